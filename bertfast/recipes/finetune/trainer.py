"""transformers' Trainer with batches by length, class weights, and lines that tell how it goes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from ..interrupts import Interrupts
from ..pretrain.meter import duration
from .features import Batches, Features
from .tasks import Task


class Finetuner(Trainer):
    """A Trainer that takes its batches from `Batches`."""

    def __init__(
        self,
        *args: Any,
        batches: Batches | None = None,
        reload: Callable[[Path], Any] | None = None,
        **named: Any,
    ) -> None:
        """reload: the model of a checkpoint; None: as Trainer reads it."""
        super().__init__(*args, **named)
        self.batches, self.reload = batches, reload
        # The two that print dicts, or draw a bar for each evaluation.
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.ProgressCallback)

    def get_train_dataloader(self) -> Any:
        assert self.batches is not None
        loader = torch.utils.data.DataLoader(
            *(self.train_dataset, 1),  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _load_best_model(self) -> None:
        if self.reload is None:
            super()._load_best_model()
        else:
            self._reload(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.reload is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._reload(resume_from_checkpoint)

    def _reload(self, checkpoint: str) -> None:
        assert self.reload is not None
        self.model = self.model_wrapped = self.reload(Path(checkpoint)).to(self.args.device)


class Epochs(TrainerCallback):
    """Tells the batches which epoch it is: a run that goes on begins in the midst of one."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches.epoch = int((state.epoch or 0) + 1e-6)


class Ranks(TrainerCallback):
    """AdaLoRA's: which ranks a step keeps."""

    def __init__(self, model: Any) -> None:
        self.model = model.base_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.model.update_and_allocate(state.global_step + 1)


class Stops(TrainerCallback):
    """A checkpoint after the step, and the end, where a signal asks for it."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupts.signal is not None:
            control.should_save = control.should_training_stop = True


class Told(TrainerCallback):
    """A line for each log and each evaluation."""

    def __init__(self, figures: tuple[str, ...], write: Callable[[str], object]) -> None:
        self.figures, self.write = dict.fromkeys(figures), write
        self.begun, self.first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        done = state.global_step - self.first
        left = (time.perf_counter() - self.begun) / max(1, done)
        left *= state.max_steps - state.global_step
        parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch:.2f}"]
        parts += [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        self.write(" | ".join([*parts, f"left {duration(left)}"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        parts = [f"step {state.global_step}/{state.max_steps}", "held out"]
        parts += [f"{name} {named[name]:.4f}" for name in ("loss", *self.figures) if name in named]
        self.write(" | ".join(parts))


def board(folder: Path) -> list[TrainerCallback]:
    """TensorBoard's, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]


def collator(tokenizer: Any, task: Task) -> Callable[[list[dict[str, Any]]], Any]:
    if task.name == "tag":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


def weighted_loss(counts: list[int]) -> Callable[..., torch.Tensor]:
    """Cross-entropy in which a label counts inversely to its number, a mean over all that is
    labelled in a step. The weights' own mean over the training rows is 1."""
    present = [count for count in counts if count]
    mean = sum(present) / len(present)
    weights = torch.tensor([mean / count if count else 0.0 for count in counts])

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].flatten(0, -2).float()
        found = torch.nn.functional.cross_entropy(
            *(logits, labels.flatten(), weights.to(logits.device)), reduction="sum"
        )
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return found / items

    return loss


def arguments(folder: Path, **more: Any) -> transformers.TrainingArguments:
    """Settings of all uses: nothing but the model's own inputs, nothing sent anywhere."""
    made = transformers.TrainingArguments(
        str(folder),
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )
    made._n_gpu = min(1, made.n_gpu)  # Trainer would spread each batch over all GPUs by threads
    return made


def outputs_of(trainer: Trainer, features: Features) -> Any:
    """The model's outputs of each input, in their order."""
    return trainer.predict(features).predictions  # type: ignore[arg-type]
