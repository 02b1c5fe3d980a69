"""A CUDA graph of the simulated GPU: it keeps the function, and calls it again on replay.

A real graph has the addresses and numbers of its capture. So what the function would find changed
is a fault here: parameters that lie elsewhere, buffers that changed, modules in training, other
attributes.
"""

import torch

from . import cuda


class Recording:
    """In place of bertfast.graphs.Recording."""

    model: torch.nn.Module  # whose layers are captured
    made = 0

    def __init__(self, function, pool):
        with cuda.capture():
            function()
        Recording.made += 1
        self._function, self._captured = function, self._state()

    def replay(self):
        assert self._state() == self._captured, "a graph was replayed that is stale"
        self._function()

    @classmethod
    def _state(cls):
        modules = list(cls.model.modules())
        addresses = [(p.data_ptr(), p.stride()) for p in cls.model.parameters()]
        addresses += [(b.data_ptr(), b._version) for b in cls.model.buffers()]
        names = "training", "eps", "scaling", "attention_scaling", "attention_type"
        numbers = [[vars(m).get(name) for name in names] for m in modules]
        return addresses, list(map(type, modules)), numbers
