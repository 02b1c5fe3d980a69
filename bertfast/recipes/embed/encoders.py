"""A saved model as texts to vectors: its tokenizer, its converted encoder, and what follows it.

A folder of sentence-transformers is read by its own files where all of it is plain: one
Transformer, a pooling by mean, by the first token or by max, then Dense and Normalize. What isn't
plain is run by sentence-transformers itself, with its encoder converted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import bertfast

from ...commands import saved
from ...commands.errors import UserError, need, one_of
from ...settings import is_converted

POOLINGS = ("mean", "cls", "max")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
LONGEST = 2**20  # a tokenizer that knows no limit says some 10^30


@dataclass(frozen=True)
class Asked:
    """The choices that a folder's own files don't make, or that replace theirs."""

    pooling: str | None = None
    normalize: bool | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    length: int | None = None
    device: str = "auto"
    precision: str = "auto"


class Loaded:
    """A tokenizer and a converted model, whose batches `features` makes."""

    def __init__(self, folder: Path, kind: Any, length: int | None, asked: Asked) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.device = device_of(asked.device)
        self.dtype = dtype_of(asked.precision, self.device)
        config = saved.load(AutoConfig, str(folder))
        self.tokenizer = saved.load(AutoTokenizer, str(folder))
        self.length = length_of(self.tokenizer, config, length, asked.length)
        model, about = saved.load(kind, str(folder), dtype=self.dtype, output_loading_info=True)
        # What an encoder lacks is its pooler, which isn't used.
        self.absent = sorted(about["missing_keys"])
        model = model.to(self.device).eval()
        # Masked tokens are padding here, and the mask is on the host: it never waits for the GPU.
        self.model = bertfast.optimize(model, packed="always")
        base = getattr(model, model.base_model_prefix, model)
        self.packed = is_converted(base) and base.why_padded() is None
        self.pad = self.tokenizer.pad_token_id or 0
        self.positions = config.max_position_embeddings

    def tokenise(self, texts: Sequence[str], others: Sequence[str] | None = None) -> Any:
        """Lists of ids, and of types where the model takes them."""
        pairs = {} if others is None else {"text_pair": list(others)}
        return self.tokenizer(
            list(texts),
            **pairs,
            truncation=True,
            max_length=self.length,
            return_attention_mask=False,
            verbose=False,
        )

    def features(self, encoded: Any, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The padded batch of some rows; its mask stays on the host, where bertfast reads it."""
        ids = [encoded["input_ids"][row] for row in rows]
        longest = max(1, *map(len, ids))
        made = {"input_ids": _padded(ids, longest, self.pad)}
        if "token_type_ids" in encoded:
            types = [encoded["token_type_ids"][row] for row in rows]
            made["token_type_ids"] = _padded(types, longest, self.tokenizer.pad_token_type_id)
        lengths = torch.tensor([len(one) for one in ids])
        made["attention_mask"] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
        return made

    def call(self, features: dict[str, torch.Tensor]) -> Any:
        moved = {name: tensor.to(self.device) for name, tensor in features.items()}
        if self.packed:
            moved["attention_mask"] = features["attention_mask"]
        return self.model(**moved)


def _padded(rows: list[list[int]], longest: int, pad: int) -> torch.Tensor:
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, and torch finds no GPU here")
    return found


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """fp16 on a GPU: of 16 bits it is the one that loses less of an embedding."""
    one_of("precision", name, PRECISIONS)
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return DTYPES[name]


def length_of(tokenizer: Any, config: Any, folder: int | None, asked: int | None) -> int:
    """The most tokens of a text: what is asked for, what the folder says, what the model can."""
    try:
        most = saved.positions(config)
    except (KeyError, AttributeError):
        most = getattr(config, "max_position_embeddings", LONGEST)
    if asked is not None:
        if asked > most:
            raise UserError(f"length must be {most} or less, the model's positions, got {asked}")
        return asked
    told = tokenizer.model_max_length if folder is None else folder
    return int(min(told, most, LONGEST))


