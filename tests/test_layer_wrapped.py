"""A layer as two autograd nodes, with what torch and its users put around a graph: checkpoints,
hooks, threads, DDP, scaled losses."""

import copy
import math
import threading

import pytest
import torch
from support.layers import gradients, make, make_input
from torch import distributed
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_repeats_the_forward(compiled, reentrant, dropout):
    module, x = make(compiled, dropout), make_input(compiled)
    expected = gradients(module, x)
    torch.manual_seed(3)
    y = checkpoint(module, x, use_reentrant=reentrant)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    y.backward(dy)
    assert torch.equal(y, expected[0])
    for leaf, gradient in zip((x, *module.parameters()), expected[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_saved_tensors_on_the_host_and_anomaly_mode(compiled):
    module, x = make(compiled, 0.2), make_input(compiled)
    expected = gradients(module, x)
    with save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        found = gradients(module, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_an_exception_in_a_backward_leaves_the_layer_usable(compiled):
    module, x = make(compiled), make_input(compiled)
    expected = gradients(module, x)

    def fail(gradient):
        raise RuntimeError("on purpose")

    y = module(x)
    handle = module.attention.output.dense.weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    handle.remove()
    for a, b in zip(gradients(module, x), expected, strict=True):
        assert torch.equal(a, b)


def test_hooks_of_parameters_see_each_gradient_once(compiled):
    module, x, seen = make(compiled), make_input(compiled), []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    module(x).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in module.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_ddp(compiled, one_process, nodes, options):
    """Gradients that travel by DDP's buckets, over two steps with accumulation in one of them."""
    module, x = make(compiled, 0.2), make_input(compiled)
    wrapped = DistributedDataParallel(copy.deepcopy(module), **options)

    def steps(model):
        torch.manual_seed(3)
        found = []
        for step in range(3):
            model(x).float().square().sum().backward()
            if step:
                found += [p.grad.clone() for p in model.parameters()]
                model.zero_grad()
        return found

    expected = steps(module)
    nodes.clear()
    got = steps(wrapped)
    assert nodes == ["attention", "mlp"] * 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_grad_scaler(compiled, nodes):
    """Scaled by a power of 2, the gradients are the same once unscaled; a step with an infinity in
    them changes no weight."""
    module, x = make(compiled, dtype=torch.float32), make_input(compiled, dtype=torch.float32)
    scaler = torch.amp.GradScaler(compiled[1], init_scale=2.0**10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def loss():
        with torch.autocast(compiled[1], torch.bfloat16):
            return module(x).float().square().sum()

    leaves = [*module.parameters()]
    expected = torch.autograd.grad(loss(), leaves)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    assert nodes == ["attention", "mlp"] * 2
    assert all(torch.equal(p.grad, grad) for p, grad in zip(leaves, expected, strict=True))
    before = [p.detach().clone() for p in leaves]
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(p, old) for p, old in zip(leaves, before, strict=True))

    optimizer.zero_grad()
    before = [p.detach().clone() for p in leaves]
    (scaler.scale(loss()) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, old) for p, old in zip(leaves, before, strict=True))


def test_threads(compiled):
    """Four of them, one model: forward and backward."""
    module, x = make(compiled), make_input(compiled)
    expected = gradients(module, x)
    found, errors = [None] * 4, []

    def work(number):
        try:
            mine = x.detach().clone().requires_grad_()
            y = module(mine)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
            found[number] = torch.autograd.grad(y, [mine, *module.parameters()], dy)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for mine in found:
        assert all(torch.equal(a, b) for a, b in zip(mine, expected[1:], strict=True))
