"""The command on a local Ray of two actors. Without Ray, which takes its time, this is skipped."""

import csv

import numpy as np
import pytest
from support import encoders

pytest.importorskip("transformers")
pytest.importorskip("ray", reason="ray[data], of the extra scale, is not installed")
pq = pytest.importorskip("pyarrow.parquet")

from support import dying  # noqa: E402

from bertfast.recipes.embed import command  # noqa: E402
from bertfast.recipes.embed.__main__ import _with_address, main  # noqa: E402

TEXTS = [f"{'word ' * (number * 5 % 11)}{number}" for number in range(38)]


def test_two_actors_of_which_one_is_killed(tmp_path, monkeypatch, capsys):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(dying)  # which actors can't import
    model = encoders.save(tmp_path / "model")
    with open(tmp_path / "input.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    monkeypatch.setattr(command, "Embedder", dying.Dying)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other work on the machine goes first
    given = [tmp_path / "input.csv", tmp_path / "out", "--model", model, "--shard", "5"]
    arguments = [*map(str, given), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--ray", "--workers", "2"])
    assert end.value.code == 0, capsys.readouterr().err
    assert (model / "killed").exists()
    assert "38 rows in 8 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(arguments)  # one run, whether by Ray or without
    assert end.value.code == 0 and "has all 38 rows already" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "out")
    assert table["row"].to_pylist() == list(range(len(TEXTS)))
    expected = dying.Embedder(model, window=5, device="cpu")(TEXTS)
    # The actors compute with one thread.
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=2e-5)


def test_an_address_may_follow():
    for given, expected in (
        (["--ray"], ["--ray", "local"]),
        (["--ray", "in.csv", "out"], ["--ray", "local", "in.csv", "out"]),
        (["--ray", "auto", "in.csv"], ["--ray", "auto", "in.csv"]),
        (["--ray", "10.0.0.1:6379", "in.csv"], ["--ray", "10.0.0.1:6379", "in.csv"]),
        (["--ray=auto"], ["--ray=auto"]),
        (["in.csv", "--ray", "--id", "n"], ["in.csv", "--ray", "local", "--id", "n"]),
    ):
        assert _with_address(given) == expected
