"""The kernels of a product and its GELU as `bertfast kernels` compiles and labels them.

An element is a sum of the product: those of a block's tile in one turn of the loop over the inner
dimension. What follows that loop is counted for itself (`Work.most_outside`).
"""

from ..aot import CUDA_NAMES, Case, Launch, Work

# Instructions outside the main loop for each sum. A bare product has 5.6 to 6.8, GELU adds 12 and
# its derivative with the sums for the bias's gradient 20.
MOST_OUTSIDE = {"forward": 20.0, "backward": 30.0}


def call_launchers() -> None:
    """Nothing yet: there is no Triton kernel."""


def triton_case(launch: Launch) -> Case | None:
    return None


_CUDA_TILE, _CUDA_DEPTH, _CUDA_STAGES, _CUDA_WARPS = 128, 32, 3, 4


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/linear_gelu.cu, if it is one."""
    pass_ = {"linear_gelu_forward_kernel": "forward", "linear_gelu_backward_kernel": "backward"}
    if kernel not in pass_:
        return None
    work = Work(
        *(_CUDA_TILE, _CUDA_TILE, _CUDA_DEPTH, ((_CUDA_TILE, _CUDA_DEPTH),)),
        streamed=_CUDA_TILE,
        outputs=2 if pass_[kernel] == "forward" else 1,
        most_outside=MOST_OUTSIDE[pass_[kernel]],
    )
    return Case(
        f"{_CUDA_TILE} x {_CUDA_TILE} x {_CUDA_DEPTH}" + ", tanh" * (arguments[1] == "true"),
        CUDA_NAMES[arguments[0]],
        threads=32 * _CUDA_WARPS,
        elements=_CUDA_TILE**2 / (32 * _CUDA_WARPS),
        loop=True,
        dynamic_shared=_CUDA_STAGES * 2 * 2 * _CUDA_TILE * _CUDA_DEPTH,
        work=work,
    )
