"""`bertfast tune`: its choices, the file that keeps them, and "auto", which follows it."""

import dataclasses
import functools
import json
import warnings

import pytest
import torch

from bertfast import notice
from bertfast.commands import env
from bertfast.commands import tune as tuning
from bertfast.commands.bench import models, op_case
from bertfast.commands.bench.cases import linear_gelu
from bertfast.commands.bench.cases.attention_qkv import AttentionQKVCase
from bertfast.commands.bench.cases.layer_norm import LayerNormCase
from bertfast.ops import dispatch, tuned
from bertfast.ops.attention import config
from bertfast.ops.linear import config as linear_config
from bertfast.ops.linear import limits
from bertfast.ops.linear import run as linear_run

HERE = {"gpu": "a GPU", "capability": "9.0", "torch": "2", "cuda": "13", "triton": "3"}
HERE["kernels"] = "0123"
GPU = torch.device("cuda", 0)
TINY = models.Model("tiny", 32, 64, 1, 2)
SPLIT = config.Split("forward", 90, 2, 64, 512, False, 0)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of choices for a GPU that this machine seems to have."""
    path = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "about", lambda device: dict(HERE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *gpu: (9, 0))
    monkeypatch.setattr(notice, "_told", set())
    tuned.forget()
    yield path
    monkeypatch.undo()
    tuned.forget()


def choices(backend="triton", split=(64, 32, 4, 1, 32)):
    us = {"cuda": 2.0, "triton": 1.0}
    backends = {"layer_norm bfloat16 768": tuned.Choice(backend, us)}
    return tuned.Tuned(backends, {SPLIT.key: tuned.Choice(split, {"64x32": 1.0})})


def chosen(width=768):
    return dispatch.choose("layer_norm", "auto", GPU, torch.bfloat16, width)


@pytest.fixture
def all_can(monkeypatch):
    monkeypatch.setattr(dispatch, "unsupported_reason", lambda *case: None)


# The file


def test_what_is_written_is_read(file):
    tuned.write(file, choices(), GPU)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    tuned.forget()
    assert tuned.current(GPU) == choices()
    assert file.read_text().endswith("}\n")


def test_a_write_that_fails_leaves_the_old_file(file):
    tuned.write(file, choices(), GPU)
    bad = choices()
    bad.backends["x"] = tuned.Choice(object(), {})
    with pytest.raises(TypeError):
        tuned.write(file, bad, GPU)
    tuned.forget()
    assert tuned.current(GPU) == choices()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def spoil_about(content):
    content["about"]["gpu"] = "another GPU"


def spoil_backend(content):
    content["backends"]["layer_norm bfloat16 768"]["chosen"] = 3


def spoil_split(content):
    content["splits"][SPLIT.key]["chosen"] = [64, 1000, 4, 1, 32]


def spoil_parts(content):
    del content["splits"]


@pytest.mark.parametrize("spoil", [spoil_about, spoil_backend, spoil_split, spoil_parts, None])
def test_what_is_not_for_here_is_passed_over_with_one_warning(file, all_can, spoil):
    tuned.write(file, choices(), GPU)
    if spoil is None:
        file.write_text(file.read_text()[:100])
    else:
        content = json.loads(file.read_text())
        spoil(content)
        file.write_text(json.dumps(content))
    tuned.forget()
    with pytest.warns(UserWarning, match="passes over .*tuned.json.*`bertfast tune`") as told:
        assert chosen() == "cuda"
    assert len(told) == 1
    tuned.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.current(GPU) == tuned.NOTHING


def test_a_file_that_is_named_and_not_there(file, monkeypatch):
    with pytest.warns(UserWarning, match="finds no file"):
        assert tuned.current(GPU) == tuned.NOTHING
    monkeypatch.setenv(tuned.VARIABLE, "")
    tuned.forget()
    assert tuned.path(GPU) is None and tuned.current(GPU) == tuned.NOTHING


def test_the_usual_place(file, tmp_path, monkeypatch):
    """Nobody is told that it isn't there."""
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert tuned.path(GPU) == tmp_path / "bertfast" / "tuned-nvidia-h100-80gb-hbm3.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.current(GPU) == tuned.NOTHING


# Who follows it


