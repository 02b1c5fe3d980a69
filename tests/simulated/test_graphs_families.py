"""Graphs of what a capture reads besides weights that all layers have: tables of positions, a bias
by distance, one layer that comes again, a width of the embeddings' own, a norm after the last."""

import copy
import pickle
import threading

import pytest
import torch
from support.graphed import (
    OWN_FORMS,
    call,
    captured,
    eager,
    make,
    of,
    real,
    record,
    request,
    served,
)
from support.hf_models import FAMILIES
from support.simulated_gpu import cuda
from support.simulated_gpu.recording import Recording
from torch.profiler import ProfilerActivity, profile

import bertfast
from bertfast import graphs
from bertfast.graphs import GRAPHS

transformers = pytest.importorskip("transformers")

# A layer takes long in Triton's interpreter, which runs attention with positions.
SMALL = dict(num_attention_heads=1, num_hidden_layers=1)
DEEPER = SMALL | {"num_hidden_layers": 2}  # a layer that comes again, or one of each kind
FORMS = [prefix for prefix in ("Albert", "MPNet", "Esm", "ModernBert") if prefix in FAMILIES]
# Short sequences that share a tile beside one that has two, and one by itself.
BATCHES = [(60, 3, 1), (5, 50, 9), (32,), (2, 2, 60)]
each_form = pytest.mark.parametrize("prefix", FORMS)
looping = pytest.mark.parametrize("prefix", FORMS[3:])


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    record(monkeypatch)


def small(prefix):
    return {"config": DEEPER if prefix in ("Albert", "ModernBert") else SMALL}


def captured_one(prefix, lengths=BATCHES[0], **options):
    return captured(prefix + "Model", lengths, **small(prefix), **options)


def same(model, inputs):
    """True if a graph gives the call's own numbers, to the bit."""
    y, by_graph = served(model, inputs)
    return by_graph and torch.equal(real(inputs, y), real(inputs, eager(model, inputs)))


@pytest.mark.parametrize("prefix", OWN_FORMS)
def test_batches_of_one_bucket(prefix):
    model, _ = captured_one(prefix)
    for number, lengths in enumerate(BATCHES):
        assert same(model, request(*lengths, seed=number))
    told = of(model).told()
    assert told.captures == 1 and told.refused is None
    assert [bucket.tokens for bucket in told.buckets] == [64]


@each_form
def test_buckets_share_what_is_made_once(prefix):
    """Tables are as long as the longest sequence of any bucket."""
    model, inputs = captured_one(prefix)
    shared = of(model)._held._shared
    made = [tensor.data_ptr() for tensor in shared.tensors()]
    assert bool(made) == (prefix != "Albert") and len({*made}) == len(made)
    longer = request(75, 3)
    for _ in range(2):
        call(model, longer)
    assert same(model, longer) and same(model, inputs)
    assert of(model).captures == 2 and shared is of(model)._held._shared
    assert [tensor.data_ptr() for tensor in shared.tensors()] == made


def ops_of(function):
    """The count of each of torch's operations that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    return {event.key: event.count for event in found.key_averages()}


@each_form
def test_a_served_call_launches_copies_and_a_graph(prefix, monkeypatch):
    """No tables, no bias, no layer, no projection before them: the host launches one graph."""
    model, inputs = captured_one(prefix)
    before = ops_of(lambda: eager(model, inputs))
    calls = []
    monkeypatch.setattr(Recording, "replay", lambda recording: calls.append(recording))
    seen = ops_of(lambda: call(model, inputs))
    assert len(calls) == 1
    kernels = {"simulated_gpu::host_view", "aten::mm"}  # bertfast's, and products
    tables = {f"aten::{name}" for name in ("arange", "cos", "sin", "log", "eq", "where", "sum")}
    assert kernels < set(before) and (prefix == "Albert" or tables & set(before))
    assert not (kernels | tables) & set(seen)
    assert seen.get("aten::linear", 0) <= 1  # the pooler's


def double_frequencies(model):
    model.rotary_module().get_buffer(frequencies(model)).mul_(2)


def other_frequencies(model):
    module, name = model.rotary_module(), frequencies(model)
    setattr(module, name, module.get_buffer(name) * 0.5)


def frequencies_in_inference(model):
    """It counts a change of a tensor that was made outside."""
    with torch.inference_mode():
        double_frequencies(model)


def other_scaling(model):
    module = model.rotary_module()
    (name, *_) = (name for name in vars(module) if name.endswith("attention_scaling"))
    setattr(module, name, 0.5)


def frequencies(model):
    buffers = model.rotary_module()._buffers
    (name, *_) = (name for name in buffers if name.endswith("inv_freq") and "original" not in name)
    return name


CHANGES = {
    "Esm": (double_frequencies, frequencies_in_inference),
    "ModernBert": (other_frequencies, other_scaling),
}


@pytest.mark.parametrize("prefix", FORMS[2:])
def test_tables_that_change(prefix):
    model, inputs = captured_one(prefix)
    before = call(model, inputs)
    for change in CHANGES[prefix]:
        change(model)
        expected = eager(model, inputs)
        assert not torch.equal(expected, before)
        y, by_graph = served(model, inputs)
        assert not by_graph and torch.equal(y, expected)
        captures = of(model).captures
        assert torch.equal(call(model, inputs), expected) and of(model).captures == captures + 1
        before, by_graph = served(model, inputs)
        assert by_graph and torch.equal(before, expected)


def change_in_place(model):
    with torch.no_grad():
        for parameter in parts_of(model).parameters():
            parameter.mul_(1.5)


def change_data(model):
    for parameter in parts_of(model).parameters():
        parameter.data = parameter.data * 1.5


def change_dtype(model):
    model.half()


def parts_of(model):
    """Modules that this family's graph reads besides layers; where there are none, the layers."""
    beside = model.facts().beside
    return torch.nn.ModuleList(beside or model.encoder_layers())


