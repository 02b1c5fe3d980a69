"""Layers and whole models: numbers first, against float64, then everybody's time in turns."""

import contextlib
import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...testing import UNIT_ROUNDOFF
from . import floor
from .baselines import MODEL_PROVIDERS, Provider, Runner, Setting, quiet
from .ceilings import Machine
from .layer_baselines import LAYER_PROVIDERS, with_layer_attention
from .measure import Wrong, peak_memory_mb, refusal
from .models import Model, Tokens, with_attention
from .record import Recorder, Row, dtype_name
from .timing import Timer, call_timer, captured, interleaved, waited_for

PASSES = ("forward", "forward+backward", "latency")
REFERENCE_TOKENS = 4096  # float64 runs this many at a time


@dataclass(frozen=True)
class EncoderCase:
    model: Model
    tokens: Tokens
    pass_: str  # one of PASSES; latency: one call, and waiting for it
    dtype: torch.dtype
    layer: bool = False  # one layer alone, on hidden states

    @property
    def training(self) -> bool:
        return self.pass_ == "forward+backward"

    @property
    def op(self) -> str:
        return self.model.name + (" layer" if self.layer else "")

    @property
    def shape(self) -> str:
        return self.tokens.name

    def work(self) -> list[floor.Work]:
        count = floor.layer if self.layer else floor.model
        return count(self.model.size, self.tokens.lengths, self.dtype.itemsize, self.training)

    def limit(self, gradients: bool) -> float:
        layers = 1 if self.layer else self.model.layers
        return limit(self.dtype, layers, self.model.inner, gradients)

    def __str__(self) -> str:
        return f"{self.op} {self.tokens.name} {self.pass_} {dtype_name(self.dtype)}"


def limit(dtype: torch.dtype, layers: int, inner: int, gradients: bool) -> float:
    """||difference|| / ||reference|| that an honest implementation stays under.

    A layer rounds what it passes on about ten times, each time by at most u, and in float32 the
    partial sums of its longest product round as well: inner / 16 times, as they are taken in
    blocks. Errors of that many roundings add up as their root. Twice that is allowed, as
    everywhere, and twice again since a product passes on the errors of both its operands. The
    backward rounds as often again, on top of the forward's error in all that it reads: twice more.
    """
    roundings = 10 + (inner / 16 if dtype == torch.float32 else 0)
    return (8 if gradients else 4) * math.sqrt(roundings * layers) * UNIT_ROUNDOFF[dtype]


