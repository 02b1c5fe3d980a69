"""A pass of a function as a step without arguments, and which of our backends a case can time."""

from collections.abc import Callable

import torch

from ...ops import dispatch

Step = Callable[[], tuple[torch.Tensor, ...]]  # runs the pass once; its outputs


def step(pass_: str, call: Callable, leaves: dict[str, torch.Tensor], dy: torch.Tensor) -> Step:
    """A pass of call(**leaves): forward (no gradients), training (a forward that saves what the
    backward needs) or backward."""
    if pass_ == "forward":

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (call(**leaves),)

        return forward
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}

    def training() -> tuple[torch.Tensor, ...]:
        return (call(**leaves),)

    if pass_ == "training":
        return training
    (y,) = training()
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def ours_and(
    op: str,
    ours: Callable[[str], Callable],
    device: str,
    stock: Callable | None = None,
    compile_backend: str = "inductor",
    case: tuple = (),
) -> dict[str, Callable]:
    """Our backends that run the case (a dtype, ...) on the device, then stock torch, eager and
    compiled, if it is given.

    On a CPU our torch backend is what users get; on a GPU stock torch stands for it.
    """
    found: dict[str, Callable] = {}
    for backend in dispatch.BACKENDS:
        reason = dispatch.unsupported_reason(op, backend, device, *case)
        if reason is None and (backend != "torch" or device == "cpu"):
            found[f"bertfast {backend}"] = ours(backend)
    if stock is not None:
        torch._functorch.config.donated_buffer = False  # the backward is run many times
        found["torch eager"] = stock
        found["torch compile"] = torch.compile(
            stock, fullgraph=True, dynamic=False, backend=compile_backend
        )
    return found
