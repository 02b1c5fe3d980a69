"""Derivatives besides the first in reverse mode: right or refused, whichever way they are asked."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast.ops import attention, attention_qkv, bias_gelu, gated, layer_norm

OPS = ("layer_norm", "layer_norm of x", "bias_gelu", "gated", "attention", "attention_qkv")
REFUSED = r"bertfast's kernels have .* and {} .* bertfast\.disabled\(\)"
SECOND = REFUSED.format("a second derivative")
DUAL = REFUSED.format("a forward-mode derivative of the backward")


class Case:
    """An op as a function of its differentiable arguments, on the tested backend or in torch."""

    def __init__(self, name, target, need, finest):
        self.op, _, only = name.partition(" of ")
        need(self.op, target)
        self.backend, self.device = target
        # Kernels that take 16 bits only are told apart by what is refused, not by numbers.
        dtype = finest(self.op, target) if self.op.startswith("attention") else torch.float32
        shapes = {
            "layer_norm": [(3, 8), (8,), (8,), (3, 8), (8,)],
            "bias_gelu": [(3, 8), (8,)],
            "gated": [(3, 8), (8,)],
            "attention": [(1, 3, 1, 16)] * 3,
            "attention_qkv": [(1, 3, 3, 1, 16)],
        }[self.op]
        self.leaves = [
            torch.randn(shape, device=self.device).to(dtype).requires_grad_() for shape in shapes
        ]
        if only:  # nothing but x needs a gradient, and z is x
            self.leaves = self.leaves[:1]
            self.constants = torch.randn(2, 8, device=self.device)
        self.only = bool(only)
        self.atol = 2e-5 if dtype == torch.float32 else 2e-2

    def __call__(self, *leaves, backend=None):
        backend = backend or self.backend
        if self.only:
            return layer_norm(*leaves, *self.constants, backend=backend)
        if self.op == "layer_norm":
            x, weight, bias, residual, x_bias = leaves
            options = dict(residual=residual, x_bias=x_bias, eps=1e-5)
            return layer_norm(x, weight, bias, **options, backend=backend)
        op = {"bias_gelu": bias_gelu, "gated": gated}
        op |= {"attention": attention, "attention_qkv": attention_qkv}
        return op[self.op](*leaves, backend=backend)

    def close(self, ours, reference):
        torch.testing.assert_close(ours, reference, rtol=0, atol=self.atol)


@pytest.fixture(params=OPS)
def case(request, target, need, finest):
    return Case(request.param, target, need, finest)


def test_each_derivative_of_each_gradient_is_refused(case):
    """dy is a constant: from a gradient to the inputs there is no way but through the op's."""
    y = case(*case.leaves)
    gradients = torch.autograd.grad(y, case.leaves, torch.ones_like(y), create_graph=True)
    for gradient in gradients:
        for leaf in case.leaves:
            with pytest.raises(RuntimeError, match=SECOND):
                torch.autograd.grad(gradient.sum(), leaf, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=SECOND):
            gradient.sum().backward(retain_graph=True)


