"""`python -m bertfast.recipes.pretrain`: commands, a file of all options, errors of one line."""

import json
import socket

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
yaml = pytest.importorskip("yaml")

from support import pretraining  # noqa: E402

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.pretrain import __main__ as command  # noqa: E402
from bertfast.recipes.pretrain import configuration, evaluate, options  # noqa: E402
from bertfast.recipes.pretrain.batches import Batches, DataOptions  # noqa: E402
from bertfast.recipes.pretrain.prefetch import Prefetch  # noqa: E402

KINDS = {name: kind for name, (kind, _) in command.COMMANDS.items()}


def status(*arguments):
    with pytest.raises(SystemExit) as ended:
        command.main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a file's three sections were run; a second time too."""
    folder = tmp_path_factory.mktemp("all")
    pretraining.texts(folder / "texts")
    data, run = str(folder / "data"), str(folder / "run")
    small = dict(layers=1, width=32, heads=2, inner=48, length=32, tokens=128)
    told = {
        "evaluate": {"data": data, "model": f"{run}/model", "length": 32, "tokens": 256},
        "prepare": {"texts": str(folder / "texts"), "data": data, "vocabulary": 60},
        "train": dict(data=data, out=run, steps=3, lr="1e-3", **small) | {"micro-batches": 2},
    }
    told["prepare"]["held-out"] = 0.1
    (folder / "all.yaml").write_text(yaml.safe_dump(told))
    assert status(folder / "all.yaml") == 0
    return folder


def test_a_file_runs_all_three(finished, capsys):
    assert status(finished / "all.yaml") == 0  # each step finds that it's done
    said = capsys.readouterr().out
    assert "60 tokens in the vocabulary" in said and "going on from the checkpoint" in said
    told = json.loads((finished / "run" / "model" / "evaluation.json").read_text())
    assert f"MLM {told['figures']['mlm_loss']:.4f}" in said
    assert "MLM loss" in (finished / "run" / "model" / "README.md").read_text()


