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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import bertfast
from bertfast.graphs import _Watched
from bertfast.ops import dispatch
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


@pytest.mark.parametrize("family", hf_models.KNOWN, ids=lambda family: family.prefix)
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
    for name in dir(transformers)  # which takes transformers a fifth of a second
    for prefix in hf_models.FAMILIES
    if name.startswith(prefix + "For") and not name.endswith(("CausalLM", "ProteinFolding"))
]


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name, exact_rotation):
    """In float64, where nothing but another sum can hide: outputs, and the gradient of each. All
    are packed but those whose softmax reads padding."""
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
        if inputs["attention_mask"].ndim == 2:
            assert packs(model, inputs) != name.endswith("QuestionAnswering")
    reasons = [row.reason for row in bertfast.report(model)]
    assert reasons and not any(reasons)


each_layer = pytest.mark.parametrize("prefix", LAYERS_OF)


def both(prefix, **config):
    stock = tiny(prefix + "Model", **config)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def one_layer(prefix):
    return {"n_layers" if prefix == "DistilBert" else "num_hidden_layers": 1}


def close(got, expected, inputs, atol=HIDDEN_ATOL):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[0][real], expected[0][real], rtol=0, atol=atol)


@each_layer
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_gradients_by_each_backend(prefix, backend):
    """The kernels' blocks in the interpreter, those that are called and those that are read."""
    stock, inputs = tiny(prefix + "Model", **one_layer(prefix)), batch((3, 6))
    if (reason := _missing(prefix, backend)) is not None:
        pytest.skip(reason)
    model = bertfast.optimize(copy.deepcopy(stock), backend=backend)
    real = inputs["attention_mask"].bool()
    same(numbers(model, inputs, real), numbers(stock, inputs, real), rtol=1e-4)
    assert packs(model, inputs)
    nodes = {"_AttentionBlockBackward", "_MlpBlockBackward"} & nodes_of(model(**inputs)[0])
    # ModernBERT's first layer has no LayerNorm before its attention, which is then composed.
    readable = isinstance(model.encoder_layers()[0].parts().attention_norm, torch.nn.LayerNorm)
    assert len(nodes) == (1 + readable if backend == "triton" else 0)


def _missing(prefix, backend):
    """Why the backend's attention can't run the family's layers yet."""
    told = next(family.layer for family in hf_models.KNOWN if family.prefix == prefix)
    names = {"rotary": "rotary", "window": "window", "distance": "distance_bias"}
    features = tuple(name for word, name in names.items() if word in told)
    case = (torch.device("cpu"), torch.float32, 16, None)
    return dispatch.unsupported_reason("attention_qkv", backend, *case, features)


