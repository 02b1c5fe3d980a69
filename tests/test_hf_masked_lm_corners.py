"""optimize(masked_lm_loss="fused") and what others do to a head: the loss is always stock's."""

import contextlib
import copy
import warnings
from unittest import mock

import pytest
import torch
from support.hf_models import VOCABULARY, packs
from support.masked_lm import (
    HEADS,
    fused,
    labelled_batch,
    loss_and_gradients,
    makes_logits,
    same,
    stock_head,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

import bertfast
from bertfast import notice
from bertfast.hf import heads
from bertfast.ops import linear_cross_entropy

transformers = pytest.importorskip("transformers")


@contextlib.contextmanager
def told(text):
    """Expects a warning with this text."""
    notice._told.clear()
    with pytest.warns(UserWarning, match=f"runs the original head of a .*{text}"):
        yield


def as_stock(stock, model, inputs, rtol=2e-5):
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs), rtol)


# What has to be called


def hook(module, inputs, output):
    return output * 1.5


HOOKED = {
    "decoder": (lambda m: m.cls.predictions.decoder, "a hook on its decoder"),
    "cls": (lambda m: m.cls, "a hook on its BertOnlyMLMHead has to be called"),
    "predictions": (lambda m: m.cls.predictions, "a hook on its BertLMPredictionHead"),
    "dense": (lambda m: m.cls.predictions.transform.dense, "a hook on a Linear sees its rows"),
}


@pytest.mark.parametrize("place", HOOKED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called(place, when):
    stock = stock_head()
    inputs = labelled_batch(stock)
    find, reason = HOOKED[place]
    model = copy.deepcopy(stock)
    find(stock).register_forward_hook(hook)
    if when == "before":
        model = fused(stock)
    else:
        bertfast.optimize(model, masked_lm_loss="fused")
        assert not makes_logits(model, inputs)
        find(model).register_forward_hook(hook)
    with told(reason):
        as_stock(stock, model, inputs)
    assert reason in bertfast.report(model).notes[-1]


def test_the_reason_is_told_once_at_the_users_line():
    model, inputs = fused(stock_head()), labelled_batch(stock_head())
    model.cls.register_forward_hook(hook)
    notice._told.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs)
        model.eval()(**inputs)
    (only,) = warned
    assert only.filename == __file__ and "runs the original head of a BertForMaskedLM" in str(
        only.message
    )


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_a_hook_on_all_modules():
    stock = stock_head(num_hidden_layers=1)
    model, inputs, seen = fused(stock), labelled_batch(stock), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with told("a hook on all modules"):
            as_stock(stock, model, inputs)
    finally:
        handle.remove()
    assert model.cls.predictions.decoder in seen


def test_a_hook_on_the_head_itself_sees_its_output():
    model, seen = fused(stock_head()), []
    model.register_forward_hook(lambda m, i, output: seen.append(output.logits))
    assert not makes_logits(model, labelled_batch(model)) and seen == [None]


def test_replaced_forwards(monkeypatch):
    stock = stock_head("RobertaForMaskedLM")
    inputs = labelled_batch(stock)
    for one in (stock, model := fused(stock)):
        head = one.lm_head
        head.forward = lambda features, head=head, **_: type(head).forward(head, features) * 2
    with told("a hook on its RobertaLMHead has to be called"):
        as_stock(stock, model, inputs)
    stock = stock_head("RobertaForMaskedLM")
    model, kind = fused(stock), type(stock)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, **inputs: own(self, **inputs))
    with told("the forward of RobertaForMaskedLM was replaced"):
        as_stock(stock, model, inputs)


def test_parts_of_somebody_elses():
    class Cosine(nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.weight, self.bias = decoder.weight, decoder.bias

        def forward(self, x):
            return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.weight, self.bias)

    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(1, keepdim=True)

    for name, kind, reason in (
        ("decoder", Cosine, "decoder is a Cosine"),
        ("act", Centred, "rows"),
    ):
        stock = stock_head()
        if name == "decoder":
            predictions = stock.cls.predictions
            predictions.decoder = kind(predictions.decoder)
        else:
            stock.cls.predictions.transform.transform_act_fn = kind()
        inputs = labelled_batch(stock, (20, 20, 20))
        with told(reason):
            as_stock(stock, fused(stock), inputs)


def test_a_parametrized_decoder():
    stock = stock_head(tie_word_embeddings=False)
    nn.utils.parametrizations.weight_norm(stock.cls.predictions.decoder)
    inputs = labelled_batch(stock)
    with told("decoder is a ParametrizedLinear, which has to be called"):
        as_stock(stock, fused(stock), inputs)


