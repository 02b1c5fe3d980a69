"""Kernels that a function launches: bertfast's own and torch's."""

import torch

# torch's functions that launch one kernel on a GPU; a product may call another by its name.
TORCHS = ("mm", "addmm", "addmm_", "add", "add_", "sum", "cat", "copy_", "fill_", "random_", "mul")


def torchs(function):
    """The events of torch's kernels."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        function()
    events = [e for e in profile.function_events if e.name.removeprefix("aten::") in TORCHS]
    return [e for e in events if not any(_inside(e, other) for other in events)]


def _inside(event, other):
    mine, its = event.time_range, other.time_range
    return event is not other and its.start <= mine.start and mine.end <= its.end


def kernels(function, host):
    """How many a function launches, bertfast's own by the host build, and the names of torch's."""
    host.reset_records()
    names = [event.name for event in torchs(function)]
    return host.launch_count() + len(names), names
