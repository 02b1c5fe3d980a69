"""The outcome of a run: a plain transformers folder, its figures as training.json, and its card."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from . import model as models
from .options import EVALUATED_SHARE
from .shards import Shards

FACTS, EVALUATION = "training.json", "evaluation.json"


def write_model(folder: Path, state: dict[str, Any], config: Any, nsp: bool, data: Shards) -> None:
    """Weights, configuration and tokenizer as transformers saves them; whole or as before. state:
    of a `Pretraining`, whose parameters are called model.NAME."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    plain: Any = models.new(config, nsp)
    plain.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    logging.disable_progress_bar()
    plain.save_pretrained(aside)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def write(folder: Path, facts: dict[str, Any]) -> None:
    """The card, and what it is made of."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "README.md").write_text(text(facts))


def add_evaluation(folder: Path, figures: dict[str, float], options: dict[str, Any]) -> None:
    """A later evaluation, in the place of the run's own."""
    told = json.dumps({"figures": figures, "options": options}, indent=1)
    (folder / EVALUATION).write_text(told + "\n")
    if (folder / FACTS).is_file():
        facts = json.loads((folder / FACTS).read_text())
        share = options["masked_share"]
        write(folder, {**facts, "evaluation": figures, "evaluated_share": share})


def text(facts: dict[str, Any]) -> str:
    """README.md: what the model is, its figures, how it was trained, how it is loaded."""
    options, figures = facts["options"], facts.get("evaluation") or {}
    nsp = bool(options["nsp"])
    kind = "AutoModelForPreTraining" if nsp else "AutoModelForMaskedLM"
    tasks = "masked tokens and next sentences" if nsp else "masked tokens"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [bert, bertfast]",
        "---",
        "",
        f"# A BERT of {facts['parameters']:,} parameters",
        "",
        f"Pre-trained by `bertfast.recipes.pretrain` on {tasks}, with the recipe "
        f"`{options['recipe']}`. It is a plain transformers model:",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "## Figures",
        "",
    ]
    if figures:
        share = 100 * facts.get("evaluated_share", EVALUATED_SHARE)
        lines += [
            f"On documents that were kept from training, {share:.0f} % of the tokens predicted:",
            "",
            *_table("figure", _named(figures)),
        ]
    else:
        lines += ["Not evaluated: no documents were kept from training."]
    trained = {
        "steps": f"{facts['steps']:,}",
        "tokens": f"{facts['tokens']:,}",
        "hours": f"{facts['seconds'] / 3600:.2f}",
        "processes": facts["processes"],
        "device": facts["device"],
        "precision": facts["precision"],
        **{f"version of {name}": version for name, version in facts["versions"].items()},
    }
    # Paths of the machine that trained it, and what stands in the table of the model.
    told = ("data", "out", "model", "size", "layers", "width", "heads", "inner")
    settings = {n: value for n, value in options.items() if n not in told and value is not None}
    settings["betas"] = ", ".join(map(str, facts["betas"]))
    if options["model"] is not None:
        settings["begun from"] = Path(options["model"]).name
    lines += ["", "## Model", "", *_table("", facts["model"])]
    lines += ["", "## Training", "", *_table("", trained)]
    lines += ["", "## Options", "", *_table("option", settings), ""]
    return "\n".join(lines)


def _named(figures: dict[str, float]) -> dict[str, str]:
    names = {
        "mlm_loss": "MLM loss, nats",
        "unigram_cross_entropy": "the same labels by frequencies, nats",
        "mlm_accuracy": "MLM accuracy",
        "nsp_loss": "NSP loss, nats",
        "nsp_accuracy": "NSP accuracy",
    }
    named = {told: f"{figures[name]:.4f}" for name, told in names.items() if name in figures}
    for name in ("labels", "sequences"):
        named[name] = f"{figures[name]:,.0f}"
    return named


def _table(head: str, rows: dict[str, Any]) -> list[str]:
    lines = [f"| {head} | |", "|---|---|"]
    return lines + [f"| {name} | {value} |" for name, value in rows.items()]
