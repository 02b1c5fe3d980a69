"""Times of `bertfast bench` on a CPU, by this checkout and by another, in one run.

    python benchmarks/side_by_side.py OLD_CHECKOUT [--repeats 5] [--only TEXT]

Each checkout has a process of its own. Both get the same weights and inputs and take turns call by
call, so that whatever else the machine does meets both. Printed is how many times as fast this
checkout is: the median over the turns, with half the range from the 20th to the 80th percentile.
One thread, processor time; about five minutes on two cores.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bertfast.commands.bench.case import Case

ROOT = Path(__file__).resolve().parents[1]
# Large tensors come from memory that the process keeps: else fresh pages are what is timed, and it
# is a process's history that decides how many.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
LEAST_S = 0.1  # of a turn


def named_cases() -> "Iterator[tuple[str, Case, bool]]":
    """Names, cases, and whether padding may be taken out."""
    from bertfast.commands.bench import cases, encoder, models

    for case in cases.cpu_cases():
        pass_ = "forward" if case.pass_ == "forward" else "forward+backward"
        yield f"{case.op} {case.shape}, {pass_}", case, True
    mini, passes, fp32 = [models.MODELS["MiniLM-L6"]], encoder.PASSES[:2], [torch.float32]
    one, eight = models.full_batch(1, 128), models.full_batch(8, 128)
    mixes = [models.mixed_batch(mix, 8) for mix in ("queries", "passages", "squad", "full")]
    for case in itertools.chain(
        encoder.cases(mini, [one, eight], passes, fp32, layer=True),
        encoder.cases(mini, [one, *mixes], passes, fp32),
    ):
        yield f"{case.op} {case.shape}, {case.pass_}", case, True
        if not case.layer and not case.training:
            yield f"{case.op} {case.shape}, {case.pass_}, padded", case, False


def job_of(case: "Case", packed: bool) -> dict[str, Any]:
    """All that a process needs to run the case; of an op's backward pass, with its forward."""
    inputs = case.inputs("cpu", 0)
    if case.kind == "op":
        inputs = inputs.packed or inputs
        layout = {k: v for k, v in inputs.more.items() if k in ("cu_seqlens", "max_seqlen")}
        dy = None if case.pass_ == "forward" else inputs.dy
        return {"op": case.op, "given": inputs.leaves | layout, "dy": dy}
    given = {"hidden_states": inputs.tensors["x"]} if case.layer else inputs.tensors
    return {"module": inputs.stock, "given": given, "dy": inputs.dy, "packed": packed}


def step_of(job: dict[str, Any]) -> Callable[[], None]:
    """A call of the bertfast that this process has."""
    import bertfast

    given, dy = job["given"], job["dy"]
    if "op" in job:
        function = getattr(bertfast.ops, job["op"])
        leaves = [value for value in given.values() if isinstance(value, torch.Tensor)]
    else:
        function = bertfast.optimize(job["module"], packed=job["packed"], strict=True)
        function.train(dy is not None)
        leaves = list(function.parameters())

    def forward() -> torch.Tensor:
        y = function(**given)
        return y if isinstance(y, torch.Tensor) else y[0]

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def train() -> None:
        torch.autograd.backward(forward(), dy, inputs=leaves)
        for leaf in leaves:
            leaf.grad = None

    if dy is None:
        return infer
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    return train


def work(checkout: Path) -> None:
    """A process: a line with a job's file makes it ready, an empty one asks for a turn."""
    import bertfast

    if not Path(bertfast.__file__).is_relative_to(checkout):
        sys.exit(f"{bertfast.__file__} was imported instead of {checkout}'s")
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever is printed, answers stand alone
    torch.set_num_threads(1)
    for line in sys.stdin:
        if path := line.strip():
            step, calls = step_of(torch.load(path, weights_only=False)), 1
            step()
            calls = max(1, round(LEAST_S / seconds(step, 1)))
        print(1e6 * seconds(step, calls), file=answers, flush=True)


def seconds(step: Callable[[], None], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls


def ask(process: subprocess.Popen, line: str = "") -> float:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"the process of {process.args[-1]} ended")
    return float(answer)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, help="another checkout, such as a git worktree")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; default: 5")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args(arguments)
    from bertfast.commands.bench.compare import PM
    from bertfast.commands.bench.timing import summarize, turns

    command = [sys.executable, __file__, "--work"]
    checkouts = {"old": options.old.resolve(), "new": ROOT}
    processes = {
        name: subprocess.Popen(
            [*command, str(checkout)],
            env=os.environ | KEPT_MEMORY | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, checkout in checkouts.items()
    }
    print("times as fast, old ms, new ms")
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "job.pt"
            for name, case, packed in named_cases():
                if options.only not in name:
                    continue
                torch.save(job_of(case, packed), path)
                for process in processes.values():
                    ask(process, str(path))
                timers = {
                    who: lambda process=process: ask(process) for who, process in processes.items()
                }
                times = turns(timers, options.repeats)
                ratio = summarize([a / b for a, b in zip(times["old"], times["new"], strict=True)])
                old, new = (summarize(times[who]).median / 1e3 for who in ("old", "new"))
                spread = (ratio.p80 - ratio.p20) / 2
                print(
                    f"{ratio.median:.2f} {PM} {spread:.2f} {old:10.3f} {new:10.3f}  {name}",
                    flush=True,
                )
    finally:
        for process in processes.values():
            process.kill()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        sys.path.insert(0, str(ROOT))
        sys.exit(main())
