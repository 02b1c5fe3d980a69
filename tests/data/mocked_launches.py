"""Launches of whole encoders by the mock driver: what they compile, load and take, as JSON for
test_mock_driver.py."""

import json
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support.mock_driver import forget, mocked
from triton import knobs

from bertfast.nn import Encoder
from bertfast.ops import bias_gelu, layer_norm
from bertfast.ops.attention import run as attention
from bertfast.ops.attention.scores import Scores
from bertfast.ops.cross_entropy import triton as loss
from bertfast.ops.dropout import NO_DROPOUT, Dropout
from bertfast.ops.linear import run as linear
from bertfast.ops.triton_launch import Launch
from bertfast.packing import Sequences

WIDTH, HEADS, INNER = 128, 2, 256
BATCHES = 100
BF16 = torch.bfloat16
BY_TRITON = linear.Choice("triton", "triton", "triton")


def encoder(training: bool, packed: bool = True) -> Encoder:
    model = Encoder(1, WIDTH, HEADS, INNER, backend="triton", packed=packed).to(BF16)
    return model.train(training)


def step(model: Encoder, mask: torch.Tensor) -> None:
    x = torch.zeros(*mask.shape, WIDTH, dtype=BF16, requires_grad=model.training)
    with torch.set_grad_enabled(model.training):
        out = model(x, mask)
        if model.training:
            out.sum().backward()


def masks(full: bool) -> list[torch.Tensor]:
    """Batches of changing lengths and sizes; full: some of them have no padding."""
    torch.manual_seed(0)
    found = []
    for number in range(BATCHES):
        longest = 2 + int(torch.randint(0, (30, 62, 126, 200)[number % 4], ()))
        lengths = torch.randint(1, longest, (2 + number % 5, 1))
        lengths[0] = longest
        if full and number % 5 == 0:
            lengths[:] = longest
        found.append(torch.arange(longest) < lengths)
    return [*found, torch.ones(1, 1, dtype=torch.bool)] if full else found


def variants(training: bool, packed: bool, full: bool) -> list[str]:
    """The kernels, one for each form, that a hundred batches compile."""
    with mocked(90, compiling=False) as driver:
        model = encoder(training, packed)
        for mask in masks(full):
            step(model, mask)
        distinct = {(each.name, each.form) for each in driver.compiled}
        assert len(driver.compiled) == len(distinct) == len(driver.loaded)
        return sorted(name for name, _ in distinct)


def captured(training: bool, packed: bool) -> dict:
    """Kernels that a capture compiles and loads after three calls that warm up, and its error."""
    error = None
    mask = torch.arange(32) < torch.tensor([[32], [20], [7]])
    with mocked(90, compiling=False) as driver:
        model = encoder(training, packed)
        for _ in range(3):
            step(model, mask)
        before = len(driver.started)
        driver.capturing = True
        try:
            step(model, mask)
        except RuntimeError as raised:
            error = str(raised)
        launched = len(driver.started) - before
        return dict(error=error, inside=driver.inside_a_capture(), launched=launched)


def compiled(capability: int) -> dict:
    """The kernels of a forward, by the real compiler, and the launches of three."""
    with mocked(capability) as driver:
        model = encoder(training=False)
        for _ in range(3):
            step(model, torch.arange(20) < torch.tensor([[20], [7]]))
        names = sorted(each.name for each in driver.compiled)
        return dict(compiled=names, launches=len(driver.started))


