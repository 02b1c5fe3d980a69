"""Heads of masked language models: tiny ones without dropout, batches with labels, gradients."""

import copy

import torch
from support.hf_models import KNOWN, VOCABULARY, batch, tiny

import bertfast

# Each head that loses its logits -> the name of what it returns them as.
HEADS = {
    name: "prediction_logits" if name.endswith("PreTraining") else "logits"
    for family in KNOWN
    for name in family.heads
}


def stock_head(name: str = "BertForMaskedLM", **config) -> torch.nn.Module:
    """In training, without dropout unless it is asked for."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    if name.startswith("DistilBert"):
        off = dict.fromkeys(("dropout", "attention_dropout"), 0.0)
    if name.startswith("Albert"):
        off["classifier_dropout_prob"] = 0.0
    if name.startswith("ModernBert"):
        off["attention_dropout"] = 0.0
    return tiny(name, **(off | config)).train()


def mean_of_losses(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **options: object
) -> torch.Tensor:
    """transformers' ForMaskedLMLoss, which makes float32 of any logits, in the dtype they have."""
    return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


def fused(stock: torch.nn.Module, **options) -> torch.nn.Module:
    """A converted copy."""
    return bertfast.optimize(copy.deepcopy(stock), masked_lm_loss="fused", **options)


def labelled_batch(
    model: torch.nn.Module, lengths: tuple[int, ...] = (5, 20, 13), share: float = 0.3
) -> dict[str, torch.Tensor]:
    """With labels at some of the real tokens, and labels of sentences where the head takes them."""
    inputs = batch(lengths)
    real = inputs["attention_mask"].bool()
    counted = real & (torch.rand(real.shape) < share)
    counted[:, 1] = True
    labels = torch.randint(5, VOCABULARY, real.shape)
    inputs["labels"] = labels.where(counted, -100)
    if type(model).__name__.endswith("PreTraining"):
        second = "sentence_order" if type(model).__name__.startswith("Albert") else "next_sentence"
        inputs[second + "_label"] = torch.randint(0, 2, (len(lengths),))
    return inputs


def loss_and_gradients(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs)["loss"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(got: dict, expected: dict, rtol: float = 2e-5) -> None:
    """Each within rtol of its largest number, as sums of such numbers err."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def makes_logits(model: torch.nn.Module, inputs: dict) -> bool:
    return model(**inputs).get(HEADS[type(model).__name__]) is not None
