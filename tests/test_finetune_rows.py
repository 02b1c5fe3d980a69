"""From files to the model's inputs: columns, wrong rows, windows, batches, the held-out part."""

import collections
import json

import numpy as np
import pytest
from support import encoders, labelled

transformers = pytest.importorskip("transformers")
for name in ("accelerate", "sklearn", "seqeval", "pyarrow", "matplotlib"):
    pytest.importorskip(name)

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.finetune import metrics, split, tables  # noqa: E402
from bertfast.recipes.finetune.__main__ import main  # noqa: E402
from bertfast.recipes.finetune.features import Batches  # noqa: E402
from bertfast.recipes.finetune.tasks import TASKS  # noqa: E402
from bertfast.recipes.finetune.tasks.classify import Pair  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return encoders.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return transformers.AutoTokenizer.from_pretrained(model)


def read(path, task, skip_bad=False, header=True, quotes=True, labelled=True, **given):
    made = TASKS[task](32)
    form = tables.Form(header, quotes)
    more = dict(form=form, labelled=labelled, skip_bad=skip_bad)
    return tables.read([path], made.roles, given, made.parse, **more)


def examples(table):
    return [row.example for row in table.rows]


# Columns


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_all_kinds_of_files(tmp_path, ending):
    rows = labelled.reviews(9)
    found = read(labelled.write(tmp_path / f"a.{ending}", rows), "classify")
    assert [(one.first, one.label) for one in examples(found)] == [
        (row["text"], row["label"]) for row in rows
    ]
    assert (
        found.columns
        == {"text": "text", "label": "label"}
        == dict.fromkeys(found.found)
        | {
            "text": "text",
            "label": "label",
        }
    )


def test_numbers_are_labels_whatever_type_they_come_as(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 3} for n in range(6)]
    for ending in ("csv", "jsonl", "parquet"):
        found = read(labelled.write(tmp_path / f"a.{ending}", rows), "classify")
        assert [one.label for one in examples(found)] == ["0", "1", "2"] * 2
    holes = [*rows, {"text": "t", "label": None}]  # pandas makes floats of such a column
    path = labelled.write(tmp_path / "b.parquet", holes)
    with pytest.raises(
        UserError, match="row 6: 'label' must be a string, got NoneType; --skip-bad"
    ):
        read(path, "classify")
    assert len(read(path, "classify", skip_bad=True).rows) == 6
    task = TASKS["classify"](32)
    task.learn([task.parse({"text": "a", "label": str(n)}) for n in (10, 9, -1, 10, 9, -1)])
    assert task.labels == ["-1", "9", "10"]


