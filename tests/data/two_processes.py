"""DDP and FSDP2 over two gloo processes; started twice by test_hf_wrappers.py.

Each process has its own rows. Gradients, averaged, and the weights after two steps must be those of
the stock model that sees all rows in one process. Under FSDP2 q, k and v are Triton's, so that the
path that joins weights is the one that runs.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from support.hf_models import batch, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

RANK = int(os.environ["RANK"])


def loss_of(model, inputs):
    real = inputs["attention_mask"].bool()
    output = model(**inputs)
    return output[0][real].tanh().pow(3).sum() + output[1].sum()


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None


def train(model, batches, scale=1.0):
    """Two steps; the gradients of the first."""
    first = None
    for _ in range(2):
        for inputs in batches:
            (loss_of(model, inputs) * scale).backward()
        if first is None:
            first = [whole(p.grad) for p in model.parameters()]
        step(model)
    return first


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def same(got, expected, names):
    for name, a, b in zip(names, got, expected, strict=True):
        atol = HIDDEN_ATOL * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def refused(call, text):
    try:
        call()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError("nothing was raised")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    stock = tiny(num_hidden_layers=1)
    names = [name for name, _ in stock.named_parameters()]
    batches = [batch((3, 6)), batch((4, 2))]

    def compare(wrapped, gradients):
        same(gradients, expected_gradients, names)
        same(map(whole, wrapped.parameters()), reference.parameters(), names)

    reference = copy.deepcopy(stock)
    expected_gradients = train(reference, batches, scale=0.5)

    model = DistributedDataParallel(bertfast.optimize(copy.deepcopy(stock)))
    compare(model, train(model, [batches[RANK]]))

    for per_layer in (True, False):
        model = bertfast.optimize(copy.deepcopy(stock), backend="triton")
        if per_layer:
            for layer in model.encoder.layer:
                fully_shard(layer, mesh=mesh)
            assert type(model.encoder.layer[0]).__name__ == "FSDPBertLayer"
        fully_shard(model, mesh=mesh)
        assert [row.reason for row in bertfast.report(model)] == [None]
        compare(model, train(model, [batches[RANK]]))
        refused(lambda model=model: bertfast.revert(model), "before it is sharded")

    model = copy.deepcopy(stock)
    fully_shard(model.encoder.layer[0], mesh=mesh)
    refused(lambda: bertfast.optimize(model), "converted before it is sharded")
    assert type(model).__module__.startswith("transformers.")  # nothing was half done
    dist.destroy_process_group()
    print("all the same")


if __name__ == "__main__":
    sys.exit(main())