@each_form
def test_weights_that_change(prefix):
    model, inputs = captured_one(prefix)
    before = call(model, inputs)
    for change, kept in ((change_in_place, True), (change_data, False), (change_dtype, False)):
        change(model)
        expected = eager(model, inputs)
        assert not torch.equal(expected, before)
        for turn in range(2):
            y, by_graph = served(model, inputs)
            assert by_graph is kept and torch.equal(y, expected), (change, turn)
        before, by_graph = served(model, inputs)
        assert by_graph and torch.equal(before, expected)
    assert same(model, request(60, 2, 1, seed=7)) and of(model).captures == 3


def what_is_no_parameter(model):
    """A number that the graph's launches, or how many there are, come from."""
    if hasattr(model.config, "local_attention"):
        model.config.local_attention = 4
    else:
        model.config.num_hidden_layers += 1


@pytest.mark.parametrize("prefix", [p for p in ("Albert", "ModernBert") if p in FAMILIES])
def test_numbers_that_change(prefix):
    model, inputs = captured_one(prefix)
    before = call(model, inputs)
    what_is_no_parameter(model)
    expected = eager(model, inputs)
    assert not torch.equal(expected, before)
    for _ in range(2):
        assert torch.equal(call(model, inputs), expected)
    assert same(model, inputs) and of(model).captures == 2


@pytest.mark.parametrize(
    "prefix, config",
    [
        ("Albert", dict(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)),
        ("Esm", SMALL | {"position_embedding_type": "absolute"}),
    ],
)
def test_other_configurations(prefix, config):
    model = make(prefix + "Model", config=config)
    for number, lengths in enumerate(BATCHES):
        inputs = request(*lengths, seed=number)
        assert torch.equal(call(model, inputs), eager(model, inputs))
    assert of(model).hits == len(BATCHES) - 2 and not of(model)._held._shared.tensors()


def hooked(model, call):
    handle = model.encoder_layers()[0].register_forward_hook(lambda *_: None)
    yield call
    handle.remove()


def in_training(model, call):
    model.train()
    yield call
    model.eval()


def with_gradients(model, call):
    yield lambda model, inputs: model(**inputs).last_hidden_state


def under_autocast(model, call):
    def cast(model, inputs):
        with torch.autocast("cuda", torch.float16):
            return call(model, inputs)

    yield cast


def while_disabled(model, call):
    yield bertfast.disabled()(call)


def in_a_capture(model, call):
    def capture(model, inputs):
        with cuda.capture():
            return call(model, {"input_ids": inputs["input_ids"]})

    yield capture


def with_positions(model, call):
    """That don't count from 0."""
    ids = torch.arange(20, device="cuda:1").flip(0)[None]
    yield lambda model, inputs: call(model, inputs | {"position_ids": ids})


WAYS = in_training, with_gradients, under_autocast, while_disabled, in_a_capture, with_positions


@looping
@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_calls_without(prefix):
    """They leave the graphs as they are."""
    model, inputs = captured_one(prefix, (20, 9, 3))
    before = of(model).told()
    for way in (*WAYS, hooked):
        for changed in way(model, call):
            changed(model, inputs)
            assert of(model).told() == before, way
    assert same(model, inputs)


@each_form
def test_outputs(prefix):
    model, inputs = captured_one(prefix)
    hits = of(model).hits
    with torch.inference_mode():
        got = model(**inputs, return_dict=False)
        assert of(model).hits == hits + 1
        shown = model(**inputs, output_hidden_states=True)
        assert of(model).hits == hits + 1 and len(shown.hidden_states) >= 2
        without = {m: m.__dict__.pop(GRAPHS) for m in model.modules() if GRAPHS in m.__dict__}
        expected = model(**inputs, return_dict=False)
    assert without and type(got) is type(expected) is tuple
    assert all(map(torch.equal, got, expected)) and len(got) == len(expected)


