"""sentence-transformers' SparseEncoder: SPLADE's vectors without logits, beside stock's."""

import contextlib
import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
from support import encoders
from support.hf_models import batch, rows_seen
from support.masked_lm import HEADS, same
from support.retrieval import PASSAGES, QUERIES, both_passes, features, same_bits, splade
from torch import nn
from torch.distributed.fsdp import fully_shard

import bertfast
from bertfast import notice
from bertfast.hf import heads
from bertfast.ops import linear_log1p_max
from bertfast.packing.batch import Batch
from bertfast.testing.model import beside_stock

pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers", reason="its encoder is tested")
if not hasattr(library, "SparseEncoder"):
    pytest.skip("this version has no SparseEncoder", allow_module_level=True)

from sentence_transformers.base import modules as modules_of_all  # noqa: E402
from sentence_transformers.sentence_transformer import modules as modules_of_sentences  # noqa: E402
from sentence_transformers.sparse_encoder import losses, modules  # noqa: E402

every_head = pytest.mark.parametrize("name", [n for n in HEADS if n.endswith("ForMaskedLM")])
VECTORS = "sentence_embedding"
NOTE = "SparseEncoder makes its vectors without the logits of all tokens"


def both(folder, name="BertForMaskedLM", change=None, **config):
    stock = splade(folder, name, **config)
    if change is not None:
        change(stock)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def off(name):
    """No dropout."""
    if name.startswith("DistilBert"):
        return dict.fromkeys(("dropout", "attention_dropout"), 0.0)
    found = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return found | ({"attention_dropout": 0.0} if name.startswith("ModernBert") else {})


def given(model, texts=PASSAGES):
    return features(model, texts)[0]


def made(model, texts=PASSAGES, **more):
    """The vectors, and the shape of the rows that they are made of: None where logits are made."""
    with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
        found = model(given(model, texts) | more)
    shapes = [call.args[0].shape for call in ours.call_args_list]
    assert len(shapes) < 2 and ("token_embeddings" in found) == (not shapes)
    assert "labels" not in found
    return found[VECTORS], shapes[0] if shapes else None


def gradients(model, texts=PASSAGES):
    model.zero_grad(set_to_none=True)
    vectors, _ = made(model, texts)
    torch.manual_seed(1)
    vectors.backward(torch.randn_like(vectors))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"vectors": vectors.detach(), **found}


def pooling(encoder, **options):
    encoder[1] = modules.SpladePooling(**options)


@pytest.mark.parametrize("packed", [True, False])
@every_head
def test_float64(name, packed, tmp_path, exact_rotation):
    stock = splade(tmp_path, name, **off(name)).double().train()
    model = bertfast.optimize(copy.deepcopy(stock), packed=packed, strict=True)
    assert bertfast.report(model).notes[-1] == NOTE or not packed
    found, expected = gradients(model), gradients(stock)
    same(found, expected, rtol=1e-10)
    vectors = expected["vectors"]
    assert 0.1 < (vectors > 0).double().mean() < 0.99  # relu cuts some, and not all
    with torch.no_grad():
        same({"vectors": made(model.eval())[0]}, {"vectors": vectors}, rtol=1e-10)


@every_head
def test_neither_padding_nor_logits_are_computed(name, tmp_path):
    model = bertfast.optimize(splade(tmp_path, name), strict=True)
    tokens = int(given(model)["attention_mask"].sum())
    _, rows = made(model)
    assert rows[0] == tokens < given(model)["attention_mask"].numel()
    assert set(rows_seen(model, {"input": given(model)})) == {(1, tokens)}
    _, rows = made(model, ["a b c", "d e f"])  # without padding
    assert rows[:2] == (2, 5)


class Vectors(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs):
        return {"vectors": self.encoder(inputs)[VECTORS]}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_float32_stays_within_the_budget(name, tmp_path, exact_rotation):
    stock = splade(tmp_path, name, **off(name)).train()
    inputs = {key: given(stock)[key] for key in ("input_ids", "attention_mask")}
    findings = beside_stock(Vectors(stock), bertfast.optimize, inputs)
    assert len(findings) > 15
    for finding, _ in findings:
        assert finding.ok, finding


# Calls of all kinds


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


CALLS = {
    "a query": lambda e: None,
    "log1p_relu": lambda e: pooling(e, activation_function="log1p_relu"),
    "in chunks": lambda e: pooling(e, chunk_size=3),
    "normalized": lambda e: e.append(modules_of_all.Normalize()),
    "an old class": lambda e: setattr(e[0], "__class__", modules.MLMTransformer),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CALLS)
