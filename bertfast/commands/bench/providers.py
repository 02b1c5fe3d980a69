"""The one table of providers: bertfast, stock torch, and every other library that is installed.

A line says what a provider is called, what it needs, and how it is made ready to run a case. One
that isn't here, or can't do the case, says why; none is left out in silence.
"""

import contextlib
import copy
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import bertfast

from ...ops import dispatch
from . import names
from .case import Setting

Need = Callable[[Any, Setting], str | None]  # of a case: why it can't be done, or None
Make = Callable[[Any, Any, Setting], Any]  # of a case and its inputs: what runs it


@dataclass(frozen=True)
class Provider:
    name: str
    color: str  # in every plot; blue is bertfast's, in tones, and what is stock is grey
    kinds: tuple[str, ...]  # of cases
    make: Make
    needs: tuple[Need, ...] = ()
    slow: str = ""  # why it is left out where only what is quick was asked for
    function: str = ""  # of an op's `functions`, if its name differs
    patience: str = ""  # why it is left out where it isn't named, even on a GPU

    @property
    def ours(self) -> bool:
        return self.name.startswith("bertfast")

    @property
    def backend(self) -> str:
        """Of an op."""
        return self.name.partition(" ")[2]

    @property
    def calls(self) -> str:
        return self.function or self.name

    def why_not(self, case: Any, setting: Setting) -> str | None:
        """Why it can't run the case here."""
        return next((reason for need in self.needs if (reason := need(case, setting))), None)


def unless(fits: Callable[[Any, Setting], bool], reason: str) -> Need:
    return lambda case, setting: None if fits(case, setting) else reason


def installed(module: str, package: str = "") -> Need:
    def found(case: Any, setting: Setting) -> bool:
        return importlib.util.find_spec(module) is not None

    return unless(found, f"{package or module} is not installed")


def backend_works(backend: str) -> Need:
    return lambda case, setting: dispatch.unsupported_reason(
        case.op, backend, setting.device, *case.form
    )


def bert(case: Any, setting: Setting) -> str | None:
    kind = case.model.model_type
    return None if kind == "bert" else f"it is compared for BERT, and this is {kind}"


def onnx_on_a_gpu(case: Any, setting: Setting) -> bool:
    import onnxruntime

    known = onnxruntime.get_available_providers()
    return setting.device == "cpu" or "CUDAExecutionProvider" in known


gpu = unless(lambda case, setting: setting.device == "cuda", "it needs a GPU")
cpu = unless(lambda case, setting: setting.device == "cpu", "on a GPU stock torch stands for it")
cpu_auto = unless(lambda case, setting: setting.device == "cpu", "on a GPU its choices are listed")
no_mask = unless(lambda case, setting: not case.masked, "it takes no mask")
no_padding = unless(lambda case, setting: not case.packed, "it is timed without padding")
no_bias = unless(lambda case, setting: not case.biased, "it takes no bias by distance")
no_dropout = unless(lambda case, setting: not case.dropout, "it has no dropout")

FLASH = (
    gpu,
    installed("flash_attn", "flash-attn"),
    unless(lambda case, setting: case.dtype != torch.float32, "flash-attention has no float32"),
)
GRAPH = (
    gpu,
    unless(lambda case, setting: not case.training, "a CUDA graph of a backward is not measured"),
)
SDPA_GRAPH = (
    *GRAPH,
    unless(
        lambda case, setting: case.tokens.real == case.tokens.padded,
        "Hugging Face looks at the mask on the host, which can't be captured",
    ),
)
MAX = (
    gpu,
    unless(
        lambda case, setting: setting.compile_backend == "inductor",
        "only torch's own compiler has this mode",
    ),
)
REDUCES = (*MAX, *GRAPH[1:])
TENSORRT = (
    gpu,
    installed("torch_tensorrt", "Torch-TensorRT"),
    unless(lambda case, setting: not case.training, "TensorRT has no backward"),
)
TRANSFORMER_ENGINE = (gpu, installed("transformer_engine", "Transformer Engine"))
ONNX = (
    installed("onnxruntime"),
    installed("onnxscript"),
    unless(lambda case, setting: not case.training, "onnxruntime has no backward"),
    unless(
        lambda case, setting: case.dtype != torch.bfloat16,
        "onnxruntime's exporter is not used with bfloat16",
    ),
    unless(onnx_on_a_gpu, "this onnxruntime was built without CUDA"),
)


def has_exact_gelu(case: Any, setting: Setting) -> bool:
    from quack.activation import act_fn_map

    return "gelu_erf" in act_fn_map