class Encoder:
    """Texts to vectors by a plain folder: encoder, pooling, and a stack of modules after it."""

    def __init__(self, folder: Path, plan: "Plan", asked: Asked) -> None:
        from transformers import AutoModel

        self.loaded = Loaded(folder / plan.transformer, AutoModel, plan.length, asked)
        self.pooling, self.prompt = plan.pooling, plan.prompt
        dense = [_dense(folder / path) for path in plan.dense]
        self.after = nn.Sequential(*dense).to(self.loaded.device)
        self.normalize = plan.normalize
        config = self.loaded.model.config
        self.width = dense[-1][0].out_features if dense else config.hidden_size

    def tokenise(self, texts: Sequence[str]) -> Any:
        return self.loaded.tokenise(
            [self.prompt + text for text in texts] if self.prompt else texts
        )

    def run(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """(texts, width), float32."""
        hidden = self.loaded.call(features)[0]
        mask = features["attention_mask"].to(hidden.device)
        pooled = self.after(pool(hidden, mask, self.pooling))
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One row a text, of its attended tokens, in float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "max":
        return hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(1).float()
    sums = torch.bmm(mask[:, None].to(torch.float32), hidden.float())[:, 0]
    return sums / mask.sum(1, keepdim=True).clamp(min=1)  # none in a tokenizer's empty text


def _dense(folder: Path) -> Any:
    """A Dense of sentence-transformers."""
    told = _json(folder / "config.json")
    linear = nn.Linear(told["in_features"], told["out_features"], told.get("bias", True))
    path = folder / "model.safetensors"
    if path.exists():
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): value for name, value in state.items()})
    return nn.Sequential(linear, _activation(told))


def _activation(told: dict[str, Any]) -> nn.Module:
    name = told.get("activation_function") or "torch.nn.modules.activation.Tanh"
    return getattr(nn, name.rpartition(".")[2])()


@dataclass(frozen=True)
class Plan:
    """How a folder's plain modules make a vector."""

    transformer: str
    length: int | None
    pooling: str
    dense: tuple[str, ...]
    normalize: bool
    prompt: str


def plan(folder: Path, asked: Asked) -> Plan | str:
    """The plan of a folder, or why sentence-transformers has to run it."""
    if asked.pooling is not None:
        one_of("pooling", asked.pooling, POOLINGS)
    if not (folder / "modules.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model must be a folder with a config.json or a modules.json, got {str(folder)!r}"
            )
        if asked.prompt_name is not None:
            raise UserError(
                f"prompt_name is {asked.prompt_name!r}, and {str(folder)!r} has no named prompts"
            )
        pooling = asked.pooling or "mean"
        return Plan("", None, pooling, (), bool(asked.normalize), asked.prompt or "")
    modules = [
        (one["type"].rpartition(".")[2], one["path"]) for one in _json(folder / "modules.json")
    ]
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"]:
        return f"its modules are {', '.join(names)}"
    transformer = modules[0][1]
    told = _optional(folder / transformer / "sentence_bert_config.json")
    if told.get("do_lower_case"):
        return "it asks for lower case"
    unknown = set(told) - {"max_seq_length", "do_lower_case"}
    # What newer versions write for any model of text.
    if told.get("transformer_task", "feature-extraction") != "feature-extraction":
        return f"its task is {told['transformer_task']}"
    if unknown - {"transformer_task", "modality_config", "module_output_name"}:
        return f"its configuration has {', '.join(sorted(unknown))}"
    if set(told.get("modality_config") or ("text",)) != {"text"}:
        return "it takes more than texts"
    prompt = _prompt(folder, asked)
    pooled = _json(folder / modules[1][1] / "config.json")
    pooling = asked.pooling or _pooling(pooled)
    if pooling not in POOLINGS:
        return f"its pooling is {pooling}"
    if prompt and not pooled.get("include_prompt", True):
        return "its pooling leaves out the prompt"
    if _optional(folder / "config_sentence_transformers.json").get("truncate_dim"):
        return "it cuts its vectors"
    dense, normalize = [], False
    for name, path in modules[2:]:
        if name == "Dense" and not normalize and _is_plain(_json(folder / path / "config.json")):
            dense.append(path)
        elif name == "Normalize":
            normalize = True
        else:
            return f"it has a module {name}"
    if asked.normalize is not None:
        normalize = asked.normalize
    return Plan(transformer, told.get("max_seq_length"), pooling, tuple(dense), normalize, prompt)


def _pooling(told: dict[str, Any]) -> str:
    if "pooling_mode" in told:
        return str(told["pooling_mode"])
    modes = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    on = [k.removeprefix("pooling_mode_") for k, v in told.items() if k.startswith("pool") and v]
    return modes.get(on[0], on[0]) if len(on) == 1 else " and ".join(on) or "mean"


