"""Host time of a call that a CUDA graph serves: all of bertfast's, and nothing of a kernel's.

    python benchmarks/graph_host_time.py [--repeats 1000] [--out FILE]

A BERT of twelve layers, narrow so that copies take little, on the tests' simulated GPU, whose
graph launches nothing here. Torch's ops cost there what they cost on a CPU, some microseconds, as
they do on a GPU. transformers' part is left out: its model's forward, embeddings and output object.
The mean of the fastest tenth of the calls. Writes benchmarks/results/graph-host-time-CPU.json.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import simulated_gpu  # noqa: E402

MISSING = simulated_gpu.why_not()
if MISSING is None:
    simulated_gpu.start()  # before torch is imported

import torch  # noqa: E402

import bertfast  # noqa: E402
from bertfast import graphs  # noqa: E402
from bertfast.commands.bench.record import cpu_name, environment  # noqa: E402
from bertfast.nn.layer import for_layers  # noqa: E402

LAYERS, PAD = 12, 1
CASES = {
    "1 sequence, 128 tokens, without a mask": (128,),
    "2 sequences, 100 and 128 tokens": (100, 128),
    "32 sequences, 20 to 128 tokens": tuple(20 + 108 * n // 31 for n in range(32)),
}


class Nothing:
    """A recording that replays nothing."""

    def __init__(self, function: Callable[[], None], pool: object) -> None:
        pass

    def replay(self) -> None:
        pass


def capture(held: Any, filled: Any, run: object) -> Any:
    """A capture without the layers: torch's, on a CPU, would need minutes for a large bucket."""
    return _capture(held, filled, lambda x, batch: x)


_capture = graphs._Held.capture


def make_model() -> torch.nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=PAD,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model = model.to("cuda:0", torch.bfloat16).eval()
    return bertfast.optimize(model, graphs=True, backend="torch")


def request(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.full(mask.shape, 7).where(mask, PAD)
    inputs = {"input_ids": ids.to("cuda:0")}
    return inputs if mask.all() else inputs | {"attention_mask": mask.long().to("cuda:0")}


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Microseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    best = sorted(times)[: max(1, repeats // 10)]
    return sum(best) / len(best) * 1e6


def measured(lengths: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Microseconds of the parts of a call, in their order, and of all of them."""
    import transformers.modeling_outputs

    model, inputs = make_model(), request(lengths)
    encoder, held = model.encoder, model.graphs_of_layers()
    held.outputs = transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions
    for _ in range(graphs.MOST_CALLS + 1):
        model(**inputs)
    held.outputs = lambda last_hidden_state: last_hidden_state
    device = inputs["input_ids"].device

    def decide():
        return model._decide(dict(inputs), model.facts())

    def told():
        return for_layers(decide(), model.facts(), device)

    def packed():
        batch, arguments = told(), {**inputs, "attention_mask": None}
        if batch.padded_shape is not None:
            model._pack(arguments, batch, batch.facts)
        return batch, arguments

    batch, arguments = packed()
    shape = (*arguments["input_ids"].shape, encoder.width())
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def whole():
        batch, _ = packed()
        return encoder.forward(x, attention_mask=None, bertfast_batch=batch)

    hits = held.hits
    whole()
    if held.hits != hits + 1:
        raise RuntimeError("no graph served the call")
    facts = model.facts()
    parts = {
        "the modules are as they were": fastest(model.facts, repeats),
        "place of the batch": fastest(lambda: model._decide(dict(inputs), facts), repeats),
        "for the layers": fastest(lambda: for_layers(batch, facts, device), repeats),
        "packing ids": 0.0,
        "weights, copies, launch, unpacking": fastest(
            lambda: encoder.forward(x, attention_mask=None, bertfast_batch=batch), repeats
        ),
    }
    if batch.padded_shape is not None:
        parts["packing ids"] = fastest(lambda: model._pack(dict(inputs), batch, facts), repeats)
    parts["sum"] = sum(parts.values())
    return {name: round(us, 1) for name, us in parts.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=1000, help="calls of each; default: 1000")
    parser.add_argument("--out", type=Path, help="default: results/graph-host-time-CPU.json")
    options = parser.parse_args(arguments)
    if MISSING is not None:
        print(f"graph_host_time.py needs the simulated GPU: {MISSING}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    graphs.Recording = Nothing
    graphs._Held.capture = capture
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    found: dict[str, object] = asdict(environment("cpu"))
    found |= {"layers": LAYERS, "unit": "us"}
    with torch.inference_mode():
        for name, lengths in CASES.items():
            found[name] = parts = measured(lengths, options.repeats)
            print(f"{name}: {parts['sum']:.0f} us")
            for part, us in parts.items():
                print(f"  {us:6.1f}  {part}")
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = options.out or ROOT / "benchmarks" / "results" / f"graph-host-time-{cpu}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
