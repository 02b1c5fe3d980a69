"""The model's card."""

import dataclasses
from pathlib import Path
from typing import Any

from ..pretrain.options import flag
from . import report
from .options import FinetuneOptions

KINDS = {
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "pair": ("text-classification", "AutoModelForSequenceClassification"),
    "tag": ("token-classification", "AutoModelForTokenClassification"),
    "qa": ("question-answering", "AutoModelForQuestionAnswering"),
}
TOLD = ("epochs", "batch", "lr", "seed")
# Paths of the machine that trained it, and what doesn't decide the numbers.
UNTOLD = ("data", "out", "model", "validation", "predict", "explain", "explain_with", "overwrite")


def text(facts: dict[str, Any], figures: dict[str, dict[str, float]], tables: dict) -> str:
    options = facts["options"]
    pipeline, kind = KINDS[options["task"]]
    plain = options["peft"] is None or options["merge"]
    lines = [
        "---",
        f"library_name: {'transformers' if plain else 'peft'}",
        f"pipeline_tag: {pipeline}",
        "tags: [bertfast]",
        "---",
        "",
        f"# {facts['base']}, fine-tuned ({options['task']})",
        "",
        "Trained by `bertfast.recipes.finetune`. It is "
        + ("a plain transformers model:" if plain else f"a peft adapter of {facts['base']}:"),
        "",
        "```python",
    ]
    if plain:
        lines += [
            f"from transformers import AutoTokenizer, {kind}",
            "",
            f'model = {kind}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    else:
        lines += [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f'base = {kind}.from_pretrained("BASE", num_labels={facts["labels"]})',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    lines += ["```", "", "## Figures", "", *report.table(figures)]
    if "each" in tables:
        lines += ["", "Of each label, held out:", "", *report.each_table(tables["each"])]
    trained = {
        **{name: facts[name] for name in ("rows", "steps", "minutes", "device", "precision")},
        **{f"version of {name}": version for name, version in facts["versions"].items()},
    }
    default = {option.name: option.default for option in dataclasses.fields(FinetuneOptions)}
    settings = {
        flag(name): value
        for name, value in options.items()
        if name in TOLD or (name not in UNTOLD and value != default[name])
    }
    lines += ["", "## Training", "", *_two_columns(trained)]
    lines += ["", "## Options", "", *_two_columns(settings), ""]
    return "\n".join(lines)


def write(folder: Path, facts: dict[str, Any], figures: Any, tables: dict[str, Any]) -> None:
    (folder / "README.md").write_text(text(facts, figures, tables))


def _two_columns(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
