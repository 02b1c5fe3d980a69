"""Training: rows to a model, its figures and its card; a run that was stopped goes on.

OUT/model/         the model, plain transformers or an adapter, with its card
OUT/metrics.json   figures, and OUT/training.png, OUT/confusion.png, OUT/tensorboard
OUT/checkpoints/   of transformers' Trainer
OUT/run.json       the options that the run was begun with
OUT/skipped.jsonl  rows that were left out, with --skip-bad
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import bertfast

from ...commands import saved
from ...commands.errors import UserError, one_of
from .. import folders
from ..embed.encoders import device_of
from ..interrupts import STATUS, Interrupts
from ..pretrain.options import as_json, flag
from ..pretrain.shards import write_json
from ..versions import device_name, versions
from . import card, model, report, tables, trainer
from .features import Batches, Features
from .options import FinetuneOptions
from .split import held_out
from .tables import Row, Table

LOCK, RUN, SKIPPED = ".lock", "run.json", "skipped.jsonl"
MADE = ("model", "checkpoints", "tensorboard", "metrics.json", RUN, SKIPPED)


def train(options: FinetuneOptions) -> int:
    """Returns the exit status: 0, or 143 or 130 where a signal ended it after a checkpoint."""
    try:
        with folders.alone(options.out / LOCK, f"another run writes to {str(options.out)!r}"):
            told = begun(options)
            if (options.out / "model").exists():
                print(f"{options.out} has a trained model already")
                return 0
            with Interrupts() as interrupts:
                run = Run(options)
                write_json(options.out / RUN, told)
                return run.to_the_end(interrupts)
    except BlockingIOError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{str(options.out)!r} can't be written: {error}") from None


def begun(options: FinetuneOptions) -> dict[str, Any]:
    """The contents of run.json. UserError where the folder's run was begun with something else."""
    if options.overwrite:
        for name in MADE:
            path = options.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    inputs = [_told(path) for paths in _parts(options).values() for path in paths]
    now = {"options": options.fixed(), "inputs": inputs}
    path = options.out / RUN
    if not path.exists():
        if (options.out / "model").exists():
            raise UserError(f"{str(options.out)!r} has a model that isn't this run's: --overwrite")
        return now
    before: dict[str, Any] = json.loads(path.read_bytes())
    changed = [
        f"{flag(name)} was {before['options'].get(name)}, and is {value} now"
        for name, value in options.fixed().items()
        if before["options"].get(name) != value
    ]
    changed += folders.changed_inputs(before["inputs"], inputs)
    if changed:
        raise UserError(
            f"{str(options.out)!r} was begun with something else: {'; '.join(changed)}. Give "
            "--overwrite, or another folder"
        )
    return now


def _parts(options: FinetuneOptions) -> dict[str, list[Path]]:
    assert options.data is not None
    parts = tables.splits(options.data)
    if options.validation is not None:
        parts["validation"] = tables.splits(options.validation)["train"]
    return parts


def _told(path: Path) -> list[Any]:
    if not path.exists():
        raise UserError(f"{path} doesn't exist")
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


