"""Beside a transformers below 5 bertfast says so, and converts what is torch's all the same.

With a newer one this pretends.
"""

import contextlib
import io
import sys

import torch
import transformers
from torch import nn
from transformers import BertModel  # may exchange the module

if not transformers.__version__.startswith("4."):
    sys.modules["transformers"].__version__ = "4.57.6"

import bertfast  # noqa: E402

VERSION = sys.modules["transformers"].__version__
TEXT = f"bertfast needs transformers 5.0 or newer for Hugging Face models, found {VERSION}"


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.plain = nn.TransformerEncoder(layer, 1)
        config = transformers.BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
        self.bert = BertModel(config)


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def import_hf():
    import bertfast.hf  # noqa: F401


model = bertfast.optimize(Both())
assert type(model.plain).__module__ == "bertfast.torch_nn", type(model.plain)
rows = {row.name: row.reason for row in bertfast.report(model)}
assert rows == {"plain.layers.0": None, "bert.encoder.layer.0": TEXT}, rows
model.bert(torch.tensor([[1, 2]]))
bertfast.revert(model)
assert TEXT in raised(ValueError, lambda: bertfast.optimize(Both(), strict=True))
assert raised(ImportError, import_hf) == TEXT
bertfast.optimize(Both().plain, strict=True)

from bertfast.commands import cli  # noqa: E402

for command in (["demo"], ["bench", "--shapes", "1x8"], ["bench", "layer", "--shapes", "1x8"]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert raised(SystemExit, lambda command=command: cli.main(command)) == "2", command
    assert said.getvalue() == f"bertfast: {TEXT}\n", (command, said.getvalue())
