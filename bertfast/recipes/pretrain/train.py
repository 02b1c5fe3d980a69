"""The training loop.

A step takes `micro_batches` consecutive batches of the data's one global sequence, spread over the
processes in turn. Its loss is a mean over the step's labelled tokens (and, for NSP, sequences) of
all processes, which are counted on the host before the first forward. Data order and masking follow
from the seed and a batch's number, and dropout is seeded by the same two: so a run that was
stopped anywhere goes on as if nothing had happened, and neither depends on how many processes
there are.
"""

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...commands.errors import UserError
from ..interrupts import STATUS, Interrupts
from ..versions import device_name, versions
from . import card, checkpoints, meter, optimizers, options, states
from . import model as models
from .batches import Batches, Place
from .checkpoints import Checkpoint
from .evaluate import evaluate, said
from .options import RECIPES, TrainOptions
from .packed import PackedBatch
from .parallel import Processes, Shared, share
from .precision import Precision
from .prefetch import Prefetch
from .prepared import Prepared, data_options

AHEAD = 8  # micro-batches that are ready before they are needed


def train(given: TrainOptions, processes: Processes) -> int:
    """Trains until the last step, or goes on to it from the run's latest checkpoint, and writes
    RUN/model. Returns the exit status: 0, or 143 or 130 where SIGTERM or SIGINT ended it, after a
    checkpoint at the end of the step."""
    data, precision = _checked(given, processes)
    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(checkpoints.locked(given.out)))
        interrupts = held.enter_context(Interrupts())
        run = Run(given, processes, data, precision)
        held.callback(run.close)
        return run.to_the_end(interrupts)


def _checked(given: TrainOptions, processes: Processes) -> tuple[Prepared, Precision]:
    """The data and the precision; UserError for options that can't be had together."""
    if given.micro_batches % processes.world:
        raise UserError(
            f"--micro-batches must be a multiple of the {processes.world} processes, "
            f"got {given.micro_batches}"
        )
    if given.tokens < given.length:
        raise UserError(f"--tokens must be at least --length ({given.length}), got {given.tokens}")
    if given.model is not None:
        for name in ("layers", "width", "heads", "inner", "dropout"):
            if getattr(given, name) is not None:
                raise UserError(f"{options.flag(name)} is for a new model, and --model gives one")
    schedule = given.resolved().schedule
    if given.decay is not None and schedule != "wsd":
        raise UserError(f"--decay is for --schedule wsd, and it is {schedule}")
    precision = Precision(given.precision, processes.device)
    if precision.dtype == torch.float16 and given.fsdp:
        raise UserError("--precision fp16 can't be had with --fsdp: take bf16 or fp32")
    data = Prepared.open(given.data)
    processes.same_everywhere("the data", data.fingerprint)
    return data, precision


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # steps that are done
    place: Place | None = None  # where the data goes on
    tokens: int = 0
    seconds: float = 0.0


