"""Memory and time of a masked language model's loss and its gradients on a CPU, beside plain torch.

    python benchmarks/masked_lm_loss.py [--repeats 3] [--out FILE]

One step: the loss from hidden states of 16,384 tokens to BERT's 30,522 words in float32, and the
gradients of hidden states, weight and bias. Beside ops.linear_cross_entropy stand F.linear and
F.cross_entropy of all tokens, as Hugging Face's models do it, and of the labelled rows alone.

Each step runs in a process of its own, with one thread; all take turns; medians. Time is the
process's own, as others may use the machine. Memory is the largest resident size during the step,
less that before it, which holds the inputs: Linux keeps it. Writes
benchmarks/results/masked-lm-loss.json, of which report.py makes the README's table.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.ops import linear_cross_entropy  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "masked-lm-loss.json"
SHARES = (0.15, 0.3)
IGNORED = -100
Tensor = torch.Tensor


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, bias=bias)


def all_tokens(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def labelled_tokens(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    index = (labels != IGNORED).nonzero().squeeze(1)
    return all_tokens(hidden.index_select(0, index), weight, bias, labels.index_select(0, index))


STOCK = "torch, all tokens"
PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "bertfast": ours,
    STOCK: all_tokens,
    "torch, labelled tokens": labelled_tokens,
}


def resident(name: str) -> float:
    """A line of this process's status, in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def step(loss: Callable[..., Tensor], sizes: tuple[int, int, int], share: float) -> tuple:
    """Seconds and MiB of a step, and its loss."""
    tokens, width, words = sizes
    torch.manual_seed(0)
    leaves = [torch.randn(tokens, width), torch.randn(words, width) / width**0.5]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.zeros(words))]
    labels = torch.randint(0, words, (tokens,)).where(torch.rand(tokens) < share, IGNORED)
    labels[0] = 0
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is from now on
    before, start = resident("VmRSS"), time.process_time()
    result = loss(*leaves, labels)
    result.backward()
    return time.process_time() - start, resident("VmHWM") - before, result.item()


def alone(name: str, sizes: tuple[int, int, int], share: float) -> None:
    """A process: prints its step's figures. A small step before loads what the libraries load."""
    torch.set_num_threads(1)
    step(PROVIDERS[name], (32, 64, 100), 1.0)
    print(json.dumps(step(PROVIDERS[name], sizes, share)))


def measured(sizes: tuple[int, int, int], share: float, repeats: int) -> dict[str, dict]:
    found: dict[str, list] = {name: [] for name in PROVIDERS}
    for _ in range(repeats):
        for name in PROVIDERS:
            arguments = ["--alone", name, "--share", str(share), "--sizes", *map(str, sizes)]
            command = [sys.executable, __file__, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout))
            seconds, mib, _ = found[name][-1]
            print(f"{share:.0%} labelled, {name}: {seconds:.2f} s, {mib:.0f} MiB", flush=True)
    losses = [loss for steps in found.values() for _, _, loss in steps]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise ValueError(f"the losses differ: {losses}")
    return {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _, _ in steps), 3),
            "all_seconds": [round(seconds, 3) for seconds, _, _ in steps],
            "peak_mib": round(statistics.median(mib for _, mib, _ in steps), 1),
        }
        for name, steps in found.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; default: 3")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.name}")
    sizes = ("TOKENS", "WIDTH", "WORDS")
    parser.add_argument("--sizes", type=int, nargs=3, default=(16384, 768, 30522), metavar=sizes)
    parser.add_argument("--alone", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=SHARES[0], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not Path("/proc/self/clear_refs").exists():
        print("masked_lm_loss.py needs Linux's /proc", file=sys.stderr)
        return 2
    if options.alone:
        alone(options.alone, tuple(options.sizes), options.share)
        return 0
    found: dict = asdict(environment("cpu"))
    found |= dict(zip(("tokens", "width", "vocabulary"), options.sizes, strict=True))
    found |= {"dtype": "float32", "threads": 1, "repeats": options.repeats}
    found["time"] = "processor time of the step, median"
    found["shares"] = {
        f"{share:g}": measured(tuple(options.sizes), share, options.repeats) for share in SHARES
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
