"""One kernel or two: the choice of the public functions of products with an activation."""

import torch

from ... import checks, tracing
from .. import dispatch
from . import limits, run


def backend_of(
    ops: run.Ops,
    x: torch.Tensor,
    weight: torch.Tensor,
    outputs: int,
    dtype: torch.dtype,
    fused: bool | None,
    backend: str,
) -> str | None:
    """The backend of the one kernel; None for two. outputs: of the kernel, which may be half of the
    product's."""
    checks.check_choice("backend", backend, dispatch.CHOICES)
    inputs = weight.shape[1]
    if fused is None:
        if not tracing.plain_call(x, weight) or tracing.only_reference():
            return None
        rows = x.numel() // inputs if inputs else 0
        sizes = (inputs, outputs, rows)
        return run.choose(backend, x.device, dtype, sizes, None, ops).forward
    checks.check_bool("fused", fused)
    if not fused:
        return None
    # While something is traced a number of rows may stand for all.
    known = tracing.plain_call(x)
    most = limits.rows_class(x.numel() // max(1, inputs)) if known else None
    reasons = []
    for name in dispatch.BACKENDS[1:] if backend == "auto" else (backend,):
        reason = _reason_here(ops.both, name, x.device, dtype)
        reason = reason or ops.limits(dtype, inputs, outputs, most)
        if name == "torch":
            reason = "its product and its activation are two"
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"fused=True can't be had here: {'; '.join(reasons)}")


def _reason_here(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return dispatch.unsupported_reason(op, backend, device, dtype)


# As `dispatch.choose`: to find out may import modules, which torch.compile can't trace. Sizes may
# be symbols, and are looked at apart.
_reason_here._dynamo_marked_constant = True  # type: ignore[attr-defined]
