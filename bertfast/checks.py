"""Checks of public functions' arguments, made before anything is computed or allocated.

Every error comes from here or is worded alike: it names the argument, what it must be, what came.
TypeError where the kind of thing is wrong (a string for a number, a sparse tensor, another dtype),
ValueError where its value, shape or place is.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT32_MAX = torch.finfo(torch.float32).max
INT32_MAX = 2**31 - 1

_FLOATS = frozenset(FLOATS)
_INTS = (int, torch.SymInt)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


# What came, in words.


def shape(tensor: torch.Tensor) -> str:
    return sizes(tensor.shape)


def sizes(values: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, values)) + "]"


def kind(value: object) -> str:
    return type(value).__name__


def said(value: object) -> str:
    """A value where it is short, else its kind."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return kind(value)


def _bound(value: float) -> str:
    if isinstance(value, int) and value > 2**16 and value & (value + 1) == 0:
        return f"2**{value.bit_length()} - 1"
    return f"{value:g}"


# Numbers, names, modules.


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {kind(value)}")


def check_int(name: str, value: int, least: int, most: int | None = None) -> None:
    """An int, or while something is traced what stands for one; no bool."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _INTS)):
        raise TypeError(f"{name} must be an int, got {kind(value)}")
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more"
        if most is not None:
            allowed = f"between {least} and {_bound(most)}"
        raise ValueError(f"{name} must be {allowed}, got {said(value)}")


def check_number(
    name: str, value: float, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX
) -> None:
    """An int or a float, or what stands for one, that float32 can hold; no bool, no NaN."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name} must be a number, got {kind(value)}")
    if not least <= value <= most:
        if most < FLOAT32_MAX:
            allowed = f"between {_bound(least)} and {_bound(most)}"
        elif least > -FLOAT32_MAX:
            allowed = f"{_bound(least)} or more and finite in float32"
        else:
            allowed = "finite in float32"
        raise ValueError(f"{name} must be {allowed}, got {said(value)}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {names}, got {said(value)}")


def check_module(
    name: str, value: torch.nn.Module, expected: type[torch.nn.Module] = torch.nn.Module
) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a torch.nn.{expected.__name__}, got {kind(value)}")


def check_device(name: str, value: torch.device | str) -> torch.device:
    """The device that is meant."""
    if isinstance(value, (str, torch.device)):
        try:
            return torch.device(value)
        except RuntimeError:
            pass
    raise ValueError(f"{name} must be a torch.device or the name of one, got {said(value)}")


def check_ints(name: str, value: Iterable[int], least: int) -> tuple[int, ...]:
    """The ints of a tuple, a list, a range or a torch.Size, each of them `least` or more."""
    if not isinstance(value, (tuple, list, range)):
        raise TypeError(f"{name} must be a tuple or list of ints, got {kind(value)}")
    for other in set(map(type, value)) - set(_INTS):
        raise TypeError(f"{name} must be a tuple or list of ints, got one with {other.__name__}")
    if value and min(value) < least:
        raise ValueError(f"{name} must have ints of {least} or more, got {said(min(value))}")
    return tuple(value)


# Tensors.


def check_tensor(name: str, value: torch.Tensor, what: str = "a tensor") -> None:
    """A tensor whose values lie in memory one by one: not sparse, not nested, not opaque."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be {what}, got {kind(value)}")
    if value.layout is not torch.strided or value.is_nested:
        refuse_layout(name, value)


def refuse_layout(name: str, tensor: torch.Tensor) -> NoReturn:
    came = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
    raise TypeError(f"{name} must be a dense tensor, got {came}")


def check_float(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        check_tensor(name, tensor)
    if tensor.is_nested:
        refuse_layout(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must have dtype float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )


def check_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cast: bool,
    names: tuple[str, str, str] = ("x", "outputs", "inputs"),
) -> None:
    """The operands of x weight^T + bias, of which x is known to be floating-point. cast: autocast
    will give them one dtype. names: of x, and of weight's two sizes."""
    name, outputs, inputs = names
    check_float("weight", weight)
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have shape [{outputs}, {inputs}] with {name}'s last dimension as "
            f"{inputs}, got {shape(weight)}, and {name} has shape {shape(x)}"
        )
    dtype = None if cast else x.dtype
    check_like("weight", weight, weight.shape, x.device, dtype, name)
    if bias is not None:
        check_like("bias", bias, weight.shape[:1], x.device, dtype, name)


def check_like(
    name: str,
    tensor: torch.Tensor,
    expected: torch.Size,
    device: torch.device,
    dtype: torch.dtype | None,
    like: str = "x",
) -> None:
    """Shape, device and dtype (None: any floating-point one) are what x's are."""
    if not isinstance(tensor, torch.Tensor) or dtype is None:
        check_float(name, tensor)
    if tensor.layout is not torch.strided:
        refuse_layout(name, tensor)
    try:
        same = tensor.shape == expected
    except RuntimeError:  # a nested tensor has no shape
        refuse_layout(name, tensor)
    if not same:
        raise ValueError(f"{name} must have shape {sizes(expected)}, got {shape(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} (where {like} is), got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype} ({like}'s), got {tensor.dtype}")


def check_place(name: str, tensor: torch.Tensor, device: torch.device, like: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} (where {like} is), got {tensor.device}")


def check_mask(
    name: str,
    mask: torch.Tensor,
    expected: torch.Size,
    device: torch.device | None,
    like: str = "x",
) -> None:
    """A mask of tokens, bool, True = attended. device None: on any."""
    check_tensor(name, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (True = attend), got {mask.dtype}")
    if mask.shape != expected:
        raise ValueError(f"{name} must have shape {sizes(expected)}, got {shape(mask)}")
    if device is not None:
        check_place(name, mask, device, like)


def check_cu_seqlens(cu_seqlens: Any) -> torch.Tensor:
    """The bounds of a packed batch's sequences, of which all but the values is looked at."""
    check_tensor("cu_seqlens", cu_seqlens, "an int32 tensor")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {shape(cu_seqlens)}")
    return cu_seqlens


def check_max_seqlen(max_seqlen: Any) -> int:
    check_int("max_seqlen", max_seqlen, 0, INT32_MAX)  # as cu_seqlens is int32
    return max_seqlen


def check_dropout(p: float, site: int) -> None:
    # What is usual is seen here: each further call costs every op a tenth of a microsecond.
    if type(p) is not float or not 0.0 <= p <= 1.0:
        check_number("dropout_p", p, 0, 1)
    if type(site) is not int or not 0 <= site <= INT32_MAX:
        check_int("site", site, 0, INT32_MAX)


def check_seed(seed: torch.Tensor, device: torch.device | None = None, like: str = "x") -> None:
    """device None: on any."""
    if not isinstance(seed, torch.Tensor) or seed.layout is not torch.strided or seed.is_nested:
        what = "an int64 tensor with one element, such as torch.randint(2**62, (1,))"
        check_tensor("seed", seed, what)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            "seed must be an int64 tensor with one element, "
            f"got {seed.dtype} with shape {shape(seed)}"
        )
    if device is not None and seed.device != device:
        check_place("seed", seed, device, like)


def check_row_index(row_index: torch.Tensor, rows: int, device: torch.device) -> None:
    check_tensor("row_index", row_index, "an int64 tensor")
    if row_index.dtype != torch.int64:
        raise TypeError(f"row_index must have dtype torch.int64, got {row_index.dtype}")
    if row_index.shape != (rows,):
        raise ValueError(
            f"row_index must have shape [{rows}] (one number for each row of x), "
            f"got {shape(row_index)}"
        )
    check_place("row_index", row_index, device, "x")
