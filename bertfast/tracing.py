"""Questions about what torch is doing now, and whether the host may look at a tensor.

They are asked here and nowhere else: most go to private functions of torch.
"""

from collections.abc import Sequence

import torch
from torch._C import (
    _get_function_stack_at,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_legacy_batchedtensor, maybe_current_level
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_compiling() -> bool:
    """True while torch.compile or torch.export traces."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """True while torch.export traces: sizes that may change must not be compared."""
    return torch.compiler.is_exporting()


def plain_call(*tensors: torch.Tensor | None) -> bool:
    """True where an op's Python implementation may be called without torch's dispatcher.

    The dispatcher costs 4 us a call. It is needed only if something acts on the op as a whole:
    tracing, a transform, a mode, a tensor subclass, or a lazily negated tensor, whose memory holds
    -x.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and not _only_a_default_device())
        or maybe_current_level() is not None
        or _get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """plain_call of further tensors, where it has been asked for one."""
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(torch.Tensor.is_neg, tensors))


def _only_a_default_device() -> bool:
    """True if the mode of torch.set_default_device is all there is: it acts on functions that make
    tensors and are given no device, and all of ours are."""
    return _len_torch_function_stack() == 1 and type(_get_function_stack_at(0)) is DeviceContext


def plain_backward(gradient: torch.Tensor, *saved: torch.Tensor | None) -> bool:
    """plain_call of a backward, whose gradient alone may be a batch of gradients."""
    return plain_call(gradient, *saved) and not is_batched(gradient)


def only_reference() -> bool:
    """True where only the torch reference can run: in a functorch transform (vmap, grad, jvp, ...),
    and where there may be dual tensors of torch.autograd.forward_ad."""
    return maybe_current_level() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    """True where dual tensors may be about: a level of torch.autograd.forward_ad is open."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(gradient: torch.Tensor) -> bool:
    """True for a batch of gradients: by a transform, or by autograd's is_grads_batched, which uses
    an older vmap that isn't one."""
    return maybe_current_level() is not None or is_legacy_batchedtensor(gradient)


def autocast(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a product of x now; None where it leaves x alone."""
    device_type = x.device.type
    # Some kinds of devices don't know autocast and raise.
    if x.dtype == torch.float64 or device_type == "meta":
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def on_host(tensor: torch.Tensor) -> bool:
    """True if the values can be read without waiting: on a CPU, and not while tracing."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _len_torch_dispatch_stack()
    )


def can_look_at(tensor: torch.Tensor) -> bool:
    """True if the values can be known now, perhaps by waiting for a device: not while something is
    traced or captured."""
    return plain_call(tensor) and tensor.device.type != "meta" and not is_capturing(tensor)


def is_capturing(tensor: torch.Tensor) -> bool:
    """True while a CUDA graph is captured, for a tensor on a GPU."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
