"""Predictions of a file's rows, in their order, and the page that explains one text."""

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...commands.errors import UserError, writable_file
from ..embed.encoders import device_of
from . import model, tables, train, trainer
from .options import FinetuneOptions
from .tables import Row
from .tasks import Task

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
AT_ONCE = 4096  # rows whose outputs are held


def predict(options: FinetuneOptions, out: Path) -> int:
    """Writes a row for each of the file: its number, its id, and what the task predicts."""
    assert options.predict is not None
    writable_file("--out", out)
    tokenizer = model.tokenizer_of(model.base_of(options.model), _task_name(options))
    task = model.task_of(options, tokenizer)
    given = {role: name for role in task.roles if (name := getattr(options, role, None))}
    needed = {role: about for role, about in task.roles.items() if about.needed[1]}
    read = tables.read(
        [options.predict],
        needed,
        {role: name for role, name in given.items() if role in needed},
        task.parse,
        form=tables.Form(options.header, options.quotes),
        labelled=False,
        skip_bad=options.skip_bad,
        id=options.id,
    )
    for bad in read.bad:
        print(f"left out: {bad.where}: {bad.reason}")
    with tempfile.TemporaryDirectory() as scratch:
        made = _trainer(options, task, tokenizer, Path(scratch))
        _write(out, list(_predicted(made, task, tokenizer, read.rows, options.id)))
    print(f"{out}: predictions of {len(read.rows):,} rows")
    return 0


def _task_name(options: FinetuneOptions) -> str:
    told = model.known(options.model)
    return options.task or (told.task if told else "")


def _trainer(
    options: FinetuneOptions, task: Task, tokenizer: Any, scratch: Path
) -> trainer.Finetuner:
    device = device_of(options.device)
    precision = train.precision(options.precision, device)
    arguments = trainer.arguments(
        scratch,
        use_cpu=device.type == "cpu",
        per_device_eval_batch_size=options.batch,
        label_names=list(task.label_names),
        **train.of_precision(precision),
    )
    return trainer.Finetuner(
        model.load(options, task), arguments, data_collator=trainer.collator(tokenizer, task)
    )


def _predicted(
    made: trainer.Finetuner, task: Task, tokenizer: Any, rows: Sequence[Row], id: str | None
) -> Iterator[dict[str, Any]]:
    cut = 0
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        examples = [row.example for row in some]
        features = task.features(tokenizer, examples, False).by_length()
        cut += features.truncated
        outputs = trainer.outputs_of(made, features) if len(features) else []
        for row, found in zip(some, task.predictions(features, examples, outputs), strict=True):
            yield {"row": row.number, **({} if id is None else {id: row.id}), **found}
    if cut:
        print(f"{cut:,} texts are longer than {task.length} tokens, and cut there")


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    if out.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), out)
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if out.suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    name: json.dumps(value, ensure_ascii=False)
                    if isinstance(value, (dict, list))
                    else value
                    for name, value in row.items()
                }
            )


def explain(options: FinetuneOptions, out: Path) -> int:
    """Writes the page."""
    from .explain import explain as write_page

    assert options.explain is not None
    writable_file("--out", out)
    tokenizer = model.tokenizer_of(model.base_of(options.model), _task_name(options))
    task = model.task_of(options, tokenizer)
    texts = [options.explain, *([options.explain_with] if options.explain_with else [])]
    wanted = 2 if task.name in ("pair", "qa") else 1
    if len(texts) != wanted:
        said = "needs" if wanted == 2 else "can't have"
        raise UserError(f"--explain of {task.name} {said} --explain-with")
    loaded = model.load(options, task).to(device_of(options.device)).eval()
    write_page(loaded, tokenizer, texts, task=task.name, out=out)
    print(f"{out}: open it in a browser")
    return 0