def test_the_vectors_are_stocks(change, training, tmp_path):
    stock, model = both(tmp_path, change=CALLS[change], **off("Bert"))
    expected = stock.train(training)(given(stock))
    found, rows = made(model.train(training))
    assert rows is not None and found.requires_grad
    close(found, expected[VECTORS])
    assert model[1].embedding_dimension == stock[1].embedding_dimension == found.shape[1]
    with torch.inference_mode():
        close(made(model)[0], expected[VECTORS].detach())


def test_encode(tmp_path):
    """With prompts, sorted by length, in batches, as sparse tensors."""
    stock, model = both(tmp_path, change=lambda e: e.append(modules_of_all.Normalize()))
    texts = PASSAGES + QUERIES + ["a b c " * 20, ""]
    for one in (stock, model):
        one.prompts = {"query": "q u ", "document": ""}
    for call in ("encode", "encode_query", "encode_document"):
        expected = getattr(stock, call)(texts, batch_size=4)
        with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
            found = getattr(model, call)(texts, batch_size=4)
        assert ours.call_count == 5 and found.is_sparse
        close(found.to_dense(), expected.to_dense())
    alone = model.encode(texts[1], convert_to_sparse_tensor=False)
    close(alone, stock.encode(texts[1], convert_to_sparse_tensor=False))
    few = dict(max_active_dims=3, convert_to_sparse_tensor=False)
    close(model.encode(texts, **few), stock.encode(texts, **few))


@pytest.mark.parametrize("rows", ["left", "holes", "empty"])
def test_masks(rows, tmp_path):
    stock, model = both(tmp_path, **off("Bert"))
    inputs = batch((5, 20, 13), side="left" if rows == "left" else "right", pad=0)
    mask = inputs["attention_mask"]
    if rows == "holes":
        mask[1, 3:6] = 0
        inputs["input_ids"][1, 3:6] = 0
    if rows == "empty":
        mask[0], inputs["input_ids"][0] = 0, 0
    expected, found = stock(dict(inputs)), model(dict(inputs))
    assert "token_embeddings" not in found
    close(found[VECTORS], expected[VECTORS])
    assert rows != "empty" or not found[VECTORS][0].any()


def test_inputs_packed_by_the_caller(tmp_path):
    """As sentence-transformers sends them where there is a flash attention."""
    stock, model = both(tmp_path, **off("Bert"))
    inputs = batch((5, 20, 13), pad=0)
    real = inputs["attention_mask"].bool()
    bounds = torch.tensor([0, 5, 25, 38], dtype=torch.int32)
    packed = dict(
        input_ids=inputs["input_ids"][real][None],
        position_ids=torch.cat([torch.arange(n) for n in (5, 20, 13)])[None],
        **dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=20, max_length_k=20),
    )
    found = model(packed)
    assert "token_embeddings" not in found
    close(found[VECTORS], stock(inputs)[VECTORS])


def route(encoder):
    """Documents by the model, queries by a table of words, as models without inference have it."""
    table = modules.SparseStaticEmbedding(encoder.tokenizer)
    router = modules.Router.for_query_document([table], list(encoder.children()))
    return library.SparseEncoder(modules=[router], device="cpu")


def test_routes(tmp_path):
    stock = route(splade(tmp_path))
    model = bertfast.optimize(copy.deepcopy(stock))
    assert NOTE in bertfast.report(model).notes[-1]
    for call, calls in (("encode_document", 1), ("encode_query", 0)):
        with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
            found = getattr(model, call)(PASSAGES)
        assert ours.call_count == calls
        close(found.to_dense(), getattr(stock, call)(PASSAGES).to_dense())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_16_bits(how, training, tmp_path):
    """The dtype is stock's, and the error no larger than twice its own."""
    stock, model = both(tmp_path, **off("Bert"))
    exact = copy.deepcopy(stock).double().train(training)(given(stock))[VECTORS]
    results = []
    for one in (stock, model):
        one.train(training)
        if how == "weights":
            results.append(one.bfloat16()(given(one))[VECTORS])
        else:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(one(given(one))[VECTORS])
    errors = [(result.double() - exact).square().mean().sqrt() for result in results]
    assert results[1].dtype == results[0].dtype == torch.bfloat16
    assert errors[1] <= 2 * errors[0]