def test_columns_by_what_stands_in_them(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("verdict\twords of theirs\n" + "yes\tone two\nno\tthree four\n" * 4)
    found = read(path, "classify")
    assert found.columns == {"text": "words of theirs", "label": "verdict"}
    path.write_text("yes\tone two\nno\tthree four\n" * 4)
    found = read(path, "classify", header=False)
    assert found.columns == {"text": "2", "label": "1"} and len(found.rows) == 8
    named = read(path, "classify", header=False, text="1", label="2")
    assert examples(named)[0].first == "yes"


def test_columns_that_are_not_known(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,c\n1,2,3\n4,5,6\n")
    with pytest.raises(UserError) as error:
        read(path, "classify")
    assert "a.csv has the columns 'a', 'b', 'c': say by --text which one is the text" in str(
        error.value
    )
    assert "--no-header" in str(error.value)
    with pytest.raises(UserError, match="--label: .*a.csv has no column 'd' among 'a', 'b', 'c'"):
        read(path, "classify", text="a", label="d")


def test_squad_and_conll(tmp_path):
    rows = labelled.questions(8, without=True)
    flat = read(labelled.write(tmp_path / "a.jsonl", rows), "qa")
    nested = read(labelled.write(tmp_path / "a.json", rows), "qa")
    assert examples(flat) == examples(nested) and examples(flat)[0].answers == []
    words = labelled.sentences(8)
    assert examples(read(labelled.write(tmp_path / "a.conll", words), "tag")) == examples(
        read(labelled.write(tmp_path / "b.jsonl", words), "tag")
    )
    csv = [{"tokens": " ".join(r["tokens"]), "tags": " ".join(r["tags"])} for r in words]
    assert examples(read(labelled.write(tmp_path / "c.csv", csv), "tag")) == examples(
        read(tmp_path / "a.conll", "tag")
    )


def test_a_folder_of_parts(tmp_path):
    for name in ("train.csv", "dev.csv", "test.csv", "notes.md"):
        (tmp_path / name).write_text("text,label\n")
    assert {part: [p.name for p in found] for part, found in tables.splits(tmp_path).items()} == {
        "train": ["train.csv"],
        "validation": ["dev.csv"],
        "test": ["test.csv"],
    }
    (tmp_path / "train.csv").unlink()
    with pytest.raises(UserError, match="must hold files of training data called train.csv"):
        tables.splits(tmp_path)


# Wrong rows: (task, file, what it holds, what is said of the first bad row, rows that are right)
WRONG = [
    ("classify", "a.csv", "text,label\na,x\n,y\nb,y\n", "line 3: the text is empty", 2),
    ("classify", "a.csv", "text,label\na,x\nb,\n", "line 3: the label is empty", 1),
    ("classify", "a.csv", "text,label\na,x\nb\n", "line 3: has 1 cells, and line 1 names 2", 1),
    ("classify", "a.tsv", 'text\tlabel\na\tx\n"b" c\ty\n', "line 3: must be CSV", 1),
    ("classify", "a.csv", b"text,label\na,x\n\xe9,y\n", "line 3: must be UTF-8, got the byte", 1),
    (
        "classify",
        "a.jsonl",
        '{"text": "a", "label": "x"}\n{"text": 1}\n',
        "line 2: has no 'label'",
        1,
    ),
    ("classify", "a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', "line 2: must be JSON", 1),
    ("classify", "a.jsonl", '{"text": "a", "label": [1]}\n', "line 1: 'label' must be a string", 0),
    ("tag", "a.jsonl", '{"tokens": ["a"], "tags": []}\n', "line 1: the label is empty", 0),
    ("tag", "a.csv", "tokens,tags\na b,O\n", "line 2: there are 2 words and 1 tags", 0),
    ("tag", "a.conll", "a O\nb\n\nc O\n", "line 1: line 2 must have a word and its tag", 1),
    ("tag", "a.csv", "tokens,tags\n\"['a']\",O\n", "line 2: the text must be a list, or words", 0),
    ("qa", "a.csv", "question,context,answer\nq,a b,c\n", "line 2: the context doesn't have", 0),
    (
        "qa",
        "a.csv",
        "question,context,answer,answer_start\nq,a b,b,0\n",
        "at 0 the context has 'a'",
        0,
    ),
    ("qa", "a.csv", "question,context,answer,answer_start\nq,a,a,x\n", "must be a whole number", 0),
    (
        "qa",
        "a.jsonl",
        '{"question": "q", "context": "c", "answers": [{}]}\n',
        "must have a text",
        0,
    ),
    ("qa", "a.jsonl", '{"question": "", "context": "c", "answers": []}\n', "question is empty", 0),
]


@pytest.mark.parametrize("task,name,data,said,right", WRONG)
def test_wrong_rows(tmp_path, task, name, data, said, right):
    """Each is told by its file and line, or left out and counted."""
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as error:
        read(path, task)
    assert said in str(error.value) and str(path) in str(error.value), error.value
    if right:
        found = read(path, task, skip_bad=True)
        assert len(found.rows) == right and len(found.bad) == 1
        assert said.rpartition(": ")[2] in found.bad[0].reason or said in found.bad[0].where
    else:
        with pytest.raises(UserError, match="has no rows that are right"):
            read(path, task, skip_bad=True)


def test_quotation_marks_can_be_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"b" c\ty\n')
    with pytest.raises(UserError, match="--no-quotes reads quotation marks as text"):
        read(path, "classify")
    assert examples(read(path, "classify", quotes=False))[0].first == '"b" c'


def test_scores_and_labels_of_pairs():
    def learn(labels, scored=None):
        task = Pair(32, scored=scored)
        task.learn([task.parse({"text": "a", "second": "b", "label": one}) for one in labels])
        return task.scored, task.labels

    assert learn(["0", "1", "1"]) == (False, ["0", "1"])
    assert learn([0.5, 1.0, 3.25]) == (True, ["score"])
    assert learn(["0", "1.5"]) == (True, ["score"])
    assert learn(["0", "1", "5"], scored=True) == (True, ["score"])
    assert learn(["no", "yes", "1.5"]) == (False, ["1.5", "no", "yes"])
    with pytest.raises(ValueError, match="must be a finite number, got 'nan'"):
        Pair(32, scored=True).parse({"text": "a", "second": "b", "label": "nan"})
    with pytest.raises(UserError, match="all rows have the score 2"):
        learn(["2", "2"], scored=True)


# The held-out part


def test_each_label_is_held_out_by_its_share():
    task = TASKS["classify"](32)
    rows = [
        tables.Row(n, task.parse({"text": f"t{n}", "label": "abbcccc"[n % 7]})) for n in range(140)
    ]
    rows.append(tables.Row(140, task.parse({"text": "t", "label": "alone"})))
    train, held = split.held_out(rows, task, 0.2, seed=1)
    assert collections.Counter(row.example.label for row in held) == {"a": 4, "b": 8, "c": 16}
    assert sorted(row.number for row in [*train, *held]) == list(range(141))
    assert split.held_out(rows, task, 0.2, seed=1)[1] == held
    assert split.held_out(rows, task, 0.2, seed=2)[1] != held
    with pytest.raises(UserError, match="too few to hold some out"):
        split.held_out(rows[:4], task, 0.2, seed=1)


def test_questions_about_one_context_stay_together():
    task = TASKS["qa"](32)
    rows = [
        tables.Row(n, task.parse({"question": f"q{n}", "context": f"c{n // 3}", "answer": "c"}))
        for n in range(60)
    ]
    train, held = split.held_out(rows, task, 0.2, seed=1)
    contexts = [{row.example.context for row in part} for part in (train, held)]
    assert len(held) == 12 and not contexts[0] & contexts[1]


# Inputs


def test_long_texts_are_counted(tokenizer):
    task = TASKS["classify"](8)
    made = [task.parse({"text": "a " * count}) for count in (3, 6, 7, 30)]
    found = task.features(tokenizer, made, False)
    assert found.truncated == 2 and found.lengths.tolist() == [5, 8, 8, 8]
    pair = Pair(12)
    long = [pair.parse({"text": "a " * 30, "second": "b " * 20})]
    found = pair.features(tokenizer, long, False)
    assert found.truncated == 1 and found.lengths.tolist() == [12]


def windows_of(tokenizer, words, length, stride):
    task = TASKS["tag"](length, stride)
    task.labels = ["O", "X"]
    example = task.parse({"text": words, "label": ["OX"[n % 2] for n in range(len(words))]})
    return task, example, task.features(tokenizer, [example], True)


def test_windows_of_words(tokenizer):
    """Each word is seen, and of a word in two windows the one counts that has more around it."""
    words = ["ab"] * 10  # two tokens each, of which a window of 9 has seven
    task, example, cut = windows_of(tokenizer, words, 9, None)
    assert cut.truncated == 1 and len(cut) == 1
    assert [label for label in cut[0]["labels"] if label >= 0] == [0, 1, 0, 1]
    task, example, found = windows_of(tokenizer, words, 9, 3)
    assert found.truncated == 0 and len(found) > 2
    assert {word for seen in found.places for word in seen.words} == set(range(10))
    # A window that opens in the midst of a word doesn't take its second token for its first.
    for seen, inputs in zip(found.places, found.inputs, strict=True):
        firsts = [inputs["input_ids"][token] for token in seen.tokens]
        assert set(firsts) == {tokenizer.convert_tokens_to_ids("a")}
    # Each window says its own number, by the only label that it gives.
    for window in range(len(found)):
        outputs = [np.zeros((len(one["input_ids"]), 2)) for one in found.inputs]
        outputs[window][:, 1] = 9
        _, best = task._tags(found, [example], outputs)
        mine = {n for n, tag in enumerate(best[0]) if tag == "X"}
        contexts = {}
        for place, seen in enumerate(found.places):
            for word, context in zip(seen.words, seen.context, strict=True):
                contexts.setdefault(word, []).append((-context, place))
        assert mine == {word for word, all in contexts.items() if min(all)[1] == window}


def test_windows_of_contexts(tokenizer):
    """An answer far behind the limit is learnt in the window that has it, and found there."""
    task = TASKS["qa"](16, 4)
    context = "a " * 30 + "xyz " + "b " * 5
    example = task.parse({"question": "q", "context": context, "answer": "xyz"})
    found = task.features(tokenizer, [example], True, True)
    assert len(found) > 3
    spans = [(one["start_positions"], one["end_positions"]) for one in found.inputs]
    learnt = [place for place, span in enumerate(spans) if span != (0, 0)]
    assert learnt
    for place in learnt:
        ids = found[place]["input_ids"][spans[place][0] : spans[place][1] + 1]
        assert tokenizer.decode(ids) == "xyz"
    starts = [np.zeros(len(one["input_ids"])) for one in found.inputs]
    ends = [np.zeros(len(one["input_ids"])) for one in found.inputs]
    starts[learnt[0]][spans[learnt[0]][0]] = ends[learnt[0]][spans[learnt[0]][1]] = 9
    (answer,) = task.predictions(found, [example], (starts, ends))
    assert answer["answer"] == "xyz" and context[answer["start"] : answer["end"]] == "xyz"
    assert answer["score"] > 0.9
    assert task.figures(found, [example], (starts, ends)) == {"f1": 1.0, "exact": 1.0}
    cut = TASKS["qa"](16)
    assert cut.features(tokenizer, [example], True, True).left_out == 1
    assert len(cut.features(tokenizer, [example], True)) == 1
    # A question that leaves no room is cut, not the context.
    long = task.parse({"question": "q " * 40, "context": "a xyz b", "answer": "xyz"})
    assert len(task.features(tokenizer, [long], True)[0]["input_ids"]) <= 16


# Batches


@pytest.mark.parametrize("limits", [dict(texts=7, tokens=None), dict(texts=1, tokens=60)])
def test_batches(limits):
    lengths = np.random.default_rng(0).integers(3, 41, 503)
    batches = Batches(lengths, **limits, seed=5, epochs=6)
    seen = []
    for batches.epoch in range(6):
        made = list(batches)
        assert len(made) == len(batches)
        assert sorted(sum(made, [])) == list(range(503))
        if limits["tokens"]:
            assert all(len(one) * lengths[one].max() <= 60 for one in made)
        useful = sum(lengths) / sum(len(one) * lengths[one].max() for one in made)
        assert useful > 0.9  # a random order has some 0.55
        assert list(batches) == made
        seen.append(made)
    assert all(one != other for one, other in zip(seen, seen[1:], strict=False))


def test_a_text_longer_than_the_budget_is_a_batch():
    batches = Batches(np.array([3, 90, 3]), texts=1, tokens=10, seed=0, epochs=1)
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]


# Figures


def test_figures_of_answers():
    """By hand, after SQuAD's own script."""
    assert metrics.normal("The  Cat's, (an) hat!") == "cats hat"
    gold = [["the red cat"], ["a", "1912"], []]
    assert metrics.of_answers(gold, ["red cats", "in 1912", ""]) == {
        "f1": pytest.approx((0.5 + 2 / 3 + 1) / 3),
        "exact": pytest.approx(1 / 3),
    }


def test_figures_of_classes_and_entities():
    gold = np.array([0, 0, 0, 1, 1])
    chances = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9], [0.7, 0.3]])
    found = metrics.of_classes(gold, chances)
    assert found["accuracy"] == 0.6 and found["precision"] == 0.5 and found["recall"] == 0.5
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["roc_auc"] == pytest.approx(4 / 6)  # pairs in the right order
    assert "roc_auc" not in metrics.of_classes(np.zeros(5, int), chances)
    gold = [["B-A", "I-A", "O", "B-B"]]
    assert metrics.of_entities(gold, [["B-A", "O", "O", "B-B"]])["f1"] == 0.5
    assert metrics.are_entities(["O", "B-A"]) and not metrics.are_entities(["NOUN", "VERB"])
    assert metrics.of_scores(np.array([1.0, 2, 3]), np.array([1.0, 2, 4])) == {
        "spearman": pytest.approx(1.0),
        "pearson": pytest.approx(0.98198, abs=1e-5),
    }


