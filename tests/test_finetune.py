"""Fine-tuning as its users run it: each task learns, saves what transformers reads, and goes on."""

import json
import signal

import numpy as np
import pytest
import torch
from support import encoders, labelled

transformers = pytest.importorskip("transformers")
for name in ("accelerate", "sklearn", "seqeval", "pyarrow", "matplotlib"):
    pytest.importorskip(name)

from bertfast.recipes.finetune import trainer  # noqa: E402
from bertfast.recipes.finetune.__main__ import main, run  # noqa: E402
from bertfast.settings import is_converted  # noqa: E402

SMALL = "--device cpu --batch 8 --lr 3e-3".split()
# Name -> task, file, rows, and the least of its figure after ten passes over what it is tested on;
# the least of a model that knows nothing is beside.
LEARNT = {
    "labels": ("classify", "a.csv", labelled.reviews(), "accuracy", 0.95),  # 0.67
    "pairs": ("pair", "a.tsv", labelled.pairs(120), "accuracy", 0.9),  # 0.5
    "scores": ("pair", "a.jsonl", labelled.pairs(120, scored=True), "pearson", 0.9),  # 0
    "tags": ("tag", "a.conll", labelled.sentences(), "f1", 0.6),  # 0
    "answers": ("qa", "a.parquet", labelled.questions(), "exact", 0.9),  # 0.2
    "some answers": ("qa", "a.json", labelled.questions(without=True), "exact", 0.9),  # 0.3
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return encoders.save(tmp_path_factory.mktemp("encoder"), **still)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, encoder):
    """Runs by the names of LEARNT, each done once."""
    done = {}

    def of(name):
        if name not in done:
            task, file, rows, *_ = LEARNT[name]
            folder = tmp_path_factory.mktemp("run")
            data = str(labelled.write(folder / file, rows))
            arguments = ["--task", task, "--data", data, "--validation", data, "--predict", data]
            arguments += ["--model", str(encoder), "--out", str(folder / "run"), "--epochs", "10"]
            assert run([*arguments, *SMALL]) == 0
            done[name] = folder / "run"
        return done[name]

    return of


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--device", "cpu"])
    assert end.value.code == 2
    return capsys.readouterr().err


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", LEARNT)
def test_each_task_learns(learnt, name):
    folder = learnt(name)
    figures = json.loads((folder / "metrics.json").read_text())["figures"]["held out"]
    figure, least = LEARNT[name][3:]
    assert figures[figure] >= least, figures
    assert len(read_lines(folder / "predictions.jsonl")) == len(LEARNT[name][2])
    card = (folder / "model" / "README.md").read_text()
    assert f"| {figure} | {figures[figure]:.4f} |" in card and "--batch | 8" in card


def test_plain_transformers_reads_the_model(learnt):
    """A model of labels: the stock class gives the predicted labels and scores."""
    folder = learnt("labels")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert not is_converted(model) and model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    predicted = read_lines(folder / "predictions.jsonl")
    for row, found in zip(labelled.reviews()[:9], predicted, strict=False):
        with torch.no_grad():
            logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        chances = logits.double().softmax(-1).tolist()
        assert found["label"] == row["label"] == ("bad", "good")[int(logits.argmax())]
        assert list(found["scores"].values()) == pytest.approx(chances, abs=1e-5)


def test_spans_are_in_the_text(learnt):
    for row, found in zip(
        labelled.sentences(), read_lines(learnt("tags") / "predictions.jsonl"), strict=True
    ):
        assert found["text"] == " ".join(row["tokens"])
        for span in found["spans"]:
            assert found["text"][span["start"] : span["end"]] == span["text"] != ""
            assert span["label"] in ("PER", "LOC") and 0 < span["score"] <= 1
    rows = labelled.questions(without=True)
    predicted = read_lines(learnt("some answers") / "predictions.jsonl")
    right = 0
    for row, found in zip(rows, predicted, strict=True):
        assert row["context"][found["start"] : found["end"]] == found["answer"]
        assert (found["answer"] == "") == (found["none"] > 0.5)
        right += [found["answer"]] == (row["answers"]["text"] or [""])
    assert right >= 0.9 * len(rows)


