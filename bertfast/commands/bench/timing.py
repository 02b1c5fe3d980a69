"""Interleaved medians.

On a GPU a provider's calls, one for each of several input sets, are captured in a CUDA graph, which
is replayed between two events: device time, without launch cost. All outputs of a capture stay
alive, so that no call writes where the cache still holds the last one's output. On a CPU the
clock is the process's own: with one thread, as the commands set it, that is the time without what
other processes took. Providers take turns over the repeats, so that a drift of the machine's clock
hits all of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)  # of a timer
Result = TypeVar("Result")  # of a call
Timer = Callable[[], float]  # runs the work once; microseconds per call


@dataclass(frozen=True)
class Sample:
    """Microseconds per call over the repeats."""

    median: float
    p20: float
    p80: float


def summarize(times: Sequence[float]) -> Sample:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Sample(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    )


def turns(
    timers: Mapping[Name, Timer], repeats: int, out_of_time: Callable[[], bool] = lambda: False
) -> dict[Name, list[float]]:
    """Each timer `repeats` times, in turns; after one round fewer if the time is over."""
    times: dict[Name, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer())
        if out_of_time():
            break
    return times


def interleaved(
    timers: Mapping[Name, Timer], repeats: int, out_of_time: Callable[[], bool] = lambda: False
) -> dict[Name, Sample]:
    times = turns(timers, repeats, out_of_time)
    return {name: summarize(values) for name, values in times.items()}


def process_timer(calls: Sequence[Call], least_us: float = 500.0) -> Timer:
    """Processor time of calls on a CPU."""
    return _repeated(calls, least_us, time.process_time)


def launch_timer(calls: Sequence[Call], least_us: float = 2000.0) -> Timer:
    """Wall time of launching eager calls on a GPU, if their kernels are shorter than that."""
    return _repeated(calls, least_us, time.perf_counter, before=torch.cuda.synchronize)


def call_timer(call: Call, least_us: float = 20000.0) -> Timer:
    """Time that a user waits: calls after one another until the GPU is done with the last one."""

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return _repeated([call], least_us, clock)


def waited_for(call: Call, device: str) -> Call:
    """The call and waiting for its end: timed, it is the call's latency."""
    if device == "cpu":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait


# Of one provider in a measurement of latency, in turns with the others; on a CPU fewer, if a turn
# takes longer than its seconds.
LATENCY_CALLS, LATENCY_TURNS, TURN_SECONDS = 1000, 10, 0.5


def latencies(
    calls: Mapping[Name, Call], out_of_time: Callable[[], bool] = lambda: False, gpu: bool = True
) -> dict[Name, list[float]]:
    """Microseconds of each call by itself, of calls that wait for their end."""

    def turn(call: Call) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < LATENCY_CALLS // LATENCY_TURNS:
            before = time.perf_counter()
            call()
            now = time.perf_counter()
            times.append((now - before) * 1e6)
            if not gpu and now - start > TURN_SECONDS:
                break
        return times

    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(LATENCY_TURNS):
        for name, call in calls.items():
            found[name] += turn(call)
        if out_of_time():
            break
    return found


def p99(times: Sequence[float]) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]


def _repeated(
    calls: Sequence[Call],
    least_us: float,
    clock: Callable[[], float],
    before: Callable[[], None] = lambda: None,
) -> Timer:
    def once(rounds: int) -> float:
        before()
        start = clock()
        for _ in range(rounds):
            for call in calls:
                call()
        return (clock() - start) * 1e6

    return _sized(once, len(calls), least_us)


def _sized(once: Callable[[int], float], calls: int, least_us: float) -> Timer:
    """A timer that repeats so often that it takes `least_us`; once(n) tells the time of n times."""
    once(1)  # warms up
    rounds = max(1, min(1000, round(least_us / max(once(1), 1e-3))))
    return lambda: once(rounds) / (rounds * calls)


def captured(
    calls: Sequence[Callable[[], Result]], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, list[Result]]:
    """The calls in one CUDA graph, and their outputs, which a replay fills."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, loads modules, fills caches: nothing of it may be captured
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call() for call in calls]
    return graph, outputs


def graph_timer(
    calls: Sequence[Call], stream: torch.cuda.Stream | None, least_us: float = 2000.0
) -> Timer:
    """Device time of the calls, captured in one CUDA graph; a measurement takes `least_us`."""
    graph, outputs = captured(calls, stream)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    once.keeps_alive = outputs  # type: ignore[attr-defined]
    return _sized(once, len(calls), least_us)


def input_sets(bytes_per_call: int, most: int = 32) -> tuple[int, str]:
    """How many input sets to rotate on a GPU, and whether that makes its cache cold or leaves it
    warm."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = -(-4 * cache // max(1, bytes_per_call))
    return max(1, min(most, wanted)), "cold" if wanted <= most else "warm"
