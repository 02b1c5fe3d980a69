"""bertfast without its optional parts: each is blocked in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.forked import Forks

PRELUDE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
import bertfast
from bertfast.ops import available, layer_norm
"""


@pytest.fixture(scope="module")
def run():
    forks = Forks(str(Path(__file__).parent))
    yield lambda blocked, body: forks.run(
        f"BLOCKED = {blocked!r}\n{PRELUDE}{textwrap.dedent(body)}"
    )
    forks.close()


ALL = ("triton", "transformers", "bertfast._host", "bertfast._cuda", "typer", "rich")


@pytest.mark.parametrize("blocked", [ALL, *((name,) for name in ALL)], ids=str)
def test_import_and_torch_backend_need_nothing_else(run, blocked):
    run(
        blocked,
        """
        x = torch.randn(3, 8, requires_grad=True)
        w = torch.ones(8)
        for backend in ("auto", "torch"):
            y = layer_norm(x, w, w, residual=x, dropout_p=0.5, backend=backend)
            y.sum().backward()
        for name in BLOCKED:
            assert name not in sys.modules, name
        """,
    )


def test_what_is_missing_is_named(run):
    said = run(
        ("triton", "bertfast._host"),
        """
        reasons = available("cpu")["layer_norm"]
        assert reasons["torch"] is None
        print(reasons["triton"])
        print(reasons["cuda"])
        x, w = torch.randn(3, 8), torch.ones(8)
        try:
            layer_norm(x, w, w, backend="triton")
        except ValueError as error:
            print(error)
        """,
    )
    triton, cuda, error = said.splitlines()
    assert "triton is blocked" in triton
    assert "bertfast._host is not there" in cuda
    assert error == f"backend 'triton' can't run layer_norm here: {triton}"


def test_importing_bertfast_imports_nothing_before_it_is_needed(run):
    run(
        (),
        """
        import subprocess

        brought = subprocess.run(
            [sys.executable, "-c", "import sys, torch; print(*sys.modules)"],
            capture_output=True, text=True, check=True,
        ).stdout.split()
        heavy = ("torch._dynamo", "torch._inductor", "triton", "transformers", "typer", "rich")
        for name in (*heavy, "bertfast._host", "bertfast._cuda", "bertfast.testing"):
            # torch itself may bring Triton in, on a machine with a GPU
            assert name not in sys.modules or name in brought, name
        """,
    )


def test_importing_bertfast_takes_little_longer_than_importing_torch():
    """1.05 times as long, in processor time; the least of a few, as other work only adds to it."""
    program = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import bertfast
print((time.process_time() - start) / (middle - start))
"""
    ratios = []
    while not ratios or (min(ratios) >= 1.5 and len(ratios) < 4):
        command = [sys.executable, "-c", program]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ratios.append(float(said))
    assert min(ratios) < 1.5


def test_a_model_is_converted_without_triton_and_the_modules(run):
    pytest.importorskip("transformers")
    run(
        ("triton", "bertfast._host", "bertfast._cuda"),
        """
        from support.hf_models import batch, packs, tiny
        model = bertfast.optimize(tiny(), strict=True)
        assert packs(model, batch())
        assert [row.reason for row in bertfast.report(model)] == [None, None]
        """,
    )


def test_without_transformers_a_model_is_left_alone_and_our_own_encoder_runs(run):
    run(
        ("transformers",),
        """
        from bertfast.nn import Encoder
        encoder = Encoder(2, 16, 2, 32).eval()
        x, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        packed = encoder(x, mask)
        encoder.packed = False
        torch.testing.assert_close(packed[mask], encoder(x, mask)[mask])
        assert not bertfast.report(bertfast.optimize(torch.nn.Linear(3, 3)))
        """,
    )