QUACK = (
    gpu,
    installed("quack", "quack-kernels"),
    unless(lambda case, setting: case.dtype != torch.float32, "quack is timed in 16 bits"),
    unless(
        lambda case, setting: torch.cuda.get_device_capability() >= (9, 0),
        "quack's products need compute capability 9.0",
    ),
    unless(has_exact_gelu, "this quack has no exact GELU (gelu_erf)"),
)
NO_BACKWARD = unless(
    lambda case, setting: case.pass_ == "forward", "its epilogue saves nothing for a backward"
)


# Functions of ops.


def our_op(backend: str, color: str, needs: tuple[Need, ...], slow: str = "") -> Provider:
    def make(case: Any, inputs: Any, setting: Setting) -> Callable:
        return case.functions["bertfast"](backend)

    return Provider(f"bertfast {backend}", color, ("op",), make, needs, slow, "bertfast")


def other_op(name: str, color: str, needs: tuple[Need, ...] = (), slow: str = "") -> Provider:
    def make(case: Any, inputs: Any, setting: Setting) -> Callable:
        return case.functions[name]

    return Provider(name, color, ("op",), make, needs, slow)


def compiled_op(mode: str | None = None) -> Make:
    def make(case: Any, inputs: Any, setting: Setting) -> Callable:
        torch._functorch.config.donated_buffer = False  # the backward is run many times
        stock, backend = case.functions["torch eager"], setting.compile_backend
        return torch.compile(stock, fullgraph=True, dynamic=False, mode=mode, backend=backend)

    return make


def compiled_flex(case: Any, inputs: Any, setting: Setting) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = case.functions["torch flex"]

    def call(**given: Any) -> torch.Tensor:
        return function(flex_attention, **given)

    torch._functorch.config.donated_buffer = False  # the backward is run many times
    compiled: Any = torch.compile(call, dynamic=False, backend=setting.compile_backend)
    compiled.packed = getattr(function, "packed", False)
    return compiled


# Layers and models. The stock module of the inputs stays as it is: other providers copy it, too.


@dataclass(frozen=True)
class Runner:
    forward: Callable[[], torch.Tensor]  # hidden states, (rows, length, width)
    module: Any  # whose parameters get gradients; None where there are none
    capture: bool = False  # timed as the replay of a CUDA graph
    # The module's gradients by the stock module's names.
    to_ours: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda named: named


def our_module(
    packed: bool = True, capture: bool = False, backend: str = "auto", graphs: bool = False
) -> Make:
    def make(case: Any, inputs: Any, setting: Setting) -> Runner:
        module = copy.deepcopy(inputs.stock)
        bertfast.optimize(module, backend=backend, packed=packed, graphs=graphs, strict=True)
        if graphs:
            for _ in range(3):  # seen, and then captured
                with torch.inference_mode():
                    case.call(module, inputs.tensors)
        return Runner(lambda: case.call(module, inputs.tensors), module, capture)

    return make


def hugging_face(attention: str, capture: bool = False) -> Make:
    def make(case: Any, inputs: Any, setting: Setting) -> Runner:
        module = case.with_attention(inputs.stock, attention)
        tensors = dict(inputs.tensors)
        if capture:
            tensors.pop("attention_mask", None)  # the host would look at it
        return Runner(lambda: case.call(module, tensors), module, capture)

    return make


def compiled_module(mode: str | None = None) -> Make:
    def make(case: Any, inputs: Any, setting: Setting) -> Runner:
        module = case.with_attention(inputs.stock, "sdpa")
        compiled = torch.compile(module, dynamic=False, mode=mode, backend=setting.compile_backend)

        def forward() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return case.call(compiled, inputs.tensors)

        return Runner(forward, module)

    return make


