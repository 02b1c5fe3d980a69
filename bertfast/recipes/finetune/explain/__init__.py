"""One text explained on one HTML page: what each token adds to an output, and attention weights.

explain(model, tokenizer, "a text", task="classify", out=Path("page.html"))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....commands.errors import need, writable_file
from .attention import weights_of
from .attributions import attributions_of
from .encoded import encode
from .page import write
from .targets import predict, targets_of
from .unchanged import unchanged

__all__ = ["explain"]


def explain(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    task: str,
    labels: Sequence[str] | None = None,
    out: Path,
) -> Path:
    """Writes the page to `out` and returns that.

    model: of transformers, with the task's head; PEFT's adapters and `bertfast.optimize` may be on
    it. It runs its original code, without dropout, and is left as it was.

    texts: one text for "classify" and "tag"; two for "pair", and for "qa" the question and the
    context.

    labels: of "classify" and "pair" the labels to explain, by default the ten most probable ones;
    of "tag" the labels whose tokens are explained. Each of a tag's targets is one token, as each
    takes as long as a whole text of the other tasks: by default the ten words that have a label
    other than "O" with the highest probability.

    Raises UserError for what can't be explained.
    """
    need("explaining a text", ("transformers", "captum"), "finetune")
    model = getattr(model, "_orig_mod", model)
    writable_file("the page", out)
    with unchanged(model):
        encoded = encode(model, tokenizer, texts, task)
        prediction = predict(model, encoded, task)
        targets = targets_of(prediction, encoded, labels)
        attributions = attributions_of(model, encoded, task, targets)
        weights = weights_of(model, encoded)
    return write(out, model, encoded, prediction, attributions, weights)