def test_auto_follows_the_file(file, all_can, monkeypatch):
    tuned.write(file, choices(), GPU)
    tuned.forget()
    assert chosen() == "triton"
    assert chosen(1024) == "cuda"  # as the table says
    assert dispatch.choose("layer_norm", "cuda", GPU, torch.bfloat16, 768) == "cuda"
    reason = lambda op, name, *case: "it can't" if name == "triton" else None  # noqa: E731
    monkeypatch.setattr(dispatch, "unsupported_reason", reason)
    tuned.forget()
    assert chosen() == "cuda"


def test_splits_follow_the_file(file):
    tuned.write(file, choices(), GPU)
    tuned.forget()
    assert config.config(*SPLIT, device=GPU) == config.Config(64, 32, 4, 1, 32, "measurement")
    assert config.config(*SPLIT).chosen_by == "compilation"
    planned = SPLIT._replace(tile=64)
    assert config.config(*planned, device=GPU).chosen_by == "compilation"


def test_a_split_that_does_not_fit_is_passed_over(file):
    split = SPLIT._replace(pass_="dkv", tile=32)
    kept = tuned.Tuned({}, {split.key: tuned.Choice((32, 64, 4, 1, 32), {})})
    tuned.write(file, kept, GPU)
    tuned.forget()
    assert config.config(*split, device=GPU) == config.config(*split)


@pytest.mark.parametrize("pass_", config.PASSES)
@pytest.mark.parametrize("tile", [0, 32, 64])
def test_candidates(pass_, tile):
    """The table's own comes first, and each fits."""
    split = config.Split(pass_, 90, 2, 64, 60, True, tile)
    found = config.candidates(split)
    assert found[0] == config.config(*split)
    assert len(set(found)) == len(found) and all(map(split.fits, found))
    for candidate in found:
        with config.trial(pass_, candidate):
            assert config.config(*split) == candidate
    assert config.config(*split) == found[0]


def test_env_says_where_choices_come_from(file, monkeypatch):
    tuned.write(file, choices(), GPU)
    tuned.forget()
    lines = "\n".join(env.auto_lines(env._auto()))
    assert "layer_norm bfloat16 768: triton, measured here" in lines
    assert "attention_qkv otherwise: the first of triton, cuda, torch that can run it" in lines
    assert "everything else: the first of cuda, triton, torch that can run it" in lines
    file.unlink()
    monkeypatch.setattr(notice, "_told", set())
    tuned.forget()
    with pytest.warns(UserWarning, match="finds no file"):
        assert "nothing was measured here" in " ".join(env.auto_lines(env._auto()))


# What it chooses


def decision(**changes):
    case = LayerNormCase("forward", 6, 32, torch.float32)
    candidates = {name: tuning.Candidate(name) for name in ("cuda", "triton")}
    key = "layer_norm float32 32"
    made = tuning.Decision("backends", key, candidates, [case])
    return dataclasses.replace(made, **changes)


def clocks(*us):
    """Timers of the candidates in turn, after the call itself has run."""
    times = iter(us)

    def timer_of(steps):
        for step in steps:
            step()
        time = next(times)
        return lambda: time

    return timer_of


@pytest.mark.triton
@pytest.mark.parametrize(("us", "expected"), [((2.0, 1.0), "triton"), ((1.0, 0.99), "cuda")])
def test_the_faster_one_is_chosen(us, expected):
    """If the gain is more than scatter."""
    found = tuning.Tuning()
    assert tuning.decide(decision(), found, clocks(*us), lambda: False, "cpu")
    assert not found.faults
    choice = found.choices["backends"]["layer_norm float32 32"]
    assert choice == tuned.Choice(expected, dict(zip(("cuda", "triton"), us, strict=True)))


@pytest.mark.triton
def test_wrong_numbers_are_never_chosen(monkeypatch):
    functions = LayerNormCase.functions

    def ours(backend):
        right = functions["bertfast"](backend)
        return lambda **given: right(**given) * (1.01 if backend == "triton" else 1.0)

    monkeypatch.setattr(LayerNormCase, "functions", {**functions, "bertfast": ours})
    found = tuning.Tuning()
    assert not tuning.decide(decision(), found, clocks(2.0, 1.0), lambda: False, "cpu")
    assert not found.choices["backends"]
    assert "layer_norm float32 32: triton: Wrong" in found.faults[0]


