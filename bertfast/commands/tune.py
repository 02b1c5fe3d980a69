"""`bertfast tune`: the fastest backends, and splits of Triton's kernels, on this GPU.

Of a product with its activation, a GELU or a gated one, that is also whether one kernel makes both.

A decision has candidates and the calls that it is about, in inference and in training. Each
candidate's numbers are checked as `bertfast bench` checks them; then all take turns. The one that
`auto` would take anyway stays unless another is faster by more than measurements scatter.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ops import dispatch, tuned
from ..ops.attention import config, limits
from ..ops.linear import config as linear_config
from ..ops.linear import limits as linear_limits
from .bench import models, op_case, providers
from .bench.case import Case, Setting, Step
from .bench.cases import linear_gated, linear_gelu
from .bench.cases.attention_qkv import AttentionQKVCase
from .bench.cases.bias_gelu import BiasGeluCase
from .bench.cases.gated import GatedCase
from .bench.cases.layer_norm import LayerNormCase
from .bench.harness import quiet
from .bench.models import GATED, MODELS, Model
from .bench.record import DTYPES
from .bench.timing import Timer, graph_timer, input_sets, turns
from .env import in_words
from .errors import UserError, one_of
from .terminal import BAD, Column, Progress, Table, console, paragraph

GAIN = 0.98  # what is to replace the choice that would be made anyway takes at most this share
SHAPES = "32x512,128x128,64x256,256x64"
REPEATS = 9
DROPOUT = 0.1
PASSES = (("forward", 0.0), ("training", DROPOUT), ("backward", DROPOUT))


@dataclass(frozen=True)
class Candidate:
    backend: str
    chosen: Any = None  # of a split: the numbers in the file
    active: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def provider(self) -> providers.Provider:
        if self.backend == "torch":  # of a product and its activation: those that "auto" takes
            return providers.other_op(f"bertfast {linear_gelu.TWO_KERNELS}", "")
        return providers.our_op(self.backend, "", ())


@dataclass
class Decision:
    part: str  # of the file
    key: str
    candidates: dict[str, Candidate]  # first the one that "auto" takes without a file
    cases: list[Case]


@dataclass
class Tuning:
    """The choices, faults and refusals so far."""

    choices: dict[str, dict[str, tuned.Choice]] = field(
        default_factory=lambda: {part: {} for part in tuned.Tuned._fields}
    )
    faults: list[str] = field(default_factory=list)  # numbers or calls that failed
    refused: list[str] = field(default_factory=list)  # splits that the compiler can't do well


TimerOf = Callable[[Sequence[Step]], Timer]


def decisions(
    measured: Sequence[Model],
    shapes: Sequence[models.Tokens],
    dtypes: Sequence[torch.dtype],
    device: str = "cuda",
) -> list[Decision]:
    """Backends for each width, head dimension and length; before a backend that has several splits
    of its kernels, these. Most important first, as the time may not do for all."""
    found: dict[tuple[str, str], Decision] = {}
    sizes = list(itertools.product(dtypes, shapes, measured))
    for dtype, tokens, model in sizes:
        rows, width = tokens.real, model.width
        norms = [LayerNormCase(pass_, rows, width, dtype, p) for pass_, p in PASSES]
        _add(found, _backend_decision("layer_norm", (dtype, width), norms, device))
        _add(found, _activation_decision(model, rows, dtype, device))
    for dtype, tokens, model in sizes:
        if model.gated is None:
            for decision in _linear_decisions(model, tokens.real, dtype, dtypes, device):
                _add(found, decision)
    for dtype, tokens, model in sizes:
        heads = (model.heads, model.width // model.heads)
        if dtype == dtypes[0]:  # those of all 16-bit types are the same
            for decision in _split_decisions(tokens, heads, dtype, device):
                _add(found, decision)
        calls = [AttentionQKVCase(pass_, tokens, *heads, dtype, p) for pass_, p in PASSES]
        case = (dtype, heads[1], limits.length_class(tokens.longest))
        _add(found, _backend_decision("attention_qkv", case, calls, device))
    for dtype, tokens, model in sizes:
        if model.gated is not None:
            for decision in _linear_decisions(model, tokens.real, dtype, dtypes, device):
                _add(found, decision)
    known = {linear_limits.rows_class(tokens.real) for tokens in shapes}
    for rows in reversed([rows for rows in linear_limits.ROWS if rows not in known]):
        for dtype, model in itertools.product(dtypes, measured):
            for decision in _linear_decisions(model, rows, dtype, dtypes, device):
                _add(found, decision)
    return [decision for decision in found.values() if len(decision.candidates) > 1]


def _add(found: dict[tuple[str, str], Decision], decision: Decision) -> None:
    known = found.setdefault((decision.part, decision.key), decision)
    known.cases += [case for case in decision.cases if case not in known.cases]


def _activation_decision(model: Model, rows: int, dtype: torch.dtype, device: str) -> Decision:
    """Of the op that follows a product."""
    passes, sizes = [pass_ for pass_, _ in PASSES[::2]], (rows, model.inner, dtype)
    if model.gated is None:
        gelus = [BiasGeluCase(pass_, *sizes) for pass_ in passes]
        return _backend_decision("bias_gelu", (dtype,), gelus, device)
    gated = [GatedCase(pass_, *sizes, model.gated) for pass_ in passes]
    return _backend_decision("gated", (dtype,), gated, device)


def _backend_decision(op: str, case: tuple, calls: Sequence[Any], device: str) -> Decision:
    shipped = dispatch.shipped_order(op, torch.device(device), case)
    order = [
        name
        for name in dict.fromkeys((*shipped, *dispatch.AUTO_ORDER["cuda"]))
        if (name != "torch" or op in ("linear_gelu", "linear_gated"))
        and dispatch.unsupported_reason(op, name, device, *case) is None
    ]
    key = tuned.key(dispatch.ops()[op], *case)
    candidates = {linear_gelu.TWO_KERNELS if n == "torch" else n: Candidate(n) for n in order}
    return Decision("backends", key, candidates, list(calls))


def _linear_decisions(
    model: Model, rows: int, dtype: torch.dtype, dtypes: Sequence[torch.dtype], device: str
) -> Iterator[Decision]:
    """Of the product in front of the activation, and of the one whose gradient that takes."""
    if dtype not in linear_limits.DTYPES:
        return
    sizes = (model.width, model.inner)
    op, passes, made = "linear_gelu", linear_config.PASSES, linear_gelu.case
    if model.gated is not None:
        op, passes = "linear_gated", linear_config.GATED
        made = functools.partial(linear_gated.case, activation=model.gated)
    calls = [made(pass_, rows, *sizes, dtype) for pass_ in linear_gelu.PASSES]
    forward, _, backward = calls
    first = [one for one in dtypes if one in linear_limits.DTYPES][0]
    triton = dispatch.unsupported_reason(op, "triton", device, *forward.form) is None
    if triton and dtype == first:  # those of all 16-bit types are the same
        arch = linear_config.architecture(_capability(device))
        for pass_, call in zip(passes, calls, strict=True):
            candidates = {
                str(one): Candidate(
                    "triton", one.numbers, functools.partial(linear_config.trial, pass_, one)
                )
                for one in linear_config.candidates(arch, pass_)
            }
            key = linear_config.key(pass_, *sizes, rows)
            yield Decision("splits", key, candidates, [call])
    yield _backend_decision(op, forward.form, calls[:2], device)
    yield _backend_decision(op, backward.form, [backward], device)


def _split_decisions(
    tokens: models.Tokens, heads: tuple[int, int], dtype: torch.dtype, device: str
) -> Iterator[Decision]:
    if dispatch.unsupported_reason("attention", "triton", device, dtype, heads[1]) is not None:
        return
    arch = config.architecture(_capability(device))
    for pass_, p in itertools.product(config.PASSES, (0.0, DROPOUT)):
        split = config.Split(pass_, arch, dtype.itemsize, heads[1], tokens.longest, p > 0, 0)
        call = "forward" if pass_ == "forward" else "backward"
        yield _split_decision(split, AttentionQKVCase(call, tokens, *heads, dtype, p))


def _capability(device: str) -> int:
    from ..ops import triton_lib

    return triton_lib.capability(torch.empty(0, device=device))


def _split_decision(split: config.Split, call: Case) -> Decision:
    candidates = {
        _name(chosen): Candidate(
            "triton",
            chosen.numbers if chosen else [],
            functools.partial(config.trial, split.pass_, chosen),
        )
        for chosen in config.candidates(split)
    }
    return Decision("splits", split.key, candidates, [call])


def _name(chosen: config.Config | None) -> str:
    if chosen is None:
        return "two kernels"
    blocks = f"{chosen.block_m}x{chosen.block_n}"
    return f"{blocks}, {chosen.num_warps} warps, {chosen.num_stages} stages"


def decide(
    decision: Decision, tuning: Tuning, timer_of: TimerOf, over: Callable[[], bool], device: str
) -> bool:
    """Measures a decision's candidates and keeps the choice; False where there was none."""
    left = dict(decision.candidates)
    us: dict[str, dict[Case, float]] = {name: {} for name in left}
    for case in decision.cases:
        timers: dict[str, Timer] = {}
        count = input_sets(sum(work.bytes for work in case.work()))[0] if device == "cuda" else 1
        sets = [case.inputs(device, seed) for seed in range(count)]
        for name, candidate in list(left.items()):
            try:
                timers[name] = _timer(case, candidate, sets, timer_of, device)
            except _Refused as reason:
                tuning.refused.append(f"{decision.key}: {name}: {reason}")
                del left[name]
            except Exception as error:  # one candidate's fault must not cost the others' numbers
                first = (str(error).strip().splitlines() or [""])[0]
                kind = type(error).__name__
                tuning.faults.append(f"{decision.key}: {name}: {kind}: {first}"[:300])
                del left[name]
        for name, times in turns(timers, REPEATS, over).items():
            us[name][case] = sorted(times)[len(times) // 2]
    totals = {name: sum(us[name].values()) for name in left}
    if len(totals) < 2:
        return False
    # Each call counts alike, however long it takes.
    best = {case: min(us[name][case] for name in left) for case in decision.cases}
    score = {name: sum(us[name][case] / best[case] for case in decision.cases) for name in left}
    fastest = min(score, key=lambda name: score[name])
    usual, *_ = decision.candidates
    if usual in score and score[fastest] > GAIN * score[usual]:
        fastest = usual
    candidate = decision.candidates[fastest]
    chosen = candidate.backend if decision.part == "backends" else candidate.chosen
    rounded = {name: round(value, 2) for name, value in totals.items()}
    tuning.choices[decision.part][decision.key] = tuned.Choice(chosen, rounded)
    return True


class _Refused(Exception):
    """A split whose machine code can't be good."""


def _timer(
    case: Case, candidate: Candidate, sets: Sequence[Any], timer_of: TimerOf, device: str
) -> Timer:
    provider = candidate.provider
    with candidate.active():
        op_case.within_budget.cache_clear()  # of another split
        runner = provider.make(case, sets[0], Setting(device))
        with _no_spills(candidate):
            case.check(provider, runner, sets[0])
        steps = [case.step(runner, inputs) for inputs in sets]
        return timer_of([_within(candidate, step) for step in steps])


def _within(candidate: Candidate, step: Step) -> Step:
    def call() -> Any:
        with candidate.active():
            return step()

    return call


@contextlib.contextmanager
def _no_spills(candidate: Candidate) -> Iterator[None]:
    """Refuses a split one of whose kernels keeps values of a thread in memory, or can't run."""
    if candidate.backend != "triton":
        yield
        return
    from ..ops import triton_launch

    before = set(map(id, triton_launch.compiled()))
    try:
        yield
    except triton_launch.Unfit as error:
        raise _Refused(str(error).strip().splitlines()[0]) from error
    new = [kernel for kernel in triton_launch.compiled() if id(kernel) not in before]
    if spills := max((kernel.n_spills for kernel in new), default=0):
        raise _Refused(f"{spills} registers spill")


def tune(
    model: str | None = None,
    shapes: str | None = None,
    dtype: Sequence[str] | None = None,
    minutes: float = 3.0,
) -> int:
    """Measures, writes the file and prints what was chosen; 1 if a candidate's numbers failed."""
    if not torch.cuda.is_available():
        raise UserError("tune needs a GPU: on a CPU there is one backend")
    device = torch.device("cuda", torch.cuda.current_device())
    file = tuned.path(device)
    if file is None:
        raise UserError(f"{tuned.VARIABLE} is empty, which means no file: there is none to write")
    end = time.monotonic() + 60 * minutes
    measured = _models(model)
    batches = models.parse_shapes(shapes or SHAPES)
    dtypes = [DTYPES[name] for name in dtype or ("bf16", "fp16")]
    out = console()
    stream = torch.cuda.Stream()

    def timer_of(steps: Sequence[Step]) -> Timer:
        return graph_timer(steps, stream)

    tuning = Tuning()
    with quiet(), torch.cuda.stream(stream):
        left = run(measured, batches, dtypes, tuning, timer_of, end)
    keep(file, tuning, device)
    for part in tuned.Tuned._fields:
        table(part, tuning).print(out)
    for line in tuning.refused:
        out.print(paragraph(f"refused: {line}", indent=2))
    for line in tuning.faults:
        out.print(paragraph(f"FAULT {line}", indent=2), style=BAD)
    if left:
        out.print(paragraph(f"left as they are, as the time was over: {len(left)} more", indent=2))
    out.print(f"{sum(map(len, tuning.choices.values()))} choices in {file}")
    return 1 if tuning.faults else 0


def run(
    measured: Sequence[Model],
    batches: Sequence[models.Tokens],
    dtypes: Sequence[torch.dtype],
    tuning: Tuning,
    timer_of: TimerOf,
    end: float,
) -> list[str]:
    """The keys that were not reached. What was measured before has no say, and what is found has at
    once."""

    def over() -> bool:
        return time.monotonic() >= end

    left: list[str] = []
    with tuned.held(tuned.Tuned(**tuning.choices)):
        todo = decisions(measured, batches, dtypes)
        with Progress(len(todo)) as progress:
            for decision in todo:
                if over():
                    left.append(decision.key)
                    continue
                progress.show(decision.key)
                decide(decision, tuning, timer_of, over, "cuda")
                tuned.forget()
                progress.step()
    return left


def keep(file: Path, tuning: Tuning, device: torch.device) -> None:
    """Writes the file, with what it has for here already and was not measured again."""
    known = tuned.NOTHING
    with contextlib.suppress(OSError, ValueError):
        known = tuned.read(file.read_text(), device)
    parts = {part: getattr(known, part) | found for part, found in tuning.choices.items()}
    tuned.write(file, tuned.Tuned(**parts), device)
    tuned.forget()


def table(part: str, tuning: Tuning) -> Table:
    columns = [Column(part, left=True), Column("chosen", left=True), Column("us", left=True)]
    made = Table(columns)
    for key, choice in tuning.choices[part].items():
        chosen = in_words(key, choice.chosen) if part == "backends" else _name_of(choice.chosen)
        us = ", ".join(f"{name} {value:g}" for name, value in sorted(choice.us.items(), key=_us))
        made.add(key, chosen, us)
    return made


def _us(line: tuple[str, float]) -> float:
    return line[1]


def _name_of(chosen: Sequence[int]) -> str:
    if len(chosen) == 7:
        return str(linear_config.Config.of(chosen))
    return _name(config.Config.of(chosen))


def _models(given: str | None) -> list[Model]:
    if given is None:
        return [*MODELS.values(), *GATED.values()]
    if Path(given).is_dir():
        return [models.saved(given)]
    return [MODELS[one_of("--model, where it is no directory,", given, MODELS)]]
