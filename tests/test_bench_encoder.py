"""Measuring layers and models: the lengths, the floor, the providers, the check before the time."""

import dataclasses
import statistics

import pytest
import torch

from bertfast.commands.bench import (
    ceilings,
    encoder,
    floor,
    harness,
    models,
    names,
    parts,
    providers,
    record,
    timing,
)
from bertfast.commands.bench.lengths import MIXES
from bertfast.commands.errors import UserError

TINY = models.Model("tiny", 32, 64, 2, 2)


@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_mixes_have_their_stated_mean(mix):
    lengths = mix.lengths(20_000, seed=3)
    assert statistics.fmean(lengths) == pytest.approx(mix.mean, rel=0.02)
    assert mix.shortest <= min(lengths) and max(lengths) <= mix.longest
    assert lengths == mix.lengths(20_000, seed=3)
    assert mix.name == "full" or lengths != mix.lengths(20_000, seed=4)


def test_long_documents_pile_up_where_they_are_cut():
    lengths = MIXES["wikipedia"].lengths(20_000)
    assert 0.15 < lengths.count(512) / len(lengths) < 0.3


def test_floor_counts_operations_and_bytes():
    """By hand: two sequences of 3 and 5 tokens, width 4, inner 16, 2 bytes a value."""
    size, lengths = models.Model("narrow", 4, 16, 3, 1), (3, 5)
    kernels = floor.forward(size, lengths, 2)
    assert sum(k.flops for k in kernels if k.kind == "products") == 24 * 8 * 4 * 4
    (attention,) = (k for k in kernels if k.kind == "attention")
    assert attention.flops == 4 * 4 * (9 + 25)
    assert attention.bytes == 4 * 8 * 4 * 2
    assert sum(k.bytes for k in kernels if k.kind == "memory") == 2 * 2 * 8 * 4 * 2
    qkv = kernels[0]
    assert qkv.bytes == 2 * (8 * 4 + 4 * 12 + 8 * 12)
    backward = floor.backward(size, lengths, 2)
    assert sum(k.flops for k in backward if k.kind == "products") == 48 * 8 * 4 * 4
    model = floor.model(size, lengths, 2, training=False)
    assert sum(k.flops for k in model) == 3 * sum(k.flops for k in kernels)


def test_floor_is_the_slower_of_both_ceilings():
    limits = floor.Ceilings(bytes_per_s=1e9, flop_per_s=1e12)
    assert floor.Work("products", 10**9, 10**3).floor_us(limits) == pytest.approx(1000)
    assert floor.Work("memory", 10**3, 10**6).floor_us(limits) == pytest.approx(1000)
    work = [floor.Work("products", 3 * 10**9, 0), floor.Work("memory", 0, 10**6)]
    assert floor.floor_us(work, limits) == pytest.approx(4000)