class Run:
    def __init__(
        self, given: TrainOptions, processes: Processes, data: Prepared, precision: Precision
    ) -> None:
        self.given, self.options, self.processes = given, given.resolved(), processes
        self.recipe = RECIPES[given.recipe]
        self.data, self.precision = data, precision
        self.progress = Progress()
        found = self._find()
        self.config, self.shared = self._model(found)
        settings = optimizers.Settings(
            *(self.options.lr, self.recipe.betas, 1e-6, self.options.weight_decay)  # type: ignore[arg-type]
        )
        name = str(self.options.optimizer)
        self.optimizers = optimizers.make(name, self.shared.module, settings)
        self.meter = meter.Meter(processes, given.tokens, bool(self.options.nsp))
        if found is not None:
            self._restore(found)
        bytes_ = 12 * sum(weight.numel() for weight in self.shared.module.parameters())
        processes.by_first(lambda: checkpoints.check_room(given.out, bytes_))
        self.log = (
            meter.Log(given.out, self.progress.step, given.steps) if processes.first else None
        )
        self._say_begin(found)
        wanted = data_options(
            tokens=given.tokens,
            length=given.length,
            nsp=bool(self.options.nsp),
            masked_share=float(self.options.masked_share or 0),
            whole_words=given.whole_words,
            seed=given.seed,
        )
        batches = self.data.batches(
            *(wanted, "train", self.progress.place, processes.rank, processes.world)
        )
        self.batches: Prefetch[tuple[Place, PackedBatch]] = Prefetch(
            _pinned(batches) if processes.device.type == "cuda" else batches, AHEAD
        )
        self.broken = torch.zeros((), dtype=torch.bool, device=processes.device)

    def close(self) -> None:
        batches = getattr(self, "batches", None)
        if batches is not None:
            batches.close()
        if self.log is not None:
            self.log.close()

    # What was there

    def _find(self) -> Checkpoint | None:
        """The checkpoint to go on from. Its tensors are there in the first process alone."""
        box: list[Checkpoint] = []

        def look() -> tuple[int, dict[str, Any]] | None:
            found = checkpoints.latest(self.given.out / "checkpoints")
            if found is None:
                return None
            options.check_same(found.run["options"], self.given)
            if found.step > self.given.steps:
                raise UserError(
                    f"--steps must be at least {found.step}, which the run in "
                    f"{str(self.given.out)!r} has done, got {self.given.steps}"
                )
            if found.run["data"] != self.data.fingerprint:
                raise UserError(
                    f"--data: {str(self.given.data)!r} is not the data that the run in "
                    f"{str(self.given.out)!r} began with: begin another run by --out"
                )
            box.append(found)
            return found.step, found.run

        there = self.processes.by_first(look)
        if there is None or box:
            return box[0] if box else None
        return Checkpoint(*there, {}, {})

    def _model(self, found: Checkpoint | None) -> tuple[Any, Shared]:
        given, nsp = self.given, bool(self.options.nsp)
        self.fresh: list[str] = []  # weights that a saved model didn't have
        torch.manual_seed(given.seed)
        if found is not None:
            from transformers import BertConfig

            config = BertConfig.from_dict(found.run["config"])
            plain: Any = models.new(config, nsp)
        elif given.model is not None:
            plain, self.fresh = models.load(given.model, nsp)
        else:
            config = models.configuration(
                size=given.size,
                layers=given.layers,
                width=given.width,
                heads=given.heads,
                inner=given.inner,
                vocabulary=self.data.vocabulary,
                length=given.length,
                dropout=float(self.options.dropout or 0),
                pad=self.data.pad,
            )
            plain = models.new(config, nsp)
        models.check_fits(plain.config, self.data.vocabulary, given.length, nsp)
        wrapped = models.Pretraining(plain, recompute=given.recompute).train()
        return plain.config, share(wrapped, self.processes, given.fsdp, given.compile)

    def _restore(self, found: Checkpoint) -> None:
        run = found.run
        states.restore(
            *(self.shared.module, self.optimizers, found.model, found.optimizer), self.processes
        )
        self.progress = Progress(found.step, Place(*run["place"]), run["tokens"], run["seconds"])
        self.meter.restore(run["meter"])
        if run["scaler"]:
            self.precision.scaler.load_state_dict(run["scaler"])

    def _say_begin(self, found: Checkpoint | None) -> None:
        if self.log is None:
            return
        if found is not None:
            before, now = found.run["world"], self.processes.world
            text = f"going on from the checkpoint of step {found.step}"
            if before != now:
                text += f", with {now} processes instead of {before}: the order of data is the same"
            self.log.say(text)
        if self.fresh:
            names = ", ".join(self.fresh)
            self.log.say(f"{str(self.given.model)!r} doesn't have these, which begin anew: {names}")
        count = sum(weight.numel() for weight in self.shared.module.parameters())
        tokens = self.given.tokens * self.given.micro_batches
        self.log.say(
            f"{count:,} parameters on {self.processes.device.type}, processes: "
            f"{self.processes.world}, {self.precision.name}; up to {tokens:,} tokens a step"
        )

    # The loop

    def to_the_end(self, interrupts: Interrupts) -> int:
        given, progress = self.given, self.progress
        saved = progress.step
        while progress.step < given.steps:
            stop = self._step(interrupts.signal)
            if stop is not None:
                if saved != progress.step:
                    self._save()
                if self.log is not None:
                    self.log.say(
                        f"stopped after step {progress.step} by {signal.Signals(stop).name}; "
                        "the same command goes on"
                    )
                return STATUS[signal.Signals(stop)]
            ends = progress.step == given.steps
            if given.evaluate_every and progress.step % given.evaluate_every == 0 and not ends:
                self._evaluate()
            if progress.step % given.checkpoint_every == 0 or ends:
                self._save()
                saved = progress.step
        self._finish()
        return 0

    def _step(self, wish: int | None) -> int | None:
        """One step. Where a process was told to stop: that signal, and no step."""
        given, processes, progress = self.given, self.processes, self.progress
        begun = time.perf_counter()
        waited = self.batches.waited
        micro = list(itertools.islice(self.batches, given.micro_batches // processes.world))
        self.meter.waited += self.batches.waited - waited
        labels, sequences, tokens, terminated, interrupted = processes.add_up(
            [
                sum(len(batch.labels) for _, batch in micro),
                sum(batch.sequences for _, batch in micro),
                sum(batch.tokens for _, batch in micro),
                wish == signal.SIGTERM,
                wish == signal.SIGINT,
            ]
        )
        if terminated or interrupted:
            return signal.SIGTERM if terminated else signal.SIGINT
        printing = (progress.step + 1) % given.print_every == 0 or progress.step + 1 == given.steps
        for index, (_, batch) in enumerate(micro):
            last = index == len(micro) - 1
            place = index * processes.world + processes.rank  # of the step's micro-batches
            sample = models.SAMPLE if printing and place == given.micro_batches - 1 else 0
            number = progress.step * given.micro_batches + place
            torch.manual_seed(dropout_seed(given.seed, number))
            with self.shared.synchronised(last):
                with self.precision.autocast():
                    sums = self.shared.call(batch.to(processes.device), sample)
                loss = sums.mlm * (processes.world / max(1, labels))
                if self.options.nsp:
                    loss = loss + sums.nsp * (processes.world / sequences)
                self.precision.scaler.scale(loss).backward()
            self.meter.add(batch, sums, sample)
        rate = float(self.options.lr or 0) * self._share_of_lr()
        norm = self._update(rate)
        progress.step += 1
        progress.place = micro[-1][0]
        progress.tokens += int(tokens)
        self.meter.steps_timed += 1
        if printing:
            self._print({"lr": rate, "gradient_norm": norm.item()})
        progress.seconds += time.perf_counter() - begun
        if self.log is not None:
            self.log.done(progress.step)
        return None

    def _share_of_lr(self) -> float:
        now = self.options
        return optimizers.share_of_lr(
            str(now.schedule), self.progress.step, now.steps, now.warmup or 0, now.decay or 0
        )

    def _update(self, rate: float) -> torch.Tensor:
        """Clips, and lets the optimisers go a step; returns the gradient's norm."""
        optimizers.set_lr(self.optimizers, rate)
        scaler = self.precision.scaler
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
        norm: Any = torch.nn.utils.clip_grad_norm_(
            self.shared.module.parameters(), self.given.clip or math.inf
        )
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not scaler.is_enabled():  # with one, a step whose gradients overflow is left out
            self.broken |= ~torch.isfinite(norm)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _check(self) -> None:
        if self.broken.item():
            raise UserError(
                f"a gradient was not a finite number, in step {self.progress.step} or shortly "
                "before: the run stops, and its last checkpoint is from before that. A lower --lr, "
                "a longer --warmup or --precision fp32 may help, in another run"
            )

    def _print(self, more: dict[str, float]) -> None:
        self._check()
        figures = {**self.meter.figures(), **more}
        if self.log is not None:
            step = self.progress.step
            self.log.write(step, figures, meter.line(step, self.given.steps, figures))

    def _save(self) -> None:
        self._check()
        processes, progress = self.processes, self.progress
        model, optimizer = states.gathered(self.shared.module, self.optimizers)
        run = {
            "place": list(self.progress.place or Place()),
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "world": processes.world,
            "options": options.fixed(self.given),
            "data": self.data.fingerprint,
            "config": self.config.to_dict(),
            "meter": self.meter.state(),
            "scaler": self.precision.scaler.state_dict(),
            "versions": versions(),
        }
        folder = self.given.out / "checkpoints"
        checkpoint = Checkpoint(progress.step, run, model, optimizer)
        processes.by_first(lambda: str(checkpoints.write(folder, checkpoint, self.given.keep)))

    # The end

    def _evaluate(self) -> dict[str, float]:
        """Figures of the held-out documents; none where there are none."""
        module: Any = self.shared.module
        if not self.data.holds_out(module.nsp):
            if self.log is not None:
                self.log.say("not evaluated: no documents were kept from training")
            return {}
        begun = time.perf_counter()
        figures = evaluate(
            *(module, self.data, self.processes, self.precision),
            tokens=max(options.EVALUATED_TOKENS, self.given.length),
            length=self.given.length,
        )
        self.meter.pause(time.perf_counter() - begun)
        if self.log is not None:
            self.log.write(self.progress.step, figures, said(figures), "held-out")
        return figures

    def _finish(self) -> None:
        figures = self._evaluate()
        state = states.gathered_model(self.shared.module)
        processes, progress = self.processes, self.progress
        facts = {
            "options": options.as_json(self.options),
            "model": {
                "layers": self.config.num_hidden_layers,
                "width": self.config.hidden_size,
                "heads": self.config.num_attention_heads,
                "inner width": self.config.intermediate_size,
                "vocabulary": self.config.vocab_size,
                "longest sequence": self.config.max_position_embeddings,
            },
            "betas": self.recipe.betas,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "processes": processes.world,
            "precision": self.precision.name,
            "device": device_name(processes.device),
            "parameters": sum(weight.numel() for weight in self.shared.module.parameters()),
            "versions": versions(),
        }
        folder = self.given.out / "model"

        def write() -> None:
            card.write_model(folder, state, self.config, bool(self.options.nsp), self.data.shards)
            card.write(folder, {**facts, "evaluation": figures})

        processes.by_first(write)
        if self.log is not None:
            self.log.say(f"the model is in {folder}")


def dropout_seed(seed: int, number: int) -> int:
    """Of torch's generators before a micro-batch: bertfast's dropout draws its own seed there."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def _pinned(batches: Batches) -> Iterator[tuple[Place, PackedBatch]]:
    """In memory that a GPU copies from while the host goes on."""
    for place, batch in batches:
        yield place, batch.pinned()
