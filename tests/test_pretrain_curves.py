"""The recipe's loss curve beside that of plain transformers: the same model, data and optimiser."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from support import pretraining  # noqa: E402

import bertfast  # noqa: E402
from bertfast.recipes.pretrain import model as models  # noqa: E402
from bertfast.recipes.pretrain import optimizers  # noqa: E402
from bertfast.recipes.pretrain.batches import Batches, DataOptions  # noqa: E402

STEPS = 50


def padded(batch):
    """A packed batch as transformers takes it: rows, padding, labels of -100."""
    bounds = batch.cu_seqlens.tolist()
    inputs = {
        name: torch.zeros(batch.sequences, batch.max_seqlen, dtype=torch.int64)
        for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    labels = torch.full((batch.tokens,), -100)
    labels[batch.places] = batch.labels
    for row, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = slice(0, end - begin)
        inputs["input_ids"][row, part] = batch.input_ids[begin:end]
        inputs["token_type_ids"][row, part] = batch.token_type_ids[begin:end]
        inputs["attention_mask"][row, part] = 1
        inputs["labels"][row, part] = labels[begin:end]
    if batch.not_next is not None:
        inputs["next_sentence_label"] = batch.not_next
    return inputs


def stock_loss(model, batch):
    return model(**padded(batch)).loss


def recipe_loss(module, batch):
    sums = module(batch)
    nsp = sums.nsp / batch.sequences if module.nsp else 0.0
    return sums.mlm / len(batch.labels) + nsp


def curve(model, loss_of, batches):
    """Losses over the steps; the model is trained in place."""
    settings = optimizers.Settings(1e-3, (0.9, 0.999), 1e-6, 0.01)
    optimizer = optimizers.make("adamw", model, settings)
    losses = []
    for step, batch in enumerate(batches):
        share = optimizers.share_of_lr("linear", step, STEPS, 5, 0)
        optimizers.set_lr(optimizer, 1e-3 * share)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizer:
            one.step()
            one.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("nsp", [True, False], ids=["mlm+nsp", "mlm"])
def test_the_curves_coincide(nsp, tmp_path):
    data = pretraining.prepared(tmp_path)
    found = iter(Batches(data, DataOptions(tokens=128, length=32, nsp=nsp)))
    batches = [next(found)[1] for _ in range(STEPS)]

    def fresh():
        config = models.configuration(
            **dict(size="tiny", layers=2, width=32, heads=2, inner=64, vocabulary=60),
            **dict(length=32, dropout=0.0, pad=0),
        )
        torch.manual_seed(0)
        return models.new(config, nsp).train()

    stock = curve(fresh(), stock_loss, batches)
    assert stock[-5:].mean() < stock[:5].mean() - 0.1  # it learns: the curve isn't flat
    recipe = curve(models.Pretraining(fresh()).train(), recipe_loss, batches)
    converted = curve(bertfast.optimize(fresh()), stock_loss, batches)
    fused = curve(bertfast.optimize(fresh(), masked_lm_loss="fused"), stock_loss, batches)
    for other in (recipe, converted, fused):
        torch.testing.assert_close(other, stock, rtol=0, atol=1e-4)
