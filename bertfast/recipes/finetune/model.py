"""The model of a run: a saved encoder with a head for the task, perhaps an adapter, converted.

A folder that this command wrote has finetune.json beside the model: its task and what that learnt.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bertfast

from ...commands import saved
from ...commands.errors import UserError
from ..embed.encoders import length_of
from .options import FinetuneOptions
from .tasks import TASKS, Task
from .tasks.classify import Pair

FACTS = "finetune.json"
ADAPTER = "adapter_config.json"


class Known(NamedTuple):
    """A folder's own task."""

    task: str
    facts: dict[str, Any]


def known(folder: Path) -> Known | None:
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_bytes())
        return Known(facts["task"], facts)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} isn't what this command wrote: {error!r}") from None


def base_of(folder: Path) -> Path:
    """The folder of the weights: its own, or of an adapter that of its base."""
    if (folder / "config.json").is_file():
        return folder
    if not (folder / ADAPTER).is_file():
        raise UserError(f"--model must be a folder with a config.json, got {str(folder)!r}")
    base = Path(json.loads((folder / ADAPTER).read_bytes())["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise UserError(
            f"--model: {str(folder)!r} is an adapter of {str(base)!r}, which has no config.json"
        )
    return base


def tokenizer_of(folder: Path, task: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = saved.load(AutoTokenizer, str(folder))
    if task == "tag" and getattr(tokenizer, "add_prefix_space", True) is False:
        # Tokenizers that count a space as part of the word behind it take lists of words like this.
        tokenizer = saved.load(AutoTokenizer, str(folder), add_prefix_space=True)
    return tokenizer


def task_of(options: FinetuneOptions, tokenizer: Any) -> Task:
    """The task, of the model's length; to predict, as the saved model has learnt it."""
    from transformers import AutoConfig

    base = base_of(options.model)
    told = known(options.model)
    if options.task is None and told is None:
        raise UserError(
            f"--task must be given, as {str(options.model)!r} wasn't made by this command"
        )
    name = options.task or (told.task if told else "")
    if options.data is None and told is not None and told.task != name:
        raise UserError(f"--task is {name}, and {str(options.model)!r} was trained for {told.task}")
    facts = told.facts if told is not None and options.data is None else {}
    length, stride = options.length or facts.get("length"), options.stride
    if stride is None:
        stride = facts.get("stride")
    config = saved.load(AutoConfig, str(base))
    length = length_of(tokenizer, config, None, length)
    if stride is not None and stride > length // 2:
        raise UserError(f"--stride must be at most {length // 2}, half of --length, got {stride}")
    made: Task = TASKS[name](length, stride)
    if isinstance(made, Pair):
        made.scored = options.scores
    if options.data is None:
        labels = facts.get("labels")
        if labels is None:
            labels = [config.id2label[number] for number in range(config.num_labels)]
            facts = {"learnt": {"scored": config.num_labels == 1, "may_be_none": False}}
        made.restore(labels, facts["learnt"])
    return made


def load(options: FinetuneOptions, task: Task, steps: int | None = None) -> Any:
    """The model with its head. steps: of the training that begins, for a new adapter."""
    folder = options.model
    more: dict[str, Any] = {}
    if options.data is not None:
        more["ignore_mismatched_sizes"] = True  # a head of other labels is replaced
        if options.dropout is not None:
            more |= _dropouts(folder, options.dropout)
    base = base_of(folder)
    model = whole(base, task, **more)
    if options.convert:
        bertfast.optimize(model)
    if base != folder:
        if options.data is not None:
            raise UserError(
                f"--model: {str(folder)!r} is an adapter; training begins with a whole model, "
                "such as --merge saves"
            )
        model = with_adapter(model, folder)
    elif options.peft is not None and steps is not None:
        model = adapted(model, options, task, steps)
    return model


def whole(folder: Path, task: Task, **more: Any) -> Any:
    """The model of a folder, by transformers' own class for the task."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind = getattr(transformers, task.auto)
    return saved.load(kind, str(folder), dtype=torch.float32, **task.of_model(), **more)


def with_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """With a saved adapter. trainable: also AdaLoRA's loss can be computed."""
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # a broken file may end in any of several libraries' own
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{str(folder)!r} can't be loaded: {type(error).__name__}: {lines[0]}"
        ) from error


def _dropouts(folder: Path, share: float) -> dict[str, float]:
    config = json.loads((folder / "config.json").read_bytes())
    return {name: share for name in config if name.endswith(("dropout", "dropout_prob"))}


def adapted(model: Any, options: FinetuneOptions, task: Task, steps: int) -> Any:
    """With a new adapter; the head is trained too."""
    import peft

    about: dict[str, Any] = {"task_type": task.adapted}
    if options.peft == "lora":
        config: Any = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **about)
    elif options.peft == "adalora":
        config = peft.AdaLoraConfig(
            init_r=options.rank + options.rank // 2,
            target_r=options.rank,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=max(1, steps // 100),
            total_step=steps,
            **about,
        )
    elif options.peft == "ia3":
        config = peft.IA3Config(**about)
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=options.rank, **about)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:  # a family that peft has no default modules for
        raise UserError(f"--peft {options.peft}: {error}") from None


def save(model: Any, tokenizer: Any, task: Task, folder: Path, merge: bool) -> None:
    """A plain folder of transformers, or of peft; with finetune.json."""
    if merge:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "task": task.name,
        "labels": task.labels,
        "length": task.length,
        "stride": task.stride,
        "learnt": task.state(),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
