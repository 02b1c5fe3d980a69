"""Values that an argument must refuse, by what the argument is, for the fuzz."""

import random
from collections.abc import Callable

import torch

NAN, INF = float("nan"), float("inf")
Maker = Callable[[random.Random, dict], object]

NO_TENSOR = ("x", 1.5, [1.0], (), object())
NO_INT = (1.0, "1", True, None, NAN, [1], torch.tensor(1))
NO_NUMBER = ("1e-5", True, 1j, [1.0], torch.tensor(1.0), object())
NO_BOOL = (1, 0, "True", 1.0, [True], torch.tensor(True), object())
NO_NAME = ("cudnn", "Torch", "", None, ["torch"], 3, b"torch", True)


def _one_of(*values: object) -> Maker:
    return lambda rng, call: rng.choice(values)


def _spoilt(tensor: torch.Tensor, how: str) -> object:
    """A tensor that no op takes in this one's place."""
    dense = tensor.detach().contiguous().clone()
    if how == "sparse":
        return dense.to_sparse()
    if how == "mkldnn":
        return dense.float().to_mkldnn()
    if how == "nested":
        return torch.nested.nested_tensor([dense, dense])
    if how == "jagged":
        return torch.nested.nested_tensor([dense, dense], layout=torch.jagged)
    return dense.to(getattr(torch, how))


_KINDS = ("sparse", "mkldnn", "nested", "jagged", "int64", "bool", "complex64")
_KINDS += ("float8_e4m3fn", "float8_e5m2")


def first_tensor(name: str) -> Maker:
    """For the argument that says which shape, dtype and device the others must have."""

    def make(rng: random.Random, call: dict) -> object:
        tensor = call[name]
        ways = [how for how in _KINDS if tensor.dim() or how not in ("sparse", "mkldnn", "jagged")]
        return rng.choice([*NO_TENSOR, None, *(_spoilt(tensor, how) for how in ways)])

    return make


def like_tensor(name: str, required: bool, other_dtypes: bool = True) -> Maker:
    """For an argument whose shape, dtype and device another gives."""

    def make(rng: random.Random, call: dict) -> object:
        tensor = call[name]
        dense = tensor.detach().contiguous()
        choices = [*NO_TENSOR, *([None] if required else [])]
        choices += [_spoilt(tensor, how) for how in _KINDS]
        choices += [dense.to("meta"), dense[None], torch.cat([dense, dense], -1)]
        if not tensor.shape[-1]:
            choices = choices[:-1]
        if other_dtypes:
            choices += [dense.to(d) for d in (torch.float64, torch.float16) if d != dense.dtype]
        return rng.choice(choices)

    return make


def seed(rng: random.Random, call: dict) -> object:
    one = torch.tensor([3])
    tensors = (one.int(), one.double(), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64))
    elsewhere = [] if "shape" in call else [one.to("meta")]  # a mask lies where its seed does
    return rng.choice([*NO_TENSOR, 7, *tensors, *elsewhere, one.to_sparse()])


def row_index(rng: random.Random, call: dict) -> object:
    x = call["x"]
    rows = x.shape[:-1].numel()
    right = torch.arange(rows)
    choices = [*NO_TENSOR, right.int(), right.double(), torch.arange(rows + 1), right[None]]
    return rng.choice([*choices, right.to("meta"), right.to_sparse()])


def key_mask(rng: random.Random, call: dict) -> object:
    """Of a padded batch."""
    x = call.get("q", call.get("qkv"))
    right = torch.ones(x.shape[:2], dtype=torch.bool)
    choices = [*NO_TENSOR, right.float(), right.to(torch.uint8), right[None], right.to("meta")]
    return rng.choice([*choices, right.to_sparse(), torch.ones(x.shape[0], x.shape[1] + 1) > 0])


