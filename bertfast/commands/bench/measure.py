"""One case: every provider's numbers are checked, then those that are right are timed in turns."""

import contextlib
import importlib
import math
from collections.abc import Callable

import torch

from .ceilings import Machine
from .floor import Work
from .record import Recorder, Row, dtype_name
from .timing import Timer, graph_timer, input_sets, interleaved, launch_timer, process_timer

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
    reference = checked.reference(inputs, provider)()
    error = relative_error(checked.steps(function, inputs)(), reference)
    if not error <= LIMITS[case.dtype]:
        raise Wrong(f"relative error {error:.2g} is above {LIMITS[case.dtype]:.2g}")
    return error


def check_budget(case, backend: str, device: str) -> None:
    """Ours against the error budget, output and every gradient, on a few rows."""
    testing = importlib.import_module(f"bertfast.testing.{case.op}")
    budget = importlib.import_module("bertfast.testing")
    inputs = testing.make_inputs(case.for_budget(), case.dtype)
    worst = budget.nearest_to_budget(testing, inputs, testing.run(inputs, backend, device))
    if not worst.ok:
        raise Wrong(str(worst))


def peak_memory_mb(step: Callable, device: str) -> float | None:
    """What a call needs beyond what was there before it, at its worst."""
    if device != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def refusal(error: Exception) -> str:
    """Why a provider isn't timed, in one line."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
    return ("not timed, wrong: " if isinstance(error, Wrong) else "not timed: ") + reason


class Bench:
    """Measures cases on one machine and hands the rows to a recorder."""

    def __init__(
        self,
        machine: Machine,
        recorder: Recorder,
        *,
        repeats: int = 15,
        out_of_time: Callable[[], bool] = lambda: False,
        compile_backend: str = "inductor",
        say: Callable[[str], None] = print,
    ):
        self.machine, self.recorder, self.device = machine, recorder, machine.device
        self.repeats, self.out_of_time, self.say = repeats, out_of_time, say
        self.compile_backend = compile_backend
        self.faults: list[str] = []  # what is wrong, and what of ours failed
        self.left_out: list[str] = []  # others that can't do a case
        self._within_budget: set[tuple] = set()
        # Backward kernels run on the stream of their forward, so both are on the capture's.
        self.stream = torch.cuda.Stream() if self.device == "cuda" else None

    def measure(self, case, providers: dict[str, Callable] | None = None) -> None:
        """Rows for one case. A provider that fails or is wrong gets a row that says so."""
        torch._dynamo.reset()  # else the limit on recompilations is reached, and eager is timed
        if providers is None:
            providers = case.providers(self.device, self.compile_backend)
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self._measure(case, providers)

    def _measure(self, case, providers: dict[str, Callable]) -> None:
        count, cache = input_sets(case.bytes, self.device)
        sets = [case.inputs(self.device, seed) for seed in range(count)]
        device_timers: dict[str, Timer] = {}
        launch_timers: dict[str, Timer] = {}
        rows: dict[str, Row] = {}
        for provider, function in providers.items():
            row = self._row(case, provider, cache)
            try:
                self._check_budget_once(case, provider)
                row.error = check(case, provider, function, sets[0])
                row.peak_memory_mb = peak_memory_mb(case.steps(function, sets[0]), self.device)
                steps = [case.steps(function, inputs) for inputs in sets]
                if self.device == "cuda":
                    device_timers[provider] = graph_timer(steps, self.stream)
                    if cache == "warm":  # else the wall's clock sees the GPU
                        launch_timers[provider] = launch_timer(steps[:1])
                else:
                    device_timers[provider] = process_timer(steps, 500.0)
                rows[provider] = row
            except Exception as error:  # one provider's fault must not cost the others' numbers
                device_timers.pop(provider, None)
                self._refuse(row, error)
        samples = interleaved(device_timers, self.repeats, self.out_of_time)
        for provider, sample in samples.items():
            row = rows[provider].timed(sample)
            row.gb_per_s = case.bytes / sample.median / 1e3
            row.tflop_per_s = case.flops / sample.median / 1e6 if case.flops else None
            self.recorder.add(row)
        samples = interleaved(launch_timers, self.repeats, self.out_of_time)
        for provider, sample in samples.items():  # bytes and floors say nothing about launching
            row = Row(**vars(rows[provider]) | {"clock": "launch", "floor_us": None})
            row.gb_per_s = row.percent_of_floor = row.tflop_per_s = None
            self.recorder.add(row.timed(sample))

    def _row(self, case, provider: str, cache: str) -> Row:
        row = Row(provider, case.op, case.pass_, case.shape, dtype_name(case.dtype), case.dropout)
        row.cache, row.clock = cache, self.machine.clock
        work = Work("attention" if case.flops else "memory", case.flops, case.bytes)
        row.floor_us = work.floor_us(self.machine.ceilings(case.dtype))
        return row

    def _check_budget_once(self, case, provider: str) -> None:
        """Before a kernel's first timing in a dtype and form, such as a width. The torch backend's
        backward is stock torch's: it is held to the relative error alone."""
        name, _, backend = provider.partition(" ")
        key = (case.op, backend, case.dtype, case.for_budget())
        if name == "bertfast" and backend != "torch" and key not in self._within_budget:
            check_budget(case, backend, self.device)
            self._within_budget.add(key)

    def _refuse(self, row: Row, error: Exception) -> None:
        row.note, row.error = refusal(error), None
        line = f"{row.provider} {row.op} {row.pass_} {row.shape} {row.dtype}: {row.note}"
        ours = row.provider.startswith("bertfast")
        (self.faults if ours or isinstance(error, Wrong) else self.left_out).append(line)
        self.say(f"  {line}")
        self.recorder.add(row)
