"""The modelled column of `bertfast bench`: each provider's counts, and the time they come to."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from bertfast.commands.bench import cases as op_cases
from bertfast.commands.bench import ceilings, encoder, floor, harness, models, predicted, record
from bertfast.commands.bench.cases import (
    bias_gelu,
    layer_norm,
    linear_cross_entropy,
    linear_gated,
    linear_gelu,
    linear_log1p_max,
)
from bertfast.commands.bench.record import Environment, Row
from bertfast.commands.bench.tables import everything, op_table
from bertfast.ops.linear.run import Choice

BASE = models.MODELS["BERT-base"]
MEASURED = ((16384, 3072, 768), (16384, 768, 3072))
# Made up: 2 TB/s, 500 TFLOP/s, a microsecond a kernel, 100 multiprocessors.
GPU = predicted.Gpu(floor.Ceilings(2e12, 5e14), 1.0, 100, MEASURED)
BF16 = torch.bfloat16


def layer(pass_="forward", shape="32x512", sizes=BASE, alone=True, dtype=BF16):
    (tokens,) = models.parse_shapes(shape)
    return encoder.EncoderCase(sizes, tokens, pass_, dtype, alone)


def counts(case, name):
    (provider,) = (one for one in case.providers() if one.name == name)
    return case.counts(provider)


# The GPU


def test_the_measured_product_takes_the_time_that_was_measured():
    times = [GPU.product_us(*sizes) for sizes in MEASURED]
    flops = 2 * 16384 * 3072 * 768
    assert min(times) == pytest.approx(flops / 5e14 * 1e6)


@pytest.mark.parametrize(
    ("rows", "factor"),
    [(12800, 1.0), (12801, 2.0)],  # 100 tiles of 128 rows and 256 columns, then one more
)
def test_a_last_wave_takes_as_long_as_a_full_one(rows, factor, monkeypatch):
    monkeypatch.setattr(predicted, "TILES", ((128, 256, 1.0),))
    full = GPU.product_us(12800, 256, 1024)
    assert GPU.product_us(rows, 256, 1024) == pytest.approx(factor * full)


def test_a_long_sum_is_split_where_tiles_are_few(monkeypatch):
    monkeypatch.setattr(predicted, "TILES", ((128, 256, 1.0),))
    whole = GPU.product_us(128, 256, 4096)
    monkeypatch.setattr(predicted, "SPLITS", (1,))
    assert whole < GPU.product_us(128, 256, 4096) / 4


def test_a_kernel_takes_the_longer_of_both():
    idle = predicted.Counts(2, 2e6)
    assert idle.us(GPU) == pytest.approx(2 + 1)
    narrow = predicted.Counts(0, 0, 2, (predicted.Product(16384, 3072, 768, extra=0),))
    bound = predicted.Counts(0, 0, 2, (predicted.Product(16384, 3072, 768, extra=1e9),))
    assert narrow.us(GPU) == pytest.approx(GPU.product_us(16384, 3072, 768))
    assert bound.us(GPU) == pytest.approx(1000, rel=0.1) and bound.us(GPU) > 1000


# A layer


def by_hand(tokens, length, units, kernels, products):
    """A layer of BERT-base on the made-up GPU, its attention apart."""
    work = floor.attention([length] * (tokens // length), 768, 2)
    rate = 5e14 * 0.54 * length / (length + 130)
    attention = max(work.flops / rate, work.bytes / 2e12) * 1e6
    made = sum(
        max(GPU.product_us(tokens, n, k), 2e6 * (tokens * (n + k) + n * k) / 2e12)
        for n, k in products
    )
    return units * tokens * 768 * 2 / 2e12 * 1e6 + kernels + made + attention


UP = [(768, 768), (3072, 768), (768, 3072)]
APART = [(768, 768)] * 3


@pytest.mark.parametrize(
    ("name", "units", "kernels", "products"),
    [
        ("bertfast", 14, 8, [(2304, 768), *UP]),
        ("HF SDPA", 18, 12, APART + UP),
        ("torch compile", 14, 9, APART + UP),
    ],
)
def test_a_layer_in_inference(name, units, kernels, products):
    expected = by_hand(16384, 512, units, kernels, products)
    assert counts(layer(), name).us(GPU) == pytest.approx(expected)


def test_each_product_has_two_gradients():
    forward, training = counts(layer(), "bertfast"), counts(layer("forward+backward"), "bertfast")
    flops = [2 * math.prod(product[:3]) for product in forward.products]
    assert len(training.products) == 3 * len(flops)
    assert sum(2 * math.prod(p[:3]) for p in training.products) == 3 * sum(flops)
    floors = layer("forward+backward").work()
    assert sum(work.flops for work in floors if work.kind == "products") == 3 * sum(flops)
    backward = training.products[len(flops) :]
    assert backward[3][:3] == (16384, 3072, 768)  # what GELU's gradient is made of
    assert {p[:3] for p in backward[4:]} == {(n, k, 16384) for n, k in [(2304, 768), *UP]}


def test_gelu_in_one_kernel_with_its_product(monkeypatch):
    """As `bertfast tune` chose: its traffic is the product's, and a kernel less each time."""
    usual = counts(layer("forward+backward"), "bertfast")
    monkeypatch.setattr(
        predicted.linear_gelu, "choose", lambda *_: Choice("triton", "triton", None)
    )
    forward = counts(layer("forward+backward"), "bertfast")
    monkeypatch.setattr(
        predicted.linear_gelu, "choose", lambda *_: Choice("triton", "triton", "cuda")
    )
    both = counts(layer("forward+backward"), "bertfast")
    unit = 16384 * 768
    assert [usual.kernels - one.kernels for one in (forward, both)] == [1, 2]
    assert usual.bytes - forward.bytes == 8 * unit * 2
    assert forward.bytes - both.bytes == 12 * unit * 2
    assert [p.extra for p in forward.products if p.extra] == [4 * unit]
    extras = {number: p.extra for number, p in enumerate(both.products) if p.extra}
    assert extras == {2: 4 * unit, 4 + 3: 4 * unit}  # up; the gradient of down's input
    assert both.us(GPU) < forward.us(GPU) < usual.us(GPU)


