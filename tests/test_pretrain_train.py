"""Pre-training in one process: a run that was stopped goes on exactly; its end is a plain model."""

import signal

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from support import pretraining  # noqa: E402
from support.pretraining import ALONE, options, trained  # noqa: E402

from bertfast.recipes.pretrain import checkpoints, train  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pretraining.prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts, with dropout: its folder and its figures."""
    run = tmp_path_factory.mktemp("whole")
    return run, trained(data, run)


def stop_at(monkeypatch, step, number):
    """Sends this process a signal within a step, counted from 1."""
    update = train.Run._update

    def interrupted(self, rate):
        if self.progress.step + 1 == step:
            signal.raise_signal(number)
        return update(self, rate)

    monkeypatch.setattr(train.Run, "_update", interrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(
    number, status, data, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        stop_at(patched, 5, number)
        assert train.train(options(data, tmp_path), ALONE) == status
    assert "stopped after step 5" in capsys.readouterr().out
    assert [step for step, _ in checkpoints.listed(tmp_path / "checkpoints")] == [5, 3]
    assert trained(data, tmp_path) == whole[1]
    assert "going on from the checkpoint of step 5" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (whole[0] / "model" / name).read_bytes()