def test_another_loss_of_distilbert():
    stock = stock_head("DistilBertForMaskedLM")
    inputs = labelled_batch(stock)
    stock.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
    with told("its mlm_loss_fct isn't CrossEntropyLoss as it was"):
        as_stock(stock, fused(stock), inputs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "targets, reason",
    [(["query", "dense"], None), (["decoder"], "decoder is a Linear, which has to be called")],
)
def test_lora(targets, reason, when):
    peft = pytest.importorskip("peft", reason="its LoRA layers are tested")
    base = stock_head(tie_word_embeddings=False)
    inputs = labelled_batch(base)

    def adapt(model):
        torch.manual_seed(7)
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=4)
        return peft.get_peft_model(model, config).train()

    stock = adapt(copy.deepcopy(base))
    if when == "before":
        model = adapt(bertfast.optimize(base, masked_lm_loss="fused"))
    else:
        model = bertfast.optimize(adapt(base), masked_lm_loss="fused")
    with told(reason) if reason else contextlib.nullcontext():
        as_stock(stock, model, inputs)
    assert (model(**inputs).logits is None) == (reason is None)


def test_a_head_that_peft_keeps_a_copy_of():
    peft = pytest.importorskip("peft", reason="its wrappers are tested")
    stock = stock_head()
    inputs = labelled_batch(stock)
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["cls"], r=4)
    model = peft.get_peft_model(fused(stock), config).train()
    expected = peft.get_peft_model(stock, config).train()
    with told("its BertOnlyMLMHead is a ModulesToSaveWrapper"):
        got = model(**inputs)
    same({"loss": got.loss}, {"loss": expected(**inputs).loss})


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_decoder():
    stock = stock_head(tie_word_embeddings=False)
    inputs = labelled_batch(stock)
    parts = {"cls.predictions.decoder": torch.ao.quantization.default_dynamic_qconfig}
    stock = torch.ao.quantization.quantize_dynamic(stock, parts).train()
    model = fused(stock)
    with torch.no_grad():
        assert makes_logits(model, inputs)
        same({"loss": model(**inputs).loss}, {"loss": stock(**inputs).loss})


# Weights


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_resized_embeddings(name):
    stock = stock_head(name)
    inputs = labelled_batch(stock)
    model = fused(stock)
    for one in (stock, model):
        torch.manual_seed(3)
        one.resize_token_embeddings(VOCABULARY + 9)
    inputs["labels"][0, 0] = VOCABULARY + 5
    as_stock(stock, model, inputs)
    assert not makes_logits(model, inputs)


@pytest.mark.parametrize("name", ["BertForPreTraining", "ElectraForMaskedLM"])
def test_weights_that_are_not_tied_and_frozen_ones(name):
    stock = stock_head(name, tie_word_embeddings=False)
    inputs = labelled_batch(stock)
    as_stock(stock, fused(stock), inputs)
    for parameter in stock.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    as_stock(stock, fused(stock), inputs)


def test_a_decoder_that_config_contradicts():
    stock = stock_head(tie_word_embeddings=False)
    inputs = labelled_batch(stock)
    stock.cls.predictions.decoder = nn.Linear(64, VOCABULARY * 2)
    with told("its decoder has 192 outputs, not config.vocab_size"), pytest.raises(ValueError):
        fused(stock)(**inputs)


# Labels


@pytest.mark.filterwarnings("ignore:bertfast runs the original head")
def test_labels_that_the_stock_model_refuses_are_refused():
    stock = stock_head()
    model, inputs = fused(stock), labelled_batch(stock)
    for labels in (
        inputs["labels"][:, :-1],
        inputs["labels"].to(torch.int32),
        inputs["labels"].float(),
        inputs["labels"].tolist(),
        inputs["labels"].to("meta"),
    ):
        for one in (stock, model):
            with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError)):
                one(**(inputs | {"labels": labels}))
    for wrong in (VOCABULARY, -1):
        inputs["labels"][0, 1] = wrong
        with pytest.raises(ValueError, match=f"between 0 and {VOCABULARY - 1}, got {wrong}"):
            model(**inputs)


def test_labels_of_other_shapes_and_kinds():
    stock = stock_head()
    model, inputs = fused(stock), labelled_batch(stock)
    expected = {"loss": stock(**inputs).loss}
    flat = inputs | {"labels": inputs["labels"].flatten()}
    output = model(**flat)
    assert output.logits is None
    same({"loss": output.loss}, expected)
    inputs = labelled_batch(stock, (9, 9))
    inputs["labels"] = inputs["labels"].clamp(min=0).to(torch.uint8)
    with told("labels are torch.uint8, not torch.int64"):
        same({"loss": model(**inputs).loss}, {"loss": stock(**inputs).loss})


def test_input_embeddings():
    stock = stock_head()
    inputs = labelled_batch(stock)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = torch.randn(*ids.shape, 64)
    model = fused(stock)
    as_stock(stock, model, inputs)
    assert not makes_logits(model, inputs)
    for one in (stock, model):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            one(labels=inputs["labels"])


