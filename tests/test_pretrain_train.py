"""Pre-training in one process: a run that was stopped goes on exactly; its end is a plain model."""

import json
import math
import signal
import time

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from support import pretraining  # noqa: E402
from support.pretraining import ALONE, figures, options, trained  # noqa: E402

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.pretrain import checkpoints, meter, train  # noqa: E402
from bertfast.recipes.pretrain.batches import Batches, DataOptions  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pretraining.prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts, with dropout: its folder and its figures."""
    run = tmp_path_factory.mktemp("whole")
    return run, trained(data, run)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal within a step, counted from 1."""
    update = train.Run._update

    def interrupted(self, rate):
        if self.progress.step + 1 == step:
            signal.raise_signal(number)
        return update(self, rate)

    monkeypatch.setattr(train.Run, "_update", interrupted)


def stopped(data, run, step, monkeypatch, **changes):
    """A run that a signal stopped after a step."""
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        assert train.train(options(data, run, **changes), ALONE) == 143


def test_a_steps_loss_is_a_mean_over_all_its_micro_batches(data, tmp_path):
    """Its loss and its gradient, by hand: sums over three micro-batches of unlike sizes."""
    given = options(data, tmp_path, micro_batches=3, steps=1, dropout=0.0, clip=0.0)
    assert train.train(given, ALONE) == 0
    (told,) = figures(tmp_path)
    config = transformers.BertConfig.from_pretrained(tmp_path / "model")
    torch.manual_seed(given.seed)
    module = train.models.Pretraining(train.models.new(config, True)).train()
    found = iter(Batches(data, DataOptions(tokens=128, length=32)))
    batches = [next(found)[1] for _ in range(3)]
    sums = [module(batch) for batch in batches]
    labels = sum(len(batch.labels) for batch in batches)
    mlm = sum(part.mlm for part in sums) / labels
    nsp = sum(part.nsp for part in sums) / sum(batch.sequences for batch in batches)
    (mlm + nsp).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
    assert told["mlm_loss"] == pytest.approx(mlm.item(), abs=1e-6)
    assert told["nsp_loss"] == pytest.approx(nsp.item(), abs=1e-6)
    assert told["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert len({len(batch.labels) for batch in batches}) > 1  # else any mean would do


# Going on


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(
    number, status, data, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        stop_at(patched, 5, number)
        assert train.train(options(data, tmp_path), ALONE) == status
    assert "stopped after step 5" in capsys.readouterr().out
    assert [step for step, _ in checkpoints.listed(tmp_path / "checkpoints")] == [5, 3]
    assert trained(data, tmp_path) == whole[1]
    assert "going on from the checkpoint of step 5" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (whole[0] / "model" / name).read_bytes()


def test_tensorboard_has_each_step_once(data, whole, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stopped(data, tmp_path, 5, monkeypatch)
    # Its files are read in the order of their names: a second, the process, and how many it wrote,
    # as text.
    begun = int(time.time())
    while int(time.time()) == begun:
        time.sleep(0.02)
    trained(data, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 9))
    assert [event.value for event in found] == pytest.approx([t["loss"] for t in whole[1]])
    names = ("mlm_accuracy", "nsp_accuracy", "tokens_per_second", "useful_tokens", "input_wait")
    for name in (*names, "peak_memory_bytes", "lr", "gradient_norm", "budget_used"):
        assert len(events.Scalars(f"train/{name}")) == 8
    assert [event.step for event in events.Scalars("held-out/mlm_loss")] == [8]


def test_losses_differ_without_dropouts_own_seed(data, whole, tmp_path, monkeypatch):
    """The comparison above would see dropout drawn otherwise."""
    monkeypatch.setattr(train, "dropout_seed", lambda seed, number: seed)
    assert trained(data, tmp_path)[1]["loss"] != whole[1][1]["loss"]


def test_a_mean_over_steps_is_the_same_where_a_checkpoint_lies_between(data, tmp_path, monkeypatch):
    expected = trained(data, tmp_path / "whole", print_every=4)
    stopped(data, tmp_path / "stopped", 6, monkeypatch, print_every=4)
    assert trained(data, tmp_path / "stopped", print_every=4) == expected
    assert [told["step"] for told in expected] == [4, 8]


def test_a_damaged_checkpoint_means_the_one_before(data, whole, tmp_path, monkeypatch):
    stopped(data, tmp_path, 5, monkeypatch)
    path = tmp_path / "checkpoints" / "step-00000005" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000005' is damaged"):
        assert trained(data, tmp_path) == whole[1]


def test_a_run_at_its_end_is_evaluated_again_and_may_get_more_steps(data, tmp_path, capsys):
    first = trained(data, tmp_path, schedule="wsd", decay=1, steps=4)
    again = trained(data, tmp_path, schedule="wsd", decay=1, steps=4)
    assert again == first
    lines = meter.read(tmp_path / "metrics.jsonl")
    assert [told["kind"] for told in lines] == ["train"] * 4 + ["held-out"]
    more = trained(data, tmp_path, schedule="wsd", decay=1, steps=6)
    assert more[:4] == first and len(more) == 6
    with pytest.raises(UserError, match="--steps must be at least 6, .* has done, got 5"):
        trained(data, tmp_path, schedule="wsd", decay=1, steps=5)


def test_every_step_stands_once_in_the_figures(data, whole, tmp_path, monkeypatch):
    """A kill after step 5 leaves lines beyond the checkpoint of step 3, and half a line."""
    stopped(data, tmp_path, 5, monkeypatch)
    checkpoints_ = tmp_path / "checkpoints"
    (checkpoints_ / "step-00000005").rename(tmp_path / "elsewhere")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert trained(data, tmp_path) == whole[1]


@pytest.mark.parametrize("optimizer", ["stable-adamw", "muon"])
def test_other_optimisers_go_on_exactly(optimizer, data, tmp_path, monkeypatch):
    more = dict(recipe="modern", optimizer=optimizer, steps=6, dropout=0.1)
    expected = trained(data, tmp_path / "whole", **more)
    stopped(data, tmp_path / "stopped", 4, monkeypatch, **more)
    assert trained(data, tmp_path / "stopped", **more) == expected
    assert "nsp_loss" not in expected[0] and expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_go_on_exactly(precision, data, whole, tmp_path, monkeypatch):
    expected = trained(data, tmp_path / "whole", precision=precision)
    stopped(data, tmp_path / "stopped", 4, monkeypatch, precision=precision)
    assert trained(data, tmp_path / "stopped", precision=precision) == expected
    for told, full in zip(expected, whole[1], strict=True):
        assert 0 < abs(told["loss"] - full["loss"]) < 0.05


# What may not change


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(lr=2e-3), r"--lr was 0.001 when the run in '.*' began, and is 0.002 now"),
        (dict(whole_words=True), "--whole-words was False when"),
        (dict(micro_batches=4), "--micro-batches was 2 when"),
        (dict(dropout=0.2), "--dropout was None when"),
    ],
)
def test_a_run_keeps_its_options(changes, text, data, whole):
    with pytest.raises(UserError, match=text):
        train.train(options(data, whole[0], **changes), ALONE)


