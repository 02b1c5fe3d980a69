"""Host time of an encoder layer as a share of Hugging Face's BertLayer with SDPA.

    python benchmarks/host_time.py [--repeats 301] [--out FILE]

Called by itself, and as one of twelve in a model. It is converted with backend="cuda": the kernels
compiled for the host take the same Python, checks, allocations and binding as on a GPU, and their
launch is switched off. With backend="triton" launches go to the tests' mock driver, whose C code
takes nothing: on a GPU a launch takes some microseconds more.

The layer is so narrow that the products, and what stock torch calls, take little beside the host's
work; without oneDNN, which takes tens of microseconds for any product in 16 bits, and with denormal
numbers as zeros: memory that no kernel has filled is full of them, and products of them take five
times as long. One thread; all take turns; medians. Writes benchmarks/results/host-time-CPU.json.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from bertfast.commands.bench import models, providers, timing  # noqa: E402
from bertfast.commands.bench.case import Setting  # noqa: E402
from bertfast.commands.bench.compare import PM  # noqa: E402
from bertfast.commands.bench.encoder import EncoderCase  # noqa: E402
from bertfast.commands.bench.record import cpu_name, environment  # noqa: E402
from bertfast.nn import EncoderLayer  # noqa: E402

try:
    from bertfast import _host
except ImportError as error:
    _host = str(error)
try:
    from support.mock_driver import mocked
except ImportError:  # there is no Triton
    mocked = None
if os.environ.get("TRITON_INTERPRET") == "1":  # then nothing is launched
    mocked = None

NARROW = models.Model("narrow", width=64, inner=64, layers=12, heads=2)
TOKENS = models.full_batch(1, 2)
DTYPE = torch.bfloat16  # attention in CUDA takes 16 bits
STOCK = "HF SDPA"


def encoder_layer(case: EncoderCase, inputs: object, setting: Setting) -> providers.Runner:
    """bertfast's own module, whose parameters have a BertLayer's names."""
    layer = EncoderLayer(NARROW.width, NARROW.heads, NARROW.inner, backend="cuda").to(DTYPE)
    layer.load_state_dict(inputs.stock.state_dict())
    return providers.Runner(lambda: layer(inputs.tensors["x"]), layer.eval())


LAYER = ("layer",)
BOTH = ("layer", "model")
MOCKED = (providers.Provider("bertfast, Triton", "", BOTH, providers.our_module(backend="triton")),)
PROVIDERS = (
    providers.Provider(STOCK, "", BOTH, providers.hugging_face("sdpa")),
    providers.Provider("bertfast", "", BOTH, providers.our_module(backend="cuda")),
    providers.Provider("bertfast.nn.EncoderLayer", "", LAYER, encoder_layer),
    providers.Provider("nn.TransformerEncoderLayer", "", LAYER, providers.torch_layer_alone),
)


@contextlib.contextmanager
def host_alone() -> Iterator[None]:
    """No kernel of bertfast runs, nor oneDNN's products."""
    _host.set_dry_launch(True)
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.enabled = False
    try:
        with contextlib.nullcontext() if mocked is None else mocked(90, False, False):
            yield
    finally:
        torch.backends.mkldnn.enabled = True
        torch.set_flush_denormal(False)
        _host.set_dry_launch(False)


def measured(pass_: str, repeats: int, layer: bool) -> dict[str, dict[str, float]]:
    """Each provider's microseconds a layer and their share of stock's, which is the median over the
    turns. Its numbers are checked before the launches are switched off."""
    case = EncoderCase(NARROW, TOKENS, pass_, DTYPE, layer=layer)
    inputs, setting = case.inputs("cpu", 0), Setting("cpu")
    steps = {}
    for provider in PROVIDERS:
        if case.kind not in provider.kinds:
            continue
        runner = provider.make(case, inputs, setting)
        case.check(provider, runner, inputs)
        steps[provider.name] = case.step(runner, inputs)
    for provider in () if mocked is None else MOCKED:  # these have no numbers to check
        steps[provider.name] = case.step(provider.make(case, inputs, setting), inputs)
    with host_alone():
        timers = {name: timing.process_timer([step], 2000.0) for name, step in steps.items()}
        times = timing.turns(timers, repeats)
    found = {}
    for name, own in times.items():
        share = timing.summarize([a / b for a, b in zip(own, times[STOCK], strict=True)])
        us = timing.summarize(own).median / (1 if layer else NARROW.layers)
        found[name] = {"us": round(us, 1), f"of {STOCK}": round(share.median, 3)}
        spread = (share.p80 - share.p20) / 2
        where = "by itself" if layer else "in a model"
        print(
            f"{pass_}, {where}: {name} {us:.0f} us, {share.median:.2f} {PM} {spread:.2f} of {STOCK}"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=301, help="turns of each; default: 301")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/host-time-CPU.json")
    options = parser.parse_args(arguments)
    if isinstance(_host, str):
        print(f"host_time.py needs the kernels compiled for the host: {_host}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    found: dict[str, object] = asdict(environment("cpu"))
    found["layer"] = f"{TOKENS.name} tokens, width {NARROW.width}, inner {NARROW.inner}, bf16"
    for pass_, name in (("forward", "inference"), ("forward+backward", "training")):
        found[name] = measured(pass_, options.repeats, layer=True)
        found[f"{name}, in a model"] = measured(pass_, options.repeats, layer=False)
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = options.out or ROOT / "benchmarks" / "results" / f"host-time-{cpu}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
