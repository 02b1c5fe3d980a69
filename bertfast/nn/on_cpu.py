"""The blocks of a layer on a CPU without dropout: torch's and oneDNN's functions, called directly.

At a small width the host needs as long to look at what an op is given as the op to run. Here that
is looked at once a layer: all modules may be read, and their tensors are of one kind (`Place`).
The numbers are those of composed.py, to the bit.
"""

import torch
import torch.nn.functional as F

from ..ops.attention import check
from ..ops.attention import reference as attention
from ..ops.attention.scores import Scores
from ..ops.bias_gelu import reference as bias_gelu
from ..ops.dropout import NO_DROPOUT
from ..ops.gated import reference as gated
from ..ops.layer_norm import reference as layer_norm
from ..ops.layer_norm.run import Norm
from ..ops.linear import onednn
from .composed import Composed
from .modules import Weights
from .parts import NO_POSITIONS, Call, Parts, Read


class OnCpu(Composed):
    def __init__(self, parts: Parts, now: Read, call: Call, x: torch.Tensor) -> None:
        super().__init__(parts, now, call)
        call.batch.check(x)
        self.rows = x.shape[:-1].numel()
        self.wide = x.dtype in (torch.float32, torch.float64)  # computed in as it is
        self.onednn = call.backend == "auto" and onednn.may_serve(x, call.training)

    def linear(self, linear: Weights, x: torch.Tensor) -> torch.Tensor:
        if self.onednn and onednn.pays(self.rows, linear.weight):
            return onednn.linear(x, *linear)
        return F.linear(x, *linear)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        call, linears, heads = self.call, self.now.qkv, self.parts.heads
        places = x.shape[1:2] if call.batch.packed else x.shape[:2]
        if len(linears) == 1:
            qkv = self.linear(linears[0], x)
            q, k, v = qkv.view(*places, 3, heads, qkv.shape[-1] // (3 * heads)).unbind(-3)
        else:
            q, k, v = (
                y.view(*places, heads, y.shape[-1] // heads)
                for y in (self.linear(one, x) for one in linears)
            )
        scores, batch = self._scores(q), call.batch
        if self.wide and batch.key_mask is None and not batch.packed and scores.all_seen:
            return attention.of_all_keys(q, k, v, scores).flatten(-2)
        context = attention.forward(q, k, v, batch.sequences, scores, NO_DROPOUT).flatten(-2)
        return context[None] if batch.packed else context

    def _scores(self, q: torch.Tensor) -> Scores:
        batch, positions, scale = self.call.batch, self.call.positions, self.parts.scale
        if positions is NO_POSITIONS:
            return Scores(scale)

        def make() -> Scores:
            longest = batch.max_seqlen if batch.packed else q.shape[1]
            return check.check_scores("q", q, longest, scale, *positions)

        return batch.once(positions, make, scale, q.shape)

    def linear_gelu(self, up: Weights, x: torch.Tensor) -> torch.Tensor:
        approximate = self.parts.approximate
        if approximate is None:
            return self.parts.activation(self.linear(up, x))
        if self.onednn and onednn.pays(self.rows, up.weight, gelu=True):
            return onednn.linear_gelu(x, *up, approximate)
        return bias_gelu.forward(F.linear(x, *up), None, approximate == "tanh")

    def linear_gated(self, up: Weights, x: torch.Tensor, activation: str) -> torch.Tensor:
        return self.glu(self.linear(up, x), activation)

    def glu(self, both: torch.Tensor, activation: str) -> torch.Tensor:
        return gated.forward(both, None, activation, False)

    def linear_norm(
        self,
        x: torch.Tensor,
        linear: Weights,
        norm: Norm,
        drop: float,
        residual: torch.Tensor,
        place: int,
    ) -> torch.Tensor:
        if self.onednn and onednn.pays(self.rows, linear.weight):
            return self.norm(norm, onednn.linear_add(x, residual, *linear))
        y = F.linear(x, *linear)
        if self.wide:
            return self.norm(norm, y + residual)
        return layer_norm.forward(y, norm, None, residual, NO_DROPOUT)[0]

    def norm(self, norm: Norm | torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(norm, Norm):
            return norm(x)  # an Identity
        if self.wide and not norm.rms:
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        return layer_norm.forward(x, norm, None, None, NO_DROPOUT)[0]

    def linear_add(
        self, linear: Weights, x: torch.Tensor, residual: torch.Tensor, drop: float
    ) -> torch.Tensor:
        if self.onednn and onednn.pays(self.rows, linear.weight):
            return onednn.linear_add(x, residual, *linear)
        return F.linear(x, *linear) + residual
