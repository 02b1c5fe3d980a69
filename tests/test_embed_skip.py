"""`--skip-bad`: bad rows are left out and listed, and what is there keeps its rows' numbers."""

import csv
import json

import numpy as np
import pytest
from support import encoders

pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from bertfast.recipes.embed import Embedder, output, skipped  # noqa: E402
from bertfast.recipes.embed.__main__ import main  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return encoders.save(tmp_path_factory.mktemp("model"))


def run(model, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--model", str(model), "--device", "cpu", "--shard", "3"])
    return end.value.code


def listed(out):
    return [json.loads(line) for line in (out / skipped.SKIPPED).read_text().splitlines()]


# Lines of a file, some bad, with what is told of these: None where a line is good or no row.
LINES = {
    "in.jsonl": [
        (b'{"text": "a cat", "id": "k0"}', None),
        (b'{"text": 3, "id": "k1"}', "'text' must be a string, got int"),
        (b"", None),
        (b'{"text"', "must be JSON, got "),
        (b'{"text": "no id"}', "has no 'id' among its columns 'text'"),
        (b'{"text": "b\xff", "id": "k2"}', "must be UTF-8, got the byte 0xff at its position 12"),
        (b'{"text": "", "id": "k3"}', None),
        (b'{"text": "c", "id": 4}', "'id' must be str as in the rows before, got int"),
        (b"[]", "must be a JSON object, got list"),
        (b'{"text": "the dog", "id": "k5"}', None),
    ],
    "in.csv": [
        (b"text,id", None),
        (b"a,b,c", "has 3 cells, and line 1 names 2 columns"),
        (b'"a"b,c', "must be CSV, got "),
        (b"a cat,k0", None),
        (b'"two\xff', "must be UTF-8, got the byte 0xff"),
        (b'lines, of one row",k1', None),
        (b",k3", None),
        (b"the dog,k5", None),
        (b'"never closed', "must be CSV, got unexpected end of data"),
        (b"and so no row", None),
    ],
    "in.txt": [
        (b"a cat", None),
        (b"\xffno", "must be UTF-8, got the byte 0xff at its position 1"),
        (b"", None),
        (b"the dog", None),
    ],
}
GOOD = ["a cat", "", "the dog"]
NUMBERS = {"in.jsonl": [0, 5, 8], "in.csv": [2, 4, 5], "in.txt": [0, 2, 3]}


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("name", LINES)
def test_bad_lines(model, tmp_path, name, form, capsys):
    source, out = tmp_path / name, tmp_path / "out"
    source.write_bytes(b"\n".join(line for line, _ in LINES[name]))
    id = () if name == "in.txt" else ("--id", "id")
    bad = [(n + 1, told) for n, (_, told) in enumerate(LINES[name]) if told is not None]
    assert run(model, source, out, "--format", form, *id) == 2
    assert f"{source}, line {bad[0][0]}: {bad[0][1]}" in capsys.readouterr().err
    assert run(model, source, out, "--format", form, *id, "--skip-bad") == 0
    said = capsys.readouterr()
    assert (
        "3 rows in " in said.out
        and f"left out, and listed in '{out}/_skipped.jsonl': {len(bad)}" in said.err
    )
    found = listed(out)
    assert len(found) == len(bad)
    for row, (line, told) in zip(found, bad, strict=True):
        assert row["file"] == str(source) and row["place"] == f"line {line}"
        assert told in row["reason"]
    told_at_once = [row["reason"] for row in found if row["reason"] in said.err]
    assert len(told_at_once) == min(len(bad), skipped.SHOWN)
    expected = Embedder(model, window=3, device="cpu")(GOOD)
    if form == "npy":
        made = np.concatenate([np.load(path) for path in sorted(out.glob("shard-?????.npy"))])
        ids = np.concatenate([np.load(path) for path in sorted(out.glob("*.ids.npy"))]).tolist()
    else:
        table = pq.read_table(out)
        made = np.stack(table["embedding"].to_numpy())
        ids = table["id"].to_pylist() if id else table["row"].to_pylist()
        assert table["row"].to_pylist() == NUMBERS[name]
    assert ids == (["k0", "k3", "k5"] if id else NUMBERS[name])
    # Shards are other windows, and so other batches.
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)
    index = json.loads((out / output.INDEX).read_text())
    assert (index["rows"], index["skipped"]) == (3, len(bad))
    assert run(model, source, out, "--format", form, *id, "--skip-bad") == 0
    assert "has all 3 rows already" in capsys.readouterr().out


def test_it_goes_on_and_says_what_it_leaves_out(model, tmp_path, capsys):
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    texts = [None, None, None, "a", None, "b", *"cdef", None]
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), source, row_group_size=4)
    assert run(model, source, out, "--skip-bad", "--id", "n") == 0
    shards = sorted(out.glob("shard-*"))
    assert [pq.read_table(shard)["n"].to_pylist() for shard in shards] == [
        [],
        [3, 5],
        [6, 7, 8],
        [9],
    ]
    assert listed(out)[3] == {
        "row": 4,
        "file": str(source),
        "place": "row 4",
        "reason": "'text' must be a string, got NoneType",
    }
    before = pq.read_table(out)
    shards[1].unlink()
    assert run(model, source, out, "--id", "n") == 2
    assert "was begun without 5 bad rows: give --skip-bad, or --over" in capsys.readouterr().err
    assert run(model, source, out, "--skip-bad", "--id", "n") == 0
    assert "6 rows in 4 shards | 2 texts" in capsys.readouterr().out
    assert pq.read_table(out).equals(before)
    pq.write_table(pa.table({"text": ["a"], "n": [0]}), source)
    assert run(model, source, out, "--overwrite") == 0
    assert pq.read_table(out)["row"].to_pylist() == [0]
    assert not (out / skipped.SKIPPED).exists()


def test_nothing_but_bad_rows(model, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("1\n2\n")
    assert run(model, source, out, "--skip-bad") == 2
    assert f"{source} has no rows but 2 bad ones" in capsys.readouterr().err
    assert not list(out.glob("shard*"))
    source.write_text("1\n" + '{"text": "a"}\n')
    assert run(model, source, out, "--skip-bad") == 0
    assert pq.read_table(out)["row"].to_pylist() == [1]
    assert [path.name for path in out.glob("*.part")] == []


def test_a_wrong_file_is_no_bad_row(model, tmp_path, capsys):
    source = tmp_path / "in.csv"
    with open(source, "w", newline="") as file:
        csv.writer(file).writerows([["body"], ["a"]])
    assert run(model, source, tmp_path / "out", "--skip-bad") == 2
    assert "line 1: has no 'text' among its columns 'body'" in capsys.readouterr().err
