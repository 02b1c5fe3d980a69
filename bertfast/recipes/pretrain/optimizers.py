"""Optimisers by name, and the learning rate as a pure function of the step.

Weights of products and embeddings decay; biases and LayerNorm's parameters don't.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...commands.errors import UserError

NAMES = ("adamw", "stable-adamw", "muon")
SCHEDULES = ("linear", "wsd")


@dataclass(frozen=True)
class Settings:
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose step is divided by the root mean square of g / sqrt(v) where that is above 1
    (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2): a gradient far above what was seen
    before then moves no weight far.

        b1 = beta1 (1 - beta1^(t-1)) / (1 - beta1^t), b2 likewise
        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        rms = sqrt(mean(g^2 / max(v, eps^2))) of each tensor
        w -= lr / max(1, rms) (weight_decay w + m / (sqrt(v) + eps))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure must be None: StableAdamW takes the gradients that are there")
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(group, weights)

    def _step(self, group: dict[str, Any], weights: list[torch.Tensor]) -> None:
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] += 1
        states = [self.state[weight] for weight in weights]
        # All but the mean over a tensor is element by element, so shards are worked on as they lie.
        values = [_local(weight) for weight in weights]
        grads = [_local(g) for weight in weights if (g := weight.grad) is not None]
        means = [_local(state["exp_avg"]) for state in states]
        squares = [_local(state["exp_avg_sq"]) for state in states]
        t = float(states[0]["step"])
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"])
        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - b2)
        factors = _shrink(weights, grads, squares, group["eps"]) * -group["lr"]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, values, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, list(factors.unbind()))
        torch._foreach_add_(values, updates)


def _shrink(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    squares: list[torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """1 / max(1, rms) of each tensor. grads and squares may be a process's shards of them, whose
    sums are then added up over all processes, once."""
    sums = torch.stack(
        [(g.square() / v.clamp(min=eps * eps)).sum() for g, v in zip(grads, squares, strict=True)]
    )
    first: Any = weights[0]
    if isinstance(first, DTensor):
        dist.all_reduce(sums, group=first.device_mesh.get_group())
    counts = torch.tensor([w.numel() for w in weights], dtype=sums.dtype).to(sums.device)
    return (sums / counts).sqrt().clamp(min=1).reciprocal()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make(name: str, model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """The optimisers of a model: two for "muon", which AdamW joins for all but the layers'
    matrices."""
    named = [(key, weight) for key, weight in model.named_parameters() if weight.requires_grad]
    weights = [weight for _, weight in named]
    options: dict[str, Any] = dict(lr=settings.lr, betas=settings.betas, eps=settings.eps)
    if name == "stable-adamw":
        return [StableAdamW(_groups(weights, settings.weight_decay), **options)]
    if name == "adamw":
        return [torch.optim.AdamW(_groups(weights, settings.weight_decay), fused=True, **options)]
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizer muon needs a torch with torch.optim.Muon: {torch.__version__}"
        )
    matrices = [weight for key, weight in named if ".layer." in key and weight.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [weight for _, weight in named if id(weight) not in chosen]
    # Its steps are scaled to have AdamW's size, so that both take one learning rate.
    muon = torch.optim.Muon(
        matrices,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(_groups(rest, settings.weight_decay), fused=True, **options)
    return [muon, adamw]


def _groups(weights: Sequence[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """With decay and without: a weight of one dimension is a bias or LayerNorm's."""
    return [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]


def share_of_lr(schedule: str, step: int, steps: int, warmup: int, decay: int) -> float:
    """The share of the learning rate that a step takes, counted from 0.

    "linear": up over `warmup` steps, then down to zero at `steps`. "wsd": up, level, and over the
    last `decay` steps down by 1 - sqrt(progress)."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    begin = max(warmup, steps - decay)
    if step < begin:
        return 1.0
    return max(0.0, 1 - math.sqrt((step - begin) / max(1, steps - begin)))


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