def test_one_path_of_several_is_refused(case):
    """The others have a second derivative, so that without the op's the sum would be wrong."""
    inner = [leaf * leaf for leaf in case.leaves]  # not leaves: the op's inputs have a history
    y = case(*inner)
    loss = y.square().sum() + sum(leaf.pow(3).sum() for leaf in case.leaves)
    gradients = torch.autograd.grad(loss, case.leaves, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    for leaf in case.leaves:
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(penalty, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        penalty.backward()


@pytest.mark.parametrize("name", ["hvp", "vhp", "hessian"])
def test_functional_second_derivatives_are_refused(case, name):
    function = getattr(torch.autograd.functional, name)
    inputs = tuple(leaf.detach() for leaf in case.leaves)
    vectors = () if name == "hessian" else (tuple(map(torch.ones_like, inputs)),)
    with pytest.raises(RuntimeError, match=SECOND):
        function(lambda *leaves: case(*leaves).square().sum(), inputs, *vectors)


def test_a_graph_of_the_backward_that_nobody_follows_changes_nothing(case):
    y = case(*case.leaves)
    plain = torch.autograd.grad(y, case.leaves, torch.ones_like(y), retain_graph=True)
    graph = torch.autograd.grad(y, case.leaves, torch.ones_like(y), create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        assert torch.equal(one, other) and other.requires_grad


def test_in_a_checkpoint_too(case):
    """It hands out each saved tensor once."""
    y = checkpoint(case, *case.leaves, use_reentrant=False)
    gradients = torch.autograd.grad(y, case.leaves, torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(gradients[0].sum(), case.leaves[0])


def test_batched_gradients(case):
    y = case(*case.leaves)
    dy = torch.randn(3, *y.shape, device=case.device).to(y.dtype)
    together = torch.autograd.grad(y, case.leaves, dy, is_grads_batched=True, retain_graph=True)

    def alone(dy):
        return torch.autograd.grad(y, case.leaves, dy, retain_graph=True)

    for batched, one in zip(together, zip(*map(alone, dy), strict=True), strict=True):
        assert torch.equal(batched, torch.stack(one))
    for batched, one in zip(torch.vmap(alone)(dy), together, strict=True):
        assert torch.equal(batched, one)
    with pytest.raises(RuntimeError, match=REFUSED.format("a graph of batched gradients")):
        torch.autograd.grad(y, case.leaves, dy, is_grads_batched=True, create_graph=True)


def test_vectorised_jacobian(case):
    inputs = tuple(leaf.detach() for leaf in case.leaves)
    jacobian = torch.autograd.functional.jacobian
    together = jacobian(case, inputs, vectorize=True)
    for ours, one_by_one in zip(together, jacobian(case, inputs), strict=True):
        assert torch.equal(ours, one_by_one)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_runs_the_reference(case, gradients):
    tangents = [torch.randn_like(leaf) for leaf in case.leaves]
    results = []
    for backend in (case.backend, "torch"):
        with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
            duals = map(forward_ad.make_dual, case.leaves, tangents)
            results.append(forward_ad.unpack_dual(case(*duals, backend=backend)))
    (y, tangent), expected = results
    assert torch.equal(y, expected.primal) and torch.equal(tangent, expected.tangent)
    assert tangent.abs().max() > 0.01
    _, other = torch.func.jvp(case, tuple(case.leaves), tuple(tangents))
    case.close(tangent, other)


def test_dual_gradients_of_a_backward_are_refused(case):
    y = case(*case.leaves)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match=DUAL):
            torch.autograd.grad(y, case.leaves, dy, retain_graph=True)
        torch.autograd.grad(y, case.leaves, torch.ones_like(y))


def test_functorch_transforms_give_the_references_second_derivatives(case):
    if case.leaves[0].dtype != torch.float32:
        pytest.skip("the second derivatives of 16-bit results are mostly rounding")

    def loss(backend):
        return lambda *leaves: case(*leaves, backend=backend).square().sum()

    everything = tuple(range(len(case.leaves)))
    ours, reference = (
        torch.func.hessian(loss(backend), everything)(*case.leaves)
        for backend in (case.backend, "torch")
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_compiled_first_derivatives(case):
    torch._dynamo.reset()
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, case):
        y = function(*case.leaves)
        results.append((y, *torch.autograd.grad(y, case.leaves, torch.ones_like(y))))
    for ours, eager in zip(*results, strict=True):
        case.close(ours, eager)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_joined_product_has_further_derivatives(autocast):
    """It is a product; x's and each parameter's, of each gradient."""
    from bertfast.nn.joined import JoinedWeights, _concatenated, joined_product

    linears = [torch.nn.Linear(6, 4) for _ in range(3)]
    leaves = [p for linear in linears for p in linear.parameters()]
    x = torch.randn(5, 6, requires_grad=True)
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]

    def second(product):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = product()
        first = torch.autograd.grad(y.square().sum(), [x, *leaves], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *leaves])

    joined = JoinedWeights(tuple(linears))
    y = joined_product(linears, x, joined)
    dy = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, [x, *leaves], dy, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, [x, *leaves], one, retain_graph=True) for one in dy]
    for batched, one in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(one), rtol=0, atol=1e-5)
    ours = second(lambda: joined_product(linears, x, joined))
    assert joined.weight is not None
    for one, other in zip(ours, second(lambda: _concatenated(x, weights, biases)), strict=True):
        # Under autocast both round each product's result to 8 bits, three one after the other.
        bound = (2.0**-7 if autocast else 2.0**-20) * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_forward_mode_of_a_converted_model(packed, gradients):
    """In eval on a CPU, where oneDNN's products, which know no tangents, serve it otherwise."""
    pytest.importorskip("transformers")
    from support.hf_models import batch, tiny

    from bertfast.testing.model import HIDDEN_ATOL

    model, mask = tiny(attn_implementation="eager"), batch()["attention_mask"]
    x, direction = torch.randn(2, *mask.shape, 64)
    tangents = []
    for convert in (lambda m: m, lambda m: bertfast.optimize(m, packed=packed)):
        model = convert(model)
        with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
            dual = forward_ad.make_dual(x, direction)
            y = model(inputs_embeds=dual, attention_mask=mask)[0]
            tangents.append(forward_ad.unpack_dual(y).tangent[mask.bool()])
    stock, ours = tangents
    atol = HIDDEN_ATOL * stock.abs().max().item()
    torch.testing.assert_close(ours, stock, rtol=0, atol=atol)