def nodes_of(tensor):
    """The names of the autograd nodes behind it."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@each_layer
def test_saved_and_loaded(prefix, tmp_path):
    stock, model = both(prefix)
    inputs = batch()
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, again.state_dict().values(), stock.state_dict().values()))
    close(model(**inputs), again(**inputs), inputs)


@each_layer
@pytest.mark.parametrize(
    "targets",
    [["query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "q", "v", "Wqkv"], "all-linear"],
)
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
    stock, model = both(prefix, **one_layer(prefix))
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
def test_dropout(prefix, monkeypatch):
    """Packed it is the padded one, where a backend is asked for. Each call and layer draws anew, as
    does one that comes again. Not compared are the residuals' of a pre-norm layer and those within
    an MLP, which are torch's own, and the embeddings', which are drawn before the layers' where
    each draws a seed."""
    _, model = both(prefix)
    layers = model.encoder_layers()
    parts = layers[0].parts()
    own_draws = parts.norm_first or parts.activation_dropout is not None
    if own_draws or len(set(layers)) < len(layers):
        _, model = both(prefix, hidden_dropout_prob=0.0)
    for layer in model.encoder_layers():
        if hasattr(layer, "attn"):  # which has one setting for both
            layer.attn.out_drop.p = 0.0
    model.train()
    inputs = batch((20, 20, 7))
    real = inputs["attention_mask"].bool()
    drawn = []
    for name in ("attention", "attention_qkv"):
        attention = getattr(bertfast.ops, name)

        def spy(*args, seed, site, attention=attention, **options):
            drawn.append((int(seed), site))
            return attention(*args, seed=seed, site=site, **options)

        monkeypatch.setattr(bertfast.ops, name, spy)
    results = []
    for packed in (True, False):
        bertfast.optimize(model, packed=packed, backend="torch")
        torch.manual_seed(3)
        results.append(model(**inputs)[0][real])
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
    assert not torch.equal(model(**inputs)[0][real], results[1])
    assert len(drawn) == 3 * len(layers) and len(set(drawn)) == 2 * len(layers)


@each_layer
def test_a_hook_beside_the_layers_sees_rows(prefix):
    """On whatever else the encoder calls, and what is around layers."""
    stock, model = both(prefix)
    inputs = batch()
    names = {id(module): name for name, module in model.named_modules()}
    inside = {id(part) for layer in model.encoder_layers() for part in layer.modules()}
    encoder = model.encoder_module()
    for module in encoder.modules():
        if id(module) in inside or isinstance(module, torch.nn.ModuleList) or module is encoder:
            continue
        seen = []
        for one in (stock, model):
            part = one.get_submodule(names[id(module)])
            handle = part.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(tensor(out).shape)
            )
            close(one(**inputs), stock(**inputs), inputs)
            handle.remove()
        assert len(set(seen)) == 1, names[id(module)]
    assert packs(model, inputs)


def tensor(output):
    return output[0] if isinstance(output, tuple) else output


@each_layer
@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize(
    "config",
    [{"is_decoder": True}, {"is_causal": True}, {"chunk_size_feed_forward": 5}],
    ids=str,
)
def test_what_is_not_done_runs_as_before(prefix, config):
    stock, model = both(prefix, **config)
    (name,), inputs = config, batch()
    layer = model.encoder_layers()[0]
    if name == "chunk_size_feed_forward" and not hasattr(getattr(layer, "ffn", layer), name):
        return  # the family doesn't have it
    assert torch.equal(model(**inputs)[0], stock(**inputs)[0]) and not packs(model, inputs)
    assert all(row.reason for row in bertfast.report(model))


@each_layer
@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize("how", ["another class", "another forward", "a hook"])
def test_each_container_is_called_if_it_has_to_be(prefix, how, monkeypatch):
    """Those whose work the fused layer does in their stead."""
    inputs = batch()
    for number in range(len(both(prefix)[1].encoder_layers()[0].containers())):
        stock, model = both(prefix)
        names = {id(module): name for name, module in model.named_modules()}
        part = model.encoder_layers()[0].containers()[number]
        kind, before = type(part), type(part).forward

        def twice(self, *args, before=before, **kwargs):
            return double(self, args, before(self, *args, **kwargs))

        with monkeypatch.context() as patch:
            if how == "another forward":
                patch.setattr(kind, "forward", twice)
            for one in (stock.get_submodule(names[id(part)]), part):
                if how == "another class":
                    one.__class__ = type(kind.__name__, (kind,), {"forward": twice})
                elif how == "a hook":
                    one.register_forward_hook(double)
            close(model(**inputs), stock(**inputs), inputs, 1e-4)
            assert bertfast.report(model)[0].reason and not packs(model, inputs)


def double(module, args, out):
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


@each_layer
def test_graphs_watch_all_that_the_encoder_reads(prefix):
    """Modules beside the layers too: a graph would read them where they were."""
    _, model = both(prefix)
    watched = _Watched(model.facts())
    beside = model.facts().beside
    read = {id(p) for part in (model.encoder_module(), *beside) for p in part.parameters()}
    made_of = {id(b) for part in model.facts().tables for b in part.buffers()}
    assert watched.why_not is None
    assert set(map(id, watched._parameters)) == read | made_of
    for module in beside:
        (parent, name), *_ = (
            (one, name)
            for one in model.modules()
            for name, child in one.named_children()
            if child is module
        )
        setattr(parent, name, torch.nn.Tanh())
        assert _Watched(model.facts()).why_not == "a module beside the layers has to be called"
        setattr(parent, name, module)


@pytest.mark.parametrize("prefix", [f.prefix for f in hf_models.KNOWN if "rotary" in f.layer])
def test_graphs_need_frequencies_whose_changes_are_counted(prefix):
    _, model = both(prefix)
    module, *_ = model.facts().tables
    name, *_ = module._buffers
    with torch.inference_mode():
        setattr(module, name, getattr(module, name).clone())
    assert "inference mode" in _Watched(model.facts()).why_not


@each_layer
def test_packed_by_the_caller(prefix):
    stock, model = both(prefix)
    ids = [torch.randint(5, 90, (n,)) for n in (5, 20, 13)]
    bounds = torch.tensor([0, 5, 25, 38], dtype=torch.int32)
    counted = "position_ids" not in model.TOKENS or getattr(model, "rotary_embeddings", None)
    positions = [
        torch.arange(len(one)) if counted else model.position_ids(one[None])[0] for one in ids
    ]
    given = dict(input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions)[None])
    packed = model(**given, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)[0][0]
    expected = torch.cat([stock(one[None])[0][0] for one in ids])
    torch.testing.assert_close(packed, expected, rtol=0, atol=HIDDEN_ATOL)


@each_layer
@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize("part", ["layer", "encoder"])
def test_a_part_by_itself(prefix, part):
    """In a model that was not converted, with a mask and without."""
    stock, model = both(prefix)
    chosen = model.encoder_layers()[1] if part == "layer" else model.encoder_module()
    bertfast.revert(model)
    bertfast.optimize(chosen)
    for inputs in (batch(), {"input_ids": batch((9, 9))["input_ids"]}):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        close(model(**inputs), stock(**inputs), {"attention_mask": real})
    assert not any(row.status == "fused" for row in bertfast.report(model))


@each_layer
def test_tuples_and_errors(prefix):
    stock, model = both(prefix)
    inputs = batch()
    got, expected = (one(**inputs, return_dict=False) for one in (model, stock))
    assert type(got) is tuple and len(got) == len(expected)
    close(got, expected, inputs)
    x = torch.randn(3, 20, hf_models.WIDTH)
    for wrong in ({}, inputs | {"inputs_embeds": x}):
        for one in (stock, model):
            with pytest.raises(ValueError, match="input"):
                one(**wrong)


def test_berts_layer_in_a_family_without_decoders():
    stock, model = both("Bert")
    for layer in model.encoder_layers():
        del layer.is_decoder
    inputs = batch()
    close(model(**inputs), stock(**inputs), inputs)
    assert packs(model, inputs)


GROUPS = dict(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)


def test_albert_in_groups():
    """Two groups of two layers, each group called twice."""
    stock, model = both("Albert", **GROUPS)
    inputs = batch()
    assert len(model.encoder_layers()) == 8 and len(bertfast.report(model)) == 4
    real = inputs["attention_mask"].bool()
    for wrapped in (False, True):
        if wrapped:
            apply_activation_checkpointing(model, check_fn=lambda m: m in set(model.groups()))
            bertfast.optimize(model)
        got = numbers(model, inputs, real)
        got = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in got.items()}
        same(got, numbers(stock, inputs, real), rtol=5e-5)
        assert packs(model, inputs)


def test_an_albert_that_is_made_longer():
    """Its layer then comes again, where it came once."""
    stock, model = both("Albert", num_hidden_layers=1)
    inputs = batch()
    model(**inputs)
    assert model.facts().numbers
    for one in (stock, model):
        one.config.num_hidden_layers = 3
    close(model(**inputs), stock(**inputs), inputs)
    assert model.facts().numbers is None and packs(model, inputs)


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_a_group_of_somebody_elses():
    """It may hand down what it likes."""
    stock, inputs = tiny("AlbertModel", **GROUPS), batch()
    group = stock.encoder.albert_layer_groups[1]

    class Mine(type(group)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return 2 * super().forward(hidden_states, attention_mask)

    group.__class__ = Mine
    model = bertfast.optimize(copy.deepcopy(stock))
    close(model(**inputs), stock(**inputs), inputs)
    assert not packs(model, inputs)
    assert "one of its groups is a Mine" in str(bertfast.report(model).notes)
