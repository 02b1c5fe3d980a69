"""One case: every provider's numbers are checked, then those that are right are timed in turns."""

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from .case import Case, Setting, Step, Wrong
from .ceilings import Machine
from .floor import floor_us
from .providers import Provider
from .record import Recorder, Row, dtype_name
from .timing import (
    LATENCY_CALLS,
    Timer,
    call_timer,
    graph_timer,
    input_sets,
    interleaved,
    latencies,
    launch_timer,
    p99,
    process_timer,
    summarize,
)


class Bench:
    """Measures cases on one machine and hands the rows to a recorder."""

    def __init__(
        self,
        machine: Machine,
        recorder: Recorder,
        *,
        repeats: int = 7,
        out_of_time: Callable[[], bool] = lambda: False,
        compile_backend: str = "inductor",
        wanted: Collection[str] | None = None,
        slow: bool = True,
        say: Callable[[str], None] = lambda text: None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """wanted: names of providers, or None for all. slow: with those that take long."""
        self.machine, self.recorder = machine, recorder
        self.setting = Setting(machine.device, compile_backend)
        self.repeats, self.out_of_time = repeats, out_of_time
        self.wanted, self.slow = wanted, slow
        self.say, self.progress = say, progress
        self.faults: list[str] = []  # what is wrong, and what of ours failed
        self.left_out: list[str] = []  # providers that can't be used, or not for a case, and why
        self.gpu = machine.device == "cuda"
        self.stream = torch.cuda.Stream() if self.gpu else None

    def measure(self, case: Case, providers: Sequence[Provider] | None = None) -> None:
        """Rows for one case. A provider that fails or is wrong gets a row that says so."""
        torch._dynamo.reset()  # else the limit on recompilations is reached, and eager is timed
        # Backward kernels run on the stream of their forward, so both are on the capture's.
        stream = (
            torch.cuda.stream(self.stream) if self._captures(case) else contextlib.nullcontext()
        )
        with quiet(), stream:
            self._measure(case, case.providers() if providers is None else providers)
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def _measure(self, case: Case, providers: Sequence[Provider]) -> None:
        name = f"{case.op} {case.shape} {case.pass_} {dtype_name(case.dtype)}"
        self.progress(f"{name}: inputs")
        count, cache = 1, "warm"
        if self._captures(case):
            count, cache = input_sets(sum(work.bytes for work in case.work()))
        sets = [case.inputs(self.machine.device, seed) for seed in range(count)]
        timers: dict[str, Timer] = {}
        launches: dict[str, Timer] = {}
        alone: dict[str, Step] = {}
        rows: dict[str, Row] = {}
        for provider in providers:
            if self.wanted is not None and provider.name not in self.wanted:
                continue
            if reason := self._why_not(provider, case):
                self._leave_out(f"{provider.name}: {reason}")
                continue
            self.progress(f"{name}: {provider.name}")
            row = self._row(case, provider, cache)
            try:
                runner = provider.make(case, sets[0], self.setting)
                row.error = case.check(provider, runner, sets[0])
                steps = [case.step(runner, inputs) for inputs in sets]
                row.peak_memory_mb = self._peak_memory_mb(steps[0])
                if case.pass_ == "latency":
                    alone[provider.name], rows[provider.name] = steps[0], row
                    continue
                timer = self._timer(case, steps)
                if self._captures(case) and cache == "warm":  # else the wall's clock sees the GPU
                    launches[provider.name] = launch_timer(steps[:1])
                timers[provider.name], rows[provider.name] = timer, row
            except Exception as error:  # one provider's fault must not cost the others' numbers
                self._refuse(row, error, provider)
        self.progress(f"{name}: timing")
        for name, times in latencies(alone, self.out_of_time, self.gpu).items():
            row = rows[name].timed(summarize(times))
            row.p99_us = p99(times)
            row.note = "" if len(times) == LATENCY_CALLS else f"{len(times)} calls"
            self._add_rates(case, row)
        for name, sample in interleaved(timers, self.repeats, self.out_of_time).items():
            self._add_rates(case, rows[name].timed(sample))
        for name, sample in interleaved(launches, self.repeats, self.out_of_time).items():
            # Bytes and floors say nothing about launching.
            row = dataclasses.replace(rows[name], clock="launch", floor_us=None)
            row.modelled_us = None
            row.gb_per_s = row.percent_of_floor = row.tflop_per_s = None
            self.recorder.add(row.timed(sample))

    def _captures(self, case: Case) -> bool:
        return self.gpu and case.clock == "device"

    def _why_not(self, provider: Provider, case: Case) -> str | None:
        if reason := provider.why_not(case, self.setting):
            return reason
        if provider.patience and self.wanted is None:
            return f"{provider.patience}: ask for it by --provider"
        left = provider.slow and not self.slow
        return f"{provider.slow}: ask for it by --provider, or use a GPU" if left else None

    def _timer(self, case: Case, steps: Sequence[Step]) -> Timer:
        if not self.gpu:
            return process_timer(steps)
        return graph_timer(steps, self.stream) if self._captures(case) else call_timer(steps[0])

    def _row(self, case: Case, provider: Provider, cache: str) -> Row:
        row = Row(
            provider.name, case.op, case.pass_, case.shape, dtype_name(case.dtype), case.dropout
        )
        row.cache, row.clock = cache, case.clock if self.gpu else "process"
        row.floor_us = floor_us(case.work(), self.machine.ceilings(case.dtype))
        gpu, counts = self.machine.model(case.dtype), case.counts(provider)
        row.modelled_us = counts.us(gpu) if gpu and counts else None
        return row

    def _add_rates(self, case: Case, row: Row) -> None:
        seconds = row.sample.median / 1e6
        flops = sum(work.flops for work in case.work())
        row.tflop_per_s = flops / seconds / 1e12 if flops else None
        rates: dict[str, Any] = {**case.rates(seconds)}
        self.recorder.add(dataclasses.replace(row, **rates))

    def _peak_memory_mb(self, step: Step) -> float | None:
        """The most that a call needs beyond what was there before it. The memory of a captured
        graph was there before."""
        if not self.gpu:
            return None
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 or None

    def _refuse(self, row: Row, error: Exception, provider: Provider) -> None:
        wrong = isinstance(error, Wrong)
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:200]
        row.note, row.error = f"not timed{', wrong' if wrong else ''}: {reason}", None
        line = f"{row.provider} {row.op} {row.pass_} {row.shape} {row.dtype}: {row.note}"
        if provider.ours or wrong:
            self.faults.append(line)
        else:
            self._leave_out(f"{row.provider}, {row.op} {row.shape}: {row.note}")
        self.say(f"  {line}")
        self.recorder.add(row)

    def _leave_out(self, line: str) -> None:
        if line not in self.left_out:
            self.left_out.append(line)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings that libraries give when a model is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
