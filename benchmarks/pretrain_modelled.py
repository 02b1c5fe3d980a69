"""Tokens per second of pre-training on one H100, from counts: modelled, not measured.

    python benchmarks/pretrain_modelled.py [FILE]     FILE: of pretrain_speed.py, brought up to date

BERT-base, packed sequences of 512 in bf16 autocast, 15 % of the tokens predicted, NSP. To the
encoder's counts, which `bertfast bench` uses too (bertfast/commands/bench/predicted.py), it adds
what a step has besides: the float32 stream of autocast, casts of weights and gradients, the head
and its loss, embeddings, and AdamW. The ceilings are an H100's as others measured them; every
kernel is taken to reach them, the host to be in time, and input to wait for nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bertfast.commands.bench import models, predicted  # noqa: E402
from bertfast.commands.bench.floor import Ceilings  # noqa: E402
from bertfast.commands.bench.predicted import Counts, Gpu, Product  # noqa: E402
from bertfast.ops.cross_entropy.chunks import chunk_rows  # noqa: E402

# 3.0 TB/s of copies, 790 TFLOP/s of 8192^3 products in bf16 on random numbers, 132 multiprocessors;
# 2 us from one kernel of a stream to the next is an assumption.
H100 = Gpu(Ceilings(3.0e12, 790e12), 2.0, 132, ((8192, 8192, 8192),))
BASE = models.MODELS["BERT-base"]
VOCABULARY, LENGTH, SHARE = 30522, 512, 0.15
SEQUENCES, MICRO_BATCHES = 64, 4  # of a micro-batch, and of a step
# Values of the stream, of 4 bytes where predicted.py has 2, or besides: a layer's two LayerNorms
# read the residual, write their output and save in float32, and write a copy for the product that
# follows; the backward reads and writes that much.
STREAM = 8, 8
# Bytes for each logit beside a product's 2 for each operand and result: those that
# bertfast/ops/cross_entropy counts, less 4 that products read and 2 that one writes. Kernels of a
# chunk, beside its products.
LOGIT_BYTES, LOGIT_KERNELS = 18.25 - 6, 8
# Values of 2 bytes for each of the decoder's weights: a chunk's part of its gradient is written and
# added in float32.
ADDED = 7
# Bytes for each parameter. A micro-batch: weights cast to 16 bits, their gradients cast back and
# added. A step: the norm, the clipping, and AdamW's reads and writes.
CAST_BYTES, STEP_BYTES = (4 + 2) + (2 + 4) + 12, 4 + 8 + 28


def h100() -> dict[str, Any]:
    tokens = models.Tokens(f"{SEQUENCES}x{LENGTH}", (LENGTH,) * SEQUENCES)
    parts = {
        "encoder": encoder(tokens),
        "head and loss": head(tokens.real),
        "embeddings": embeddings(tokens.real),
    }
    micro = {name: counts.us(H100) for name, counts in parts.items()}
    weights = BASE.layers * 12 * BASE.width**2 + VOCABULARY * BASE.width
    micro["casts of weights"] = H100.memory_us(CAST_BYTES * weights)
    step = H100.memory_us(STEP_BYTES * weights)
    total = MICRO_BATCHES * sum(micro.values()) + step
    return {
        "what": "modelled by counts, not measured",
        "device": "H100",
        "model": f"BERT-base, {SEQUENCES}x{LENGTH} tokens a micro-batch, {MICRO_BATCHES} a step",
        "ceilings": {
            "bytes_per_second": H100.ceilings.bytes_per_s,
            "flop_per_second": H100.ceilings.flop_per_s,
            "gap_us": H100.gap_us,
        },
        "micro_batch_ms": {name: round(us / 1e3, 2) for name, us in micro.items()},
        "optimizer_ms": round(step / 1e3, 2),
        "tokens_per_second": round(MICRO_BATCHES * tokens.real / total * 1e6, -3),
    }


def encoder(tokens: models.Tokens) -> Counts:
    found = predicted.encoder(BASE, tokens, torch.bfloat16, True, True, "bertfast")
    assert found is not None
    found = found.times(BASE.layers)
    stream = 2.0 * sum(STREAM) * tokens.real * BASE.width * BASE.layers
    return found + Counts(0, stream)


def head(tokens: int) -> Counts:
    """Of labelled rows: dense, GELU, LayerNorm, the decoder, each with its two gradients."""
    rows, width = round(SHARE * tokens), BASE.width
    products = [Product(rows, width, width)] * 2 + [Product(width, width, rows)]
    chunks = -(-rows // chunk_rows(VOCABULARY, on_gpu=True))
    part = -(-rows // chunks)
    for _ in range(chunks):
        products += [Product(part, VOCABULARY, width), Product(part, width, VOCABULARY)]
        products += [Product(VOCABULARY, width, part, ADDED * VOCABULARY * width)]
    moved = LOGIT_BYTES * rows * VOCABULARY + 2.0 * 30 * rows * width
    return Counts(20 + chunks * LOGIT_KERNELS, moved, 2, tuple(products))


def embeddings(tokens: int) -> Counts:
    """Three lookups, their sum, LayerNorm and dropout, and all that backward; in float32."""
    return Counts(30, 4.0 * 24 * tokens * BASE.width)


if __name__ == "__main__":
    print(json.dumps(h100(), indent=1))
    for file in map(Path, sys.argv[1:]):
        found = json.loads(file.read_text()) | {"modelled": h100()}
        file.write_text(json.dumps(found, indent=1) + "\n")