def test_plots_tables_and_tensorboard(learnt, capsys):
    folder = learnt("labels")
    for name in ("training.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    told = json.loads((folder / "metrics.json").read_text())
    assert sum(map(sum, told["confusion"])) == 60 and told["each"]["bad"]["support"] == 20
    assert any("eval_loss" in one for one in told["history"])
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert {"train/loss", "eval/accuracy"} <= set(board.Tags()["scalars"])


def test_the_same_command_again_says_that_all_is_done(learnt, encoder, tmp_path, capsys):
    folder = learnt("labels")
    data = folder.parent / "a.csv"
    asked = ["--task", "classify", "--data", str(data), "--validation", str(data), "--epochs", "10"]
    asked += ["--model", str(encoder), "--out", str(folder)]
    assert run([*asked, *SMALL]) == 0
    assert "has a trained model already" in capsys.readouterr().out
    said = fails([*asked, *SMALL, "--lr", "1e-3"], capsys)
    assert "--lr was 0.003, and is 0.001 now" in said


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_predictions_alone(learnt, tmp_path, ending, capsys):
    """By the saved model, of a file with other columns, and ids."""
    rows = [{"key": f"k{n}", "text": row["text"]} for n, row in enumerate(labelled.reviews(9))]
    rows.insert(3, {"key": "empty", "text": " "})
    data, out = labelled.write(tmp_path / "new.csv", rows), tmp_path / f"out.{ending}"
    asked = ["--model", learnt("labels") / "model", "--predict", data, "--out", out, "--id", "key"]
    assert "new.csv, line 5: the text is empty" in fails(asked, capsys)
    assert run([*map(str, asked), "--skip-bad", "--device", "cpu"]) == 0
    if ending == "parquet":
        import pyarrow.parquet as pq

        found = pq.read_table(out).to_pylist()
    elif ending == "jsonl":
        found = read_lines(out)
    else:
        import csv

        with out.open() as file:
            found = list(csv.DictReader(file, delimiter="\t" if ending == "tsv" else ","))
        found = [
            row | {"row": int(row["row"]), "scores": json.loads(row["scores"])} for row in found
        ]
    assert [row["row"] for row in found] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [row["key"] for row in found] == [f"k{n}" for n in range(9)]
    assert [row["label"] for row in found] == [row["label"] for row in labelled.reviews(9)]
    assert set(found[0]["scores"]) == {"bad", "good"}


def test_raw_texts_are_tagged(learnt, tmp_path):
    """Of a text that isn't words yet, spans have the text's own places."""
    data = tmp_path / "new.jsonl"
    text = "  the aa,  was (zz)!"
    data.write_text(json.dumps({"text": text}) + "\n")
    out = tmp_path / "out.jsonl"
    asked = ["--model", str(learnt("tags") / "model"), "--predict", str(data), "--out", str(out)]
    assert run([*asked, "--device", "cpu"]) == 0
    (found,) = read_lines(out)
    assert found["text"] == text
    assert [text[s["start"] : s["end"]] for s in found["spans"]] == [
        s["text"] for s in found["spans"]
    ]
    assert "aa" in {span["text"] for span in found["spans"]}


def test_a_text_is_explained(learnt, tmp_path, capsys):
    pytest.importorskip("captum")
    page = tmp_path / "page.html"
    asked = ["--model", learnt("labels") / "model", "--explain", "b aa c", "--out", page]
    assert run([*map(str, asked), "--device", "cpu"]) == 0
    assert "</html>" in page.read_text()
    asked[1] = learnt("answers") / "model"
    assert "--explain of qa needs --explain-with" in fails(asked, capsys)
    assert run([*map(str, asked), "--device", "cpu", "--explain-with", "b c xx d"]) == 0


def losses(encoder, tmp_path, task, file, rows, *more):
    data = str(labelled.write(tmp_path / file, rows))
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    asked = ["--task", task, "--data", data, "--model", str(encoder), "--out", str(out)]
    assert run([*asked, *SMALL, *more]) == 0
    history = json.loads((out / "metrics.json").read_text())["history"]
    return [one["loss"] for one in history if "loss" in one]


@pytest.mark.parametrize("name", ["labels", "scores", "tags", "answers"])
def test_losses_are_those_of_the_stock_model(encoder, tmp_path, name, monkeypatch, capsys):
    """Over some fifty steps, without dropout: rounding alone parts them."""
    task, file, rows, *_ = LEARNT[name]
    made = trainer.arguments
    monkeypatch.setattr(
        trainer, "arguments", lambda folder, **m: made(folder, **m | {"logging_steps": 1})
    )
    epochs = ["--epochs", str(-(-50 // -(-len(rows) * 9 // 80)))]
    fused = losses(encoder, tmp_path, task, file, rows, *epochs)
    assert "2 of 2 layers run on bertfast" in capsys.readouterr().out
    stock = losses(encoder, tmp_path, task, file, rows, *epochs, "--no-convert")
    assert len(fused) == len(stock) >= 50
    assert "0 of 2 layers run on bertfast" in capsys.readouterr().out
    assert fused == pytest.approx(stock, abs=1e-4)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """With dropout, in the midst of an epoch, by token budget, while its patience runs out: the
    same bits as if it had not been stopped."""
    model = encoders.save(tmp_path / "model")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data = str(labelled.write(tmp_path / "a.csv", labelled.reviews()))
    asked = ["--task", "classify", "--data", data, "--model", str(model), "--epochs", "12"]
    asked += ["--validation", data, "--tokens", "100", "--every", "4", "--patience", "3", *SMALL]
    assert run([*asked, "--out", str(whole)]) == 0
    history = json.loads((whole / "metrics.json").read_text())["history"]
    evaluated = [(one["step"], one["eval_f1_macro"]) for one in history if "eval_loss" in one]
    best = max(range(len(evaluated)), key=lambda place: evaluated[place][1])
    assert best == len(evaluated) - 4  # patience ended it
    step = evaluated[best][0] + 6  # after one evaluation without a better one

    def stop(self, args, state, control, **more):
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Told, "on_step_begin", stop, raising=False)
        assert run([*asked, "--out", str(parts)]) == 143
    assert f"stopped after step {step}; the same command goes on" in capsys.readouterr().out
    assert not (parts / "model").exists()
    assert run([*asked, "--out", str(parts)]) == 0
    assert f"going on after checkpoint-{step}" in capsys.readouterr().out
    weights = [folder / "model" / "model.safetensors" for folder in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    again = json.loads((parts / "metrics.json").read_text())["history"]
    assert evaluated == [(o["step"], o["eval_f1_macro"]) for o in again if "eval_loss" in o]
    assert not (parts / "checkpoints").exists()


def test_it_stops_early_and_keeps_the_best(encoder, tmp_path, capsys):
    data = str(labelled.write(tmp_path / "a.csv", labelled.reviews()))
    out = tmp_path / "run"
    asked = ["--task", "classify", "--data", data, "--validation", data, "--model", str(encoder)]
    asked += ["--out", str(out), "--epochs", "40", "--every", "8", "--patience", "2"]
    assert run([*asked, *SMALL, "--metric", "accuracy"]) == 0
    told = json.loads((out / "metrics.json").read_text())
    seen = [one["eval_accuracy"] for one in told["history"] if "eval_accuracy" in one]
    assert seen.index(max(seen)) == len(seen) - 3 < 30
    assert told["figures"]["held out"]["accuracy"] == max(seen)


def test_class_weights_are_torchs():
    """The loss is torch's weighted one, but for its divisor: the number of labels."""
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 3), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
    found = trainer.weighted_loss([6, 2, 1])({"logits": logits}, labels)
    weights = torch.tensor([9 / 18, 9 / 6, 9 / 3])
    wanted = torch.nn.functional.cross_entropy(logits, labels, weights)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)  # here the weights' mean is 1
    tagged = torch.where(torch.arange(9) < 4, labels, -100)
    some = trainer.weighted_loss([6, 2, 1])({"logits": logits[None]}, tagged[None], 8)
    plain = torch.nn.functional.cross_entropy(logits[:4], labels[:4], reduction="sum")
    assert some.item() == pytest.approx(0.5 * plain.item() / 8, rel=1e-6)


def test_class_weights_reach_training(encoder, tmp_path):
    rows = labelled.reviews()
    with_weights = losses(encoder, tmp_path, "classify", "a.csv", rows, "--class-weights")
    without = losses(encoder, tmp_path, "classify", "a.csv", rows)
    assert not np.allclose(with_weights, without, rtol=1e-3)
