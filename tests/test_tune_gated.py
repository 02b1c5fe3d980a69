"""`bertfast tune` of gated MLPs: one kernel or two, and the op after a product."""

import dataclasses
import functools

import pytest
import torch
from test_tune import GPU, TINY, all_can, clocks, file  # noqa: F401

from bertfast.commands import env
from bertfast.commands import tune as tuning
from bertfast.commands.bench import models
from bertfast.commands.bench.cases import linear_gated, linear_gelu
from bertfast.ops import dispatch, tuned
from bertfast.ops.linear import config as linear_config
from bertfast.ops.linear import limits
from bertfast.ops.linear import run as linear_run
from bertfast.ops.linear_gated import run as linear_gated_run

GATED = dataclasses.replace(TINY, gated="silu")


@pytest.mark.triton
def test_decisions_of_gated_mlps(monkeypatch):
    """Of both ops, after attention's; another model's calls count where the case is the same."""
    monkeypatch.setattr(tuning, "_capability", lambda device: 90)
    host = dispatch.unsupported_reason("linear_gated", "cuda", "cpu") is None
    shapes, types = [models.full_batch(2, 20)], [torch.float16, torch.bfloat16]
    other = dataclasses.replace(GATED, inner=96, gated="gelu")
    made = tuning.decisions([TINY, GATED, other], shapes, types, "cpu")
    found = {one.key: one for one in made}
    after = found["gated float16"]
    assert {(c.pass_, c.width, c.activation) for c in after.cases} == {
        (pass_, *size) for pass_ in ("forward", "backward") for size in ((64, "silu"), (96, "gelu"))
    }
    assert "two kernels" not in after.candidates and "torch" not in after.candidates
    assert [case.width for case in found["bias_gelu float16"].cases] == [64, 64]
    keys = [key for key in found if key.startswith("linear_gated float16")]
    sizes = ("32 64", "32 96")
    expected = {f"linear_gated float16 {size} {rows}" for size in sizes for rows in limits.ROWS}
    assert set(keys) == expected | {f"{key} backward" for key in expected}
    both = found["linear_gated float16 32 64 256"]
    assert [*both.candidates] == ["two kernels", *(["cuda"] if host else []), "triton"]
    assert [(case.pass_, case.op, case.activation) for case in both.cases] == [
        ("forward", "linear_gated", "silu"),
        ("training", "linear_gated", "silu"),
    ]
    order = [*found]
    assert order.index(both.key) > order.index("attention float16 16 64")
    for pass_, call in zip(linear_config.GATED, linear_gelu.PASSES, strict=True):
        known = linear_config.candidates(90, pass_)
        key = linear_config.key(pass_, 32, 64, 40)
        assert (key in found) == (len(known) > 1)
        if key in found:
            split = found[key]
            assert order.index(key) < order.index(both.key)
            assert [one.chosen for one in split.candidates.values()] == [c.numbers for c in known]
            assert [(case.pass_, case.dtype) for case in split.cases] == [(call, torch.float16)]


@pytest.mark.host
@pytest.mark.triton
@pytest.mark.parametrize("pass_", linear_gelu.PASSES)
@pytest.mark.parametrize(
    ("us", "expected"),
    [((2.0, 1.0, 3.0), "cuda"), ((2.0, 3.0, 1.0), "triton"), ((1.0, 0.99, 2.0), "torch")],
)
def test_one_kernel_or_two_of_a_gated_mlp(pass_, us, expected, need):
    for backend in ("cuda", "triton"):
        need("linear_gated", (backend, "cpu"))
    case = linear_gated.case(pass_, 24, 32, 64, torch.float16)
    made = tuning._backend_decision("linear_gated", case.form, [case], "cpu")
    found = tuning.Tuning()
    assert tuning.decide(made, found, clocks(*us), lambda: False, "cpu")
    assert not found.faults
    (choice,) = found.choices["backends"].values()
    assert choice == tuned.Choice(
        expected, dict(zip(("two kernels", "cuda", "triton"), us, strict=True))
    )


def test_choices_of_a_gated_product_are_followed(file, all_can):  # noqa: F811
    case = (torch.bfloat16, 768, 1152, 4096)
    key, back = tuned.key("linear_gated", *case), tuned.key("linear_gated", *case, "backward")
    kept = {key: tuned.Choice("triton", {}), back: tuned.Choice("torch", {})}
    kept["gated bfloat16"] = tuned.Choice("triton", {})
    tuned.write(file, tuned.Tuned(kept, {}), GPU)
    tuned.forget()
    choose = functools.partial(linear_gated_run.choose, "auto", GPU, torch.bfloat16)
    assert choose((768, 1152, 3000), (768, 1152)) == linear_run.Choice("triton", "triton", None)
    assert choose((768, 1152, 5000), (768, 1152)) == linear_run.Choice("triton")
    gelu = functools.partial(linear_run.choose, "auto", GPU, torch.bfloat16)
    assert gelu((768, 1152, 3000)).forward is None  # of a GELU nothing was measured
    lines = "\n".join(env.auto_lines(env._auto()))
    assert "linear_gated bfloat16 768 1152 4096 backward: two kernels, measured here" in lines


def test_what_is_tuned_for_by_default():
    tuned_for = tuning._models(None)
    assert {model.gated for model in tuned_for} == {None, "gelu", "silu"}
    assert [model.name for model in tuned_for][:3] == [*models.MODELS]


def test_a_saved_models_gating(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    for name, more, expected in (
        ("ModernBertConfig", dict(hidden_activation="gelu"), "gelu"),
        ("ModernBertConfig", dict(hidden_activation="gelu_new"), "gelu_tanh"),
        ("ModernBertConfig", dict(hidden_activation="relu"), None),
        ("BertConfig", {}, None),
    ):
        getattr(transformers, name)(**sizes, **more).save_pretrained(tmp_path / "one")
        found = models.saved(str(tmp_path / "one"))
        assert (found.gated, found.inner) == (expected, 48), name