@looping
def test_copies_have_none(prefix):
    model, inputs = captured_one(prefix)
    expected = call(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert of(other).captures == 0 and of(other).told().buckets == ()
        y, by_graph = served(other, inputs)
        assert not by_graph and torch.equal(y, expected)
    bertfast.revert(model)
    assert not any(GRAPHS in vars(module) for module in model.modules())


@pytest.mark.parametrize("prefix", FORMS[1:3])
def test_threads_with_streams(prefix):
    model, _ = captured_one(prefix)
    requests = [request(*lengths, seed=s) for s, lengths in enumerate([(9, 5), (20,), (3,) * 9])]
    expected = [eager(model, inputs) for inputs in requests]
    torch.cuda.synchronize("cuda:1")
    wrong = []

    def serve(number):
        stream = torch.cuda.Stream("cuda:1")
        with torch.cuda.stream(stream):
            for turn in range(3):
                mine = (number + turn) % len(requests)
                y = call(model, requests[mine])
                stream.synchronize()
                if not torch.equal(y, expected[mine]):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize("cuda:1")  # as the requests were another stream's
    assert not wrong and of(model).hits >= 7


@pytest.mark.parametrize("prefix", FORMS[:3])
def test_graphs_go_while_another_stream_replays_one(prefix, simulated_faults):
    """With their tables, which the stream of captures made."""
    model, inputs = captured_one(prefix)
    expected = eager(model, inputs)
    other = torch.cuda.Stream("cuda:1")
    other.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(other):
        y = call(model, inputs)
    before = [parameter.data for parameter in model.parameters()]
    change_data(model)
    call(model, inputs)  # which drops them
    assert before  # else it were a weight that goes too early
    assert not (found := simulated_faults()), found
    torch.cuda.synchronize("cuda:1")
    assert torch.equal(y, expected)
    torch.cuda.synchronize("cuda:1")  # as y is the other stream's


def test_tables_count_as_memory(monkeypatch):
    model, _ = captured_one("JinaEmbeddingsV3", graphs=graphs.Limits(tokens=4096))
    held = of(model)._held
    tables = [table.nbytes for table in held._shared.tensors()]
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    assert sorted(tables) == [4096 * half * 4] * 4  # the model's own, and those of attention
    assert of(model).told().bytes == held.x.nbytes + held.numbers.nbytes + sum(tables)
    limits = graphs.Limits(memory=held.x.nbytes + 100)
    model = make("JinaEmbeddingsV3Model", graphs=limits, config=SMALL)
    inputs = request(9, 5, 20)
    for _ in range(3):
        assert torch.equal(call(model, inputs), eager(model, inputs))
    assert of(model).captures == 0


@each_form
def test_warm_up(prefix):
    model = make(prefix + "Model", **small(prefix))
    graphs.warm_up(model, [(1, 16), (3, 20)])
    assert [bucket.tokens for bucket in of(model).told().buckets] == [64]
    assert same(model, request(5, 5)) and same(model, request(12, padded=False))
    assert "launches CUDA graphs: 1 buckets of 64" in str(bertfast.report(model))


def test_an_encoder_of_bertfast():
    encoder = bertfast.nn.Encoder(2, 64, 4, 96).to("cuda:1", torch.bfloat16).eval()
    assert bertfast.optimize(encoder, graphs=True, strict=True) is encoder
    Recording.model = encoder
    x = torch.randn(3, 20, 64).to("cuda:1", torch.bfloat16)
    mask = (torch.arange(20) < torch.tensor([20, 7, 11])[:, None]).to("cuda:1")
    for given in (None, mask):
        with torch.inference_mode():
            outputs = [encoder(x, given) for _ in range(4)]
        assert all(torch.equal(y, outputs[0]) for y in outputs)
        assert len({y.data_ptr() for y in outputs}) == 4
    assert of(encoder).captures == 1 and of(encoder).hits == 6
    hits = of(encoder).hits
    encoder(x, mask)  # whose gradient may be asked for
    assert of(encoder).hits == hits
    rows = bertfast.report(encoder)
    assert [row.status for row in rows] == ["fused"] * 2 and "1 buckets" in str(rows)
    graphs.warm_up(encoder, [(4, 40)])
    assert of(encoder).captures == 2
    with torch.no_grad():
        encoder.layer[0].output.LayerNorm.weight.data = torch.full((64,), 2.0).to(x)
        y = encoder(x, mask)
        assert not torch.equal(y, outputs[0])
        assert all(torch.equal(encoder(x, mask), y) for _ in range(3))
    bertfast.revert(encoder)
    assert GRAPHS not in vars(encoder)


def test_an_encoder_with_a_layer_of_somebody_elses():
    class Layer(torch.nn.Module):
        def forward(self, x, batch):
            return x * 2

    encoder = bertfast.nn.Encoder(2, 64, 4, 96).to("cuda:1", torch.bfloat16).eval()
    encoder.layer[1] = Layer()
    bertfast.optimize(encoder, graphs=True)
    x = torch.randn(3, 20, 64).to("cuda:1", torch.bfloat16)
    with torch.inference_mode():
        assert len({y.sum().item() for y in (encoder(x) for _ in range(4))}) == 1
    assert of(encoder).told().refused == "a Layer is among the layers"