def torch_layer(layer: Any) -> nn.TransformerEncoderLayer:
    """A BertLayer as torch's own."""
    parameter = layer.output.dense.weight
    module = nn.TransformerEncoderLayer(
        layer.intermediate.dense.in_features,
        layer.attention.self.num_attention_heads,
        layer.intermediate.dense.out_features,
        layer.output.dropout.p,
        "gelu",
        layer.output.LayerNorm.eps,
        batch_first=True,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    module.load_state_dict(names.to_theirs(layer, names.TORCH))
    return module.train(layer.training)


def torch_layer_alone(case: Any, inputs: Any, setting: Setting) -> Runner:
    module = torch_layer(inputs.stock)
    to_ours = functools.partial(names.to_ours, table=names.TORCH)
    return Runner(lambda: module(inputs.tensors["x"]), module, to_ours=to_ours)


def torch_encoder(case: Any, inputs: Any, setting: Setting) -> Runner:
    """A BERT model's embeddings, and its layers as torch.nn.TransformerEncoder."""
    layers = [torch_layer(layer) for layer in inputs.stock.encoder.layer]
    module: Any = nn.Module()
    module.embeddings = copy.deepcopy(inputs.stock.embeddings)
    module.encoder = nn.TransformerEncoder(layers[0], len(layers))
    module.encoder.layers = nn.ModuleList(layers)
    module.train(inputs.stock.training)
    padding = inputs.tensors["attention_mask"] == 0

    def forward() -> torch.Tensor:
        x = module.embeddings(input_ids=inputs.tensors["input_ids"])
        y = module.encoder(x, src_key_padding_mask=padding)
        return nn.functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))

    def to_ours(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, gradient in gradients.items():
            if not name.startswith("encoder.layers."):
                found[name] = gradient
                continue
            number, _, rest = name.removeprefix("encoder.layers.").partition(".")
            for ours, part in names.to_ours({rest: gradient}, names.TORCH).items():
                found[f"encoder.layer.{number}.{ours}"] = part
        return found

    return Runner(forward, module, to_ours=to_ours)


def transformer_engine(case: Any, inputs: Any, setting: Setting) -> Runner:
    """Its GELU is the tanh form, so in float32 it is another function, and refused as wrong."""
    import transformer_engine.pytorch as te

    layer, x = inputs.stock, inputs.tensors["x"]
    module = te.TransformerLayer(
        layer.intermediate.dense.in_features,
        layer.intermediate.dense.out_features,
        layer.attention.self.num_attention_heads,
        layernorm_epsilon=layer.output.LayerNorm.eps,
        hidden_dropout=layer.output.dropout.p,
        attention_dropout=layer.attention.self.dropout.p,
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
    module.train(layer.training)
    to_ours = functools.partial(names.to_ours, table=names.TRANSFORMER_ENGINE)
    return Runner(lambda: module(x), module, to_ours=to_ours)


def packed_arguments(case: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch without padding, as (1, tokens), in the form that Hugging Face's flash attention
    takes."""
    mask = tensors["attention_mask"].bool()
    bounds = case.tokens.cu_seqlens(str(mask.device))
    positions = torch.cat([torch.arange(length) for length in case.tokens.lengths])
    return dict(
        input_ids=tensors["input_ids"][mask][None],
        position_ids=positions[None].to(mask.device),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=case.tokens.longest,
        max_length_k=case.tokens.longest,
    )


def flash_varlen(case: Any, inputs: Any, setting: Setting) -> Runner:
    """The whole model on packed tokens, the best that flash-attention can do. Taking the padding
    out is not timed, as a loader could; putting it back is, as with bertfast."""
    module = case.with_attention(inputs.stock, "flash_attention_2")
    arguments = packed_arguments(case, inputs.tensors)
    mask = inputs.tensors["attention_mask"].bool()
    index = mask.flatten().nonzero().squeeze(1)

    def forward() -> torch.Tensor:
        y = module(**arguments)[0]
        flat = y.new_zeros(mask.numel(), y.shape[-1])
        return flat.index_copy(0, index, y[0]).unflatten(0, mask.shape)

    return Runner(forward, module)


def onnx(case: Any, inputs: Any, setting: Setting) -> Runner:
    import onnxruntime

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.with_attention(inputs.stock, "sdpa")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    options = onnxruntime.SessionOptions()
    if setting.device == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    arguments = [inputs.tensors[name] for name in ("input_ids", "attention_mask")]
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.onnx")
        with contextlib.redirect_stdout(None):
            program: Any = torch.onnx.export(
                Hidden().eval(), tuple(arguments), dynamo=True, verbose=False
            )
        program.save(path)
        provider = {"cpu": "CPU", "cuda": "CUDA"}[setting.device] + "ExecutionProvider"
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    binding = session.io_binding()
    for theirs, value in zip(session.get_inputs(), arguments, strict=True):
        moved = onnxruntime.OrtValue.ortvalue_from_numpy(value.cpu().numpy(), setting.device, 0)
        binding.bind_ortvalue_input(theirs.name, moved)
    binding.bind_output(session.get_outputs()[0].name, setting.device)

    def forward() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_dlpack(binding.get_outputs()[0]._ortvalue)

    return Runner(forward, None)


def tensorrt(case: Any, inputs: Any, setting: Setting) -> Runner:
    import torch_tensorrt

    names = ("input_ids", "attention_mask")
    module = case.with_attention(inputs.stock, "sdpa").eval()

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    given = [inputs.tensors[name] for name in names]
    compiled = torch_tensorrt.compile(
        Hidden().eval(), ir="dynamo", inputs=given, enabled_precisions={case.dtype}
    )
    return Runner(lambda: compiled(*given), None)


OP, LAYER, MODEL, BOTH = ("op",), ("layer",), ("model",), ("layer", "model")
ALONE, REDUCED = "max-autotune-no-cudagraphs", "reduce-overhead"
COMPILES = "compiling takes a while"
AUTOTUNES = "autotuning may take a minute a case"
SHOWS = "on a CPU it only shows that its numbers are right"

# In the order of the plots.
TABLE = (
    Provider("bertfast", "#1257c4", BOTH, our_module()),
    Provider("bertfast padded", "#8fb5ee", MODEL, our_module(packed=False)),
    Provider("bertfast graphs", "#2a3f9b", MODEL, our_module(graphs=True), GRAPH),
    Provider("bertfast graph", "#0a2f6b", BOTH, our_module(packed=False, capture=True), GRAPH),
    our_op("torch", "#8fb5ee", (cpu,)),
    our_op("triton", "#4a86de", (backend_works("triton"),), SHOWS),
    our_op("cuda", "#1257c4", (backend_works("cuda"),), SHOWS),
    other_op("bertfast two kernels", "#8fb5ee", (gpu,)),
    other_op("bertfast auto", "#1257c4", (cpu_auto,)),
    Provider("HF eager", "#b3b8be", BOTH, hugging_face("eager")),
    Provider("HF SDPA", "#5a6068", BOTH, hugging_face("sdpa")),
    Provider("HF SDPA graph", "#3b3f45", BOTH, hugging_face("sdpa", capture=True), SDPA_GRAPH),
    other_op("torch eager", "#b3b8be"),
    other_op("torch sdpa", "#5a6068"),
    other_op("torch sdpa flash", "#7b828a", (gpu, no_mask)),
    other_op("torch sdpa efficient", "#8f959c", (gpu,)),
    other_op("torch sdpa cudnn", "#9fa5ab", (gpu,)),
    other_op("torch sdpa math", "#cfd3d7", (), SHOWS),
    Provider("torch flex", "#a58d73", OP, compiled_flex, (gpu, no_padding, no_dropout)),
    other_op("flash-attn", "#9a76b5", (*FLASH, no_bias)),
    Provider("flash-attn varlen", "#9a76b5", MODEL, flash_varlen, FLASH),
    Provider("nn.TransformerEncoder", "#d9a54a", MODEL, torch_encoder, (bert,)),
    Provider("nn.TransformerEncoderLayer", "#d9a54a", LAYER, torch_layer_alone),
    Provider("Transformer Engine", "#c2705c", LAYER, transformer_engine, TRANSFORMER_ENGINE),
    Provider("onnxruntime", "#8a7f5c", MODEL, onnx, ONNX, COMPILES),
    Provider("torch compile", "#6f9f6b", OP, compiled_op(), (), COMPILES, "torch eager"),
    # Not with a graph of its own: it is captured as the others are.
    Provider("torch compile max", "#3f6d44", OP, compiled_op(ALONE), MAX, patience=AUTOTUNES),
    Provider("torch compile", "#6f9f6b", BOTH, compiled_module(), (), COMPILES),
    Provider("torch compile graphs", "#56875a", MODEL, compiled_module(REDUCED), REDUCES, COMPILES),
    Provider("torch compile max", "#3f6d44", BOTH, compiled_module("max-autotune"), MAX, COMPILES),
    Provider("TensorRT", "#7a5c8a", MODEL, tensorrt, TENSORRT, COMPILES),
    other_op("cuBLASLt, tanh GELU", "#a58d73", (gpu, NO_BACKWARD)),
    other_op("quack", "#9a76b5", QUACK),
    other_op("Liger", "#c98aa8", (gpu, installed("liger_kernel", "Liger"))),
    other_op("cut-cross-entropy", "#d9a54a", (gpu, installed("cut_cross_entropy"))),
)


def of_kind(kind: str) -> list[Provider]:
    """Those of the table that run an op, a layer or a model."""
    return [provider for provider in TABLE if kind in provider.kinds]
