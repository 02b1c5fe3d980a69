"""Tiny Hugging Face models and batches for them."""

import importlib
from importlib.util import find_spec
from unittest import mock

import torch

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS = 64, 4, 2, 96, 96, 80
PAD = 1  # the padding token's number

_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=INNER,
    max_position_embeddings=POSITIONS,
    pad_token_id=PAD,
)
_DISTILBERT = dict(
    vocab_size=VOCABULARY,
    dim=WIDTH,
    n_layers=LAYERS,
    n_heads=HEADS,
    hidden_dim=INNER,
    max_position_embeddings=POSITIONS,
    pad_token_id=PAD,
)
# What a tiny model of some families has besides.
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_OWN = {
    "Albert": _DROPOUT | {"embedding_size": 32},
    "Electra": {"embedding_size": 32},
    "Ernie": {"use_task_id": True},
    "Esm": {"position_embedding_type": "rotary", "emb_layer_norm_before": True},
    "Gte": _DROPOUT,
    "ModernBert": {"attention_dropout": 0.1, "local_attention": 8},
    "NomicBert": _DROPOUT,
}


def _known_here() -> list:
    """The families that this version of transformers has in the form that bertfast knows."""
    if not find_spec("transformers"):
        return []
    from bertfast import hf
    from bertfast.hf.families import FAMILIES

    def is_here(family) -> bool:
        try:
            module = importlib.import_module(family.module)
        except ModuleNotFoundError:
            return False
        return not any(hf.why_unknown(getattr(module, name)) for name in family.swapped)

    return [family for family in FAMILIES if is_here(family)]


KNOWN = _known_here()


def _families() -> tuple[dict[str, dict], list[str]]:
    """The prefix of the class names of each family -> its configuration, and one family of each
    layer."""
    found, kinds = {}, {}
    for family in KNOWN:
        own = _BERT | _OWN.get(family.prefix, {})
        found[family.prefix] = _DISTILBERT if family.prefix == "DistilBert" else own
        layer, *_ = family.swapped.values()
        form = layer, "gated" in family.layer
        kinds.setdefault(form, family.prefix)
    return found, list(kinds.values())


FAMILIES, LAYERS_OF = _families()


def tiny(name: str = "BertModel", **config) -> torch.nn.Module:
    """A model by its class name, in eval, with random numbers in place of zeros and ones."""
    import transformers

    kind = getattr(transformers, name)
    arguments = next(FAMILIES[p] for p in sorted(FAMILIES, key=len)[::-1] if name.startswith(p))
    model = kind(kind.config_class(**(arguments | config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.mul_(4.0)  # scores that tell tokens apart
    return model


def rotated(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' apply_rotary_pos_emb, in the dtype that q and k have."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    halves = ((x, torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1)) for x in (q, k))
    return tuple(x * cos + turned * sin for x, turned in halves)


def batch(
    lengths: tuple[int, ...] = (5, 20, 13), side: str = "right", pad: int = PAD, extra: int = 0
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows of these lengths, padded to the longest and `extra`."""
    width = max(lengths) + extra
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if side == "left" else slice(length)
        ids[row, part] = torch.randint(5, VOCABULARY, (length,))
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rows_seen(model: torch.nn.Module, inputs: dict) -> list[tuple[int, int]]:
    """(rows, length) of what each fused layer is given in a call of the model."""
    from bertfast.hf import layer

    shapes = []
    run_layer = layer.run_layer

    def spy(parts, x, *rest):
        shapes.append(tuple(x.shape[:2]))
        return run_layer(parts, x, *rest)

    with mock.patch.object(layer, "run_layer", spy):
        model(**inputs)
    return shapes


def packs(model: torch.nn.Module, inputs: dict) -> bool:
    """True if the layers compute nothing for the padding."""
    seen = rows_seen(model, inputs)
    tokens = int(inputs["attention_mask"].sum())
    return bool(seen) and all(shape == (1, tokens) for shape in seen)
