"""A family of models is one file: nothing of it stands elsewhere. And every head of every family,
and for one family of each layer what wraps, traces and saves models."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
from support import hf_models
from support.hf_models import LAYERS_OF, batch, packs, tiny
from support.masked_lm import same

import bertfast
from bertfast.testing.model import HIDDEN_ATOL, numbers

transformers = pytest.importorskip("transformers")

from bertfast import hf  # noqa: E402
from bertfast.hf.families import FAMILIES  # noqa: E402

FOLDER = Path(hf.__file__).parent
MOST_LINES = 120
FILES = {path.stem: path for path in (FOLDER / "families").glob("*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("name", FILES)
def test_a_family_is_a_short_file_of_its_own(name):
    family = importlib.import_module(f"bertfast.hf.families.{name}").FAMILY
    text = FILES[name].read_text()
    assert family in FAMILIES and len(text.splitlines()) <= MOST_LINES
    classes = [*family.swapped, *family.heads]
    named = re.compile(r"\b(" + "|".join(classes) + r")\b")
    other = [path for path in FOLDER.rglob("*.py") if path != FILES[name]]
    for path in other:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        assert not named.search(code), path


def test_all_are_found():
    assert len(FAMILIES) == len(FILES) == len({family.title for family in FAMILIES})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_its_classes_are_transformers(family):
    for name in (*family.swapped, *family.heads):
        swapped = getattr(hf, name)
        assert swapped.__name__ == name and swapped._original.__module__ == family.module
        assert hf.why_unknown(swapped._original) is None


def test_contributing_shows_one():
    text = (FOLDER.parents[1] / "CONTRIBUTING.md").read_text()
    assert f"```python\n{FILES['camembert'].read_text()}```" in text


HEADS = [
    name
    for prefix in hf_models.FAMILIES
    for name in dir(transformers)
    if name.startswith(prefix + "For") and not name.endswith("CausalLM")
]


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name):
    """In float64, where nothing but another sum can hide: outputs, and the gradient of each."""
    stock, inputs = tiny(name).double(), batch((5, 20, 13, 9))
    if name.endswith("MultipleChoice"):
        inputs = {key: value.unflatten(0, (2, 2)) for key, value in inputs.items()}
    real = inputs["attention_mask"].bool()
    model = bertfast.optimize(copy.deepcopy(stock), strict=True)
    try:
        expected = numbers(stock, inputs, real)
    except IndexError:  # transformers 5.0 made some without the pooler that they read
        with pytest.raises(IndexError):
            numbers(model, inputs, real)
    else:
        same(numbers(model, inputs, real), expected, rtol=1e-10)
    assert [row.reason for row in bertfast.report(model)] == [None] * hf_models.LAYERS


each_layer = pytest.mark.parametrize("prefix", LAYERS_OF)


def both(prefix, **config):
    stock = tiny(prefix + "Model", **config)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def close(got, expected, inputs, atol=HIDDEN_ATOL):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[0][real], expected[0][real], rtol=0, atol=atol)


@each_layer
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_gradients_by_each_backend(prefix, backend):
    """The kernels' blocks in the interpreter, those that are called and those that are read."""
    stock, inputs = tiny(prefix + "Model"), batch((3, 6))
    model = bertfast.optimize(copy.deepcopy(stock), backend=backend)
    real = inputs["attention_mask"].bool()
    same(numbers(model, inputs, real), numbers(stock, inputs, real), rtol=1e-4)
    assert packs(model, inputs)


@each_layer
def test_saved_and_loaded(prefix, tmp_path):
    stock, model = both(prefix)
    inputs = batch()
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, again.state_dict().values(), stock.state_dict().values()))
    close(model(**inputs), again(**inputs), inputs)


@each_layer
@pytest.mark.parametrize("targets", [["query", "value", "q_lin", "v_lin"], "all-linear"])
def test_lora(prefix, targets):
    peft = pytest.importorskip("peft", reason="its LoRA layers are tested")
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=4)
    stock = peft.inject_adapter_in_model(config, tiny(prefix + "Model"))
    model, inputs = bertfast.optimize(copy.deepcopy(stock)), batch()
    real = inputs["attention_mask"].bool()
    same(numbers(model, inputs, real), numbers(stock, inputs, real), rtol=5e-5)
    assert packs(model, inputs)


@each_layer
def test_autocast(prefix):
    """Each rounds every product to 16 bits in its own way: both are as near to float32."""
    stock, model = both(prefix)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    exact = stock(**inputs)[0][real]
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(**inputs)[0][real], model(**inputs)[0][real]
    assert got.dtype == expected.dtype
    assert (got.float() - exact).abs().max() <= 2 * (expected.float() - exact).abs().max()


@each_layer
def test_fullgraph_and_export(prefix):
    stock, model = both(prefix)
    torch._dynamo.reset()
    inputs = batch((5, 12))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(**inputs), stock(**inputs), inputs)
    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("length", min=3, max=64)}
    shapes = {name: sizes for name in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        inputs = batch((4, 21, 7))
        close(program.module()(**inputs), stock(**inputs), inputs)


@each_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(prefix, reentrant):
    """With dropout, which the second run has to draw again."""
    _, model = both(prefix)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has none for it")
    model.train().enable_input_require_grads()
    inputs, found = batch(), []
    real = inputs["attention_mask"].bool()
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        found.append(numbers(model, inputs, real))
    same(found[1], found[0])


@each_layer
def test_hidden_states(prefix):
    stock, model = both(prefix)
    inputs = batch()
    expected = stock(**inputs, output_hidden_states=True).hidden_states
    for _ in range(2):
        got = model(**inputs, output_hidden_states=True).hidden_states
        assert len(got) == len(expected) == hf_models.LAYERS + 1
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert packs(model, inputs)


@each_layer
def test_attentions(prefix):
    stock, model = both(prefix, attn_implementation="eager")
    inputs = batch()
    expected = stock(**inputs, output_attentions=True).attentions
    got = model(**inputs, output_attentions=True).attentions
    assert len(got) == hf_models.LAYERS and all(map(torch.equal, got, expected))
    close(model(**inputs), stock(**inputs), inputs)


@each_layer
def test_revert_after_use(prefix):
    stock, model = both(prefix)
    inputs = batch()
    model(**inputs, output_hidden_states=True)
    with bertfast.disabled():
        assert torch.equal(model(**inputs)[0], stock(**inputs)[0])
    bertfast.revert(model)
    assert torch.equal(model(**inputs)[0], stock(**inputs)[0]) and not packs(model, inputs)


@each_layer
def test_dropout(prefix):
    """Packed it is the padded one, and each call draws anew."""
    _, model = both(prefix)
    model.train()
    inputs = batch((20, 20, 7))
    real = inputs["attention_mask"].bool()
    results = []
    for packed in (True, False):
        bertfast.optimize(model, packed=packed)
        torch.manual_seed(3)
        results.append(model(**inputs)[0][real])
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
    assert not torch.equal(model(**inputs)[0][real], results[1])