# Requests that can't be met


@pytest.mark.parametrize(
    "arguments,said",
    [
        ("--out o", "nothing to do: give --data, --predict or --explain"),
        ("--data a.csv --out o", "--task must be one of classify, tag, qa, pair"),
        ("--task tags --data a.csv --out o", "got 'tags'; did you mean 'tag'?"),
        ("--task classify --data no.csv --out o", "no.csv doesn't exist"),
        ("--task classify --data a.csv --out o --stride 4", "--stride is for tag and qa"),
        ("--task classify --data a.csv --out o --merge", "--merge needs an adapter"),
        ("--task classify --data a.csv --out o --metric f2", "--metric must be one of f1_macro"),
        ("--task classify --data a.csv --out o.csv", "--out must be a folder"),
        ("--task classify --data a.csv --out o --length 99", "length must be 40 or less"),
        ("--task tag --stride 20 --data a.csv --out o", "--stride must be at most 16"),
        ("--task classify --data one.csv --out o", "all rows have the label 'x'"),
        ("--task classify --data ids.csv --out o", "say by --label which column has labels"),
        ("--predict a.csv --out o", "--task must be given, as"),
        ("--task classify --data a.csv --validation b.csv --out o", "the label is 'z', and"),
        ("--task classify --data a.csv --out o --precision fp16", "fp16 needs a GPU"),
        ("--task pair --data p.csv --out o --class-weights", "--class-weights is for labels"),
        (
            "--task tag --data a.csv --out o --device cuda:1",
            "--device must be one of auto, cpu, cu",
        ),
    ],
)
def test_requests_that_cannot_be_met(model, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    labelled.write(tmp_path / "a.csv", labelled.reviews(30))
    labelled.write(tmp_path / "p.csv", labelled.pairs(30, scored=True))
    (tmp_path / "b.csv").write_text("text,label\na,z\n")
    (tmp_path / "one.csv").write_text("text,label\n" + "a,x\n" * 30)
    (tmp_path / "ids.csv").write_text("text,label\n" + "".join(f"a,{n}\n" for n in range(30)))
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", *arguments.split(), "--model", str(model)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "o" / "run.json").exists() or "class-weights" in arguments


def test_what_was_left_out_is_listed(model, tmp_path, capsys):
    rows = labelled.reviews(30)
    rows[4]["text"] = rows[9]["label"] = ""
    data = labelled.write(tmp_path / "a.csv", rows)
    asked = ["--task", "classify", "--data", data, "--model", model, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as end:
        main([*map(str, asked), "--device", "cpu", "--skip-bad", "--epochs", "1"])
    assert not end.value.code
    said = capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| rows | train 25, validation 3, left out 2 |" in card
    assert "left out: 2 rows" in said and f"{data}, line 6 : the text is empty" in said
    listed = [json.loads(one) for one in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert listed == [
        {"where": f"{data}, line 6", "reason": "the text is empty"},
        {"where": f"{data}, line 11", "reason": "the label is empty"},
    ]


def test_it_is_one_process(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ["--task", "tag", "--data", tmp_path / "a.csv", "--out", tmp_path, "--model", model]
    with pytest.raises(SystemExit) as end:
        main([*map(str, asked)])
    assert end.value.code == 2 and "is one process on one device" in capsys.readouterr().err
