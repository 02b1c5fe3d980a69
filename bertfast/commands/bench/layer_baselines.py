"""Who runs one encoder layer, on a full batch of hidden states."""

import copy
from collections.abc import Callable

import torch
from torch import nn

import bertfast

from . import names
from .baselines import Provider, Runner, Setting, captures, compiler_has_graphs, needs, needs_gpu


def with_layer_attention(layer: nn.Module, implementation: str) -> nn.Module:
    """A copy of a BertLayer with its own config, whose attention is "eager" or "sdpa"."""
    layer = copy.deepcopy(layer)
    layer.attention.self.config._attn_implementation = implementation
    return layer


def _run(
    module: nn.Module, setting: Setting, capture: bool = False, table: names.Table | None = None
) -> Runner:
    def forward() -> torch.Tensor:
        y = module(setting.inputs["x"])
        return y[0] if isinstance(y, tuple) else y

    return Runner(forward, module, capture, lambda named: names.to_ours(named, table or {}))


def _hugging_face(implementation: str, capture: bool = False) -> Callable[[Setting], Runner]:
    def make(setting: Setting) -> Runner:
        return _run(with_layer_attention(setting.stock, implementation), setting, capture)

    return make


def _bertfast(capture: bool) -> Callable[[Setting], Runner]:
    def make(setting: Setting) -> Runner:
        layer = bertfast.optimize(copy.deepcopy(setting.stock), strict=True)
        return _run(layer, setting, capture)

    return make


def _compiled(mode: str | None) -> Callable[[Setting], Runner]:
    def make(setting: Setting) -> Runner:
        layer = with_layer_attention(setting.stock, "sdpa")
        options = {} if mode is None else {"mode": mode}
        compiled = torch.compile(layer, dynamic=False, backend=setting.compile_backend, **options)

        def forward() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(setting.inputs["x"])

        return Runner(forward, layer)

    return make


def _torch_layer(setting: Setting) -> Runner:
    layer, x = setting.stock, setting.inputs["x"]
    module = nn.TransformerEncoderLayer(
        layer.intermediate.dense.in_features,
        layer.attention.self.num_attention_heads,
        layer.intermediate.dense.out_features,
        layer.output.dropout.p,
        "gelu",
        layer.output.LayerNorm.eps,
        batch_first=True,
        device=x.device,
        dtype=x.dtype,
    )
    module.load_state_dict(names.to_theirs(layer, names.TORCH))
    return _run(module.train(layer.training), setting, table=names.TORCH)


def _transformer_engine(setting: Setting) -> Runner:
    """Its GELU is the tanh form, so in float32 it is another function, and refused as wrong."""
    import transformer_engine.pytorch as te

    layer, x = setting.stock, setting.inputs["x"]
    attention = layer.attention.self
    module = te.TransformerLayer(
        layer.intermediate.dense.in_features,
        layer.intermediate.dense.out_features,
        attention.num_attention_heads,
        layernorm_epsilon=layer.output.LayerNorm.eps,
        hidden_dropout=layer.output.dropout.p,
        attention_dropout=attention.dropout.p,
        self_attn_mask_type="no_mask",
        apply_residual_connection_post_layernorm=True,
        output_layernorm=True,
        fuse_qkv_params=True,
        qkv_weight_interleaved=False,
        activation="gelu",
        attn_input_format="bshd",
        params_dtype=x.dtype,
        device=x.device,
    )
    theirs = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in names.to_theirs(layer, names.TRANSFORMER_ENGINE).items():
            theirs[name].copy_(value)
    return _run(module.train(layer.training), setting, table=names.TRANSFORMER_ENGINE)


def _needs_transformer_engine(setting: Setting) -> str | None:
    return needs_gpu(setting) or needs("transformer_engine", "Transformer Engine")


LAYER_PROVIDERS = (
    Provider("bertfast", _bertfast(capture=False)),
    Provider("bertfast graph", _bertfast(capture=True), captures),
    Provider("HF eager", _hugging_face("eager")),
    Provider("HF SDPA", _hugging_face("sdpa")),
    Provider("HF SDPA graph", _hugging_face("sdpa", capture=True), captures),
    Provider("nn.TransformerEncoderLayer", _torch_layer),
    Provider("Transformer Engine", _transformer_engine, _needs_transformer_engine),
    Provider("torch compile", _compiled(None), slow=True),
    Provider("torch compile max", _compiled("max-autotune"), compiler_has_graphs, slow=True),
)