class FirstLogarithm(torch.overrides.TorchFunctionMode):
    """torch.log1p gives float32, as under autocast on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made.float() if func is torch.log1p else made


@pytest.mark.parametrize("training", [True, False])
def test_the_logarithms_dtype_is_that_of_stocks_call(training, tmp_path):
    _, model = both(tmp_path, **off("Bert"))
    model.bfloat16().train(training)
    head, rows = model[0].model, torch.randn(1, 3, 64).bfloat16()
    with FirstLogarithm():
        found = head._vectors_of(rows, Batch())
    assert found.dtype == (torch.float32 if training else torch.bfloat16)


def test_a_trainers_losses_are_stocks(tmp_path):
    datasets = pytest.importorskip("datasets", reason="its trainer needs it")
    pytest.importorskip("accelerate", reason="its trainer needs it")
    stock, model = both(tmp_path / "model", **off("Bert"))
    curves, columns = [], {"query": QUERIES, "passage": PASSAGES}
    for encoder in (stock, model):
        ranking = losses.SparseMultipleNegativesRankingLoss(encoder)
        arguments = library.SparseEncoderTrainingArguments(
            str(tmp_path),
            **dict(max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3, seed=1),
            **dict(use_cpu=True, logging_steps=1, report_to="none", save_strategy="no"),
            disable_tqdm=True,
        )
        trainer = library.SparseEncoderTrainer(
            *(encoder, arguments),
            train_dataset=datasets.Dataset.from_dict(columns),
            loss=losses.SpladeLoss(encoder, ranking, 1e-3, 1e-3),
        )
        with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
            trainer.train()
        assert ours.call_count == (0 if encoder is stock else 20)
        curves.append([told["loss"] for told in trainer.state.log_history if "loss" in told])
    assert len(curves[0]) == 10 and curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_both_passes_of_a_cached_loss_drop_the_same(tmp_path):
    model = bertfast.optimize(splade(tmp_path)).train()
    ranking = losses.SparseMultipleNegativesRankingLoss(model)
    loss = losses.CachedSpladeLoss(model, ranking, 1e-3, 1e-3, mini_batch_size=3)

    def added(*given):
        return sum(loss(*given).values())

    assert same_bits(both_passes(model, added, features(model, QUERIES, PASSAGES)))


@pytest.mark.triton
def test_the_backend_is_the_models(tmp_path):
    stock = splade(tmp_path, num_hidden_layers=1)
    model = bertfast.optimize(copy.deepcopy(stock), backend="triton")
    with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
        found = model(given(model, PASSAGES[:2]))[VECTORS]
    assert ours.call_args.kwargs["backend"] == "triton"
    close(found, stock(given(stock, PASSAGES[:2]))[VECTORS], atol=1e-4)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_in_parallel(how, process_group, tmp_path):
    stock, model = both(tmp_path / "model", num_hidden_layers=1, **off("Bert"))
    expected, parallel = gradients(stock), model
    if how == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=process_group)
    with mock.patch.object(heads, "linear_log1p_max", wraps=linear_log1p_max) as ours:
        vectors = parallel(given(model))[VECTORS]
    assert ours.call_count == 1
    torch.manual_seed(1)
    vectors.backward(torch.randn_like(vectors))
    found = {
        name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in model.named_parameters()
    }
    same({"vectors": vectors.detach(), **found}, expected)


# Where logits are made


@contextlib.contextmanager
def told(text):
    notice._told.clear()
    with pytest.warns(
        UserWarning, match="makes the logits of all tokens in a SparseEncoder: "
    ) as w:
        yield
    assert len(w) == 1 and text in str(w[0].message) and w[0].filename == __file__


def hook(module):
    module.register_forward_hook(lambda module, inputs, output: output)


def quantise(encoder):
    parts = {"decoder": torch.ao.quantization.default_dynamic_qconfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(
            encoder[0].model.cls.predictions, parts, inplace=True
        )


REASONS = {
    "its pooling is the sum of relu": lambda e: pooling(e, pooling_strategy="sum"),
    "its pooling is the max of tanh": lambda e: setattr(e[1], "activation_function", "tanh"),
    "a hook on its decoder": lambda e: hook(e[0].model.cls.predictions.decoder),
    "a hook on a Linear sees its rows": lambda e: hook(e[0].model.cls.predictions.transform.dense),
    "a hook on its BertForMaskedLM sees its logits": lambda e: hook(e[0].model),
    "a hook on its Transformer": lambda e: hook(e[0]),
    "a hook on its SpladePooling": lambda e: hook(e[1]),
    "a Dropout may read the logits": lambda e: e.append(modules_of_sentences.Dropout(0.0)),
    "its Normalize reads something else": lambda e: e.append(
        modules_of_all.Normalize("token_embeddings")
    ),
    "its module_kwargs": lambda e: setattr(e, "module_kwargs", {"1": ["other"]}),
    "its decoder is a": quantise,
    "its BertForMaskedLM is not converted": lambda e: bertfast.revert(e[0].model),
    "it makes other of the model's logits": lambda e: setattr(e[0], "module_output_name", "other"),
}


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_told(reason, tmp_path):
    stock, model = both(tmp_path)
    assert made(model)[1] is not None
    for one in (stock, model):
        REASONS[reason](one)
    note = bertfast.report(model).notes[-1]
    assert note.startswith("SparseEncoder makes the logits of all tokens: ") and reason in note
    if "other" in reason or "tanh" in reason:
        return  # stock has an error for it, or reads anything as relu
    with told(reason):
        found = model(given(model))
        model(given(model))
    assert "token_embeddings" in found
    close(found[VECTORS], stock(given(stock))[VECTORS])


def test_a_float_mask_weighs_logits(tmp_path):
    stock, model = both(tmp_path)
    mask = given(stock)["attention_mask"].float() * 0.5
    with told("attention_mask is torch.float32"):
        found, rows = made(model, attention_mask=mask)
    assert rows is None
    close(found, stock(given(stock) | {"attention_mask": mask})[VECTORS])
    assert "made them in its last call: attention_mask is" in bertfast.report(model).notes[-1]


def test_another_library_between(tmp_path):
    peft = pytest.importorskip("peft")
    stock, model = both(tmp_path)
    target = ["query", "decoder"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied decoder
        for one in (stock, model):
            torch.manual_seed(2)
            one.add_adapter(peft.LoraConfig(target_modules=target, init_lora_weights=False))
    with told("its decoder is a Linear, which has to be called"):
        found, _ = made(model.eval())
    close(found, stock.eval()(given(stock))[VECTORS], atol=1e-4)


def test_adapters_in_the_encoder_alone(tmp_path):
    peft = pytest.importorskip("peft")
    stock, model = both(tmp_path)
    for one in (stock, model):
        torch.manual_seed(2)
        one.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    found, rows = made(model.eval())
    assert rows is not None
    close(found, stock.eval()(given(stock))[VECTORS], atol=1e-4)


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_a_hook_on_all_modules(tmp_path):
    _, model = both(tmp_path)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        _, rows = made(model)
    finally:
        handle.remove()
    assert rows is None and model[0].model.cls.predictions.decoder in seen


def test_a_model_without_a_head_that_is_known(tmp_path):
    model = bertfast.optimize(splade(tmp_path))

    class Mine(type(model[0].model)._original):
        pass

    model[0].model = Mine(model[0].model.config)
    with told("its Mine is not converted, or has no head"):
        assert made(model)[1] is None


def test_a_sparse_auto_encoder_is_left_as_it_is(tmp_path):
    bare = modules_of_all.Transformer(str(encoders.save(tmp_path)))
    pool = modules_of_sentences.Pooling(32, "mean")
    parts = [bare, pool, modules.SparseAutoEncoder(32, 64, k=8, k_aux=16)]
    stock = library.SparseEncoder(modules=parts, device="cpu").eval()
    model = bertfast.optimize(copy.deepcopy(stock))
    assert type(model) is type(stock) and not bertfast.report(model).notes
    close(model(given(model))[VECTORS], stock(given(stock))[VECTORS])


def test_there_and_back(tmp_path):
    stock, model = both(tmp_path)
    assert type(model).__name__ == "SparseEncoder" and isinstance(model, library.SparseEncoder)
    assert list(model.state_dict()) == list(stock.state_dict())
    with bertfast.disabled():
        found, rows = made(model)
        assert rows is None and torch.equal(found, made(stock)[0])
    head = model[0].model
    inputs = {key: given(model)[key] for key in ("input_ids", "attention_mask")}
    assert head(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    labelled = inputs | {"labels": inputs["input_ids"]}
    assert head.train()(**labelled).logits is not None  # masked_lm_loss wasn't asked for
    bertfast.optimize(head.eval(), packed=False)  # it stays a part of the whole
    assert made(model)[1] is not None
    bertfast.optimize(model, masked_lm_loss="fused")
    assert head.train()(**labelled).logits is None and made(model.eval())[1] is not None
    bertfast.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in stock.modules()]
    assert torch.equal(made(model)[0], made(stock)[0])


def test_copies_pickles_and_what_is_saved(tmp_path):
    stock, model = both(tmp_path / "model")
    expected, _ = made(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, rows = made(other)
        assert rows is not None and torch.equal(found, expected)
    model.save(str(tmp_path / "saved"))
    assert "bertfast" not in (tmp_path / "saved" / "modules.json").read_text()
    again = library.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(again) is type(stock) and made(again)[1] is None
    close(made(again)[0], expected)


def test_compiled_whole(tmp_path):
    """Compilers are given the original code."""
    torch._dynamo.reset()
    stock, model = both(tmp_path, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    close(compiled(given(model))[VECTORS], stock(given(stock))[VECTORS])
    assert made(model)[1] is not None