def hidden_error(y: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> float:
    """Relative error on real tokens; infinite if one isn't finite."""
    if y.shape != reference.shape:
        return math.inf
    right = reference[mask]
    error = ((y[mask].to(right) - right).norm() / right.norm()).item()
    return error if math.isfinite(error) else math.inf


def gradient_error(gradients: dict, reference: dict) -> float:
    """The worst parameter's relative error. One whose gradient is nothing but rounding, as the key
    bias's, is measured by the largest gradient's size instead."""
    floor_ = 0.01 * max(right.norm().item() for right in reference.values())
    worst = 0.0
    for name, right in reference.items():
        if gradients.get(name) is None:
            return math.inf
        size = max(right.norm().item(), floor_)
        error = (gradients[name].to(right) - right).norm().item() / size
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Reference:
    hidden: torch.Tensor  # float64
    gradients: dict[str, torch.Tensor] | None
    mask: torch.Tensor
    dy: torch.Tensor | None  # in the case's dtype, zero at padding


class EncoderBench:
    """Measures layers and models on one machine and hands the rows to a recorder."""

    def __init__(
        self,
        machine: Machine,
        recorder: Recorder,
        *,
        repeats: int = 7,
        out_of_time: Callable[[], bool] = lambda: False,
        compile_backend: str = "inductor",
        providers: Sequence[str] | None = None,
        slow: bool = True,
        say: Callable[[str], None] = print,
        progress: Callable[[str], None] = lambda text: None,
    ):
        """providers: names, or None for all. slow: with those that compile."""
        self.machine, self.recorder, self.device = machine, recorder, machine.device
        self.repeats, self.out_of_time = repeats, out_of_time
        self.compile_backend = compile_backend
        self.wanted, self.slow = providers, slow
        self.say, self.progress = say, progress
        self.faults: list[str] = []
        self.left_out: dict[str, str] = {}  # who isn't here -> why
        self._stock: tuple[tuple, nn.Module] | None = None
        self.stream = torch.cuda.Stream() if self.device == "cuda" else None

    def measure(self, case: EncoderCase) -> None:
        """Rows for one case. A provider that fails or is wrong gets a row that says so."""
        torch._dynamo.reset()
        with quiet():
            self._measure(case)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, case: EncoderCase) -> None:
        setting = self._setting(case)
        self.progress(f"{case}: float64")
        reference = self._reference(case, setting)
        timers: dict[str, Timer] = {}
        rows: dict[str, Row] = {}
        for provider in self._providers(case):
            reason = provider.why_not(setting)
            if reason is None and provider.slow and not self.slow:
                reason = "compiling takes a while: ask for it by --provider, or use a GPU"
            if reason is not None:
                self.left_out.setdefault(provider.name, reason)
                continue
            self.progress(f"{case}: {provider.name}")
            row = self._row(case, provider)
            try:
                runner = provider.make(setting)
                row.error = self._checked(case, runner, reference)
                timers[provider.name] = self._timer(case, runner, reference, row)
                rows[provider.name] = row
            except Exception as error:  # one provider's fault must not cost the others' numbers
                self._refuse(row, error, provider)
        self.progress(f"{case}: timing")
        samples = interleaved(timers, self.repeats, self.out_of_time)
        for name, sample in samples.items():
            row = rows[name].timed(sample)
            seconds = sample.median / 1e6
            row.tokens_per_s = case.tokens.real / seconds
            row.padded_tokens_per_s = case.tokens.padded / seconds
            row.tflop_per_s = sum(kernel.flops for kernel in case.work()) / seconds / 1e12
            self.recorder.add(row)

    def _providers(self, case: EncoderCase) -> list[Provider]:
        known = LAYER_PROVIDERS if case.layer else MODEL_PROVIDERS
        return [p for p in known if self.wanted is None or p.name in self.wanted]

    def _setting(self, case: EncoderCase) -> Setting:
        key = (case.model, case.dtype, case.layer)
        if self._stock is None or self._stock[0] != key:
            self._stock = None  # the last one's memory
            model = case.model.build(self.device, case.dtype, layers=1 if case.layer else None)
            self._stock = key, model.encoder.layer[0] if case.layer else model
        stock = self._stock[1]
        if case.layer:
            generator = torch.Generator(self.device).manual_seed(1)
            shape = (len(case.tokens.lengths), case.tokens.longest, case.model.width)
            x = torch.randn(shape, generator=generator, device=self.device)
            inputs = {"x": x.to(case.dtype)}
        else:
            inputs = case.tokens.inputs(self.device, stock.config.vocab_size)
        return Setting(
            stock, case.tokens, inputs, self.device, case.dtype, case.training, self.compile_backend
        )

    def _reference(self, case: EncoderCase, setting: Setting) -> Reference:
        """Plain attention in float64, a few rows at a time; gradients add up over them."""
        wide = copy.deepcopy(setting.stock).double()
        wide = (with_layer_attention if case.layer else with_attention)(wide, "eager")
        rows = len(case.tokens.lengths)
        own = torch.tensor(case.tokens.lengths, device=self.device)[:, None]
        mask = torch.arange(case.tokens.longest, device=self.device) < own
        dy = None
        if case.training:
            generator = torch.Generator(self.device).manual_seed(2)
            shape = (*mask.shape, case.model.width)
            dy = torch.randn(shape, generator=generator, device=self.device).to(case.dtype)
            dy = dy * mask[..., None]
        hidden = []
        step = max(1, REFERENCE_TOKENS // case.tokens.longest)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            with torch.set_grad_enabled(case.training):
                if case.layer:
                    y = wide(setting.inputs["x"][part].double())
                else:
                    y = wide(**{k: v[part] for k, v in setting.inputs.items()})[0]
            if case.training:
                y.backward(dy[part].double())
            hidden.append(y.detach())
        gradients = _gradients(wide) if case.training else None
        return Reference(torch.cat(hidden), gradients, mask, dy)

    def _checked(self, case: EncoderCase, runner: Runner, right: Reference) -> float:
        """The provider's error without dropout, of hidden states and gradients."""
        allowed = case.limit(gradients=False)
        with self._stream_if(runner), torch.set_grad_enabled(case.training):
            y = runner.forward()
            error = _held(hidden_error(y.detach(), right.hidden, right.mask), allowed)
            if case.training:
                y.backward(right.dy)
        if case.training:
            allowed = case.limit(gradients=True)
            gradients = runner.to_ours(_gradients(runner.module))
            worst = gradient_error(gradients, right.gradients)
            error = max(error, _held(worst, allowed, "gradients: "))
            runner.module.zero_grad(set_to_none=True)
        return error

    def _timer(self, case: EncoderCase, runner: Runner, right: Reference, row: Row) -> Timer:
        if case.training:
            runner.module.train()

            def step() -> None:
                runner.forward().backward(right.dy)
                runner.module.zero_grad(set_to_none=True)
        else:

            def step() -> torch.Tensor:
                with torch.inference_mode():
                    return runner.forward()

        if runner.capture:
            graph, (y,) = captured([step], self.stream)
            graph.replay()
            error = hidden_error(y, right.hidden, right.mask)
            _held(error, case.limit(gradients=False), "in a graph: ")
            step = graph.replay
        else:
            row.peak_memory_mb = peak_memory_mb(step, self.device)
        if case.pass_ == "latency":
            step = waited_for(step, self.device)
        return call_timer(step, self.device)

    def _stream_if(self, runner: Runner) -> contextlib.AbstractContextManager:
        captured = runner.capture and self.stream is not None
        return torch.cuda.stream(self.stream) if captured else contextlib.nullcontext()

    def _row(self, case: EncoderCase, provider: Provider) -> Row:
        row = Row(provider.name, case.op, case.pass_, case.tokens.name, dtype_name(case.dtype))
        row.dropout = 0.1 if case.training else 0.0
        row.clock = "call" if self.device == "cuda" else "process"
        row.cache = "warm"
        row.floor_us = floor.floor_us(case.work(), self.machine.ceilings(case.dtype))
        return row

    def _refuse(self, row: Row, error: Exception, provider: Provider) -> None:
        row.note, row.error = refusal(error), None
        line = f"{row.provider} {row.op} {row.pass_} {row.shape} {row.dtype}: {row.note}"
        if provider.ours or isinstance(error, Wrong):
            self.faults.append(line)
        else:
            self.left_out.setdefault(f"{row.provider}, {row.shape}", row.note)
        self.say(f"  {line}")
        self.recorder.add(row)


def _held(error: float, allowed: float, what: str = "") -> float:
    if not error <= allowed:
        raise Wrong(f"{what}relative error {error:.2g} is above {allowed:.2g}")
    return error


def _gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def cases(
    models: Sequence[Model],
    batches: Sequence[Tokens],
    passes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    layer: bool = False,
) -> Iterator[EncoderCase]:
    """Every combination. Latency is measured where there is one sequence."""
    for dtype in dtypes:
        for model in models:
            for tokens in batches:
                for pass_ in passes:
                    if pass_ != "latency" or len(tokens.lengths) == 1:
                        yield EncoderCase(model, tokens, pass_, dtype, layer)
