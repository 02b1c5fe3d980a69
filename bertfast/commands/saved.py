"""A saved Hugging Face model: its configuration and name, or what is wrong with its directory."""

import json
import sys
from pathlib import Path
from typing import Any

from .errors import UserError, need

# Common names of directories, which say nothing about the model: its name is further up.
_GENERIC = ("model", "models", "saved", "encoder", "transformer", "0_Transformer", "snapshots")


def need_transformers(what: str) -> None:
    """Raises UserError where transformers isn't here, or is too old."""
    need(what, ("transformers",), "hf")
    try:
        from .. import hf  # noqa: F401
    except ImportError as error:
        raise UserError(str(error)) from error


def load(kind: Any, directory: str, **options: Any) -> Any:
    """Loads from the directory by a class of transformers. An error of any kind becomes one line
    that names the directory."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:  # a broken file may end in any of a dozen libraries' own
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"--model: {directory!r} can't be loaded: {type(error).__name__}: {lines[0]}"
        ) from error


def config(directory: str) -> Any:
    """The configuration of a model that bertfast knows."""
    need_transformers("a saved model")
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"--model must be a directory with a config.json, got {directory!r}")
    from transformers import AutoConfig

    found = load(AutoConfig, directory)
    known = model_types()
    if found.model_type not in known:
        raise UserError(
            f"--model must be a saved model of type {', '.join(known)}; {directory!r} has one of "
            f"type {found.model_type!r}"
        )
    return found


def model_types() -> list[str]:
    """The model types with a converted class in bertfast.hf."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from .. import hf

    return [
        kind
        for kind, classes in MODEL_MAPPING_NAMES.items()
        if isinstance(classes, str) and hasattr(hf, classes)
    ]


def positions(config: Any) -> int:
    """The longest sequence. RoBERTa's kind begins to count behind the number of its padding."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from .. import hf

    kind: Any = MODEL_MAPPING_NAMES[config.model_type]
    family = sys.modules[getattr(hf, kind)._original.__module__]
    embeddings = getattr(family, kind.removesuffix("Model") + "Embeddings", None)
    skips = hasattr(embeddings, "create_position_ids_from_input_ids")
    return config.max_position_embeddings - (config.pad_token_id + 1 if skips else 0)


def gating(config: Any) -> str | None:
    """The activation of its gated MLP, by its name in ops.gated; None where there is none, or its
    activation is another function."""
    from transformers.activations import ACT2FN
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from ..hf.families import FAMILIES
    from ..nn.bert import gating_form

    kind = MODEL_MAPPING_NAMES[config.model_type]
    if not any(kind in one.swapped and "gated" in one.layer.split(", ") for one in FAMILIES):
        return None
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return gating_form(ACT2FN[name])


def name(directory: str) -> str:
    """The name by which people know the model: what its configuration says that it was made from,
    or the directory's, or, where that is called "model", the one above."""
    path = Path(directory).resolve()
    written = json.loads((path / "config.json").read_text()).get("_name_or_path")
    if isinstance(written, str) and written and not written.startswith((".", "/")):
        return written.rstrip("/").rpartition("/")[2]
    for part in (path, *path.parents):
        if part.name and part.name not in _GENERIC and not part.name.startswith("checkpoint"):
            return part.name
    return path.name