def test_a_run_keeps_its_data(whole, tmp_path):
    pretraining.texts(tmp_path / "texts", documents=30)
    pretraining.prepare([tmp_path / "texts"], tmp_path / "data", vocabulary=60, progress=False)
    with pytest.raises(UserError, match="is not the data that the run in .* began with"):
        train.train(options(tmp_path / "data", whole[0]), ALONE)


# What can't be


def test_no_step_is_taken_on_what_isnt_a_number(data, tmp_path, monkeypatch):
    def spoilt(self, rate):
        if self.progress.step == 4:
            next(self.shared.module.parameters()).grad.fill_(math.nan)
        return update(self, rate)

    update = train.Run._update
    monkeypatch.setattr(train.Run, "_update", spoilt)
    with pytest.raises(UserError, match="was not a finite number, in step 6 or"):
        train.train(options(data, tmp_path, print_every=100), ALONE)
    assert [step for step, _ in checkpoints.listed(tmp_path / "checkpoints")] == [3]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(tokens=16), r"--tokens must be at least --length \(32\), got 16"),
        (dict(width=33), r"--width must be a multiple of --heads \(2\), got 33"),
        (dict(fsdp=True), "--fsdp shards a model over processes: start them by torchrun"),
        (dict(fsdp=True, precision="fp16"), "--precision fp16 can't be had with --fsdp"),
        (dict(data="nowhere"), "holds no prepared text"),
        (dict(model="nowhere"), "--layers is for a new model, and --model gives one"),
        (dict(decay=3), "--decay is for --schedule wsd, and it is linear"),
    ],
)
def test_requests_that_cant_be_met(changes, text, data, tmp_path):
    from pathlib import Path

    changes = {n: Path(v) if n in ("data", "model") else v for n, v in changes.items()}
    with pytest.raises(UserError, match=text):
        train.train(options(changes.pop("data", data), tmp_path, **changes), ALONE)


def test_a_model_that_isnt_there(data, tmp_path):
    given = options(data, tmp_path / "run", **of(tmp_path / "none"))
    with pytest.raises(
        UserError, match="--model must be a folder with a config.json, got '.*none'"
    ):
        train.train(given, ALONE)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "roberta"}')
    given = options(data, tmp_path / "run", **of(tmp_path / "bad"))
    with pytest.raises(UserError, match="must be a model of type 'bert', got one of .* 'roberta'"):
        train.train(given, ALONE)


def test_a_disk_without_room_for_a_checkpoint(data, tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"a checkpoint takes 0.0 GB, and '.*' has room for 0.0 GB"):
        train.train(options(data, tmp_path), ALONE)


