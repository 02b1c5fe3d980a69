"""optimize, revert, report: what is converted, and that nothing is left behind."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hf_models import FAMILIES, batch, packs, tiny
from torch import nn

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


def types(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family):
    stock, inputs = tiny(family + "Model"), batch()
    model = copy.deepcopy(stock)
    before, keys = [dict(m.__dict__) for m in model.modules()], list(model.state_dict())
    expected = stock(**inputs)[0]
    assert bertfast.optimize(model, strict=True) is model
    changed = {
        type(m).__name__
        for m, kind in zip(model.modules(), types(stock), strict=True)
        if type(m) is not kind
    }
    assert len(changed) == 2 + hasattr(stock, "encoder") + hasattr(stock, "transformer")
    assert all(
        isinstance(m, kind) and type(m).__name__ == kind.__name__
        for m, kind in zip(model.modules(), types(stock), strict=True)
    )
    assert list(model.state_dict()) == keys
    model(**inputs)
    assert bertfast.revert(model) is model
    assert types(model) == types(stock)
    assert [set(m.__dict__) for m in model.modules()] == [set(d) for d in before]
    assert torch.equal(model(**inputs)[0], expected)


def test_converting_twice_and_reverting_twice():
    model, inputs = bertfast.optimize(tiny()), batch()
    once = types(model)
    bertfast.optimize(model, packed=False)
    assert types(model) == once and not packs(model, inputs)
    bertfast.optimize(model)
    assert packs(model, inputs)
    bertfast.revert(bertfast.revert(model))
    assert not packs(model, inputs)


def test_a_part_of_a_model():
    model, inputs = tiny("BertForMaskedLM"), batch()
    expected = model(**inputs).logits
    bertfast.optimize(model.bert.encoder.layer[1])
    bertfast.optimize(model.bert.encoder)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    rows = bertfast.report(model)
    reason = "fused only where there is no mask: its BertModel is not converted"
    assert [row.reason for row in rows] == [reason, reason]
    bertfast.revert(model)
    assert torch.equal(model(**inputs).logits, expected)
    bertfast.optimize(model.bert.encoder.layer[0])
    assert [row.reason for row in bertfast.report(model)] == [reason, "not converted"]
    assert [row.reason for row in bertfast.report(model.bert.encoder)] == [None, "not converted"]


def test_a_layer_by_itself():
    stock = tiny().encoder.layer[0]
    layer = bertfast.optimize(copy.deepcopy(stock))
    x, mask = torch.randn(2, 6, 64), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    torch.testing.assert_close(layer(x), stock(x), rtol=0, atol=HIDDEN_ATOL)
    four = mask[:, None, None, :].expand(2, 1, 6, 6)
    assert torch.equal(layer(x, four), stock(x, four))
    # a 2-D mask is what attn_implementation="bertfast" hands to a layer
    torch.testing.assert_close(layer(x, mask)[mask], stock(x, four)[mask], rtol=0, atol=HIDDEN_ATOL)


def test_two_models_that_share_a_configuration():
    config = tiny().config
    first, second = transformers.BertModel(config), transformers.BertModel(config)
    before = config.to_dict(), config._attn_implementation
    bertfast.optimize(first)
    first(**batch())
    assert (config.to_dict(), config._attn_implementation) == before
    assert type(second) is transformers.BertModel and not packs(second, batch())


def test_the_attention_implementation_can_still_be_set():
    model, inputs = bertfast.optimize(tiny()), batch()
    expected = model(**inputs)[0]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**inputs)[0], expected)
    assert len(model(**inputs, output_attentions=True).attentions) == 2


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)


def test_what_it_does_not_know():
    model = Unknown()
    before = types(model)
    assert types(bertfast.optimize(model)) == before
    assert str(bertfast.report(model)) == "no encoder layer that bertfast knows"
    with pytest.raises(ValueError, match="bertfast knows no module of Unknown"):
        bertfast.optimize(model, strict=True)
    config = transformers.LayoutLMConfig(
        vocab_size=50,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    other = transformers.LayoutLMModel(config)
    before = types(other)
    assert types(bertfast.optimize(other)) == before
    rows = bertfast.report(other)
    assert rows and all(row.reason == "bertfast doesn't know this class" for row in rows)
    with pytest.raises(ValueError, match="LayoutLMLayer"):
        bertfast.optimize(other, strict=True)


def test_a_subclass_of_the_users_is_left_alone(monkeypatch):
    class Mine(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[0] * 2

    stock, inputs = tiny(), batch()
    stock.__class__ = Mine
    monkeypatch.setattr(bertfast.notice, "_told", set())
    with pytest.warns(UserWarning, match="Mine is a subclass of BertModel") as warned:
        model = bertfast.optimize(copy.deepcopy(stock))
    assert warned[0].filename == __file__
    assert type(model) is Mine
    rows = bertfast.report(model)
    assert len(rows) == 2 and all("Mine is a subclass of BertModel" in row.reason for row in rows)
    with pytest.raises(ValueError, match="Mine is a subclass of BertModel"):
        bertfast.optimize(copy.deepcopy(stock), strict=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs)[real], stock(**inputs)[real], rtol=0, atol=5e-5)


@pytest.mark.parametrize("how", ["from_pretrained", "config"])
def test_a_new_model_of_a_converted_models_class(how, tmp_path):
    """It runs its original code until it is optimized itself."""
    fused, inputs = bertfast.optimize(tiny()), batch()
    real = inputs["attention_mask"].bool()
    expected = fused(**inputs)[0][real]
    if how == "config":
        new = type(fused)(fused.config).eval()
        new.load_state_dict(fused.state_dict())
    else:
        fused.save_pretrained(tmp_path)
        new = type(fused).from_pretrained(tmp_path).eval()
    assert [row.reason for row in bertfast.report(new)] == ["not converted"] * 2
    torch.testing.assert_close(new(**inputs)[0][real], expected, rtol=0, atol=HIDDEN_ATOL)
    assert not packs(new, inputs)
    assert types(bertfast.optimize(new, strict=True)) == types(fused) and packs(new, inputs)
    torch.testing.assert_close(new(**inputs)[0][real], expected, rtol=0, atol=HIDDEN_ATOL)
    bertfast.revert(new)
    assert type(new) is transformers.BertModel and not packs(new, inputs)


def test_reverting_a_new_model_of_a_converted_models_class():
    new = type(bertfast.optimize(tiny()))(tiny().config)
    assert type(bertfast.revert(new)) is transformers.BertModel


def test_a_new_layer_of_a_converted_layers_class():
    fused, x = bertfast.optimize(tiny()), torch.randn(2, 6, 64)
    layer = fused.encoder.layer[0]
    new = type(layer)(fused.config).eval()
    new.load_state_dict(layer.state_dict())
    torch.testing.assert_close(new(x), layer(x), rtol=0, atol=HIDDEN_ATOL)
    fused.encoder.layer[0] = new  # and inside a converted model, before and after its conversion
    assert not packs(fused, batch())
    assert packs(bertfast.optimize(fused), batch())


def test_an_old_transformers_is_named():
    """In a process of its own, where bertfast.hf was not imported before. CI runs the same script
    beside a real one."""
    script = Path(__file__).parent / "data" / "old_transformers.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "found 4.57.6" in result.stderr  # the warning


def test_layers_of_another_version_are_left_alone(monkeypatch):
    kind = transformers.models.bert.modeling_bert.BertLayer

    def forward(self, hidden_states, attention_mask=None, head_mask=None, **kwargs):
        raise AssertionError

    model = tiny()
    monkeypatch.setattr(kind, "forward", forward)
    bertfast.optimize(model)
    assert type(model.encoder.layer[0]) is kind
    assert "head_mask" in bertfast.report(model)[0].reason


def test_forwards_replaced_on_the_instance_are_reported():
    stock, inputs = tiny(), batch()
    original = stock.encoder.layer[0].forward
    stock.encoder.layer[0].forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    expected = stock(**inputs)[0]
    bertfast.optimize(stock)
    assert "replaced" in bertfast.report(stock)[0].reason
    torch.testing.assert_close(stock(**inputs)[0], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["Bert", "Electra", "DistilBert"])
@pytest.mark.parametrize("part", ["SelfAttention", "Layer", "Linear", "LayerNorm"])
def test_forwards_replaced_on_the_class_are_called(family, part, monkeypatch):
    """As who looks into attention does, before or after the conversion."""
    stock, inputs = tiny(family + "Model"), batch()
    early, late = bertfast.optimize(copy.deepcopy(stock)), copy.deepcopy(stock)
    names = {"SelfAttention": "DistilBertSelfAttention", "Layer": "TransformerBlock"}
    if part in ("Linear", "LayerNorm"):
        kind = getattr(nn, part)
    else:
        name = names[part] if family == "DistilBert" else family + part
        kind = getattr(sys.modules[type(stock).__module__], name)
    original, calls = kind.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        out = original(self, *args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5

    monkeypatch.setattr(kind, "forward", forward)
    expected = stock(**inputs)[0]
    real, count = inputs["attention_mask"].bool(), len(calls)
    for model in (early, bertfast.optimize(late)):
        calls.clear()
        torch.testing.assert_close(model(**inputs)[0][real], expected[real], rtol=1e-4, atol=1e-4)
        assert len(calls) == count
        assert not packs(model, inputs)  # what was put there may act on rows


@pytest.mark.parametrize(
    "arguments, kind, error",
    [
        (dict(backend="fast"), ValueError, "backend must be one of 'auto', 'torch'"),
        (dict(backend=["torch"]), ValueError, "backend must be one of .* got list"),
        (dict(packed="sometimes"), ValueError, 'packed must be True, False or "always"'),
        (dict(packed=None), ValueError, "packed must be .* got None"),
        (dict(packed=1), ValueError, "packed must be .* got 1"),
        (dict(strict="yes"), TypeError, "strict must be a bool, got str"),
    ],
)
def test_bad_arguments(arguments, kind, error):
    model = tiny()
    before = types(model)
    with pytest.raises(kind, match=error):
        bertfast.optimize(model, **arguments)
    assert types(model) == before


@pytest.mark.parametrize("function", [bertfast.optimize, bertfast.revert, bertfast.report])
@pytest.mark.parametrize("value", [None, "bert-base-uncased", transformers.BertModel])
def test_what_is_no_module(function, value):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got "):
        function(value)


def test_a_backend_that_cannot_run_here_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from bertfast.ops import available

    if available("cpu")["attention"]["cuda"] is None:
        pytest.skip("there are CUDA kernels for attention on a CPU")
    with pytest.raises(ValueError, match="backend 'cuda' can't run attention"):
        bertfast.optimize(tiny(), backend="cuda")(**batch())


def test_the_report_prints():
    model = bertfast.optimize(tiny("BertForQuestionAnswering"))
    model.bert.encoder.layer[1].output.register_forward_hook(lambda *a: None)
    rows = bertfast.report(model)
    text, page = str(rows), rows._repr_html_()
    assert "bert.encoder.layer.0  BertLayer  fused" in text
    assert "a hook on its BertOutput has to be called" in text
    assert "bert keeps padding: question answering" in text
    assert "<table>" in page and "question answering&#x27;s" in page


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_a_saved_model(tmp_path, capsys, as_json):
    from bertfast.commands.verify_model import verify_model

    tiny("BertForTokenClassification").save_pretrained(tmp_path)
    assert verify_model(str(tmp_path), as_json=as_json) == 0
    said = capsys.readouterr().out
    if as_json:
        record = json.loads(said)
        assert record["ok"] and len(record["layers"]) == 2
        assert {row["inputs"] for row in record["rows"]} == {
            "random, no padding",
            "random, padding right",
            "random, padding left",
        }
    else:
        assert "2 of 2 layers fused" in said and "WRONG" not in said
        assert max(map(len, said.splitlines()[1:])) <= 80


@pytest.mark.parametrize("fault", ["mask", "eps", "scale"])
def test_verify_finds_a_fault(tmp_path, capsys, monkeypatch, fault):
    """Each is wrong by little, or only where there is padding."""
    from bertfast.commands.verify_model import verify_model
    from bertfast.hf import layer

    run = layer.run_layer

    def wrong(parts, x, call):
        if fault == "mask" and call.batch.key_mask is not None:
            call = call._replace(batch=layer.Batch())
        if fault == "eps":
            x = x * (1 + 1e-4)
        if fault == "scale":
            parts = parts._replace(scale=parts.scale * 1.001)
        return run(parts, x, call)

    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(layer, "run_layer", wrong)
    assert verify_model(str(tmp_path)) == 1
    assert "WRONG" in capsys.readouterr().out


def test_verify_reads_texts(tmp_path, capsys):
    from bertfast.commands.verify_model import verify_model

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tiny().save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat\non a mat the cat sat\n")
    assert verify_model(str(tmp_path), texts, as_json=True) == 0
    assert "2 texts" in capsys.readouterr().out


def test_nothing_to_compare_is_a_fault(tmp_path, capsys):
    from bertfast.commands.verify_model import verify_model

    tiny("BertModel", is_decoder=True).save_pretrained(tmp_path)
    assert verify_model(str(tmp_path)) == 1
    assert "it is a decoder's" in capsys.readouterr().out


def test_the_classes_are_found_by_name():
    from bertfast import hf

    assert hf.BertLayer is hf.BertLayer and hf.BertLayer.__module__ == "bertfast.hf"
    assert issubclass(
        hf.TransformerBlock, sys.modules[hf.TransformerBlock._original.__module__].TransformerBlock
    )
    with pytest.raises(AttributeError, match="LayoutLMLayer"):
        hf.LayoutLMLayer  # noqa: B018
