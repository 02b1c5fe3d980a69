"""The numbers that a forward computes with."""

import torch


class Precision:
    """autocast, and the scaler that fp16's gradients need."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
            name = "bf16" if on_gpu else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if on else None, enabled=on)