def test_a_broken_batch_is_told_in_the_loop(data, tmp_path, monkeypatch):
    def broken(self, plan, epoch, index, number):
        if number == 7:
            raise RuntimeError("a block can't be read")
        return make(self, plan, epoch, index, number)

    make = Batches._batch
    monkeypatch.setattr(Batches, "_batch", broken)
    with pytest.raises(RuntimeError, match="a block can't be read"):
        train.train(options(data, tmp_path), ALONE)
    assert len(figures(tmp_path)) == 3  # three steps of two came before


# The model


def packed_inputs(batch):
    """The first sequence of a packed batch, by itself."""
    end = int(batch.cu_seqlens[1])
    return {
        "input_ids": batch.input_ids[None, :end],
        "token_type_ids": batch.token_type_ids[None, :end],
    }


@pytest.mark.parametrize("recipe", ["bert-2018", "modern"])
def test_the_model_is_plain_transformers(recipe, data, tmp_path, capsys):
    trained(data, tmp_path, recipe=recipe, steps=3)
    nsp = recipe == "bert-2018"
    folder = tmp_path / "model"
    kind = transformers.AutoModelForPreTraining if nsp else transformers.AutoModelForMaskedLM
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = {type(module).__module__.partition(".")[0] for module in model.modules()}
    assert names == {"transformers", "torch"}
    assert "bertfast" not in (folder / "config.json").read_text()
    # The same numbers as the run's own weights, converted.
    found = checkpoints.latest(tmp_path / "checkpoints")
    own = train.models.Pretraining(train.models.new(model.config, nsp)).eval()
    own.load_state_dict(found.model)
    options_ = DataOptions(tokens=128, length=32, nsp=nsp)
    batch = next(iter(Batches(data, options_)))[1]
    with torch.no_grad():
        got, expected = own.model(**packed_inputs(batch)), model.eval()(**packed_inputs(batch))
    for a, b in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(a, b)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size and tokenizer.model_max_length == 32
    # The card
    card = (folder / "README.md").read_text()
    facts = json.loads((folder / "training.json").read_text())
    loss = facts["evaluation"]["mlm_loss"]
    assert f"| MLM loss, nats | {loss:.4f} |" in card and f"| recipe | {recipe} |" in card
    assert kind.__name__ in card and str(tmp_path) not in card and "None" not in card
    assert "| width | 32 |" in card and "| vocabulary | 60 |" in card
    assert f"| tokens | {facts['tokens']:,} |" in card


def of(folder):
    """The options of a model that is given."""
    return dict(model=folder, layers=None, width=None, heads=None, inner=None)


def test_it_goes_on_from_a_saved_model(data, whole, tmp_path, capsys):
    """Also without the head for pairs, and with one that is new."""
    run, told = whole
    begun = trained(data, tmp_path / "a", steps=1, **of(run / "model"))
    assert begun[0]["mlm_loss"] < told[0]["mlm_loss"]
    trained(data, tmp_path / "b", steps=1, nsp=False, **of(run / "model"))
    config = json.loads((tmp_path / "b" / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    capsys.readouterr()
    trained(data, tmp_path / "c", steps=1, nsp=True, **of(tmp_path / "b" / "model"))
    said = capsys.readouterr().out
    assert "b/model' doesn't have these, which begin anew: bert.pooler.dense.bias" in said


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (dict(vocab_size=50), "doesn't fit the model: it has 60 tokens, and the model .* for 50"),
        (dict(max_position_embeddings=31), "--length must be 31 or less"),
        (dict(type_vocab_size=1), "leave NSP out by --no-nsp"),
    ],
)
def test_a_model_that_doesnt_fit(config, text, data, tmp_path):
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    given = small | dict(vocab_size=60, max_position_embeddings=32) | config
    model = transformers.BertForPreTraining(transformers.BertConfig(**given))
    model.save_pretrained(tmp_path / "given")
    with pytest.raises(UserError, match=text):
        train.train(options(data, tmp_path / "run", **of(tmp_path / "given")), ALONE)


def test_torch_compile(data, tmp_path, monkeypatch):
    """Traced by dynamo and run as traced, as compiling takes minutes."""
    from bertfast.recipes.pretrain import parallel

    whole = trained(data, tmp_path / "plain", dropout=0.0, steps=1)
    seen = []
    compile_ = torch.nn.Module.compile

    def traced(self, **given):
        def backend(graph, inputs):
            seen.append(graph)
            return graph.forward

        return compile_(self, backend=backend, **given)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled = trained(data, tmp_path / "compiled", dropout=0.0, steps=1, compile=True)
    assert 1 <= len(seen) <= 2  # before and after the accuracy; no form for each batch
    for a, b in zip(compiled, whole, strict=True):
        assert math.isclose(a["loss"], b["loss"], abs_tol=1e-6)
    with pytest.raises(UserError, match="--compile can't be had with --fsdp"):
        parallel.share(torch.nn.Linear(1, 1), ALONE, fsdp=True, compiled=True)
