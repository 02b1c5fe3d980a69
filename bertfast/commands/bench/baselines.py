"""Who runs an encoder: bertfast, and everybody else that is installed.

A provider gets the stock model and a batch and returns what to call. Whoever isn't here, or can't
do the case, says why; nobody is left out in silence.
"""

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import bertfast

from . import names
from .models import Tokens, with_attention

Forward = Callable[[], torch.Tensor]  # hidden states, (rows, length, width)


@dataclass(frozen=True)
class Setting:
    """What every provider of a case is given. Nobody may change the stock model."""

    stock: nn.Module
    tokens: Tokens
    inputs: dict[str, torch.Tensor]
    device: str
    dtype: torch.dtype
    training: bool  # forward and backward; the model may be in train() or eval()
    compile_backend: str = "inductor"


@dataclass(frozen=True)
class Runner:
    forward: Forward
    module: nn.Module | None  # whose parameters get gradients; None where there are none
    capture: bool = False  # timed as the replay of a CUDA graph
    # The module's gradients by the stock module's names.
    to_ours: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda named: named


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Setting], Runner]
    why_not: Callable[[Setting], str | None] = lambda setting: None
    slow: bool = False  # takes long to prepare: compilers

    @property
    def ours(self) -> bool:
        return self.name.startswith("bertfast")


def _run(module: nn.Module, setting: Setting) -> Runner:
    return Runner(lambda: module(**setting.inputs)[0], module)


def _hugging_face(implementation: str) -> Callable[[Setting], Runner]:
    return lambda setting: _run(with_attention(setting.stock, implementation), setting)


def _bertfast(packed: bool, capture: bool = False) -> Callable[[Setting], Runner]:
    def make(setting: Setting) -> Runner:
        module = bertfast.optimize(copy.deepcopy(setting.stock), packed=packed, strict=True)
        return Runner(lambda: module(**setting.inputs)[0], module, capture)

    return make


def _captured(setting: Setting) -> Runner:
    """Without a mask, which Hugging Face looks at on the host: that can't be captured."""
    module = with_attention(setting.stock, "sdpa")
    return Runner(lambda: module(setting.inputs["input_ids"])[0], module, capture=True)


def _captures_without_mask(setting: Setting) -> str | None:
    if setting.tokens.real != setting.tokens.padded:
        return "Hugging Face looks at the mask on the host, which can't be captured"
    return captures(setting)


def _compiled(mode: str | None) -> Callable[[Setting], Runner]:
    def make(setting: Setting) -> Runner:
        module = with_attention(setting.stock, "sdpa")
        options = {} if mode is None else {"mode": mode}
        compiled = torch.compile(module, dynamic=False, backend=setting.compile_backend, **options)

        def forward() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(**setting.inputs)[0]

        return Runner(forward, module)

    return make


def packed_arguments(setting: Setting) -> dict:
    """A batch without padding, as (1, tokens), in the form that Hugging Face's flash attention
    takes."""
    mask = setting.inputs["attention_mask"].bool()
    lengths = torch.tensor(setting.tokens.lengths)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    cu_seqlens = cu_seqlens.to(setting.device)
    positions = torch.cat([torch.arange(n) for n in setting.tokens.lengths])
    return dict(
        input_ids=setting.inputs["input_ids"][mask][None],
        position_ids=positions[None].to(setting.device),
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=setting.tokens.longest,
        max_length_k=setting.tokens.longest,
    )


def _flash_varlen(setting: Setting) -> Runner:
    """The whole model on packed tokens, the best that flash-attention can do. Taking the padding
    out is not timed, as a loader could; putting it back is, as with bertfast."""
    module = with_attention(setting.stock, "flash_attention_2")
    arguments = packed_arguments(setting)
    mask = setting.inputs["attention_mask"].bool()
    index = mask.flatten().nonzero().squeeze(1)

    def forward() -> torch.Tensor:
        y = module(**arguments)[0]
        flat = y.new_zeros(mask.numel(), y.shape[-1])
        return flat.index_copy(0, index, y[0]).unflatten(0, mask.shape)

    return Runner(forward, module)


def _needs_flash(setting: Setting) -> str | None:
    if reason := needs_gpu(setting) or needs("flash_attn", "flash-attn"):
        return reason
    if setting.dtype == torch.float32:
        return "flash-attention has no float32"
    return None


