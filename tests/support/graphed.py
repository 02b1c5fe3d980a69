"""Models with graphs by bucket on the simulated GPU, and requests for them."""

import torch
from support.hf_models import KNOWN, tiny
from support.simulated_gpu.recording import Recording

import bertfast
from bertfast import graphs
from bertfast.graphs import GRAPHS

HALF, PAD = torch.bfloat16, 1
# Families of whose layers a capture reads more than weights, or whose layers come again.
OWN_FORMS = [
    family.prefix
    for family in KNOWN
    if any(word in family.layer for word in ("rotary", "distance", "shared"))
]


def record(monkeypatch):
    """Has graphs recorded as the simulated GPU can."""
    monkeypatch.setattr(graphs, "Recording", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    Recording.made = 0


def make(name="BertModel", device="cuda:1", graphs=True, config=None, **options):
    model = tiny(name, **(config or {})).to(device, HALF).eval()
    bertfast.optimize(model, graphs=graphs, **options)
    Recording.model = model
    return model


def of(model):
    (found,) = (m.__dict__[GRAPHS] for m in model.modules() if GRAPHS in m.__dict__)
    return found


def request(*lengths, seed=0, device="cuda:1", padded=True):
    """ids and mask of a batch."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 60, mask.shape, generator=generator).where(mask, PAD)
    inputs = {"input_ids": ids.to(device)}
    return inputs | ({"attention_mask": mask.long().to(device)} if padded else {})


def eager(model, inputs):
    """The same call without graphs."""
    held = {m: m.__dict__.pop(GRAPHS) for m in model.modules() if GRAPHS in m.__dict__}
    try:
        return call(model, inputs)
    finally:
        for module, graphs_ in held.items():
            module.__dict__[GRAPHS] = graphs_


def call(model, inputs):
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


def real(inputs, y):
    return y[inputs["attention_mask"].bool()] if "attention_mask" in inputs else y


def captured(name="BertModel", lengths=(9, 5, 20), **options):
    """A model whose graph of this batch is there, and the batch."""
    model = make(name, **options)
    inputs = request(*lengths)
    while not of(model).captures:
        call(model, inputs)
    return model, inputs


def served(model, inputs):
    """The output, and whether a graph made it."""
    before = of(model).hits
    y = call(model, inputs)
    return y, of(model).hits > before
