"""Encoder layers: how data flows through them, and modules made of them."""

from .encoder import Encoder, EncoderLayer

__all__ = ["Encoder", "EncoderLayer"]
