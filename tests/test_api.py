"""The public functions as an editor, a type checker and help() see them."""

import importlib.util
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import bertfast
from bertfast import ops, packing
from bertfast.nn import Encoder

FUNCTIONS = [bertfast.optimize, bertfast.revert, bertfast.report, bertfast.disabled]
FUNCTIONS += [getattr(ops, name) for name in ops.__all__] + [packing.plan, packing.lay_out]


def test_names_that_readme_shows_are_exported():
    assert set(bertfast.__all__) >= {"__version__", "disabled", "optimize", "report", "revert"}
    assert set(ops.__all__) >= {"attention", "attention_qkv", "bias_gelu", "layer_norm"}
    for module in (bertfast, ops, packing):
        for name in module.__all__:
            assert hasattr(module, name), name


@pytest.mark.parametrize("function", [bertfast.optimize, bertfast.revert])
def test_a_converted_model_keeps_its_class_for_a_type_checker(function):
    hints = typing.get_type_hints(function)
    assert isinstance(hints["return"], typing.TypeVar)
    assert hints["model"] is hints["return"]
    assert hints["return"].__bound__ is nn.Module


def test_a_converted_model_is_the_same_object():
    model = nn.Sequential(Encoder(1, 16, 2, 32))
    assert bertfast.optimize(model) is model
    assert bertfast.revert(model) is model
    assert type(bertfast.report(model)).__name__ == "Report"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_has_a_type_and_is_explained(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(function)
    for other in re.findall(r"as in\s+`(\w+)`", text):
        text += inspect.getdoc(getattr(ops, other))
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert name in text, f"{function.__name__} doesn't explain {name}"


@pytest.mark.parametrize("function", [bertfast.optimize, bertfast.revert, bertfast.report])
def test_conversion_explains_each_argument_in_a_paragraph(function):
    paragraphs = inspect.getdoc(function).split("\n\n")
    for name in inspect.signature(function).parameters:
        assert any(text.startswith(f"{name}: ") for text in paragraphs), name


def test_disabled_is_a_context_and_a_decorator():
    encoder = bertfast.optimize(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
        )
    ).eval()
    x = torch.randn(2, 5, 16)
    stock = bertfast.revert(encoder)(x)
    bertfast.optimize(encoder)
    with bertfast.disabled():
        assert torch.equal(encoder(x), stock)
    assert torch.equal(bertfast.disabled()(encoder)(x), stock)


def test_the_reference_is_made_of_these_docstrings():
    path = Path(__file__).parents[1] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    current = generate.API.read_text() == generate.render()
    assert current, "python docs/generate.py writes docs/api.md again"
    pytest.importorskip("transformers")
    text = generate.README.read_text()
    assert generate.with_families(text) == text, "python docs/generate.py writes the table again"
