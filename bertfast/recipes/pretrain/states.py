"""The whole state of a model and its optimisers by the parameters' names, however many processes
have it: what a checkpoint holds."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .parallel import Processes


def gathered(
    module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and optimisers on the host of the first process; called by all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(module, options=options)
    return model, get_optimizer_state_dict(module, tuple(optimizers), options=options)


def gathered_model(module: nn.Module) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def restore(
    module: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    model: dict[str, Any],
    optimizer: dict[str, Any],
    processes: Processes,
) -> None:
    """Loads the result of `gathered`, which the first process alone has to have; called by all."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes.world > 1)
    set_model_state_dict(module, model, options=options)
    set_optimizer_state_dict(module, tuple(optimizers), optimizer, options=options)
