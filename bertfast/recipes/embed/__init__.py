"""Texts to vectors and pairs to scores, on packed batches; of files, by a command that goes on."""

from .embedder import CrossScorer, Embedder

__all__ = ["CrossScorer", "Embedder"]