def test_the_figures_are_those_of_the_table():
    """Of CONTRIBUTING, whose own rows a test counts from launches."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

    def row(name):
        (line,) = re.findall(rf"^\| {name} \|(.*)\|$", text, re.M)
        return tuple(map(float, line.split("|")))

    ours = "beside products and attention, GELU in"
    one = predicted.OURS_ONE
    assert predicted.OURS.units == row(f"{ours} two kernels")
    whole = tuple(map(sum, zip(one.units, one.in_product, strict=True)))
    assert whole == row(f"{ours} one kernel")
    assert predicted.EAGER.units == row("the same of eager, with a matrix of scores beside it")
    assert predicted.SDPA.units == row("of eager with SDPA")
    assert predicted.COMPILED.units == row("of torch.compile")
    assert predicted.FLASH_PACKED.units == row("of flash-attention on packed tokens")


def test_padding_is_computed_by_those_who_keep_it():
    case = encoder.EncoderCase(BASE, models.Tokens("mixed", (128, 32)), "forward", BF16)
    found = {name: counts(case, name) for name in ("bertfast", "bertfast padded", "HF SDPA")}
    rows = {name: one.products[0].rows for name, one in found.items()}
    assert rows == {"bertfast": 160, "bertfast padded": 256, "HF SDPA": 256}
    assert len(found["bertfast"].products) == 12 * 4
    assert found["bertfast"].kernels == 12 * 8 + 1


def test_what_is_not_known_is_not_modelled():
    names = {one.name for one in layer().providers() if layer().counts(one)}
    assert names == {
        *("bertfast", "bertfast graph", "HF eager", "HF SDPA", "HF SDPA graph"),
        *("torch compile", "torch compile max"),
    }
    assert counts(layer(dtype=torch.float32), "bertfast") is None
    for change in (dict(inner=2048), dict(gated="silu")):
        other = dataclasses.replace(BASE, **change)
        assert counts(layer(sizes=other), "bertfast") is None


# Ops


@pytest.mark.parametrize(
    ("pass_", "name", "kernels", "after", "extra"),
    [
        ("forward", "bertfast triton", 1, 0, -1),
        ("training", "bertfast triton", 1, 0, 1),
        ("backward", "bertfast triton", 2, 0, 3),
        ("forward", "bertfast two kernels", 2, 3, 0),
        ("backward", "bertfast two kernels", 3, 5, 0),
        ("training", "torch eager", 3, 5, 0),
    ],
)
def test_linear_gated(pass_, name, kernels, after, extra):
    """after, extra: tensors of y's size, beside the product's own, of which u is two."""
    found = counts(linear_gated.case(pass_, 100, 32, 64, BF16), name)
    assert found.kernels == kernels and found.bytes == after * 100 * 64 * 2
    columns = 64 if pass_ == "backward" else 128
    assert found.products == ((100, columns, 32, extra * 100 * 64),)
    case = linear_gated.case(pass_, 100, 32, 64, BF16)
    (work,) = case.work()
    assert work.flops == 2 * 100 * columns * 32
    wide = {"forward": 1, "training": 3, "backward": 4}[pass_] * 100
    bias = 2 * (2 if pass_ == "backward" else 1)
    assert work.bytes == 2 * (100 * 32 + columns * 32 + (wide + bias) * 64)
    assert counts(linear_gated.case("backward", 100, 32, 64, BF16), "torch eager") is None


@pytest.mark.parametrize(
    ("pass_", "name", "kernels", "after", "extra"),
    [
        ("forward", "bertfast triton", 1, 0, 0),
        ("training", "bertfast cuda", 1, 0, 1),
        ("backward", "bertfast cuda", 2, 0, 1),
        ("forward", "bertfast two kernels", 2, 2, 0),
        ("training", "bertfast two kernels", 2, 2, 0),
        ("backward", "bertfast two kernels", 3, 3, 0),
        ("backward", "torch eager", 3, 4, 0),
        ("training", "quack", 1, 0, 1),
        ("backward", "quack", 2, 1, 2),
        ("forward", linear_gelu.TANH, 1, 0, 0),
    ],
)
def test_linear_gelu(pass_, name, kernels, after, extra):
    """after: tensors of y's size, read or written beside the product's own."""
    found = counts(linear_gelu.case(pass_, 100, 32, 64, BF16), name)
    assert found.kernels == kernels and found.bytes == after * 100 * 64 * 2
    assert found.products == ((100, 64, 32, extra * 100 * 64),)


def test_linear_cross_entropy():
    """Ours has labelled rows alone; its logits are float32, read twice, and dz written once."""
    case = linear_cross_entropy.LinearCrossEntropyCase("forward+backward", 1000, 64, 160, BF16)
    (logits, dhidden, dweight), rows = case.work(), case.labelled
    assert rows == 150 and {work.flops for work in case.work()} == {2 * 150 * 64 * 160}
    assert logits.bytes == dweight.bytes == dhidden.bytes + 2 * 160 == 2 * (310 * 64 + 160)
    ours, stock = (counts(case, name) for name in ("bertfast triton", "torch eager"))
    assert ours.bytes == (4 + 4 + 2 + 8 / 32) * 150 * 160 + (2 + 6) * 160 * 64
    assert ours.products[0] == (150, 160, 64, 150 * 160) and len(ours.products) == 3
    assert stock.bytes == 7 * 2 * 1000 * 160 and stock.products[1] == (1000, 64, 160, 0)
    assert counts(dataclasses.replace(case, pass_="forward"), "bertfast triton").kernels == 14


def test_linear_log1p_max():
    """Ours has float32 logits, read once; stock torch's are read thrice and written twice."""
    case = linear_log1p_max.LinearLog1pMaxCase("forward", 4, 50, 64, 160, BF16)
    (work,) = case.work()
    assert work.flops == 2 * 200 * 64 * 160
    assert work.bytes == 2 * (200 * 64 + 160 * 64 + 4 * 160)
    ours, stock = (counts(case, name) for name in ("bertfast triton", "torch eager"))
    assert ours == predicted.Counts(8, 4 * 200 * 160, 2, ((200, 160, 64, 200 * 160),))
    assert stock == predicted.Counts(4, 10 * 200 * 160, 2, ((200, 160, 64, 0),))


