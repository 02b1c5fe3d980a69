"""The blocks of a layer by the ops, which autograd composes: wherever a module has to be called,
where something traces or transforms, and on torch's backend."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from ..ops.layer_norm.run import Norm
from ..ops.linear import linear_add
from .joined import joined_product, same_form
from .modules import Weights
from .parts import AFTER_ATTENTION, AFTER_MLP, ATTENTION, Call, Dropouts, Parts, Read


class Composed:
    def __init__(self, parts: Parts, now: Read, call: Call) -> None:
        self.parts, self.now, self.call = parts, now, call
        self.dropouts = Dropouts(call)

    def attention_block(self, x: torch.Tensor) -> torch.Tensor:
        now = self.now
        context = self.attention(x)
        return self.linear_norm(
            *(context, now.attention_output, now.attention_norm),
            *(now.attention_output_dropout, x, AFTER_ATTENTION),
        )

    def mlp_block(self, x: torch.Tensor) -> torch.Tensor:
        now = self.now
        h = self.activated(x)
        return self.linear_norm(h, now.down, now.down_norm, now.down_dropout, x, AFTER_MLP)

    def pre_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The residual sums are torch's, or oneDNN's."""
        x = self.attention_sum(x)
        return self.mlp_sum(x, self.norm(self.now.down_norm, x))

    def attention_sum(self, x: torch.Tensor) -> torch.Tensor:
        now = self.now
        context = self.attention(self.norm(now.attention_norm, x))
        return self.linear_add(now.attention_output, context, x, now.attention_output_dropout)

    def mlp_sum(self, x: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
        h = self.activated(normalised)
        return self.linear_add(self.now.down, h, x, self.now.down_dropout)

    def linear(self, linear: Weights | torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if type(linear) is not Weights:
            return linear(x)
        call = self.call
        return ops.linear(x, *linear, training=call.training, backend=call.backend)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """attention of the products of x, (rows, length, width)."""
        parts, call, linears = self.parts, self.call, self.now.qkv
        packed = call.batch.packed
        seed, site = self._seed(x, parts.attention_dropout, ATTENTION)
        options: dict[str, Any] = dict(
            **call.batch.layout(),
            dropout_p=parts.attention_dropout,
            seed=seed,
            site=site,
            scale=parts.scale,
            backend=call.backend,
            **call.positions.arguments(),
        )
        if len(linears) == 1 or self._one_product(linears, x):
            if len(linears) == 1:
                qkv = self.linear(linears[0], x)
            else:
                qkv = joined_product(linears, x, call.joined)
            qkv = _by_head(qkv, 3, parts.heads)
            context = ops.attention_qkv(qkv[0] if packed else qkv, **options)
        else:
            three = (_by_head(self.linear(linear, x), parts.heads) for linear in linears)
            context = ops.attention(*(part[0] if packed else part for part in three), **options)
        context = context.flatten(-2)
        return context[None] if packed else context

    def _seed(self, x: torch.Tensor, p: float, place: int) -> tuple[torch.Tensor | None, int]:
        """Seed and site of a dropout; no seed where its mask may be the one that torch draws."""
        if self.call.backend == "auto" and x.device.type == "cpu":
            return None, 0
        dropout = self.dropouts.of(x, p, place)
        return dropout.seed, dropout.site

    def _one_product(self, linears: Sequence[Any], x: torch.Tensor) -> bool:
        """True where one product is best for q, k and v: where kernels may read it in place."""
        on_kernels = x.is_cuda or self.call.backend in ("triton", "cuda")
        return on_kernels and all(type(w) is Weights for w in linears) and same_form(linears)

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """activation_dropout(activation(up(x))), or of a gated MLP activation_dropout(
        activation(gate(x)) * up(x))"""
        if self.parts.gated is None:
            h = self.linear_gelu(self.now.up[0], x)
        else:
            h = self.gated(self.parts.gated.activation, self.now.up, x)
        return _dropped(h, self.now.activation_dropout)

    def linear_gelu(self, up: Weights | torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """activation(up(x))"""
        parts, call = self.parts, self.call
        options: dict[str, Any] = dict(approximate=parts.approximate, backend=call.backend)
        if parts.approximate is None:
            return parts.activation(self.linear(up, x))
        if type(up) is Weights:
            return ops.linear_gelu(x, *up, training=call.training, **options)
        return ops.bias_gelu(up(x), **options)

    def gated(
        self, activation: str | None, up: Sequence[Weights | torch.nn.Module], x: torch.Tensor
    ) -> torch.Tensor:
        """activation(gate(x)) * up(x)"""
        joined = self.call.joined_up
        if len(up) == 1 and activation is not None and type(up[0]) is Weights:
            return self.linear_gated(up[0], x, activation)
        if len(up) == 1:
            both = self.linear(up[0], x)
        elif activation is None or joined is None or not self._one_product(up, x):
            return self.linear_gelu(up[0], x) * self.linear(up[1], x)
        else:
            both = joined_product(up, x, joined)
        if activation is not None:
            return self.glu(both, activation)
        gate, other = both.chunk(2, -1)
        return self.parts.activation(gate) * other

    def linear_gated(self, up: Weights, x: torch.Tensor, activation: str) -> torch.Tensor:
        options: dict[str, Any] = dict(training=self.call.training, backend=self.call.backend)
        return ops.linear_gated(x, *up, activation=activation, **options)

    def glu(self, both: torch.Tensor, activation: str) -> torch.Tensor:
        return ops.gated(both, activation=activation, backend=self.call.backend)

    def linear_norm(
        self,
        x: torch.Tensor,
        linear: Weights | torch.nn.Module,
        norm: Norm | torch.nn.Module,
        drop: float | torch.nn.Module,
        residual: torch.Tensor,
        place: int,
    ) -> torch.Tensor:
        """norm(dropout(linear(x)) + residual)"""
        call = self.call
        if type(norm) is not Norm or type(drop) is not float:
            y = _dropped(self.linear(linear, x), drop) + residual
            return self.norm(norm, y)
        seed, site = self._seed(x, drop, place)
        options: dict[str, Any] = dict(
            residual=residual,
            eps=norm.eps,
            dropout_p=drop,
            seed=seed,
            site=site,
            row_index=call.batch.index if drop else None,
            backend=call.backend,
        )
        if type(linear) is Weights:
            weights = (*linear, norm.weight, norm.bias)
            return ops.linear_norm(x, *weights, training=call.training, **options)
        return ops.layer_norm(linear(x), norm.weight, norm.bias, **options)

    def norm(self, norm: Norm | torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(norm, Norm):
            return norm(x)
        weight, bias, eps, _ = norm
        return ops.layer_norm(x, weight, bias, eps=eps, backend=self.call.backend)

    def linear_add(
        self,
        linear: Weights | torch.nn.Module,
        x: torch.Tensor,
        residual: torch.Tensor,
        drop: float | torch.nn.Module,
    ) -> torch.Tensor:
        """residual + dropout(linear(x))"""
        if drop == 0.0 and type(linear) is Weights:
            call = self.call
            options: dict[str, Any] = dict(training=call.training, backend=call.backend)
            return linear_add(x, *linear, residual=residual, **options)
        return residual + _dropped(self.linear(linear, x), drop)


def _by_head(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The last dimension as sizes and the rest: -1 can't be found where there are no rows."""
    return x.unflatten(-1, (*sizes, x.shape[-1] // math.prod(sizes)))


def _dropped(x: torch.Tensor, drop: float | torch.nn.Module) -> torch.Tensor:
    if isinstance(drop, float):
        return torch.nn.functional.dropout(x, drop) if drop else x
    return drop(x)
