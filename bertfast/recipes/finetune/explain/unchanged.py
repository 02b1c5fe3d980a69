"""A model in eval that runs its original code for a while, and is then as it was."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ....settings import disabled


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undoes all that a call leaves on a model: besides modes and the implementation of
    attention that are transformers' recorders, hooks or forwards on instances by its version."""
    modules = [(m, dict(m.__dict__), dict(m._forward_hooks)) for m in model.modules()]
    configs = {id(config): config for m, *_ in modules if (config := _config(m)) is not None}
    settings = [(config, dict(config.__dict__)) for config in configs.values()]
    try:
        with disabled(), torch.inference_mode(False):
            model.eval()
            yield
    finally:
        for module, attributes, hooks in modules:
            _restore(module.__dict__, attributes)
            _restore(module._forward_hooks, hooks)
        for config, attributes in settings:
            _restore(config.__dict__, attributes)


def _config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if hasattr(config, "_attn_implementation") else None


def _restore(now: dict, before: dict) -> None:
    now.clear()
    now.update(before)
