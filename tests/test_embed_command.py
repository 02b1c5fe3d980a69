"""The command: what it reads and writes, that it goes on, and what it says of wrong input."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import encoders

pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from bertfast.recipes.embed import Embedder  # noqa: E402
from bertfast.recipes.embed.__main__ import main  # noqa: E402

TEXTS = [f"{'word ' * (number * 5 % 11)}{number}" for number in range(23)]
TEXTS[4], TEXTS[5] = "", 'a "quoted" one,\nof two lines'
KEYS = [f"k{number}" for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return encoders.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vectors(model):
    """A window is a shard: the same batches, and so the same bits."""
    return Embedder(model, window=5, device="cpu")(TEXTS)


def run(model, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--model", str(model), "--device", "cpu", "--shard", "5"])
    return end.value.code


def written(path, kind, texts=TEXTS):
    path = path / f"input.{kind}"
    rows = [{"n": n, "text": t, "key": k} for n, (t, k) in enumerate(zip(texts, KEYS))]  # noqa: B905
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n\n" for row in rows)
    elif kind == "txt":
        path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts))
    else:
        with open(path, "w", newline="") as file:
            if kind == "csv":
                file.write("\ufeff")
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


def found_in(folder):
    table = pq.read_table(folder)
    assert table["row"].to_pylist() == list(range(len(TEXTS)))
    return np.stack(table["embedding"].to_numpy())


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl.gz", "txt"])
def test_all_kinds_of_files(model, vectors, tmp_path, kind, capsys):
    out, key = tmp_path / "out", () if kind == "txt" else ("--id", "key")
    assert run(model, written(tmp_path, kind), out, *key) == 0
    assert (found_in(out) == vectors).all()
    if key:
        assert pq.read_table(out)["key"].to_pylist() == KEYS
    said = capsys.readouterr().out
    assert "23 rows in 5 shards | 23 texts |" in said and "100.0 % useful" in said
    assert run(model, tmp_path / f"input.{kind}", out, *key) == 0
    assert "has all 23 rows already" in capsys.readouterr().out


def test_a_folder_to_numpy(model, vectors, tmp_path):
    for number, part in enumerate((TEXTS[:9], TEXTS[9:])):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        written(tmp_path / "in" / str(number), "csv", part)
    out = tmp_path / "in" / "out"
    assert run(model, tmp_path / "in", out, "--format", "npy", "--id", "n") == 0
    names = [f"shard-{number:05d}" for number in range(5)]
    assert (np.concatenate([np.load(out / f"{name}.npy") for name in names]) == vectors).all()
    ids = np.concatenate([np.load(out / f"{name}.ids.npy") for name in names])
    assert ids.tolist() == [*map(str, range(9)), *map(str, range(14))]


def test_it_goes_on(model, vectors, tmp_path, capsys):
    """Killed at any moment, no row is lost or there twice, and whole shards aren't made again."""
    source, out = written(tmp_path, "csv"), tmp_path / "out"
    script = (
        "import sys, time, os\n"
        "from bertfast.recipes.embed import output, __main__\n"
        "write = output.Run.write\n"
        "def slow(run, shard, *more):\n"
        "    if shard == 3: print('here', flush=True); time.sleep(60)\n"
        "    write(run, shard, *more)\n"
        "output.Run.write = slow\n"
        "__main__.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, source, out, "--model", model, "--shard", "5"]
    process = subprocess.Popen(
        [*map(str, command), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout.readline() == b"here\n"
        assert run(model, source, out) == 2  # the other one is at work
        assert "another run is writing to" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    shards = sorted(out.glob("shard-*"))
    assert [shard.name[6:11] for shard in shards] == ["00000", "00001", "00002"]
    times = [shard.stat().st_mtime_ns for shard in shards]
    (out / "shard-00003.parquet.77.part").write_bytes(b"half a")
    shards[1].write_bytes(shards[1].read_bytes()[:-9])  # a disk that lost its end
    assert run(model, source, out) == 0
    assert "23 rows in 5 shards | 13 texts" in capsys.readouterr().out
    assert (found_in(out) == vectors).all() and not list(out.glob("*.part"))
    again = [shard.stat().st_mtime_ns for shard in shards]
    assert again[0] == times[0] and again[2] == times[2]


def test_what_has_changed_is_named(model, tmp_path, capsys):
    source, out = written(tmp_path, "csv"), tmp_path / "out"
    assert run(model, source, out) == 0
    assert run(model, source, out, "--pooling", "max", "--column", "key") == 2
    said = capsys.readouterr().err
    assert "--pooling was None, and is max now" in said and "--column was text" in said
    time.sleep(0.01)
    source.write_text(source.read_text() + "23,more,k23\n")
    assert run(model, source, out) == 2
    assert f"{source} has changed. Give --overwrite" in capsys.readouterr().err
    assert run(model, source, out, "--overwrite") == 0
    assert pq.read_table(out).num_rows == len(TEXTS) + 1
    assert run(encoders.save(tmp_path / "other"), source, out) == 2
    assert "--model was" in capsys.readouterr().err


WRONG = {
    "a.csv": [
        ("n,body\n1,a\n", "line 1: has no 'text' among its columns 'n', 'body'"),
        ("n,text\n1,a\n2\n", "line 3: has 1 cells, and line 1 names 2 columns"),
        ('text\n"a\nb\n', "line 2: must be CSV, got unexpected end of data"),
        (b"text\na\nb\xff\n", "line 3: must be UTF-8, got the byte 0xff at its position 2"),
        ("", "is empty, and must begin with a line of column names"),
        ("text\n", "has no rows"),
    ],
    "a.jsonl": [
        ('{"text": "a"}\n{"text": 3}\n', "line 2: 'text' must be a string, got int"),
        ('{"text": "a"}\n\n{"text"\n', "line 3: must be JSON"),
        ('{"body": "a"}\n', "line 1: has no 'text' among its columns 'body'"),
        ("[1]\n", "line 1: must be a JSON object, got list"),
    ],
    "a.jsonl.gz": [("no gzip", "after line 0: must be gzip's")],
    "a.parquet": [("no parquet", "must be a Parquet file")],
    "a.pdf": [("x", "must be Parquet, CSV, JSON lines or text")],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows(model, tmp_path, name, capsys):
    for data, error in WRONG[name]:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        assert run(model, path, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert error in said and str(path) in said, said
        assert not list((tmp_path / "out").glob("shard*"))


def test_wrong_parquet(model, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None], "body": [1, 2]}), path)
    assert run(model, path, tmp_path / "out") == 2
    assert f"{path}, row 1: 'text' must be a string, got None" in capsys.readouterr().err
    assert run(model, path, tmp_path / "out", "--column", "body") == 2
    assert "row 0: 'body' must be a string, got int" in capsys.readouterr().err
    assert run(model, path, tmp_path / "out", "--column", "title") == 2
    assert "has no 'title' among its columns 'text', 'body'" in capsys.readouterr().err


def test_wrong_requests(model, tmp_path, capsys):
    source = written(tmp_path, "txt")
    for arguments, error in (
        ((tmp_path / "no.csv", tmp_path / "out"), "no.csv, the input, doesn't exist"),
        (
            (source, tmp_path / "out", "--id", "n"),
            "is text, and has no column 'n' beside its lines",
        ),
        ((source, tmp_path / "out", "--format", "csv"), "--format must be one of parquet, npy"),
        ((source, source), "can't be written"),
        ((source, tmp_path / "out", "--id", "row"), "--id can't be 'row', which is a column of"),
        ((source, tmp_path / "out", "--tokens", "0"), "--tokens must be at least 1, got 0"),
    ):
        assert run(model, *arguments) == 2
        assert error in capsys.readouterr().err
    assert run(tmp_path, source, tmp_path / "out") == 2
    assert "must be a folder with a config.json or a modules.json" in capsys.readouterr().err
