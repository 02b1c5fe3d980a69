"""Real CUDA graphs by bucket: what a simulated one, which calls functions again, can't show."""

import threading

import pytest
import torch
from support.hf_models import FAMILIES, INNER, KNOWN, LAYERS, tiny

import bertfast
from bertfast.commands.bench.case import relative
from bertfast.commands.bench.encoder import limit
from bertfast.graphs import GRAPHS, Limits, warm_up

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def pair(name="BertModel", dtype=torch.bfloat16, graphs=True):
    """A model with graphs, and one with the same weights without."""
    model, other = (tiny(name).to("cuda", dtype).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    return bertfast.optimize(model, graphs=graphs), bertfast.optimize(other)


def request(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 60, mask.shape, generator=generator).where(mask, 1)
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


def call(model, inputs):
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


def counts(model):
    (graphs,) = (m.__dict__[GRAPHS] for m in model.modules() if GRAPHS in m.__dict__)
    return graphs.told()


def close(y, expected):
    """True within two honest implementations' errors, whose derivation is at `limit`: cuBLAS may
    take another kernel for another number of rows, a sum in another order in each layer."""
    return relative(y, expected) <= 2 * limit(y.dtype, LAYERS, INNER, gradients=False)


def same(model, other, inputs):
    y, expected = call(model, inputs), call(other, inputs)
    real = inputs["attention_mask"].bool()
    assert close(y[real], expected[real])
    return y


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_have_the_numbers_of_calls(family):
    model, other = pair(family + "Model")
    for number in range(8):
        same(model, other, request(9, 5 + number, 20, seed=number))
    told = counts(model)
    assert told.captures == 1 and told.hits == 8 - 3 and told.refused is None, told


ROTARY = [family.prefix for family in KNOWN if "rotary" in family.layer]


@pytest.mark.parametrize("family", ROTARY)
def test_tables_are_made_again_where_frequencies_changed(family):
    """They are in memory that replays on other streams read too."""
    model, other = pair(family + "Model")
    inputs = request(9, 5, 20)
    for scale in (1.0, 0.5, 0.25):
        for one in (model, other):
            for buffer in one.rotary_module().buffers():
                buffer.mul_(scale)
        torch.cuda.synchronize()
        for _ in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                same(model, other, inputs)
                torch.cuda.current_stream().synchronize()
    assert counts(model).captures == 3 and counts(model).refused is None


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & {"Albert", "MPNet"}))
def test_what_is_beside_the_layers_is_read_anew(family):
    model, other = pair(family + "Model")
    inputs = request(9, 5, 20)
    for _ in range(4):
        before = same(model, other, inputs)
    for one in (model, other):
        for module in one.facts().beside:
            for parameter in module.parameters():
                parameter.data.mul_(1.5)
    assert not torch.equal(same(model, other, inputs), before)
    assert counts(model).captures == 1


def test_an_encoder_of_bertfast():
    encoder = bertfast.nn.Encoder(2, 64, 4, 96).to("cuda", torch.bfloat16).eval()
    x = torch.randn(3, 20, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.arange(20, device="cuda") < torch.tensor([20, 7, 11], device="cuda")[:, None]
    with torch.inference_mode():
        expected = encoder(x, mask)
        bertfast.optimize(encoder, graphs=True)
        for _ in range(4):
            assert close(encoder(x, mask), expected)
    assert counts(encoder).captures == 1 and counts(encoder).hits == 2


def test_replays_see_weights_that_changed_in_place_and_no_others():
    model, other = pair()
    inputs = request(9, 5, 20)
    for _ in range(4):
        before = same(model, other, inputs)
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert not torch.equal(same(model, other, inputs), before)
    assert counts(model).captures == 1
    for one in (model, other):
        weight = one.encoder.layer[1].output.dense.weight
        weight.data = weight.data * 3
    for _ in range(4):
        same(model, other, inputs)
    assert counts(model).captures == 2


def test_many_buckets_share_a_pool():
    model, other = pair()
    warm_up(model, [(rows, 40) for rows in (100, 50, 20, 10, 5, 2)])
    one = counts(model).bytes
    for rows in (100, 3, 20, 7, 50, 1):
        same(model, other, request(*[40] * (rows - 1), 33, seed=rows))
    assert counts(model).bytes - one < one / 2


def test_threads_and_streams():
    model, other = pair()
    requests = [request(*lengths, seed=s) for s, lengths in enumerate([(9, 5), (20,), (3,) * 9])]
    expected = [call(other, inputs) for inputs in requests]
    torch.cuda.synchronize()
    wrong = []

    def serve(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(200):
                mine = (number + turn) % len(requests)
                y = call(model, requests[mine])
                torch.cuda.current_stream().synchronize()
                if not close(y, expected[mine]):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and counts(model).hits > 700


def test_a_users_own_capture():
    """After one call as it will be captured, with the padding kept."""
    model, other = pair()
    bertfast.optimize(model, packed=False)
    inputs = {"input_ids": request(16, 16)["input_ids"]}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        model(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        y = model(**inputs).last_hidden_state
    inputs["input_ids"].copy_(request(16, 16, seed=9)["input_ids"])
    graph.replay()
    assert close(y, call(other, inputs))


def test_compiled_with_graphs():
    model, other = pair()
    bertfast.optimize(model, packed=False)
    compiled = torch.compile(model, mode="reduce-overhead")
    for seed in range(4):
        inputs = {"input_ids": request(16, 16, seed=seed)["input_ids"]}
        with torch.inference_mode():
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(**inputs).last_hidden_state
            assert close(y, call(other, inputs))


def test_memory_is_bounded():
    model, other = pair(graphs=Limits(tokens=1024, memory=64 * 2**20))
    for rows in (20, 40, 10):
        for seed in range(4):
            same(model, other, request(*[25] * rows, seed=seed))
    assert counts(model).bytes <= 64 * 2**20
