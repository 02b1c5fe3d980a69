"""`bertfast verify --model DIR`: a saved model, converted and not, on the same inputs.

Each output and the gradient of each parameter is held to the budget of bertfast/testing/model.py.
Dropout is off: its masks are not the stock model's, whatever the seed.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert import Report, optimize, report
from ..ops import dispatch
from ..testing.budget import worst
from ..testing.model import WAYS, beside_stock
from . import saved
from .errors import UserError
from .terminal import BAD, GOOD, Column, Progress, Table, console

ROWS, LENGTH = 4, 64  # of the random inputs


@dataclass(frozen=True)
class Row:
    inputs: str
    tensor: str  # the output, or of the gradients the one nearest to its budget
    error: float
    allowed: float
    stock_error: float
    ok: bool


def check(
    model: torch.nn.Module,
    texts: list[str],
    tokenizer: Any = None,
    backend: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    rows = []
    for label, inputs in _inputs(model, texts, tokenizer):
        say(label)
        real = inputs["attention_mask"].bool() if inputs["attention_mask"].ndim == 2 else None
        found = beside_stock(model, lambda m: optimize(m, backend=backend), inputs, real)
        errors = {finding.name: stock for finding, stock in found}
        findings = [finding for finding, _ in found]
        shown = [f for f in findings if not f.name.startswith("d ")]
        gradients = [f for f in findings if f.name.startswith("d ")]
        # every one that is wrong, and the worst of those that are right
        shown += [f for f in gradients if not f.ok] or ([worst(gradients)] if gradients else [])
        rows += [Row(label, f.name, f.max_error, f.max_budget, errors[f.name], f.ok) for f in shown]
    return rows


def _inputs(
    model: Any, texts: list[str], tokenizer: Any
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    config = model.config
    device = model.device
    length = min(LENGTH, config.max_position_embeddings - 2)
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id or 0
    for label, side, lengths in (
        ("random, no padding", "right", [length] * ROWS),
        ("random, padding right", "right", [length, length // 2, length // 4, 3]),
        ("random, padding left", "left", [length, length // 2, length // 4, 3]),
    ):
        ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
        ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
        place = torch.arange(length).expand(ROWS, -1)
        count = torch.tensor(lengths)[:, None]
        mask = place < count if side == "right" else place >= length - count
        ids = torch.where(mask, ids, pad)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if type(model).__name__.endswith("ForMultipleChoice"):
            inputs = {name: value.unflatten(0, (2, -1)) for name, value in inputs.items()}
        yield label, {name: value.to(device) for name, value in inputs.items()}
    if texts:
        encoded = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=config.max_position_embeddings - 2,
            return_tensors="pt",
        )
        yield f"{len(texts)} texts", {name: value.to(device) for name, value in encoded.items()}


def load(directory: str) -> torch.nn.Module:
    """The model of a directory, of the class that it was saved from, in eval."""
    config = saved.config(directory)
    import transformers

    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else transformers.AutoModel
    return saved.load(kind, directory, dtype=torch.float32).eval()


def read_texts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {str(path)!r} can't be read: {error}") from None
    if not lines:
        raise UserError(f"--texts must have a line of text, {str(path)!r} has none")
    return lines


def verify_model(
    directory: str, texts: Path | None = None, backend: str | None = None, as_json: bool = False
) -> int:
    """Prints the table; returns the exit code: 1 if any number is outside its budget."""
    lines = [] if texts is None else read_texts(texts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = backend or "auto"
    for op in dispatch.ops() if backend else ():
        if reason := dispatch.unsupported_reason(op, wanted, device, torch.float32):
            raise UserError(f"--backend {backend} can't run a float32 model's {op} here: {reason}")
    with Progress(0) as progress:
        progress.show(f"loading {directory}")
        model = load(directory).to(device)
        tokenizer = None
        if lines:
            import transformers

            tokenizer = saved.load(transformers.AutoTokenizer, directory)
        layers = report(optimize(copy.deepcopy(model), backend=wanted))
        fused = sum(row.reason is None for row in layers)
        rows = check(model, lines, tokenizer, wanted, progress.show) if fused else []
    ok = bool(rows) and all(row.ok for row in rows)
    if as_json:
        reasons = {row.name: row.status for row in layers}
        record = {"ok": ok, "model": type(model).__name__, "layers": reasons}
        print(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        _print(directory, model, layers, fused, rows)
    return 0 if ok else 1


def short(name: str) -> str:
    """A parameter's name without what is the same for all layers."""
    return re.sub(r"\b(?:\w+\.)*layers?\.(\d+)\.", r"layer \1: ", name)


def _print(
    directory: str, model: torch.nn.Module, layers: Report, fused: int, rows: list[Row]
) -> None:
    out = console()
    out.print(f"{type(model).__name__}, {fused} of {len(layers)} layers fused: {directory}")
    if fused < len(layers) or not rows:
        out.print(str(layers))
    if not rows:
        out.print("nothing to compare: no layer is fused", style=BAD)
        return
    table = Table(
        [*map(Column, ("error", "allowed", "stock's")), *(Column(h, True) for h in ("", "tensor"))],
        "\nerror against the stock model in float64, and what is allowed",
        "Real tokens only. allowed: twice the stock model's own error, the worst of "
        f"{WAYS} ways to order its sums, and one rounding. Of the gradients, d ..., the one "
        "nearest to its budget, and each that is outside.",
    )
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].inputs != row.inputs:
            table.add(row.inputs)
        numbers = (f"{value:.1e}" for value in (row.error, row.allowed, row.stock_error))
        verdict = "right" if row.ok else "WRONG"
        table.add(*numbers, verdict, short(row.tensor), style=GOOD if row.ok else BAD)
    table.print(out)
