"""The order in which "auto" tries attention's backends."""

import re
from types import SimpleNamespace

import pytest
import torch

from bertfast.commands.kernels import budget, peers
from bertfast.ops import attention, attention_qkv, dispatch
from bertfast.ops.attention import limits, order
from bertfast.testing import positions


@pytest.mark.parametrize(
    "capability, head_dim, first",
    [
        (90, 64, "triton"),
        (90, 32, "triton"),
        (90, 128, "cuda"),
        (80, 64, "cuda"),
        (89, 64, "cuda"),
        (120, 32, "cuda"),
        (100, 64, "cuda"),
        (75, 64, "cuda"),
        (90, None, "triton"),
    ],
)
def test_the_first_backend_by_architecture_and_head_dimension(capability, head_dim, first):
    found = order.line(capability, head_dim).order
    assert found[0] == first and sorted(found) == ["cuda", "torch", "triton"]


@pytest.mark.parametrize(
    "capability, head_dim, asked, first",
    [
        (90, 64, "distance_bias backward", "cuda"),
        (90, 64, "distance_bias", "cuda"),
        (90, 64, "rotary window", "cuda"),
        (90, 64, "rotary window backward", "triton"),
        (90, 64, "rotary", "triton"),
        (90, 64, "rotary backward", "triton"),
        (90, 128, "window backward", "cuda"),
        (80, 64, "rotary window backward", "cuda"),
        (80, 64, "rotary backward", "cuda"),
        (80, 32, "rotary backward", "cuda"),
        (80, 24, "rotary backward", "triton"),
        (80, 24, "rotary", "cuda"),
        (120, 24, "window", "triton"),
        (80, 32, "distance_bias window backward", "cuda"),
        (100, 32, "rotary backward", "cuda"),
    ],
)
def test_the_first_backend_of_calls_by_position(capability, head_dim, asked, first):
    assert order.line(capability, head_dim, tuple(asked.split())).order[0] == first


@pytest.mark.parametrize("form", [{"window": (3, 2)}, {"rotary": positions.tables(9, 16)}, {}])
@pytest.mark.parametrize("of_one", [True, False])
def test_a_call_by_position_says_whether_it_has_gradients(monkeypatch, form, of_one):
    asked = []

    def choose(op, backend, *case):
        asked.append(case[4] if len(case) > 4 else ())
        return "torch"

    monkeypatch.setattr(dispatch, "choose", choose)
    qkv = torch.randn(1, 9, 3, 2, 16)

    def call(qkv):
        return attention_qkv(qkv, **form) if of_one else attention(*qkv.unbind(2), **form)

    call(qkv)
    call(qkv.requires_grad_())
    with torch.no_grad():
        call(qkv)
    names = tuple(form)
    assert asked == [names, (*names, *["backward"] * bool(names)), names]


def test_every_line_says_what_it_rests_on():
    for line in order.LINES:
        assert re.match("measured on .+|machine code: .+|not measured", line.evidence)
        assert 0 < line.width <= limits.MAX_HEAD_DIM
    assert order.LINES[-1].capabilities == ()


def test_the_counts_that_lines_quote_are_the_committed_ones():
    counts = {
        (one.name, one.pass_, one.form, one.arch): one
        for one in peers.ours(budget.load()[budget.HOT_PATHS])
    }
    hopper = order.line(90, 64).evidence
    quoted = {
        pass_: [counts[f"bertfast {name}", pass_, "D 64", "sm_90a"] for name in ("triton", "cuda")]
        for pass_ in ("forward", "backward")
    }
    for number in (0, 1):
        forward, backward = (quoted[pass_][number] for pass_ in ("forward", "backward"))
        both = f"{forward.instructions:.1f}", f"{backward.instructions:.1f}"
        assert all(text in hopper for text in both), both
        shared = f"{forward.shared_bytes:.0f}", f"{backward.shared_bytes:.0f}"
        assert all(text in hopper for text in shared), shared


@pytest.mark.parametrize(
    "capability, width, arch, triton, cuda",
    [
        (
            90,
            128,
            "sm_90a",
            ["dkv, masked, D 128, up to 512, dropout"],
            ["D 128, 64 x 16, dropout"],
        ),
        (
            80,
            64,
            "sm_80",
            ["dkv, packed, D 64, up to 512", "dkv, packed, D 64, up to 512, dropout"],
            ["D 64, 64 x 16", "D 64, 64 x 16, dropout"],
        ),
    ],
)
def test_the_counts_of_dkv_are_the_committed_ones_too(capability, width, arch, triton, cuda):
    lines = budget.load()[budget.HOT_PATHS]
    quoted = [
        f"{lines[source, kernel, label, 'bfloat16', arch].instructions:.0f}"
        for source, kernel, labels in (
            ("triton", "attention_bwd_dkv_kernel", triton),
            ("cuda", "attention_backward_dkv_kernel", cuda),
        )
        for label in labels
    ]
    found = re.findall(r"\d+", order.line(capability, width).evidence.partition("takes")[2])
    assert found == quoted