def test_ops_that_only_move_memory():
    gelu = bias_gelu.BiasGeluCase("forward", 10, 32, BF16)
    assert counts(gelu, "torch eager") == predicted.Counts(2, 4 * 10 * 32 * 2)
    ours = counts(layer_norm.LayerNormCase("backward", 10, 32, BF16), "bertfast triton")
    (work,) = layer_norm.LayerNormCase("backward", 10, 32, BF16).work()
    assert ours == predicted.Counts(2, work.bytes)
    masked = layer_norm.LayerNormCase("training", 10, 32, BF16, 0.1)
    assert counts(masked, "torch eager") is None


def test_nothing_is_modelled_faster_than_the_floor():
    for case in op_cases.gpu_cases():
        for provider in case.providers():
            if found := case.counts(provider):
                least = floor.floor_us(case.work(), GPU.ceilings)
                assert found.us(GPU) > 0.98 * least, (case, provider.name)  # parameters' rows


# Where it is shown


def test_a_run_on_a_gpu_writes_it_and_one_on_a_cpu_does_not(monkeypatch):
    machine = ceilings.Machine("cpu", lambda row: None, quick=True)
    assert machine.model(BF16) is None
    for gpu in (None, GPU):
        monkeypatch.setattr(machine, "model", lambda dtype, gpu=gpu: gpu)
        recorder = record.Recorder(None, record.environment("cpu"))
        case = linear_gelu.case("forward", 6, 32, 64, BF16)
        harness.Bench(machine, recorder, repeats=1, wanted=["torch eager"]).measure(case)
        (row,) = recorder.rows
        expected = None if gpu is None else counts(case, "torch eager").us(gpu)
        assert row.modelled_us == expected and row.median_us


