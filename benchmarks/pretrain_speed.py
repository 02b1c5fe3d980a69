"""Pre-training's real tokens per second: the recipe beside transformers' Trainer, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_speed.py

The text is what Python brings along (python_text.py), the task MLM alone, the model 4 layers of
width 256 with a vocabulary of 4,096: its head has the share of the work that BERT-base's has. Both
train from random weights by AdamW in float32, with dropout 0.1 and without, 15 % of the tokens
predicted, the same number of steps with as many real tokens each. Trainer has stock
BertForMaskedLM with SDPA and DataCollatorForLanguageModeling. Texts are cut in the two ways that
are usual there:

    paragraphs   each is a text of its own. Trainer cuts it at the length, and pads it to the
                 longest of its batch (run_mlm.py with --line_by_line); the recipe packs it
    documents    long texts. Trainer has all of them in a line, cut every so many tokens: full
                 rows, without padding, which go from one document into the next (run_mlm.py's
                 default, group_texts); the recipe cuts each by itself

All take turns, in one process; the rate of a turn leaves out its first steps, saving and
evaluation. It is by processor time, of all threads, input among them, so that other work on the
machine counts for little; the file has the clock's too.

In the file stand too the tokens per second that BERT-base packed at 512 should reach on one H100,
modelled by pretrain_modelled.py. They were not measured.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in pretrain_learns.py
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pretrain_modelled  # noqa: E402
import python_text  # noqa: E402
import torch  # noqa: E402
from pretrain_learns import call  # noqa: E402

from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.recipes.pretrain import meter  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "pretrain-speed.json"
GOALS = {"over_trainer": 2.0, "modelled_tokens_per_second": 600_000}
LENGTH, TOKENS = 128, 2048  # the longest row, and real tokens of a step
VOCABULARY, SHARE, LR = 4096, 0.15, 1e-4
DROPOUTS = 0.1, 0.0  # of bert-2018 and of modern
LAYERS, WIDTH, HEADS = 4, 256, 4
FIRST = 5  # steps that a turn doesn't count; the recipe prints its figures as often
CUTS = "paragraphs", "documents"
WAYS = tuple(f"{who}, {cut}" for cut in CUTS for who in ("recipe", "Trainer"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="of a turn, a multiple of 5")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--characters", type=int, help="of text, instead of all")
    told = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), told)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    told.out.write_text(json.dumps(result, indent=1) + "\n")
    for found in result["measured"]:
        for name in WAYS:
            rate = found["ways"][name]["tokens_per_second"]
            print(f"dropout {found['dropout']}, {name}: {rate:,} real tokens/s")
        print(f"over Trainer: {found['over_trainer']}")
    return 0


def measure(folder: Path, told: argparse.Namespace) -> dict[str, Any]:
    files = {cut: folder / f"{cut}.jsonl" for cut in CUTS}
    about = python_text.write(files["documents"], told.characters)
    about["paragraphs"] = paragraphs(files["documents"], files["paragraphs"])
    data = {cut: folder / cut for cut in CUTS}
    call("prepare", files["documents"], data=data["documents"], vocabulary=VOCABULARY)
    tokenizer = data["documents"] / "tokenizer"
    call("prepare", files["paragraphs"], data=data["paragraphs"], tokenizer=tokenizer)
    here = {**asdict(environment("cpu")), "threads": torch.get_num_threads()}
    rows = {cut: tokenised(files[cut], tokenizer, cut) for cut in CUTS}
    turns: list[dict[str, list[dict[str, float]]]] = [{n: [] for n in WAYS} for _ in DROPOUTS]
    for number in range(told.turns):
        for dropout, found in zip(DROPOUTS, turns, strict=True):
            for name in WAYS:
                who, cut = name.split(", ")
                turn = Turn(folder / f"{who}-{cut}-{dropout}-{number}", told.steps, number, dropout)
                if who == "recipe":
                    found[name].append(by_recipe(turn, data[cut]))
                else:
                    found[name].append(by_trainer(turn, rows[cut], tokenizer))
    return {
        "goals": GOALS,
        "environment": here,
        "text": about,
        "settings": {
            **{"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCABULARY},
            **{"length": LENGTH, "tokens": TOKENS, "masked_share": SHARE},
            **{"steps": told.steps, "turns": told.turns},
        },
        "measured": [
            {
                "dropout": dropout,
                "ways": {name: summary(one) for name, one in found.items()},
                "over_trainer": {cut: over(found, cut) for cut in CUTS},
            }
            for dropout, found in zip(DROPOUTS, turns, strict=True)
        ],
        "modelled": pretrain_modelled.h100(),
    }


def over(turns: dict[str, list[dict[str, float]]], cut: str) -> dict[str, float]:
    """How many times as fast the recipe is, turn by turn."""
    pairs = zip(turns[f"recipe, {cut}"], turns[f"Trainer, {cut}"], strict=True)
    ratios = sorted(ours["tokens_per_second"] / its["tokens_per_second"] for ours, its in pairs)
    found = {"median": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}
    return {name: round(ratio, 2) for name, ratio in found.items()}


def summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    rates = [turn["tokens_per_second"] for turn in turns]
    means = {
        name: round(statistics.mean(turn[name] for turn in turns), 3)
        for name in turns[0]
        if name != "tokens_per_second"
    }
    rounded = list(map(round, rates))
    return {"tokens_per_second": round(statistics.median(rates)), "turns": rounded, **means}


# The text


def paragraphs(documents: Path, path: Path) -> int:
    """JSON lines with a paragraph each, of more than three words; how many."""
    found = []
    for line in documents.read_text().splitlines():
        parts = re.split(r"\n\s*\n", json.loads(line)["text"])
        found += [" ".join(part.split()) for part in parts if len(part.split()) > 3]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in found))
    return len(found)


def tokenised(path: Path, folder: Path, cut: str) -> list[dict[str, Any]]:
    """Rows for Trainer, as run_mlm.py makes them."""
    tokenizer = tokenizer_of(folder)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    if cut == "paragraphs":
        made = tokenizer(texts, truncation=True, max_length=LENGTH, return_special_tokens_mask=True)
        names = ("input_ids", "attention_mask", "special_tokens_mask")
        return [{n: made[n][row] for n in names} for row in range(len(texts))]
    made = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    ids, special = (sum(made[n], []) for n in ("input_ids", "special_tokens_mask"))
    return [
        {
            "input_ids": ids[first : first + LENGTH],
            "special_tokens_mask": special[first : first + LENGTH],
            "attention_mask": [1] * LENGTH,
        }
        for first in range(0, len(ids) - LENGTH + 1, LENGTH)
    ]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# The turns


class Turn(NamedTuple):
    folder: Path
    steps: int
    seed: int
    dropout: float


class Moment(NamedTuple):
    processor: float
    wall: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.process_time(), time.perf_counter())


def rates(begun: Moment, ended: Moment, tokens: int, steps: int) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / (ended.processor - begun.processor),
        "tokens_per_second_by_the_clock": tokens / (ended.wall - begun.wall),
        "tokens_per_step": tokens / steps,
    }


def by_recipe(turn: Turn, data: Path) -> dict[str, float]:
    seen: list[tuple[Moment, dict[str, Any]]] = []
    write = meter.Log.write

    def watched(log: Any, step: int, figures: dict[str, Any], *more: Any) -> None:
        seen.append((Moment.now(), {"step": step, **figures}))
        write(log, step, figures, *more)

    with mock.patch.object(meter.Log, "write", watched):
        call(
            *("train", "--no-nsp"),
            **{"data": data, "out": turn.folder, "seed": turn.seed, "steps": FIRST + turn.steps},
            **{"length": LENGTH, "tokens": TOKENS, "micro_batches": 1, "masked_share": SHARE},
            **{"layers": LAYERS, "width": WIDTH, "heads": HEADS, "dropout": turn.dropout, "lr": LR},
            **{"print_every": FIRST, "schedule": "linear", "warmup": 0},
        )
    (begun, _), *counted = [one for one in seen if "input_wait" in one[1]]
    # A line's rate is over its steps' time.
    tokens = sum(x["tokens_per_second"] * x["seconds_per_step"] * FIRST for _, x in counted)
    useful = statistics.mean(x["useful_tokens"] for _, x in counted)
    return {**rates(begun, counted[-1][0], round(tokens), turn.steps), "useful": useful}


def by_trainer(turn: Turn, rows: list[dict[str, Any]], saved: Path) -> dict[str, float]:
    import transformers

    torch.manual_seed(turn.seed)
    tokenizer = tokenizer_of(saved)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=turn.dropout,
        attention_probs_dropout_prob=turn.dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.BertForMaskedLM(config)
    mean = statistics.mean(len(row["input_ids"]) for row in rows)
    usual = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=SHARE)
    counts: list[tuple[int, int]] = []  # real tokens and all, batch by batch

    def collate(batch: list[dict[str, Any]]) -> Any:
        made = usual(batch)
        counts.append((int(made["attention_mask"].sum()), made["input_ids"].numel()))
        return made

    ends: list[Moment] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(Moment.now())

    arguments = transformers.TrainingArguments(
        str(turn.folder),
        max_steps=FIRST + turn.steps,
        per_device_train_batch_size=round(TOKENS / mean),
        learning_rate=LR,
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=turn.seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    ).train()
    counted = counts[FIRST : FIRST + turn.steps]
    real = sum(one for one, _ in counted)
    useful = real / sum(every for _, every in counted)
    return {**rates(ends[FIRST - 1], ends[-1], real, turn.steps), "useful": useful}


if __name__ == "__main__":
    sys.exit(main())
