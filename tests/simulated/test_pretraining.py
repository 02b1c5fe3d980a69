"""Steps of pre-training on a GPU: batches, losses and checkpoints are where they should be."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

import torch  # noqa: E402
from support import pretraining  # noqa: E402
from support.pretraining import ALONE, figures, options  # noqa: E402
from support.simulated_gpu import cuda, kernels, products  # noqa: E402

from bertfast.recipes.pretrain.parallel import started  # noqa: E402
from bertfast.recipes.pretrain.precision import Precision  # noqa: E402
from bertfast.recipes.pretrain.prepared import Prepared  # noqa: E402
from bertfast.recipes.pretrain.train import Run, train  # noqa: E402

FEW = dict(steps=2, checkpoint_every=1, dropout=0.1)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_two_steps(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "mm", products.mm)
    data = pretraining.prepared(tmp_path)
    assert train(options(data, tmp_path / "cpu", **FEW), ALONE) == 0
    expected = figures(tmp_path / "cpu")
    kernels.launches.clear()
    with started("cuda") as processes:
        assert processes.device == torch.device("cuda", 0)
        given = options(data, tmp_path / "gpu", precision=precision, **FEW)
        assert train(given, processes) == 0
        found = figures(tmp_path / "gpu")
        assert kernels.launches
        # The same command again finds the checkpoint, and evaluates.
        assert train(given, processes) == 0
    for told, wanted in zip(found, expected, strict=True):
        # Dropout is the same, as bertfast draws it; 16 bits round the sums.
        assert told["loss"] == pytest.approx(wanted["loss"], abs=0.05)


def test_the_host_doesnt_wait_within_a_step(tmp_path, monkeypatch):
    """A step that prints nothing, with dropout and clipping."""
    monkeypatch.setattr(torch, "mm", products.mm)
    data = pretraining.prepared(tmp_path)
    with started("cuda") as processes:
        given = options(data, tmp_path, print_every=100, dropout=0.1)
        run = Run(given, processes, Prepared.open(data), Precision("auto", processes.device))
        try:
            for step in range(3):
                before = cuda.waits()
                assert run._step(None) is None
                if step:  # the first one makes what is kept
                    assert cuda.waits() == before, cuda.last_wait()
        finally:
            run.close()
