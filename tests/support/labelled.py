"""Small labelled sets that a tiny model can learn, and files of them."""

import csv
import json
import random
from pathlib import Path

GOOD, BAD = ("aa", "ee", "ii"), ("xx", "zz", "qq")
FILLERS = ("b", "c", "d", "f", "g", "h", "the", "was")


def _text(draw: random.Random, words: tuple[str, ...], longest: int = 9) -> str:
    text = [draw.choice(FILLERS) for _ in range(draw.randrange(2, longest))]
    text.insert(draw.randrange(len(text)), draw.choice(words))
    return " ".join(text)


def reviews(count: int = 60) -> list[dict]:
    """Two labels, one twice as common."""
    draw = random.Random(1)
    return [
        {"text": _text(draw, BAD if n % 3 == 0 else GOOD), "label": ("good", "bad")[n % 3 == 0]}
        for n in range(count)
    ]


def pairs(count: int = 60, scored: bool = False) -> list[dict]:
    """Of texts with words of the same kind, or not."""
    draw = random.Random(2)
    rows = []
    for _ in range(count):
        first, second = draw.choice((GOOD, BAD)), draw.choice((GOOD, BAD))
        same = first is second
        label = round(4.0 * same + draw.random(), 2) if scored else int(same)
        texts = _text(draw, first, 5), _text(draw, second, 5)
        rows.append(
            {"sentence1": texts[0], "sentence2": texts[1], "score" * scored or "label": label}
        )
    return rows


def sentences(count: int = 60) -> list[dict]:
    """Words of the first kind are persons, of one or two words; the second kind's are places."""
    draw = random.Random(3)
    rows = []
    for _ in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        for _ in range(draw.randrange(3, 7)):
            kind = draw.random()
            if kind < 0.25:
                names = [draw.choice(GOOD) for _ in range(draw.randrange(1, 3))]
                tokens += names
                tags += ["B-PER", "I-PER"][: len(names)]
            elif kind < 0.4:
                tokens.append(draw.choice(BAD))
                tags.append("B-LOC")
            tokens.append(draw.choice(FILLERS))
            tags.append("O")
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def questions(count: int = 60, without: bool = False) -> list[dict]:
    """The answer is the one word of the second kind; without: each fourth has none."""
    draw = random.Random(4)
    rows = []
    for number in range(count):
        context = " ".join(draw.choice(FILLERS) for _ in range(draw.randrange(3, 9)))
        answers: dict = {"text": [], "answer_start": []}
        if not (without and number % 4 == 0):
            word = draw.choice(BAD)
            answers = {"text": [word], "answer_start": [len(context) + 1]}
            context = f"{context} {word} {draw.choice(FILLERS)}"
        rows.append({"question": "who was it", "context": context, "answers": answers})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    """A file of the kind that its ending says."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".conll":
        path.write_text(
            "-DOCSTART- O\n\n"
            + "\n".join(
                "".join(f"{w} x {t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True))
                for row in rows
            )
        )
    elif path.suffix == ".json":
        paragraphs = [
            {
                "context": row["context"],
                "qas": [
                    {
                        "id": str(number),
                        "question": row["question"],
                        "answers": [
                            {"text": text, "answer_start": start}
                            for text, start in zip(*row["answers"].values(), strict=True)
                        ],
                    }
                ],
            }
            for number, row in enumerate(rows)
        ]
        path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    else:
        flat = [
            {name: " ".join(v) if isinstance(v, list) else v for name, v in row.items()}
            for row in rows
        ]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, flat[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(flat)
    return path