@pytest.mark.triton
def test_a_kernel_that_does_not_fit_is_refused(monkeypatch):
    """That is no fault: it is why there are other candidates."""
    functions = LayerNormCase.functions

    def ours(backend):
        def unfit(**given):
            raise triton_launch.Unfit("layer_norm_fwd_kernel: 7 registers spill\nand more")

        return unfit if backend == "triton" else functions["bertfast"](backend)

    monkeypatch.setattr(LayerNormCase, "functions", {**functions, "bertfast": ours})
    triton_launch = pytest.importorskip("bertfast.ops.triton_launch")
    found = tuning.Tuning()
    assert not tuning.decide(decision(), found, clocks(2.0, 1.0), lambda: False, "cpu")
    assert not found.faults
    (said,) = found.refused
    assert said == "layer_norm float32 32: triton: layer_norm_fwd_kernel: 7 registers spill"


@pytest.mark.triton
def test_splits_are_tried():
    """The fastest is kept, and in use at once."""
    split = config.Split("forward", 90, 2, 16, 20, False, 0)
    call = AttentionQKVCase("forward", models.full_batch(2, 20), 1, 16, torch.bfloat16)
    made = tuning._split_decision(split, call)
    names = list(made.candidates)
    assert len(names) > 2
    found = tuning.Tuning()
    times = [2.0] * len(names)
    times[1] = 1.0
    with tuned.held(tuned.Tuned(**found.choices)):
        assert tuning.decide(made, found, clocks(*times), lambda: False, "cpu")
        tuned.forget()
        assert not found.faults
        wanted = config.config(*split, device=GPU)
        assert wanted.numbers == made.candidates[names[1]].chosen
    assert config.config(*split, device=GPU).chosen_by == "compilation"


@pytest.mark.triton
def test_each_decision_has_its_calls():
    shapes = [models.full_batch(2, 20), models.full_batch(1, 100)]
    found = tuning.decisions([TINY], shapes, [torch.bfloat16, torch.float16], "cpu")
    keys = [made.key for made in found if made.part == "backends"]
    per_dtype = ["layer_norm {} 32", "bias_gelu {}", "attention {} 16 64", "attention {} 16 128"]
    for rows in limits.ROWS:
        per_dtype += [f"linear {{}} 32 64 {rows}", f"linear {{}} 32 64 {rows} backward"]
    assert sorted(keys) == sorted(
        key.format(dtype) for key in per_dtype for dtype in ("bfloat16", "float16")
    )
    norms = next(made for made in found if made.key == "layer_norm bfloat16 32")
    assert {case.rows for case in norms.cases} == {40, 100} and len(norms.cases) == 6
    gelus = next(made for made in found if made.key == "linear float16 32 64 256")
    assert [(case.pass_, case.rows) for case in gelus.cases] == [
        *(("forward", 40), ("training", 40), ("forward", 100), ("training", 100))
    ]
    assert gelus.candidates["two kernels"] == tuning.Candidate("torch")
    splits = [made.key for made in found if made.part == "splits"]
    assert "dq 16-bit D16 length64 dropout" in splits
    assert len(set(splits)) == len(splits)
    # An attention's backend is chosen when its splits are.
    order = [made.key for made in found]
    assert order.index("forward 16-bit D16 length64") < order.index("attention bfloat16 16 64")
    # What no shape is in comes last.
    assert order[-1] == "linear float16 32 64 1024 backward"
    assert order.index("linear bfloat16 32 64 256") < order.index("attention bfloat16 16 64")


@pytest.mark.triton
def test_a_product_and_its_gelu_have_splits_where_there_are_several(monkeypatch):
    """Before its backend is chosen, once for both 16-bit types, each with a call of its pass."""
    monkeypatch.setattr(tuning, "_capability", lambda device: 90)
    shapes, types = [models.full_batch(2, 20)], [torch.float32, torch.float16, torch.bfloat16]
    found = {made.key: made for made in tuning.decisions([TINY], shapes, types, "cpu")}
    for pass_, call in (("forward", "forward"), ("saving", "training"), ("backward", "backward")):
        key = linear_config.key(pass_, 32, 64, 40)
        made = found[key]
        known = linear_config.candidates(90, pass_)
        assert [one.chosen for one in made.candidates.values()] == [c.numbers for c in known]
        assert [(case.pass_, case.dtype) for case in made.cases] == [(call, torch.float16)]
        assert [*found].index(key) < [*found].index("linear float16 32 64 256")
        for candidate, config_ in zip(made.candidates.values(), known, strict=True):
            with candidate.active():
                assert linear_config.choose(pass_, 90, 32, 64, 256) == config_
    assert not any("float32" in key for key in found if key.startswith("linear"))