def torch_encoder(stock: nn.Module) -> nn.Module:
    """The layers of a BERT model as torch.nn.TransformerEncoder."""
    config = stock.config
    parameter = next(stock.parameters())
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_dropout_prob,
        "gelu",
        config.layer_norm_eps,
        batch_first=True,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers)
    for theirs, ours in zip(encoder.layers, stock.encoder.layer, strict=True):
        theirs.load_state_dict(names.to_theirs(ours, names.TORCH))
    return encoder.train(stock.training)


def _torch_gradients(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that they have in a BertModel."""
    found = {}
    for name, gradient in gradients.items():
        if not name.startswith("encoder.layers."):
            found[name] = gradient
            continue
        number, _, rest = name.removeprefix("encoder.layers.").partition(".")
        for ours, part in names.to_ours({rest: gradient}, names.TORCH).items():
            found[f"encoder.layer.{number}.{ours}"] = part
    return found


def _torch_encoder(setting: Setting) -> Runner:
    module = nn.Module()
    module.embeddings = copy.deepcopy(setting.stock.embeddings)
    module.encoder = torch_encoder(setting.stock)
    padding = setting.inputs["attention_mask"] == 0

    def forward() -> torch.Tensor:
        x = module.embeddings(input_ids=setting.inputs["input_ids"])
        y = module.encoder(x, src_key_padding_mask=padding)
        return nn.functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))

    return Runner(forward, module, to_ours=_torch_gradients)


def _is_bert(setting: Setting) -> str | None:
    kind = type(setting.stock).__name__
    return None if kind == "BertModel" else f"it is compared for BERT, and this is {kind}"


def _onnxruntime(setting: Setting) -> Runner:
    import onnxruntime

    inputs = setting.inputs

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = with_attention(setting.stock, "sdpa")

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    options = onnxruntime.SessionOptions()
    if setting.device == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    arguments = ["input_ids", "attention_mask"]
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.onnx")
        with contextlib.redirect_stdout(None):
            program = torch.onnx.export(
                Hidden().eval(),
                tuple(inputs[name] for name in arguments),
                dynamo=True,
                verbose=False,
            )
        program.save(path)
        provider = {"cpu": "CPU", "cuda": "CUDA"}[setting.device] + "ExecutionProvider"
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    feed = {
        theirs.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            inputs[name].cpu().numpy(), setting.device, 0
        )
        for theirs, name in zip(session.get_inputs(), arguments, strict=True)
    }
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, value)
    output = session.get_outputs()[0].name
    binding.bind_output(output, setting.device)

    def forward() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_dlpack(binding.get_outputs()[0]._ortvalue)

    return Runner(forward, None)


def _needs_onnx(setting: Setting) -> str | None:
    if reason := needs("onnxruntime") or needs("onnxscript"):
        return reason
    if setting.training:
        return "onnxruntime has no backward"
    if setting.dtype == torch.bfloat16:
        return "onnxruntime's exporter is not used with bfloat16"
    if setting.device == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime was built without CUDA"
    return None


def needs(module: str, package: str | None = None) -> str | None:
    found = importlib.util.find_spec(module) is not None
    return None if found else f"{package or module} is not installed"


def needs_gpu(setting: Setting) -> str | None:
    return None if setting.device == "cuda" else "it needs a GPU"


def captures(setting: Setting) -> str | None:
    if setting.training:
        return "a CUDA graph of a backward is not measured"
    return needs_gpu(setting)


def compiler_has_graphs(setting: Setting) -> str | None:
    if setting.compile_backend != "inductor":
        return "only torch's own compiler has this mode"
    return needs_gpu(setting)


MODEL_PROVIDERS = (
    Provider("bertfast", _bertfast(packed=True)),
    Provider("bertfast padded", _bertfast(packed=False)),
    Provider("bertfast graph", _bertfast(packed=False, capture=True), captures),
    Provider("HF eager", _hugging_face("eager")),
    Provider("HF SDPA", _hugging_face("sdpa")),
    Provider("HF SDPA graph", _captured, _captures_without_mask),
    Provider("flash-attn varlen", _flash_varlen, _needs_flash),
    Provider("nn.TransformerEncoder", _torch_encoder, _is_bert),
    Provider("onnxruntime", _onnxruntime, _needs_onnx, slow=True),
    Provider("torch compile", _compiled(None), slow=True),
    Provider("torch compile max", _compiled("max-autotune"), compiler_has_graphs, slow=True),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings by which libraries greet a model."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