class Run:
    """A run, as far as it can be made ready before the first step."""

    def __init__(self, options: FinetuneOptions) -> None:
        assert options.task is not None and options.data is not None
        self.options = options
        self.tokenizer = model.tokenizer_of(model.base_of(options.model), options.task)
        self.task = model.task_of(options, self.tokenizer)
        self.rows, self.skipped = self._rows()
        if options.metric is not None:
            one_of("--metric", options.metric, self.task.figures_known)
        self.better = options.metric or self.task.figures_known[0]
        self.device = device_of(options.device)
        self.precision = precision(options.precision, self.device)
        self.features = {
            part: self._features(part, rows) for part, rows in self.rows.items() if rows
        }
        training = self.features["train"]
        if not len(training):
            raise UserError("all answers lie beyond the model's limit: give --stride")
        self.batches = Batches(
            training.lengths,
            texts=options.batch,
            tokens=options.tokens,
            seed=options.seed,
            epochs=options.epochs,
        )
        self.steps = math.ceil(len(self.batches) / options.accumulate) * options.epochs
        transformers.set_seed(options.seed)
        self.model = model.load(options, self.task, self.steps)
        self._tell_layers()
        self.begun = time.perf_counter()

    def say(self, line: str) -> None:
        print(line, flush=True)

    # Rows

    def _rows(self) -> tuple[dict[str, list[Row]], int]:
        options, task = self.options, self.task
        given = {
            role: name for role in task.roles if (name := getattr(options, role, None)) is not None
        }
        rows: dict[str, list[Row]] = {}
        bad: list[tables.Bad] = []
        usual: dict[str, str] | None = None
        for part, paths in _parts(options).items():
            read = tables.read(
                paths,
                task.roles,
                given,
                task.parse if part == "train" else self._checked,
                form=tables.Form(options.header, options.quotes),
                labelled=True,
                skip_bad=options.skip_bad,
                usual=usual,
            )
            if part == "train":
                usual = read.columns
                self._tell_columns(read)
                task.learn([row.example for row in read.rows])
            rows[part] = read.rows
            bad += read.bad
        self._tell_bad(bad)
        if "validation" not in rows:
            train, held = held_out(rows["train"], task, options.held_out, options.seed)
            rows |= {"train": train, "validation": held}
        self.say(" | ".join(f"{part}: {len(some):,} rows" for part, some in rows.items()))
        return rows, len(bad)

    def _checked(self, cells: dict[str, Any]) -> Any:
        example = self.task.parse(cells)
        self.task.check(example)
        return example

    def _tell_columns(self, read: Table) -> None:
        told = [
            f"{role} from {column!r}" + (" (found)" if role in read.found else "")
            for role, column in read.columns.items()
        ]
        self.say(f"columns: {', '.join(told)}")

    def _tell_layers(self) -> None:
        told = list(bertfast.report(self.model))
        fused = sum(row.reason is None for row in told)
        self.say(f"{fused} of {len(told)} layers run on bertfast")

    def _tell_bad(self, bad: Sequence[tables.Bad]) -> None:
        path = self.options.out / SKIPPED
        if not bad:
            return
        path.write_text("".join(json.dumps(one._asdict()) + "\n" for one in bad))
        self.say(f"left out: {len(bad):,} rows, listed in {path}; the first: {' : '.join(bad[0])}")

    def _features(self, part: str, rows: list[Row]) -> Features:
        examples = [row.example for row in rows]
        learning = part == "train"
        made = self.task.features(self.tokenizer, examples, True, learning)
        if made.truncated:
            self.say(
                f"{part}: {made.truncated:,} texts are longer than {self.task.length} tokens, and "
                "cut there" + (f"; {made.left_out:,} so lose their answer" * bool(made.left_out))
            )
        return made if learning else made.by_length()

    # Training

    def to_the_end(self, interrupts: Interrupts) -> int:
        made = self._trainer(interrupts)
        last = self._last_checkpoint()
        if last is not None and self.options.peft == "adalora":
            self.say("beginning anew: peft's checkpoints of AdaLoRA don't have how it chose ranks")
            shutil.rmtree(last.parent)
            last = None
        if last is not None:
            self.say(f"going on after {last.name}")
        made.train(resume_from_checkpoint=None if last is None else str(last))
        if interrupts.signal is not None:
            self.say(f"stopped after step {made.state.global_step}; the same command goes on")
            return STATUS[interrupts.signal]  # type: ignore[index]
        self._finish(made)
        return 0

    def _last_checkpoint(self) -> Path | None:
        from transformers.trainer_utils import get_last_checkpoint

        folder = self.options.out / "checkpoints"
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return None if found is None else Path(found)

    def _trainer(self, interrupts: Interrupts) -> trainer.Finetuner:
        options, task = self.options, self.task
        when = "epoch" if options.every is None else "steps"
        arguments = trainer.arguments(
            options.out / "checkpoints",
            **of_precision(self.precision),
            use_cpu=self.device.type == "cpu",
            seed=options.seed,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=self._evaluated_at_once(),
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.rate,
            weight_decay=options.weight_decay,
            warmup_steps=round(options.warmup * self.steps),
            lr_scheduler_type="linear",
            eval_strategy=when,
            save_strategy=when,
            eval_steps=options.every,
            save_steps=options.every or 500,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model=self.better,
            greater_is_better=True,
            logging_steps=max(1, min(50, self.steps // 10)),
            label_names=list(task.label_names),
        )
        callbacks: list[Any] = [
            trainer.Epochs(self.batches),
            trainer.Stops(interrupts),
            trainer.Told((self.better, *task.figures_known[:2]), self.say),
            *trainer.board(options.out / "tensorboard"),
        ]
        if options.peft == "adalora":
            callbacks.append(trainer.Ranks(self.model))
        if options.patience is not None:
            callbacks.append(transformers.EarlyStoppingCallback(options.patience))
        counts = None
        if options.class_weights:
            counts = task.counts(row.example for row in self.rows["train"])
        return trainer.Finetuner(
            self.model,
            arguments,
            data_collator=trainer.collator(self.tokenizer, task),
            train_dataset=self.features["train"],
            eval_dataset=self.features["validation"],
            compute_metrics=self._figures,
            compute_loss_func=None if counts is None else trainer.weighted_loss(counts),
            callbacks=callbacks,
            batches=self.batches,
            reload={None: self._whole_of, "adalora": self._adapter_of}.get(options.peft),
        )

    def _whole_of(self, checkpoint: Path) -> Any:
        """Trainer reads the file itself, in which transformers 5.0 gives LayerNorm's weights the
        names of their first checkpoints, and passes over what it doesn't know."""
        read = model.whole(checkpoint, self.task)
        self.model.load_state_dict(read.state_dict())
        return self.model

    def _adapter_of(self, checkpoint: Path) -> Any:
        """A checkpoint of AdaLoRA has only the ranks that were kept when it was written, which the
        model of another step has no room for."""
        made = model.load(self.options, self.task)
        return model.with_adapter(made, checkpoint, trainable=True)

    def _evaluated_at_once(self) -> int:
        if self.options.tokens is None:
            return self.options.batch
        return max(1, self.options.tokens // self.task.length)

    def _figures(self, predicted: Any) -> dict[str, float]:
        examples = [row.example for row in self.rows["validation"]]
        return self.task.figures(self.features["validation"], examples, predicted.predictions)

    # The end

    def _finish(self, made: trainer.Finetuner) -> None:
        options, task = self.options, self.task
        figures, told = {}, {}
        for part, features in self.features.items():
            if part == "train":
                continue
            examples = [row.example for row in self.rows[part]]
            outputs = trainer.outputs_of(made, features)
            figures["held out" if part == "validation" else part] = task.figures(
                features, examples, outputs
            )
            if part == "validation":
                told = task.tables(features, examples, outputs)
        report.write(options.out, figures, told, made.state.log_history)
        folder = options.out / "model.writing"
        shutil.rmtree(folder, ignore_errors=True)
        model.save(made.model, self.tokenizer, task, folder, options.merge)
        counts = [f"{part} {len(some):,}" for part, some in self.rows.items()]
        counts += [f"left out {self.skipped:,}"] if self.skipped else []
        facts = {
            "options": as_json(options) | {"lr": options.rate},
            "base": saved.name(str(model.base_of(options.model))),
            "labels": len(task.labels) or 2,
            "rows": ", ".join(counts),
            "steps": made.state.global_step,
            "minutes": f"{(time.perf_counter() - self.begun) / 60:.1f}",
            "device": device_name(self.device),
            "precision": self.precision,
            "versions": versions(),
        }
        card.write(folder, facts, figures, told)
        folder.rename(options.out / "model")
        shutil.rmtree(options.out / "checkpoints")
        self.say("\n".join(["", *report.table(figures), ""]))
        self.say(f"{options.out / 'model'} is the model of the best {self.better}")


def precision(name: str, device: torch.device) -> str:
    """The one that `auto` stands for."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: on a CPU take fp32 or bf16")
    return name


def of_precision(name: str) -> dict[str, bool]:
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


def for_predicting(options: FinetuneOptions, folder: Path) -> FinetuneOptions:
    """The options that read the model which was trained."""
    return dataclasses.replace(options, model=folder, data=None, merge=False, peft=None)
