"""Speed of each family of Hugging Face's, converted, beside stock, on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/families_speed.py

Two layers of each, tiny (width 64) and as wide as a base model (768), in float32 with the dropout
that its configuration has: inference, and a training step's forward and backward. A batch has 4
rows of 128 tokens, "full", or of 128, 64, 32 and 16, "padded". Stock and converted take turns, in a
random order, and are compared by processor time, so that other work on the machine counts for
little. `over` is the median of the turns' ratios. Both are compared in their outputs before.
"""

import argparse
import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would count as at work
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import bertfast  # noqa: E402
from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.hf.families import FAMILIES  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "families-speed.json"
SIZES = {"tiny": (64, 4, 256), "base": (768, 12, 3072)}  # width, heads, inner
TURNS = {"tiny": 75, "base": 7}
BATCHES = {"full": (128, 128, 128, 128), "padded": (128, 64, 32, 16)}
LAYERS, VOCABULARY, PAD = 2, 1000, 1
MOST = 1e-4  # what the outputs, which are about 1 in size, may differ by


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    told = parser.parse_args(arguments)
    here = {**asdict(environment("cpu")), "threads": torch.get_num_threads()}
    result: dict[str, Any] = {"environment": here, "batches": BATCHES, "families": {}}
    for family in FAMILIES:
        measured = {size: measure(family.prefix, size) for size in SIZES}
        result["families"][family.title] = measured
        print(family.title, {s: {k: v["over"] for k, v in m.items()} for s, m in measured.items()})
    told.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make(prefix: str, size: str) -> torch.nn.Module:
    width, heads, inner = SIZES[size]
    kind = getattr(transformers, prefix + "Model")
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    if prefix == "DistilBert":
        names = ("dim", "n_heads", "n_layers", "hidden_dim")
    config = dict(zip(names, (width, heads, LAYERS, inner), strict=True))
    config |= dict(vocab_size=VOCABULARY, max_position_embeddings=140, pad_token_id=PAD)
    if prefix in ("Albert", "Electra"):
        config["embedding_size"] = width // 6
    if prefix == "Esm":
        config["position_embedding_type"] = "rotary"
    return kind(kind.config_class(**config))


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape).where(mask, PAD)
    return {"input_ids": ids, "attention_mask": mask.long()}


def measure(prefix: str, size: str) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    stock = make(prefix, size)
    models = {"stock": stock, "converted": bertfast.optimize(copy.deepcopy(stock), strict=True)}
    found = {}
    for layout, lengths in BATCHES.items():
        inputs = batch(lengths)
        same({name: model.eval() for name, model in models.items()}, inputs)
        for pass_, call in (("inference", infer), ("training", train)):
            found[f"{pass_}, {layout}"] = compare(models, inputs, call, TURNS[size])
    return found


def same(models: dict[str, torch.nn.Module], inputs: dict[str, torch.Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        one, other = (model(**inputs)[0][real] for model in models.values())
    if not torch.allclose(one, other, rtol=0, atol=MOST):
        raise RuntimeError(f"outputs differ by {(one - other).abs().max()}")


def infer(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model.eval()
    with torch.inference_mode():
        model(**inputs)


def train(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    model(**inputs)[0][inputs["attention_mask"].bool()].square().sum().backward()


def compare(
    models: dict[str, torch.nn.Module],
    inputs: dict[str, torch.Tensor],
    call: Callable[[torch.nn.Module, dict[str, torch.Tensor]], None],
    turns: int,
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in models}
    draw = random.Random(0)
    for turn in range(turns + 1):
        for name in draw.sample(list(models), len(models)):
            begun = time.process_time()
            call(models[name], inputs)
            if turn:  # the first one loads and allocates
                times[name].append(time.process_time() - begun)
    ratios = sorted(a / b for a, b in zip(times["stock"], times["converted"], strict=True))
    return {
        "over": round(statistics.median(ratios), 2),
        "least": round(ratios[0], 2),
        "greatest": round(ratios[-1], 2),
        **{f"{name}_ms": round(1e3 * statistics.median(own), 2) for name, own in times.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
