"""Checks the public functions share. An error names the argument, what it must be, what came."""

import torch


def shape(tensor: torch.Tensor) -> str:
    return _list(tensor.shape)


def _list(sizes) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def check_float(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def check_like(
    name: str,
    tensor: torch.Tensor,
    expected,
    device: torch.device,
    dtype: torch.dtype | None,
    like: str = "x",
) -> None:
    """Shape, device and dtype (None: any floating-point one) are what x's are."""
    if not isinstance(tensor, torch.Tensor) or dtype is None:
        check_float(name, tensor)
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {_list(expected)}, got {shape(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} (where {like} is), got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype} ({like}'s), got {tensor.dtype}")


def check_dropout(p: float, site: int) -> None:
    if not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p}")
    if not isinstance(site, int):
        raise TypeError(f"site must be an int, got {type(site).__name__}")
    if not 0 <= site < 2**31:
        raise ValueError(f"site must be between 0 and 2**31 - 1, got {site}")


def check_seed(seed: torch.Tensor, device: torch.device | None, like: str = "x") -> None:
    if not isinstance(seed, torch.Tensor):
        raise TypeError(
            "seed must be an int64 tensor with one element, such as "
            f"torch.randint(2**62, (1,)), got {type(seed).__name__}"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            "seed must be an int64 tensor with one element, "
            f"got {seed.dtype} with shape {shape(seed)}"
        )
    if seed.device != device:
        raise ValueError(f"seed must be on {device} (where {like} is), got {seed.device}")


def check_row_index(row_index: torch.Tensor, rows: int, device: torch.device) -> None:
    if not isinstance(row_index, torch.Tensor):
        raise TypeError(f"row_index must be an int64 tensor, got {type(row_index).__name__}")
    if row_index.dtype != torch.int64:
        raise TypeError(f"row_index must have dtype torch.int64, got {row_index.dtype}")
    if row_index.shape != (rows,):
        raise ValueError(
            f"row_index must have shape [{rows}] (one number for each row of x), "
            f"got {shape(row_index)}"
        )
    if row_index.device != device:
        raise ValueError(f"row_index must be on {device} (where x is), got {row_index.device}")