def rotary(rng: random.Random, call: dict) -> object:
    """Tables of positions. Of an odd head dimension no tables are right."""
    x = call.get("q", call.get("qkv"))
    longest = min(x.shape[1] if call["max_seqlen"] is None else call["max_seqlen"], 400)
    right = torch.ones(longest, x.shape[-1] // 2)
    if x.shape[-1] % 2:
        return right, right
    wide = torch.ones(longest, x.shape[-1] // 2 + 1)
    leaf = right.clone().requires_grad_()
    others = [*NO_TENSOR, None, right.half(), right.double(), right.long(), right[None], wide]
    others += [right.to("meta"), leaf, right.to_sparse(), _spoilt(right, "nested")]
    others += [right[:-1]] * (longest > 0)
    other = rng.choice(others)
    pairs = ((right, other), (other, right), (other, other))
    wrong = (right, torch.stack((right, right)), (right,), (right,) * 3, {"cos": right}, 1.5, "xy")
    return rng.choice((*pairs, *pairs, rng.choice(wrong)))


_SIDES = (-1, -(2**63), -(10**400), 1.0, NAN, True, None, "1", [1], torch.tensor(1))


def window(rng: random.Random, call: dict) -> object:
    side = rng.choice(_SIDES)
    pairs = ((side, 3), (3, side), [side, side])
    wrong = (64, "xy", 1.5, True, (), (1,), (1, 1, 1), {1, 2}, torch.tensor([1, 1]), object())
    return rng.choice((*pairs, rng.choice(wrong)))


def distance_bias(rng: random.Random, call: dict) -> object:
    x = call.get("q", call.get("qkv"))
    heads = x.shape[-2]
    right = torch.ones(heads, 5, dtype=x.dtype)
    choices = [*NO_TENSOR, *(_spoilt(right, how) for how in _KINDS)]
    choices += [right[:, :4], right[:, :0], right[0], right[None], right.to("meta")]
    choices += [torch.cat((right, right)), right[:0]]
    return rng.choice(choices)


def cu_seqlens(rng: random.Random, call: dict) -> object:
    right = call["cu_seqlens"].contiguous()
    more = right.clone()
    more[-1] += 1
    choices = [*NO_TENSOR, None, right.tolist(), right.long(), right.float(), right.bool()]
    choices += [right[None], right[0], right[:0], right + 1, right - 1, right.to_sparse()]
    if call.get("total", 0) is not None:  # where something says how many tokens there are
        choices += [more]
    if "total" not in call:
        choices += [right.to("meta")]
    if right[-1] > 0:
        choices += [torch.cat([right, right[:1]])]
    return rng.choice(choices)


def max_seqlen(rng: random.Random, call: dict) -> object:
    longest = int(call["cu_seqlens"].diff().max()) if call["cu_seqlens"].shape[0] > 1 else 0
    return rng.choice([*NO_INT, -1, 2**31, 2**40, 10**400, longest - 1])


def labels(rng: random.Random, call: dict) -> object:
    right = call["labels"]
    outside = [right.index_fill(0, torch.tensor([0]), bad) for bad in (-1, 10**6, -(2**63))]
    tensors = (right.int(), right.double(), right[None], right[:-1], right.to("meta"))
    return rng.choice([*NO_TENSOR, None, *outside, *tensors, right.to_sparse()])


site = _one_of(*NO_INT, -1, 2**31, 10**400)
eps = _one_of(*NO_NUMBER, None, NAN, INF, -1e-5, 10**400)
dropout_p = _one_of(*NO_NUMBER, None, NAN, INF, -0.1, 1.001, 2, 10**400)
scale = _one_of(*NO_NUMBER, NAN, INF, -INF, 1e39, 10**400, -(10**5000))
total = _one_of(*(bad for bad in NO_INT if bad is not None), -1, 2**31, 10**400)
labelled = _one_of(*(bad for bad in NO_INT if bad is not None), -1, 2**63, 10**400)
name = _one_of(*NO_NAME)
no_int = _one_of(*NO_INT, 2**63, -(10**400))
no_bool = _one_of(*NO_BOOL)
