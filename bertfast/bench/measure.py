"""One case: every provider's numbers are checked, then those that are right are timed in turns."""

import contextlib
import importlib
import math
from collections.abc import Callable

import torch

from .ceilings import Copy
from .record import Recorder, Row
from .timing import Sample, Timer, graph_timer, input_sets, interleaved, wall_timer

# ||difference|| / ||reference|| that any honest implementation stays under: stock torch rounds to
# the dtype a few times on the way, each time by at most u. Ours also have the error budget.
LIMITS = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


class Wrong(Exception):
    """A provider whose numbers are off: it isn't timed."""


def relative_error(actual, reference) -> float:
    """The largest ||difference|| / ||reference|| of the outputs; infinite if one isn't finite."""
    worst = 0.0
    for got, right in zip(actual, reference, strict=True):
        if got.shape != right.shape:
            return math.inf
        error = ((got.double() - right).norm() / right.norm()).item()
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error)
    return worst


def check(case, provider: str, function: Callable, inputs: dict) -> float:
    """The provider's error at the timed shape. Raises Wrong if it is too large."""
    ours = provider.startswith("bertfast")
    # Stock torch draws a mask of its own, so its arithmetic is checked without.
    checked = case if ours or not case.dropout else case.without_dropout()
    reference = checked.reference(inputs)["bertfast" if ours else "torch"]()
    error = relative_error(checked.steps(function, inputs)(), reference)
    if not error <= LIMITS[case.dtype]:
        raise Wrong(f"relative error {error:.2g} is above {LIMITS[case.dtype]:.2g}")
    return error


def check_budget(case, backend: str, device: str) -> None:
    """Ours against the error budget, output and every gradient, on a few rows."""
    testing = importlib.import_module(f"bertfast.testing.{case.op}")
    budget = importlib.import_module("bertfast.testing")
    inputs = testing.make_inputs(case.for_budget(), case.dtype)
    worst = budget.worst(
        budget.compare(
            testing.run(inputs, backend, device),
            testing.oracle(inputs),
            testing.rounding_model(inputs),
            testing.scales(inputs),
        )
    )
    if not worst.ok:
        raise Wrong(str(worst))


class Bench:
    """Measures cases on one device and hands the rows to a recorder."""

    def __init__(
        self,
        device: str,
        recorder: Recorder,
        copy: Copy,
        *,
        repeats: int = 15,
        out_of_time: Callable[[], bool] = lambda: False,
        flop_per_s: float | None = None,
        compile_backend: str = "inductor",
        say: Callable[[str], None] = print,
    ):
        self.device, self.recorder, self.copy = device, recorder, copy
        self.repeats, self.out_of_time, self.say = repeats, out_of_time, say
        self.compile_backend, self.flop_per_s = compile_backend, flop_per_s
        self.refused: list[str] = []
        self._within_budget: set[tuple] = set()
        # Backward kernels run on the stream of their forward, so both are on the capture's.
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def measure(self, case, providers: dict[str, Callable] | None = None) -> None:
        """Rows for one case. A provider that fails or is wrong gets a row that says so."""
        torch._dynamo.reset()  # else the limit on recompilations is reached, and eager is timed
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self._measure(case, providers or case.providers(self.device, self.compile_backend))

    def _measure(self, case, providers: dict[str, Callable]) -> None:
        count, cache = input_sets(case.bytes, self.device)
        sets = [case.inputs(self.device, seed) for seed in range(count)]
        device_timers: dict[str, Timer] = {}
        host_timers: dict[str, Timer] = {}
        rows: dict[str, Row] = {}
        for provider, function in providers.items():
            row = Row(provider, case.op, case.pass_, case.shape, _name(case.dtype), case.dropout)
            row.cache = cache
            rows[provider] = row
            try:
                self._check_budget_once(case, provider)
                row.error = check(case, provider, function, sets[0])
                row.peak_memory_mb = self._peak_memory(case.steps(function, sets[0]))
                steps = [case.steps(function, inputs) for inputs in sets]
                if self.device == "cuda":
                    device_timers[provider] = graph_timer(steps, self.stream)
                if self.device == "cpu" or cache == "warm":  # else the wall's clock sees the GPU
                    least_us = 2000.0 if self.device == "cuda" else 0.0
                    host_timers[provider] = wall_timer(steps[:1], self.device, least_us)
            except Exception as error:  # one provider's fault must not cost the others' numbers
                device_timers.pop(provider, None)
                self._refuse(row, error)
        if self.device == "cuda":
            for provider, sample in interleaved(
                device_timers, self.repeats, self.out_of_time
            ).items():
                self.recorder.add(self._filled(rows[provider], sample, case))
        for provider, sample in interleaved(host_timers, self.repeats, self.out_of_time).items():
            row = Row(**vars(rows[provider]) | {"clock": "host", "cache": "warm"})
            if self.device == "cuda":
                # Wall time of launching; bytes and floors say nothing about it.
                row.gb_per_s = row.percent_of_floor = row.tflop_per_s = None
                row.median_us, row.p20_us, row.p80_us = sample.median, sample.p20, sample.p80
            else:
                row = self._filled(row, sample, case)
            self.recorder.add(row)

    def _check_budget_once(self, case, provider: str) -> None:
        """Before a backend's first timing in a dtype and form, such as a width."""
        name, _, backend = provider.partition(" ")
        key = (case.op, backend, case.dtype, case.for_budget())
        if name == "bertfast" and key not in self._within_budget:
            check_budget(case, backend, self.device)
            self._within_budget.add(key)

    def _peak_memory(self, step: Callable) -> float | None:
        if self.device != "cuda":
            return None
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _refuse(self, row: Row, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        row.note = ("not timed, wrong: " if isinstance(error, Wrong) else "not timed: ") + reason
        row.error = None
        self.refused.append(
            f"{row.provider} {row.op} {row.pass_} {row.shape} {row.dtype}: {reason}"
        )
        self.say(f"  {self.refused[-1]}")
        self.recorder.add(row)

    def _filled(self, row: Row, sample: Sample, case) -> Row:
        row.median_us, row.p20_us, row.p80_us = sample.median, sample.p20, sample.p80
        row.gb_per_s = case.bytes / sample.median / 1e3
        row.tflop_per_s = case.flops / sample.median / 1e6 if case.flops else None
        floor = case.bytes / self.copy.bytes_per_s
        if self.flop_per_s:
            floor = max(floor, case.flops / self.flop_per_s)
        row.percent_of_floor = 100 * floor * 1e6 / sample.median
        return row


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