def test_processes_are_connected_once(finished, monkeypatch):
    """A second connection may find what the first left with torchrun's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        told["MASTER_PORT"] = str(free.getsockname()[1])
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    connect, made = torch.distributed.init_process_group, []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: (made.append(a), connect(*a, **k))
    )
    assert status(finished / "all.yaml") == 0
    assert len(made) == 1 and not torch.distributed.is_initialized()


def test_commands_do_what_the_file_does(finished, tmp_path, capsys):
    small = "--layers 1 --width 32 --heads 2 --inner 48 --length 32 --tokens 128 --lr 1e-3"
    more = f"--data {finished}/data --out {tmp_path}/run --steps 3 --micro-batches 2"
    assert status("train", *small.split(), *more.split()) == 0
    names = ("model.safetensors", "config.json", "tokenizer.json")
    for name in names:
        ours = (tmp_path / "run" / "model" / name).read_bytes()
        assert ours == (finished / "run" / "model" / name).read_bytes()


def test_evaluation_is_that_of_plain_transformers(finished):
    """Its figures, by the stock model on each sequence alone."""
    from transformers import BertForPreTraining

    model = BertForPreTraining.from_pretrained(finished / "run" / "model").eval()
    data = finished / "data"
    told = json.loads((finished / "run" / "model" / "evaluation.json").read_text())["figures"]
    counts = torch.zeros(60)
    for begin in Batches(data, DataOptions()).shards.split("train")._shards:
        counts += torch.bincount(torch.tensor(begin[0].astype("int64")), minlength=60)
    shares = ((counts + 1) / (counts + 1).sum()).log()
    sums = dict.fromkeys(("mlm", "right", "labels", "nsp", "nsp right", "pairs", "unigram"), 0.0)
    for _, batch in Batches(data, DataOptions(tokens=256, length=32), split="held-out"):
        bounds = batch.cu_seqlens.tolist()
        for row, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            with torch.no_grad():
                found = model(batch.input_ids[None, a:b], None, batch.token_type_ids[None, a:b])
            here = (batch.places >= a) & (batch.places < b)
            logits, labels = found.prediction_logits[0, batch.places[here] - a], batch.labels[here]
            sums["mlm"] += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            sums["right"] += int((logits.argmax(1) == labels).sum())
            sums["labels"] += len(labels)
            sums["unigram"] -= float(shares[labels].sum())
            scores, truth = found.seq_relationship_logits, batch.not_next[row : row + 1]
            sums["nsp"] += float(torch.nn.functional.cross_entropy(scores, truth))
            sums["nsp right"] += int(scores.argmax(1) == truth)
            sums["pairs"] += 1
    expected = {
        "mlm_loss": sums["mlm"] / sums["labels"],
        "mlm_accuracy": sums["right"] / sums["labels"],
        "unigram_cross_entropy": sums["unigram"] / sums["labels"],
        "nsp_loss": sums["nsp"] / sums["pairs"],
        "nsp_accuracy": sums["nsp right"] / sums["pairs"],
        "labels": sums["labels"],
        "sequences": sums["pairs"],
    }
    assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_frequencies_are_shares():
    import numpy as np

    shares = evaluate.shares(np.array([3, 0, 1]))
    assert shares.tolist() == [4 / 7, 1 / 7, 2 / 7]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("train: {stepps: 3}", r"an option of train must be one of .*; did you mean 'steps'\?"),
        (
            "trian: {steps: 3}",
            r"must be one of prepare, train, evaluate, got 'trian'; did you mean",
        ),
        ("train: {steps: 3.5}", "train: steps must be of type int, got 3.5"),
        ("train: {steps: true}", "train: steps must be of type int, got True"),
        ("train: {lr: fast}", "train: lr must be of type float, got 'fast'"),
        ("train: {recipe: bert}", "train: --recipe must be one of bert-2018, modern, got 'bert'"),
        ("train: {steps: 0}", "train: --steps must be at least 1, got 0"),
        ("train: {masked_share: 1}", "--masked-share must be below 1, got 1.0"),
        ("train: 3", "train must have options, one a line, got 3"),
        ("prepare: {data: d}", "prepare: .*texts"),
        ("- train", "must have sections: prepare, train, evaluate"),
        ("train: [", "is no YAML"),
    ],
)
def test_errors_of_a_file(text, error, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=error):
        list(configuration.read(str(tmp_path / "c.yaml"), KINDS))
    assert status(tmp_path / "c.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bertfast: ") and "c.yaml" in line


def test_errors_of_flags(tmp_path, capsys):
    for arguments, said in (
        (("train", "--data", tmp_path, "--out", tmp_path / "r"), "holds no prepared text"),
        (("train", "--steps", "0"), "--steps must be at least 1"),
        (("train", "--recipe", "new"), "--recipe must be one of bert-2018, modern"),
        (("train", "--stepps", "3"), "No such option"),
        (("prepare",), "Missing argument"),
        ((tmp_path / "none.yaml",), "can't be read: No such file"),
        ((tmp_path / "none.yaml", "--steps", "3"), "so none may follow it, got '--steps'"),
        (("evaluate", "--device", "tpu"), "--device must be one of auto, cpu, cuda"),
    ):
        assert status(*arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bertfast: ") and said in line, line
    assert not list(tmp_path.iterdir())  # nor was a run begun
    assert status() == 0 and "prepare" in capsys.readouterr().out
    assert status("prepare", tmp_path / "none", "--data", tmp_path / "d") == 2
    assert "none" in capsys.readouterr().err


def test_without_held_out_documents(finished, tmp_path, capsys):
    arguments = ["prepare", finished / "texts", "--data", tmp_path / "d", "--held-out", "0"]
    assert status(*arguments, "--vocabulary", "60") == 0
    model = finished / "run" / "model"
    assert status("evaluate", "--data", tmp_path / "d", "--model", model, "--length", "32") == 2
    assert "no documents to evaluate on" in capsys.readouterr().err


def test_what_a_model_lacks_isnt_evaluated(finished, tmp_path, capsys):
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(finished / "run" / "model")
    model.save_pretrained(tmp_path / "mlm")
    model.bert.save_pretrained(tmp_path / "bare")
    more = ("--data", finished / "data", "--length", "32")
    for name, flags in (("mlm", ["--nsp"]), ("bare", [])):
        assert status("evaluate", "--model", tmp_path / name, *more, *flags) == 2
        assert "has no weights for" in capsys.readouterr().err
    assert status("evaluate", "--model", tmp_path / "mlm", *more) == 0
    assert "NSP" not in capsys.readouterr().out


def test_recipes():
    of_2018 = options.TrainOptions(steps=1000).resolved()
    assert (of_2018.masked_share, of_2018.nsp, of_2018.optimizer) == (0.15, True, "adamw")
    assert (of_2018.warmup, of_2018.schedule) == (10, "linear")
    modern = options.TrainOptions(recipe="modern", lr=1e-3).resolved()
    assert (modern.masked_share, modern.nsp, modern.optimizer) == (0.3, False, "stable-adamw")
    assert (modern.lr, modern.schedule, modern.decay) == (1e-3, "wsd", 1000)
    assert options.EvaluateOptions().masked_share == 0.15  # whatever the training


def test_no_flag_is_torchruns():
    """It reads those behind the module too, where they might be short for one of its own."""
    from torch.distributed.run import get_args_parser

    for name, kind in KINDS.items():
        given = ["-m", "bertfast.recipes.pretrain", name]
        for option in kind.__dataclass_fields__:
            given += [options.flag(option), "1", "--no-" + options.flag(option)[2:]]
        told = get_args_parser().parse_args(given)
        assert told.training_script == "bertfast.recipes.pretrain"
        assert [told.training_script, *told.training_script_args] == given[1:]


def test_help_tells_every_option(capsys):
    for name, kind in KINDS.items():
        assert status(name, "--help") == 0
        said = capsys.readouterr().out
        for option in kind.__dataclass_fields__:
            assert option == "texts" or options.flag(option) in said


def test_prefetch():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = Prefetch(items(), 3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert len(made) <= 10  # it stays a few ahead
    assert list(Prefetch(iter([1, 2]), 1)) == [1, 2]