def test_shapes_and_mixes_are_read():
    (a, b) = models.parse_shapes("1x128, 8x64")
    assert a.lengths == (128,) and b.lengths == (64,) * 8 and b.name == "8x64"
    mix = models.mixed_batch("squad", 5)
    assert len(mix.lengths) == 5 and mix.real < mix.padded == 5 * mix.longest
    assert mix.name == f"squad 5x{mix.longest}"
    inputs = mix.inputs("cpu")
    assert inputs["attention_mask"].sum(1).tolist() == list(mix.lengths)
    for wrong in ("8", "x8", "0x8", "8x", "8xx8"):
        with pytest.raises(UserError, match="ROWSxLENGTH"):
            models.parse_shapes(wrong)


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("transformers")
    for name, value in (("LATENCY_TURNS", 2), ("TURN_SECONDS", 0.05)):
        monkeypatch.setattr(timing, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recorder = record.Recorder(None, record.environment("cpu"))
    machine = ceilings.Machine("cpu", lambda row: None, quick=True)
    yield harness.Bench(machine, recorder, repeats=2, slow=False)
    torch.set_num_threads(threads)


MODELS = {"bertfast", "bertfast padded", "HF eager", "HF SDPA", "nn.TransformerEncoder"}
LAYERS = {"bertfast", "HF eager", "HF SDPA", "nn.TransformerEncoderLayer"}


@pytest.mark.parametrize("pass_", encoder.PASSES)
@pytest.mark.parametrize("layer", [False, True])
def test_everybody_who_is_here_is_checked_and_timed(bench, pass_, layer):
    tokens = models.full_batch(1, 9) if layer or pass_ == "latency" else _mixed()
    bench.measure(encoder.EncoderCase(TINY, tokens, pass_, torch.float32, layer))
    rows = {row.provider: row for row in bench.recorder.rows}
    assert set(rows) == (LAYERS if layer else MODELS)
    for row in rows.values():
        assert row.median_us > 0 and row.percent_of_floor > 0
        if pass_ == "latency":
            assert row.p99_us >= row.p80_us >= row.median_us
        else:
            assert row.note == "" and row.p99_us is None
        assert 0 < row.error < 1e-5
        assert row.tokens_per_s == pytest.approx(tokens.real / row.median_us * 1e6)
        assert row.padded_tokens_per_s == pytest.approx(tokens.padded / row.median_us * 1e6)
    assert bench.faults == []
    absent = {"torch compile", "torch compile max", "bertfast graph"}
    absent |= set() if layer else {"bertfast graphs", "torch compile graphs", "TensorRT"}
    absent |= {"Transformer Engine"} if layer else {"flash-attn varlen", "onnxruntime"}
    assert absent <= {line.partition(":")[0] for line in bench.left_out}


def _mixed() -> models.Tokens:
    return models.Tokens("mixed", (3, 9, 6))


def test_16_bit_models_stay_within_their_bound(bench):
    for pass_ in ("forward", "forward+backward"):
        bench.measure(encoder.EncoderCase(TINY, _mixed(), pass_, torch.bfloat16))
    assert bench.faults == []
    assert {row.provider for row in bench.recorder.rows} == MODELS
    assert all(row.error > 1e-4 for row in bench.recorder.rows)  # it is no float32


@pytest.mark.parametrize("fault", ["a bias", "NaN", "no gradient", "raises"])
def test_a_wrong_model_is_not_timed(bench, fault):
    def make(case, inputs, setting):
        right = providers.hugging_face("sdpa")(case, inputs, setting)

        def forward():
            if fault == "raises":
                raise RuntimeError("no such kernel")
            y = right.forward()
            return y * float("nan") if fault == "NaN" else y

        with torch.no_grad():
            bias = right.module.encoder.layer[1].output.dense.bias
            if fault == "a bias":
                bias[0] += 1e-3
            if fault == "no gradient":
                bias.requires_grad_(False)
        return dataclasses.replace(right, forward=forward)

    compared = [provider for provider in providers.of_kind("model") if provider.name == "HF eager"]
    compared.insert(0, providers.Provider("bertfast", "", ("model",), make))
    case = encoder.EncoderCase(TINY, _mixed(), "forward+backward", torch.float32)
    bench.measure(case, compared)
    rows = {row.provider: row for row in bench.recorder.rows}
    assert rows["bertfast"].median_us is None and rows["bertfast"].note.startswith("not timed")
    assert rows["HF eager"].median_us > 0
    assert len(bench.faults) == 1


@pytest.mark.parametrize("right", [True, False])
def test_what_a_graph_replays_is_checked(bench, monkeypatch, right):
    """A stand-in for a CUDA graph, whose replay is as the eager run or isn't."""

    class Graph:
        def replay(self):
            if not right:
                with torch.inference_mode():
                    self.output += 1e-3

    def captured(calls):
        graph = Graph()
        graph.output = calls[0]()
        return graph, [graph.output]

    graphs = [p for p in providers.of_kind("model") if p.name.endswith(" graph")]
    assert {p.name for p in graphs} == {"bertfast graph", "HF SDPA graph"}
    graphs = [dataclasses.replace(p, needs=()) for p in graphs]
    monkeypatch.setattr(encoder, "captured", captured)
    case = encoder.EncoderCase(TINY, models.full_batch(1, 9), "latency", torch.float32)
    bench.measure(case, graphs)
    assert len(bench.recorder.rows) == 2
    for row in bench.recorder.rows:
        assert (row.median_us is not None) == right
        assert right or "wrong: Wrong: in a graph: relative error" in row.note


@pytest.mark.parametrize("table", [names.TORCH, names.TRANSFORMER_ENGINE])
def test_names_go_there_and_back(bench, table):
    layer = TINY.build("cpu", torch.float32).encoder.layer[0]
    theirs = names.to_theirs(layer, table)
    assert len(theirs) == 2 * len(table)
    ours = names.to_ours(theirs | {"other": torch.ones(1)}, table)
    assert ours.pop("other") is not None
    wanted = dict(layer.named_parameters())
    assert set(ours) == set(wanted)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_packed_arguments_hold_the_real_tokens():
    tokens = _mixed()
    case = encoder.EncoderCase(TINY, tokens, "forward", torch.float32)
    packed = providers.packed_arguments(case, tokens.inputs("cpu"))
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, 18)
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 12, 18]
    assert packed["position_ids"][0, :5].tolist() == [0, 1, 2, 0, 1]
    assert (packed["input_ids"] != 0).all()
    assert packed["max_length_k"] == 9


def test_a_directory_without_a_model_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="a directory with a config.json"):
        models.saved(str(tmp_path))


def test_a_saved_model_is_measured(bench, tmp_path):
    TINY.build("cpu", torch.float32).save_pretrained(tmp_path)
    model = models.saved(str(tmp_path))
    assert dataclasses.replace(model, name="tiny", directory=None) == TINY
    bench.wanted = ("bertfast", "HF SDPA")
    bench.measure(encoder.EncoderCase(model, _mixed(), "forward", torch.float32))
    assert len(bench.recorder.rows) == 2 and bench.faults == []


@pytest.mark.parametrize("in_one", [False, True])
def test_a_gelu_in_its_products_kernel_is_a_product(in_one, monkeypatch):
    called = []

    def records(name):
        real = getattr(parts.ops, name)
        return lambda *args: called.append(name) or real(*args)

    for name in ("bias_gelu", "linear_gelu"):
        monkeypatch.setattr(parts.ops, name, records(name))
    choice = parts.linear_gelu.Choice("triton", "triton" if in_one else None)
    monkeypatch.setattr(parts.linear_gelu, "choose", lambda *_: choice)
    tensors = parts._Layer(TINY, models.full_batch(2, 9), "cpu", torch.float32)
    found = parts._ours(tensors)
    assert len([y for y in found["products"]() if y is not None]) == 4
    assert called == ["linear_gelu"] * in_one
    assert len([y for y in found["memory"]() if y is not None]) == 3 - in_one
    assert called == (["linear_gelu"] if in_one else ["bias_gelu"])


def test_parts_of_a_layer(bench):
    case = encoder.EncoderCase(TINY, models.full_batch(2, 8), "forward", torch.float32, layer=True)
    parts.measure_parts(bench.machine, bench.recorder, case, 2)
    timed = {(row.provider, row.op) for row in bench.recorder.rows if row.median_us > 0}
    kinds = ("products", "attention", "memory")
    assert timed == {(p, f"tiny layer {kind}") for p in ("bertfast", "HF SDPA") for kind in kinds}