def calls() -> None:
    """Calls whose forms differ in few places, each once."""
    for _ in range(2):
        for dtype in (torch.float32, BF16):
            storage = torch.zeros(40 * 48, dtype=dtype)
            for width in (1, 7, 16, 24):
                one = torch.zeros(width, dtype=dtype)
                for rows in (1, 2, 16):
                    for stride, begin in ((width, 0), (width + 1, 0), (32, 0), (32, 8), (32, 3)):
                        x = storage.as_strided((rows, width), (stride, 1), begin)
                        options = dict(residual=x) if begin else {}
                        layer_norm(x, one, one, backend="triton", **options)
                        bias_gelu(x, one if rows > 1 else None, backend="triton")
        for rows in (1, 16, 70):
            for width in (8, 64):
                x, one = torch.zeros(rows, width, dtype=BF16), torch.zeros(width, dtype=BF16)
                weight = torch.zeros(width, width, dtype=BF16)
                for bias in (one, None):
                    for save in (False, True):
                        linear.forward(x, weight, bias, False, BY_TRITON, save)
                    wanted = (True, bias is not None)
                    linear.backward(x, weight, x, bias, True, wanted, BY_TRITON)
        for rows in (1, 16, 70):
            for words in (1, 16, 40, 50):
                wide = -(-words // 16) * 16
                labels, each = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
                for dtype in (torch.float32, BF16):
                    z, dz = torch.zeros(rows, wide), torch.zeros(rows, wide, dtype=dtype)
                    z, dz, one = z[:, :words], dz[:, :words], torch.zeros(wide)
                    for smoothing in (0.0, 0.5, 1.0):
                        loss.forward(z, None, labels, smoothing, each, each, dz, None)
                        loss.forward(z, one.to(dtype), labels, smoothing, each, None, dz, one)
        heads = torch.zeros(70, 8, 3, 2, 16, dtype=BF16)
        seed = torch.zeros(1, dtype=torch.int64)
        for size in (1, 3, 16, 64, 70):
            for length in (1, 8):
                for drop in (NO_DROPOUT, Dropout(seed, 100, 1, 2, None)):
                    qkv = heads[:size, :length]
                    saved = attention.forward(qkv, Sequences(), Scores(1), drop, "triton", True)
                    attention.backward(
                        saved.out, qkv, saved, Sequences(), Scores(0.5), drop, "triton"
                    )


def by_triton(self, grid, pointers, strides, numbers, constants, num_warps=4):
    """A launch that asks Triton's binder for the form."""
    self.kernel[grid](*pointers, *strides, *numbers, *constants, num_warps=num_warps)


def same_forms() -> dict:
    """Differences of what is started from what Triton's binder would, and the number of forms."""
    with mocked(90, compiling=False) as driver, torch.no_grad():
        calls()
        ours, driver.started = driver.started, []
        forms = len(driver.compiled)
        forget()
        with mock.patch.object(Launch, "__call__", by_triton):
            calls()
        return dict(same=ours == driver.started, launches=len(ours), forms=forms)


def hooked() -> list[bool]:
    """Of four equal launches, the third with somebody's hook: which hooks are told of."""
    x, one = torch.zeros(2, 64, dtype=BF16), torch.zeros(64, dtype=BF16)
    with mocked(90, compiling=False) as driver, torch.no_grad():
        for number in range(4):
            if number == 2:
                knobs.runtime.launch_enter_hook.add(print)
            layer_norm(x, one, one, backend="triton")
            knobs.runtime.launch_enter_hook.remove(print)
        return driver.told


def share_of_host_time() -> float:
    """The host time of LayerNorm's launch, as a share of that of Triton's own way. By the thread's
    time and the fastest rounds, as other work on the machine only adds."""
    x, one = torch.zeros(2, 64, dtype=BF16), torch.zeros(64, dtype=BF16)
    ways = (Launch.__call__, by_triton, lambda *arguments: None)
    rounds: list[list[float]] = [[], [], []]
    with mocked(90, compiling=False, recording=False), torch.no_grad():
        for _ in range(41):
            for way, times in zip(ways, rounds, strict=True):
                with mock.patch.object(Launch, "__call__", way):
                    layer_norm(x, one, one, backend="triton")
                    start = time.thread_time()
                    for _ in range(50):
                        layer_norm(x, one, one, backend="triton")
                    times.append(time.thread_time() - start)
    ours, tritons, rest = map(min, rounds)
    return (ours - rest) / (tritons - rest)


def main() -> None:
    torch.set_num_threads(1)
    both = (False, True)
    result = {
        "variants": [
            dict(
                training=training, packed=packed, full=full, names=variants(training, packed, full)
            )
            for training in both
            for packed, full in ((True, False), (False, True), (True, True))
        ],
        "captured": [
            dict(training=training, packed=packed, **captured(training, packed))
            for training in both
            for packed in both
        ],
        "compiled": {capability: compiled(capability) for capability in (80, 90)},
        "same forms": same_forms(),
        "told": hooked(),
        "share": share_of_host_time(),
    }
    print(json.dumps(result))


main()
