"""The page: one HTML file with its data, styles and script, that asks nothing of a network.

Attention weights p are kept as the byte round(255 sqrt(p)), which is within 0.4 percentage points
of any weight and within 0.03 of one of 0.5 %, deflated, in base64: 3 to 4 MB for 6 layers of 12
heads at 256 tokens. Above MOST_WEIGHTS of them the page has the mean of each layer's heads alone.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import string
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....commands.errors import UserError
from .attributions import Attribution
from .encoded import MOST_CUT, Encoded
from .targets import Prediction

MOST_WEIGHTS = 10_000_000


def write(
    out: Path,
    model: nn.Module,
    encoded: Encoded,
    prediction: Prediction,
    attributions: list[Attribution],
    weights: torch.Tensor | None,
) -> Path:
    config: Any = model.config
    data = {
        "task": prediction.task,
        "model": Path(str(getattr(config, "_name_or_path", ""))).name or type(model).__name__,
        "tokens": [
            {"token": t.token, "text": t.text, "before": t.before, "segment": t.segment}
            for t in encoded.tokens
        ],
        "rest": [_shortened(rest) for rest in encoded.rest],
        "cut": encoded.cut,
        "limit": encoded.limit,
        "labels": prediction.of_tokens,
        "unexplained": len(prediction.targets) - len(attributions),
        "noAnswer": prediction.no_answer,
        "targets": [_attribution(made) for made in attributions],
        "attention": None if weights is None else _attention(weights),
    }
    try:
        out.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page: {str(out)!r} can't be written: {error.strerror}") from None
    return out


def page(data: dict[str, Any]) -> str:
    files = importlib.resources.files(__package__)
    template, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    return string.Template(template).substitute(
        title=html.escape(f"{data['model']}: {data['task']}, explained"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embedded(data),
    )


def embedded(data: Any) -> str:
    """JSON as the text of a script element, which no text of the data can end."""
    made = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        made = made.replace(character, f"\\u{ord(character):04x}")
    return made


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _attribution(made: Attribution) -> dict[str, Any]:
    target = made.target
    numbers = [*made.scores.tolist(), made.output, made.baseline]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"the model's output for {target.name!r} is not finite")
    return {
        "name": target.name,
        "probability": target.probability,
        "span": target.token,
        "scores": [_rounded(score) for score in made.scores.tolist()],
        "output": _rounded(made.output),
        "baseline": _rounded(made.baseline),
        "sum": _rounded(float(made.scores.sum())),
        "delta": _rounded(made.delta),
        "steps": made.steps,
        "converged": made.converged,
    }


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def _attention(weights: torch.Tensor) -> dict[str, Any]:
    layers, heads = weights.shape[:2]
    outside = 1 - float(weights.sum(-1).mean())
    mean = weights.numel() > MOST_WEIGHTS
    if mean:
        weights = weights.mean(1, keepdim=True)
    made = weights.clamp(0, 1).sqrt().mul(255).round().to(torch.uint8).numpy().tobytes()
    deflated = base64.b64encode(zlib.compress(made, 9)).decode()
    told = {"layers": layers, "heads": heads, "mean": mean, "outside": _rounded(outside)}
    return {**told, "bytes": deflated}


def _shortened(text: str) -> str:
    if len(text) <= MOST_CUT:
        return text
    return f"{text[:MOST_CUT]} … ({len(text) - MOST_CUT:,} more characters)"
