"""linear_gelu's Triton kernels: every form of every architecture, and planted faults."""

import contextlib

import pytest
import torch
from support.guard import run_guarded

from bertfast.ops import triton_lib, tuned
from bertfast.ops.bias_gelu import run as bias_gelu
from bertfast.testing import compare, hold_to_budget, worst
from bertfast.testing import linear_gelu as table
from bertfast.testing.linear_gelu import Case

pytestmark = pytest.mark.triton
pytest.importorskip("triton")
if not triton_lib.INTERPRETED:
    pytest.skip("other architectures' forms run in the interpreter", allow_module_level=True)

import triton as triton_language  # noqa: E402
import triton.language as tl  # noqa: E402

from bertfast.ops.linear import config, triton, triton_pointers  # noqa: E402

TARGET = ("triton", "cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# An architecture, and which of each pass's candidates.
FORMS = [(arch, 0) for arch in config.ARCHITECTURES] + [(90, 1), (100, 1)]
# Ragged in rows, inputs and outputs; more than one tile, whose last part may be wholly outside.
CASES = [
    Case(133, 72, 264),
    Case(5, 40, 8, bias=False, layout="rows apart"),
    Case(70, 200, 136, approximate="tanh", values="wide"),
]


@contextlib.contextmanager
def made_for(arch, number=0):
    """Kernels of an architecture, by the candidates of this number where there are so many."""
    token = triton_lib.capability_without_device.set(arch)
    try:
        with contextlib.ExitStack() as stack:
            for pass_ in config.PASSES:
                known = config.candidates(arch, pass_)
                stack.enter_context(config.trial(pass_, known[min(number, len(known) - 1)]))
            yield
    finally:
        triton_lib.capability_without_device.reset(token)


@contextlib.contextmanager
def everywhere(chosen):
    with contextlib.ExitStack() as stack:
        for pass_ in config.PASSES:
            stack.enter_context(config.trial(pass_, chosen))
        yield


def wrong(inputs, **options):
    """True if what the kernels give exceeds the budget."""
    model, oracle = table.rounding_model(inputs), table.oracle(inputs)
    out = table.run(inputs, *TARGET, **options)
    return not worst(compare(out, oracle, model, table.scales(inputs))).ok


@pytest.mark.parametrize(("arch", "number"), FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_stays_within_the_error_budget(case, arch, number):
    inputs = table.make_inputs(case, torch.bfloat16)
    with made_for(arch, number):
        out = run_guarded(table.run, inputs, TARGET)
        hold_to_budget(table, inputs, out)
        y, u = table.up(inputs, *TARGET, save=False)
    assert u is None and torch.equal(y, out["y"])


@dtypes
@pytest.mark.parametrize("form", ["persistent", "specialized"])
def test_programs_walk_over_the_tiles(form, dtype, monkeypatch):
    """Three programs; 17 x 2 tiles, which are three groups of rows of tiles."""
    monkeypatch.setattr(triton, "MULTIPROCESSORS", 3)
    inputs = table.make_inputs(Case(17 * 16, 40, 40), dtype)
    with everywhere(config.Config(form, 16, 32, 32, 4, 2, 2)):
        hold_to_budget(table, inputs, run_guarded(table.run, inputs, TARGET))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("form", ["pointers", "descriptors", "operands"])
def test_an_epilogue_by_parts(form, parts):
    inputs = table.make_inputs(Case(37, 72, 88), torch.float16)
    with everywhere(config.Config(form, 32, 64, 16, 4, 2, parts)):
        hold_to_budget(table, inputs, run_guarded(table.run, inputs, TARGET))


@dtypes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("arch", "number"), [(80, 0), (90, 0), (90, 1)])
def test_y_has_the_bits_of_bias_gelus_kernel(arch, number, approximate, dtype):
    inputs = table.make_inputs(Case(70, 96, 200, approximate=approximate), dtype)
    with made_for(arch, number):
        y, u = table.up(inputs, *TARGET)
        two = bias_gelu.forward(u, inputs["bias"], approximate == "tanh", "triton")
    assert torch.equal(y, two)


def with_gaps(inputs, *names):
    """The matrices in larger ones of NaN: what lies beside and below them must not be read, or at
    least not count."""
    for name in names:
        rows, width = inputs[name].shape
        wide = torch.full((rows + 8, width + 64), torch.nan, dtype=inputs[name].dtype)
        wide[:rows, :width] = inputs[name]
        inputs = inputs | {name: wide[:rows, :width]}
    return inputs


@pytest.mark.parametrize(("arch", "number"), FORMS)
@pytest.mark.parametrize("width", [8, 72])
def test_gaps_full_of_nan(arch, number, width):
    """Widths that aren't multiples of a step, so that each tile's last step reaches into a gap."""
    inputs = table.make_inputs(Case(19, width, 40), torch.float16)
    inputs = with_gaps(inputs, "x", "weight", "dy", "down")
    with made_for(arch, number):
        hold_to_budget(table, inputs, run_guarded(table.run, inputs, TARGET))


def test_rows_that_share_memory():
    """An expanded tensor, which descriptors can't describe."""
    inputs = table.make_inputs(Case(19, 72, 40), torch.float16)
    inputs |= {name: inputs[name][:1].expand(19, -1) for name in ("x", "dy")}
    for arch in (80, 90):
        with made_for(arch):
            hold_to_budget(table, inputs, table.run(inputs, *TARGET))


# Faults that the tests above must find.


@triton_language.jit
def store_all_sums(dv, partial_ptr, row_tile, first_row, first_col, M, N, width):
    cols = first_col + tl.arange(0, dv.shape[1])
    tl.store(partial_ptr + row_tile * width + cols, tl.sum(dv, axis=0), mask=cols < N)


def test_sums_over_rows_outside_are_found(monkeypatch):
    inputs = table.make_inputs(Case(133, 72, 136), torch.float16)
    with made_for(80):
        assert not wrong(inputs)
        monkeypatch.setattr(triton_pointers, "store_sums", store_all_sums)
        assert wrong(inputs)


def changed(monkeypatch, name, change):
    """Has a launch of the module get other numbers and constants."""
    launch = getattr(triton, name)

    def other(grid, pointers, strides, numbers, constants, num_warps):
        launch(grid, pointers, strides, *change(numbers, constants), num_warps)

    monkeypatch.setattr(triton, name, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("name", ["_by_pointers", "_by_pointers_backward"])
def test_a_missing_mask_beside_a_gap_is_found(name, monkeypatch):
    inputs = table.make_inputs(Case(19, 40, 40), torch.float16)
    inputs = with_gaps(inputs, "x", "weight", "dy", "down")
    with made_for(80):
        assert not wrong(inputs)
        no_mask = "gelu", 1, True
        changed(monkeypatch, name, lambda numbers, constants: (numbers, (*no_mask, *constants[3:])))
        assert wrong(inputs)


@pytest.mark.parametrize("name", ["_by_descriptors", "_by_descriptors_backward"])
def test_a_tile_that_no_program_makes_is_found(name, monkeypatch):
    monkeypatch.setattr(triton, "MULTIPROCESSORS", 3)
    inputs = table.make_inputs(Case(100, 40, 40), torch.float16)
    with everywhere(config.Config("persistent", 16, 32, 32, 4, 2, 2)):
        changed(monkeypatch, name, lambda numbers, constants: ((*numbers[:3], 4), constants))
        with pytest.raises(AssertionError):
            hold_to_budget(table, inputs, run_guarded(table.run, inputs, TARGET))


# Configurations.


def test_a_measured_configuration_is_taken_if_it_is_known(monkeypatch):
    gpu = torch.device("cuda", 0)
    first, second = config.candidates(90, "backward")
    key = config.key("backward", 3072, 768, 4096)
    case = ("backward", 90, 3072, 768, 4096, gpu)
    unknown = config.Config("persistent", 64, 64, 64, 4, 3, 1)
    found = {second: (second.numbers, second.numbers), first: (unknown.numbers, first.numbers)}
    for chosen, expected in found.values():
        choices = tuned.Tuned({}, {key: tuned.Choice(chosen, {})})
        with tuned.held(choices):
            assert config.choose(*case).numbers == expected
            assert config.choose(*case[:-1]) == first  # of no GPU
    assert config.choose("backward", 90, 3072, 768, 16384, gpu) == first


def test_a_trial_ends():
    first, second = config.candidates(90, "forward")
    with config.trial("forward", second):
        assert config.choose("forward", 90, 768, 3072, 256) is second
    assert config.choose("forward", 90, 768, 3072, 256) is first


@pytest.mark.parametrize("arch", config.ARCHITECTURES)
@pytest.mark.parametrize("pass_", config.PASSES)
def test_configurations_as_numbers(arch, pass_):
    for one in config.candidates(arch, pass_):
        assert config.Config.of(one.numbers) == one
        assert tuned._checked("splits", one.numbers) == tuple(one.numbers)