def _is_plain(told: dict[str, Any]) -> bool:
    activation = told.get("activation_function") or "torch.nn."
    return (
        activation.startswith("torch.nn.")
        and not told.get("use_residual")
        and told.get("module_input_name", "sentence_embedding") == "sentence_embedding"
        and told.get("module_output_name") in (None, "sentence_embedding")
    )


def _prompt(folder: Path, asked: Asked) -> str:
    if asked.prompt is not None:
        return asked.prompt
    told = _optional(folder / "config_sentence_transformers.json")
    prompts = told.get("prompts") or {}
    if asked.prompt_name is not None:
        return prompts[one_of("prompt_name", asked.prompt_name, prompts)]
    return prompts.get(told.get("default_prompt_name"), "")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r}, of the model, can't be read: {error}") from None


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.exists() else {}


class Library:
    """sentence-transformers' own encode, on a converted model, for what isn't plain."""

    def __init__(self, folder: Path, why: str, asked: Asked) -> None:
        need(f"{folder} isn't plain ({why}), and", ("sentence_transformers",), "embed")
        if asked.pooling is not None:
            raise UserError(f"pooling can't be chosen for {str(folder)!r}: {why}")
        if asked.normalize is False:
            raise UserError(f"normalize can't be turned off for {str(folder)!r}: {why}")
        from sentence_transformers import SentenceTransformer

        device = device_of(asked.device)
        model: Any = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
        model = model.to(dtype_of(asked.precision, device))
        if asked.length is not None:
            model.max_seq_length = asked.length
        self.model = bertfast.optimize(model)
        self.told: dict[str, Any] = {
            "prompt": asked.prompt,
            "prompt_name": asked.prompt_name,
            "normalize_embeddings": bool(asked.normalize),
        }
        self.width = model.get_embedding_dimension()

    def vectors(self, texts: Sequence[str]) -> Any:
        found = self.model.encode(list(texts), show_progress_bar=False, **self.told)
        return found.astype("float32").reshape(len(texts), -1)


def check_scorer(folder: Path) -> None:
    """Raises UserError where Scorer can't follow the folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model must be a folder with a config.json, got {str(folder)!r}")
    if (folder / "modules.json").is_file():
        modules = [one["type"].rpartition(".")[2] for one in _json(folder / "modules.json")]
        if modules != ["Transformer"]:
            raise UserError(
                f"model must be one Transformer, and {str(folder)!r} has the modules "
                f"{', '.join(modules)}"
            )
    kinds = _json(folder / "config.json").get("architectures") or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"model must be a cross-encoder, which gives labels to sequences, and {str(folder)!r} "
            f"is a {kinds[0]}"
        )
    told = _optional(folder / "config_sentence_transformers.json")
    if (told.get("prompts") or {}).get(told.get("default_prompt_name")):
        raise UserError(f"{str(folder)!r} puts a prompt before its pairs, which isn't done here")


class Scorer:
    """Pairs to scores by a folder of transformers' SequenceClassification."""

    def __init__(self, folder: Path, asked: Asked) -> None:
        from transformers import AutoModelForSequenceClassification as Kind

        check_scorer(folder)
        length = _optional(folder / "sentence_bert_config.json").get("max_seq_length")
        self.loaded = Loaded(folder, Kind, length, asked)
        if absent := self.loaded.absent:
            raise UserError(
                f"model must be a cross-encoder, and {str(folder)!r} has no weights for "
                f"{', '.join(absent[:3])}"
            )
        config = self.loaded.model.config
        self.labels = config.num_labels
        told = _optional(folder / "config_sentence_transformers.json")
        named = (
            told.get("activation_fn")
            or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
            or getattr(config, "sbert_ce_default_activation_function", None)
        )
        if named and named.startswith("torch.nn."):
            self.activation: nn.Module = getattr(nn, named.rpartition(".")[2])()
        else:
            self.activation = nn.Sigmoid() if self.labels == 1 else nn.Identity()

    def tokenise(self, pairs: Sequence[tuple[str, str]]) -> Any:
        return self.loaded.tokenise([a for a, _ in pairs], [b for _, b in pairs])

    def run(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """(pairs, labels), float32."""
        return self.activation(self.loaded.call(features).logits.float())
