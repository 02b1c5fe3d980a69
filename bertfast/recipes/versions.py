"""The machine and the versions that a run was made with, for its card and its checkpoints."""

import platform

import torch

import bertfast


def versions() -> dict[str, str]:
    import transformers

    return {
        "bertfast": bertfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