def test_the_counts_by_position_are_the_committed_ones_too():
    lines = budget.load()[budget.HOT_PATHS]

    def instructions(source, kernel, label, arch):
        return lines[source, f"attention_{kernel}_kernel", label, "bfloat16", arch].instructions

    def by_triton(kernel, label, arch="sm_90a"):
        layout, words = label.split(" ", 1)
        full = (
            f"{layout}, {'planned' if layout == 'forward' else 'packed'}, D 64, up to 512, {words}"
        )
        return instructions("triton", kernel, full, arch)

    def by_cuda(kernel, step, arch="sm_90a"):
        label = f"D 64, 64 x {step}, by position"
        return instructions("cuda", f"{kernel}_by_position", label, arch)

    def numbers(*case):
        return re.findall(r"\d+\.\d|\d+", order.line(*case).evidence)

    biased = numbers(90, 64, ("distance_bias",))
    assert biased[0] == f"{by_triton('fwd', 'forward bias'):.0f}"
    assert biased[2] == f"{by_triton('fwd', 'forward bias', 'sm_80'):.0f}"
    forward = {arch: by_cuda("forward", 64, arch) for arch in ("sm_90a", "sm_80")}
    assert biased[4:6] == [f"{forward[arch]:.0f}" for arch in ("sm_90a", "sm_80")]
    triton = by_triton("bwd_dq", "dq rotary, window") + by_triton("bwd_dkv", "dkv rotary, window")
    cuda = by_cuda("backward_dq", 32) + by_cuda("backward_dkv", 16)
    windowed = numbers(90, 64, ("window",))
    assert windowed[0] == f"{by_triton('fwd', 'forward window'):.1f}"
    assert windowed[1] == f"{forward['sm_90a']:.1f}"
    assert windowed[3:] == [f"{triton:.1f}", f"{cuda:.1f}"]
    backward = [by_cuda("backward_dq", 32, "sm_80"), by_cuda("backward_dkv", 16, "sm_80")]
    for asked in (("window",), ("rotary", limits.BACKWARD)):
        assert numbers(80, 24, asked)[-2:] == [f"{count:.0f}" for count in backward]


def test_auto_follows_the_table_of_each_device(monkeypatch):
    """With GPUs on which nothing was measured and every backend can run."""
    capabilities = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu.index])
    monkeypatch.setattr(dispatch.tuned, "current", lambda gpu: SimpleNamespace(backends={}))
    monkeypatch.setattr(dispatch, "unsupported_reason", lambda *case: None)
    monkeypatch.setattr(dispatch, "_chosen", {})
    for index, chosen in enumerate(("triton", "cuda")):
        gpu = torch.device("cuda", index)
        for op in ("attention", "attention_qkv"):
            assert dispatch.choose(op, "auto", gpu, torch.bfloat16, 64) == chosen
        assert dispatch.choose("layer_norm", "auto", gpu, torch.bfloat16, 768) == "cuda"
        window = ("window",)
        assert dispatch.choose("attention", "auto", gpu, torch.bfloat16, 64, 512, window) == "cuda"
    assert dispatch.choose("attention", "auto", torch.device("cpu"), torch.bfloat16, 64) == "torch"


def test_what_was_measured_goes_first(monkeypatch):
    gpu = torch.device("cuda", 0)
    case = (torch.bfloat16, 64)
    measured = {dispatch.tuned.key("attention", *case): SimpleNamespace(chosen="cuda")}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))
    monkeypatch.setattr(dispatch.tuned, "current", lambda gpu: SimpleNamespace(backends=measured))
    assert dispatch._order("attention", gpu, case)[0] == "cuda"


def test_a_mask_without_gaps_costs_its_ends_only():
    """In Triton, whose kernels are the first choice where they are: of a padded batch that is
    attended without gaps the hot path is that of a packed one, within 15 %; within 20 in the whole
    backward in one kernel, whose dropout may begin anywhere in a group of draws."""
    counts = {
        (label, arch): line.instructions
        for (source, _, label, dtypes, arch), line in budget.load()[budget.HOT_PATHS].items()
        if source == "triton" and dtypes == "bfloat16"
    }
    compared = 0
    for (label, arch), instructions in counts.items():
        packed = counts.get((label.replace("masked", "packed"), arch))
        # Where they multiply by mma.sync auto takes the CUDA kernels.
        first_choice = arch == "sm_90a" or label.startswith(("forward", "dq"))
        if "masked" in label and packed and first_choice:
            compared += 1
            most = 1.2 if label.startswith("whole") else 1.15
            assert instructions <= most * packed, (label, arch)
    assert compared >= 12