# Modes of training


@pytest.mark.parametrize("name", ["BertForPreTraining", "DistilBertForMaskedLM"])
def test_autocast(name):
    """The loss is float32, and errs as the stock model's of 16 bits does."""
    stock = stock_head(name)
    inputs = labelled_batch(stock)
    exact = stock(**inputs).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, output = stock(**inputs).loss.item(), fused(stock)(**inputs)
        grads = loss_and_gradients(model := fused(stock), inputs)
    assert output.loss.dtype == torch.float32 and not makes_logits(model, inputs)
    # Logits here are some 5 in size: as many roundings of 2^-8 as there are values on the way.
    assert abs(output.loss.item() - exact) < max(2 * abs(rounded - exact), 5 * 2**-8)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


def test_a_model_of_16_bits():
    stock = stock_head().bfloat16()
    inputs = labelled_batch(stock)
    model = fused(stock)
    grads = loss_and_gradients(model, inputs)
    assert grads.pop("loss").dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    stock = stock_head()
    inputs = labelled_batch(stock)
    model = fused(stock)
    for one in (stock, model):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    as_stock(stock, model, inputs)
    assert packs(model, inputs) and not makes_logits(model, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_whole(backend):
    torch._dynamo.reset()
    stock = stock_head(num_hidden_layers=1)
    model = fused(stock)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ((5, 12), (12, 9)):
        inputs = labelled_batch(stock, lengths)
        output = compiled(**inputs)
        assert output.logits is None
        output.loss.backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        expected = loss_and_gradients(stock, inputs)
        same({"loss": output.loss.detach(), **got}, expected)
        model.zero_grad()


WEIGHT = "cls.predictions.decoder.weight"


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, the decoder apart"])
def test_in_parallel(how, process_group):
    stock = stock_head(num_hidden_layers=1, tie_word_embeddings="apart" not in how)
    inputs = labelled_batch(stock)
    model = fused(stock)
    if how == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
    else:
        if "apart" in how:
            fully_shard(model.cls.predictions.decoder, mesh=process_group)
        parallel = fully_shard(model, mesh=process_group)
    with told("has to be called") if "apart" in how else contextlib.nullcontext():
        output = parallel(**inputs)
    output.loss.backward()
    assert (output.logits is None) == ("apart" not in how)
    expected = loss_and_gradients(stock, inputs)
    grads = {
        name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in model.named_parameters()
    }
    got = {"loss": output.loss.detach(), **grads}
    if "apart" in how:  # its bias is no longer the head's
        got, expected = ({n: found[n] for n in ("loss", WEIGHT)} for found in (got, expected))
    same(got, expected)


def test_transforms():
    stock = stock_head(num_hidden_layers=1)
    inputs = labelled_batch(stock)
    model = fused(stock)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    expected = loss_and_gradients(stock, inputs)
    del expected["loss"]
    same(torch.func.grad(loss)(parameters), expected)


def test_no_gradients_in_training():
    stock = stock_head()
    model, inputs = fused(stock), labelled_batch(stock)
    with torch.no_grad():
        output = model(**inputs)
    assert output.logits is None and not output.loss.requires_grad
    same({"loss": output.loss}, {"loss": stock(**inputs).loss.detach()})


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("BertForMaskedLM", False),
        ("BertForPreTraining", False),
        ("RobertaForMaskedLM", True),
        ("ModernBertForMaskedLM", False),
    ],
)
def test_trainer(tmp_path, name, bf16):
    """With accumulation, of which it tells the head (num_items_in_batch); evaluation has logits. By
    autocast it puts a forward of its own on the instance."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    if name not in HEADS:
        pytest.skip(f"this version of transformers has another {name}")
    stock = stock_head(name)
    inputs = labelled_batch(stock, (9, 5, 20, 7))
    rows = [{n: v[row] for n, v in inputs.items()} for row in range(4)]
    results = []
    for model in (stock, fused(stock)):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
            seed=1,
            bf16=bf16,
            label_names=[n for n in inputs if "label" in n],
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        with mock.patch.object(heads, "linear_cross_entropy", wraps=linear_cross_entropy) as ours:
            loss = trainer.train().training_loss
        assert ours.call_count == (0 if model is stock else 6)  # 3 steps of 2 batches
        predicted = trainer.predict(rows)
        results.append((loss, predicted.metrics["test_loss"]))
        assert predicted.predictions is not None
        trainer.save_model(str(tmp_path))
    # In 16 bits logits of some 5 are rounded by 2^-8 of them, in the stock head alone.
    assert results[0] == pytest.approx(results[1], rel=1e-2 if bf16 else 1e-4)
    getattr(transformers, name).from_pretrained(tmp_path)