def linear_decision(pass_="forward"):
    case = linear_gelu.case(pass_, 24, 32, 64, torch.float16)
    return tuning._backend_decision("linear_gelu", case.form, [case], "cpu")


@pytest.mark.host
@pytest.mark.triton
@pytest.mark.parametrize("pass_", linear_gelu.PASSES)
@pytest.mark.parametrize(
    ("us", "expected"),
    [((2.0, 1.0, 3.0), "cuda"), ((2.0, 3.0, 1.0), "triton"), ((1.0, 0.99, 2.0), "torch")],
)
def test_one_kernel_or_two(file, pass_, us, expected, need):
    """The choice is what a layer's node and the op follow, at this size and no other."""
    need("linear_gelu", ("cuda", "cpu"))
    made = linear_decision(pass_)
    assert [*made.candidates] == ["two kernels", "cuda", "triton"]
    found = tuning.Tuning()
    assert tuning.decide(made, found, clocks(*us), lambda: False, "cpu")
    assert not found.faults
    (choice,) = found.choices["backends"].values()
    assert choice.chosen == expected and set(choice.us) == {"two kernels", "cuda", "triton"}
    said = " ".join(line for line, _ in tuning.table("backends", found).lines())
    assert f"{expected if expected != 'torch' else 'two kernels'} " in said


def spoilt(backend, right):
    """A kernel whose results are off by 1 %, if it is the backend's."""
    off = 1.01 if backend == "cuda" else 1.0

    def run(**given):
        y = right(**given)
        return y * off if isinstance(y, torch.Tensor) else (y[0] * off, y[1])

    return run


@pytest.mark.host
@pytest.mark.triton
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_one_kernel_with_wrong_numbers_is_never_chosen(pass_, monkeypatch, need):
    need("linear_gelu", ("cuda", "cpu"))
    made = linear_decision(pass_)
    kind = type(made.cases[0])
    ours = kind.functions["bertfast"]
    wrong = {**kind.functions, "bertfast": lambda backend: spoilt(backend, ours(backend))}
    monkeypatch.setattr(kind, "functions", wrong)
    monkeypatch.setitem(op_case.LIMITS, torch.float16, 2.0**-9)
    found = tuning.Tuning()
    assert tuning.decide(made, found, clocks(2.0, 3.0), lambda: False, "cpu")
    (choice,) = found.choices["backends"].values()
    assert choice.chosen == "torch" and "cuda: Wrong" in found.faults[0]


def test_choices_of_a_product_are_followed_and_told(file, all_can):
    case = (torch.bfloat16, 768, 3072, 4096)
    key, back = tuned.key("linear", *case), tuned.key("linear", *case, "backward")
    kept = {key: tuned.Choice("triton", {}), back: tuned.Choice("torch", {})}
    tuned.write(file, tuned.Tuned(kept, {}), GPU)
    tuned.forget()
    choose = functools.partial(linear_run.choose, "auto", GPU, torch.bfloat16)
    gelu = dispatch.choose("bias_gelu", "auto", GPU, torch.bfloat16)
    assert choose((768, 3072, 3000), (768, 3072)) == linear_run.Choice(gelu, "triton", None)
    assert choose((768, 3072, 5000), (768, 3072)) == linear_run.Choice(gelu)
    lines = "\n".join(env.auto_lines(env._auto()))
    assert "linear bfloat16 768 3072 4096: triton, measured here" in lines
    assert "linear bfloat16 768 3072 4096 backward: two kernels, measured here" in lines
    assert "linear_gelu otherwise: two kernels\n" in lines


def test_what_auto_takes_anyway_comes_first(file, all_can):
    """By an op's own table, if it has one: another has to be faster by more than scatter."""
    order = {}
    for op, case in (
        ("attention_qkv", (torch.bfloat16, 64, 512)),
        ("bias_gelu", (torch.bfloat16,)),
    ):
        order[op] = [*tuning._backend_decision(op, case, [], "cuda:0").candidates]
    assert order == {"attention_qkv": ["triton", "cuda"], "bias_gelu": ["cuda", "triton"]}


def test_what_was_known_stays(file):
    tuned.write(file, choices(), GPU)
    found = tuning.Tuning()
    found.choices["backends"]["bias_gelu float16"] = tuned.Choice("cuda", {"cuda": 1.0})
    tuning.keep(file, found, GPU)
    kept = tuned.read(file.read_text(), GPU)
    assert set(kept.backends) == {"layer_norm bfloat16 768", "bias_gelu float16"}
    assert kept.splits == choices().splits