def rows(modelled=True, name="HF SDPA"):
    more = dict(percent_of_floor=50.0, error=1e-3, peak_memory_mb=1234.0)
    for provider, us in (("bertfast", 600.0), (name, 800.0), ("nn.TransformerEncoder", 900.0)):
        sample = dict(median_us=us, p20_us=0.99 * us, p80_us=1.01 * us)
        row = Row(provider, "BERT-base layer", "forward", "32x512", "bf16", **sample, **more)
        if modelled and provider == "bertfast":
            row.modelled_us = 550.0
        yield row


def table(rows):
    return [line for line, _ in everything(list(rows))]


def test_a_table_with_it():
    found = table(rows())
    heading = next(line for line in found if "median us" in line)
    assert heading.split() == "median us speed-up % floor modelled MB error".split()
    ours = next(line for line in found if line.startswith("  bertfast"))
    others = next(line for line in found if line.startswith("  HF SDPA"))
    assert " 550 " in ours and " - " in others
    assert any(line.startswith("modelled: ") for line in "\n".join(found).splitlines())
    without = "\n".join(table(rows(modelled=False)))
    assert "modelled" not in without and "error" in without


def test_a_table_has_the_columns_that_a_page_has_room_for():
    found = table(rows(name="a provider with a name that is very long"))
    assert max(map(len, found[:8])) <= 80
    heading = next(line for line in found if "median us" in line)
    assert "modelled" in heading and "error" not in heading
    (key,) = {("BERT-base layer", "forward", "32x512", "bf16", 0.0)}
    assert len(op_table("BERT-base layer", {key: list(rows())}).columns) == 7


def test_files_without_the_column_are_read(tmp_path):
    """Those that were written before there was a model; another column may not be absent."""
    where = Environment("NVIDIA X", "1.2", "2", "3", "5", "13.0", "3.11", "0.1", "abc")
    recorder = record.Recorder(tmp_path / "new.csv", where)
    for row in rows():
        recorder.add(row)
    assert [row.modelled_us for row in record.read(tmp_path / "new.csv")[0]] == [550.0, None, None]
    lines = (tmp_path / "new.csv").read_text().splitlines()
    place = record.COLUMNS.index("modelled_us")

    def without(place):
        kept = [[c for n, c in enumerate(line.split(",")) if n != place] for line in lines]
        (tmp_path / "old.csv").write_text("\n".join(map(",".join, kept)) + "\n")
        return record.read(tmp_path / "old.csv")[0]

    assert [row.median_us for row in without(place)] == [600.0, 800.0, 900.0]
    assert {row.modelled_us for row in without(place)} == {None}
    with pytest.raises(KeyError):
        without(record.COLUMNS.index("median_us"))
