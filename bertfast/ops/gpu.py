"""Reasons for which no kernel here can run on a GPU."""

import torch

LEAST_CAPABILITY = (8, 0)


def unsupported_reason(device: torch.device) -> str | None:
    """Why no kernel can run on this GPU. The backends ask further, each for its own."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA's GPUs, and this torch is built for AMD's (ROCm)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "the kernels need compute capability 8.0, this GPU has {}.{}".format(*capability)
    return None
