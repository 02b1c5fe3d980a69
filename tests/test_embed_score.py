"""`--pair`: scores of pairs by the command, beside sentence-transformers'."""

import csv
import pickle

import numpy as np
import pytest
from support import encoders
from support.encoders import TEXTS

pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
library = pytest.importorskip("sentence_transformers")
import pyarrow.parquet as pq  # noqa: E402

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.embed import CrossScorer, command, scale  # noqa: E402
from bertfast.recipes.embed.__main__ import main  # noqa: E402
from bertfast.recipes.embed.embedder import Counts  # noqa: E402
from bertfast.testing.model import HIDDEN_ATOL  # noqa: E402

PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
COLUMNS = ("--column", "query", "--pair", "passage")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    kind = "BertForSequenceClassification"
    return encoders.save(tmp_path_factory.mktemp("model"), kind, num_labels=1)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["passage", "n", "query"]])
        csv.writer(file).writerows([(b, n, a) for n, (a, b) in enumerate(PAIRS)])
    return path


def run(model, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--model", str(model), "--device", "cpu", "--shard", "7"])
    return end.value.code


def expected(model):
    return library.CrossEncoder(str(model), device="cpu").predict(PAIRS)


def close(found, expected):
    """Within the budget of a hidden state, which is that of six layers of 1536, and these are two
    of 64. The head sums 32 such errors by weights of 0.3, which makes sqrt(32) * 0.3 = 1.7 of one.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=HIDDEN_ATOL)


def test_scores_of_pairs(model, source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, source, out, *COLUMNS, "--id", "n") == 0
    assert f"{len(PAIRS)} rows in 4 shards | {len(PAIRS)} pairs |" in capsys.readouterr().out
    table = pq.read_table(out)
    assert table.column_names == ["row", "n", "score"]
    assert table["row"].to_pylist() == list(map(int, table["n"].to_pylist()))
    assert table["score"].type == pa.float32()
    close(table["score"].to_numpy(), expected(model))
    (out / "shard-00002.parquet").unlink()
    assert run(model, source, out, *COLUMNS, "--id", "n") == 0
    assert "rows in 4 shards | 7 pairs |" in capsys.readouterr().out
    assert pq.read_table(out).equals(table)
    assert run(model, source, out, "--column", "query", "--pair", "n", "--id", "n") == 2
    assert "--pair was passage, and is n now" in capsys.readouterr().err


def test_to_numpy_by_a_pickled_worker(model, source, tmp_path, monkeypatch):
    """As Ray's actors have it."""

    def here(run, scorer, missing):
        worker = scale.Worker(*pickle.loads(pickle.dumps((run, scorer))), None)
        assert isinstance(worker.embedder, CrossScorer)
        found = [worker({"shard": [shard]}) for shard in missing]
        return Counts(*(sum(one[name][0] for one in found) for name in Counts._fields)), 1.0

    monkeypatch.setattr(command, "_here", here)
    out = tmp_path / "out"
    assert run(model, source, out, *COLUMNS, "--format", "npy") == 0
    made = np.concatenate([np.load(path) for path in sorted(out.glob("shard-?????.npy"))])
    assert made.dtype == np.float32 and made.shape == (len(PAIRS),)
    close(made, expected(model))


def test_several_labels(source, tmp_path):
    model = encoders.save(tmp_path / "m", "DistilBertForSequenceClassification", num_labels=3)
    assert run(model, source, tmp_path / "out", *COLUMNS) == 0
    made = np.stack(pq.read_table(tmp_path / "out")["score"].to_numpy())
    close(made, expected(model))


def test_bad_pairs_are_left_out(model, tmp_path):
    rows = [{"query": a, "passage": b} for a, b in PAIRS[:9]]
    rows[3]["passage"] = rows[7]["query"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    out = tmp_path / "out"
    assert run(model, tmp_path / "in.parquet", out, *COLUMNS, "--skip-bad") == 0
    table = pq.read_table(out)
    assert table["row"].to_pylist() == [0, 1, 2, 4, 5, 6, 8]
    close(table["score"].to_numpy(), expected(model)[table["row"].to_pylist()])
    assert "'passage' must be a string" in (out / "_skipped.jsonl").read_text()


def test_wrong_requests(model, source, tmp_path, capsys):
    out = tmp_path / "out"
    text = tmp_path / "in.txt"
    text.write_text("a\n")
    bi_encoder = encoders.save(tmp_path / "bi")
    for given, arguments, error in (
        (model, (source, *COLUMNS, "--pooling", "cls"), "--pooling is for vectors, and --pair"),
        (model, (source, *COLUMNS, "--no-normalize"), "--normalize is for vectors"),
        (model, (source, *COLUMNS, "--prompt-name", "q"), "--prompt-name is for vectors"),
        (model, (source, "--column", "n", "--pair", "n"), "--pair must be another column than"),
        (model, (source, "--column", "query", "--pair", "title"), "has no 'title' among its"),
        (model, (source, *COLUMNS, "--id", "score"), "--id can't be 'score', which is a column"),
        (model, (text, "--pair", "b"), "is text, and has no column 'b' beside its lines"),
        (bi_encoder, (source, *COLUMNS), "model must be a cross-encoder, which gives labels"),
    ):
        first, *rest = arguments
        assert run(given, first, out, *rest) == 2
        assert error in capsys.readouterr().err


def test_a_head_without_weights_is_no_cross_encoder(tmp_path):
    """It would be filled with random numbers."""
    import transformers

    folder = encoders.save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="has no weights for classifier.bias, classifier.weight"):
        CrossScorer(folder)([("a", "b")])
