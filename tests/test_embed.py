"""Embedder and CrossScorer beside sentence-transformers, which computes the same numbers."""

import json
import pickle

import numpy as np
import pytest
import torch
from support import encoders
from support.encoders import TEXTS

pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers")

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.embed import CrossScorer, Embedder  # noqa: E402
from bertfast.recipes.embed.embedder import by_tokens  # noqa: E402
from bertfast.testing.model import HIDDEN_ATOL  # noqa: E402

PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))


def close(found, expected):
    """Within the budget of a hidden state, which a pooling can't leave."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=HIDDEN_ATOL)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_folder_of_sentence_transformers(tmp_path, pooling):
    folder = encoders.sentence_encoder(tmp_path, pooling=pooling, dense=True)
    stock = library.SentenceTransformer(str(folder), device="cpu")
    embedder = Embedder(folder, tokens=100, window=7, device="cpu")
    close(embedder(TEXTS), stock.encode(TEXTS))
    counts = embedder.counts
    assert counts.texts == len(TEXTS) and counts.tokens == counts.computed > 0  # without padding
    assert embedder([]).shape == (0, 8) and embedder.width == 8


def test_what_is_not_plain_is_run_by_its_library(tmp_path):
    folder = encoders.sentence_encoder(tmp_path, pooling="weightedmean")
    stock = library.SentenceTransformer(str(folder), device="cpu")
    embedder = Embedder(folder, window=7, device="cpu")
    close(embedder(TEXTS), stock.encode(TEXTS))
    assert embedder.counts.texts == len(TEXTS) and embedder([]).shape == (0, 32)
    close(Embedder(folder, pooling="cls")(TEXTS), Embedder(tmp_path / "bare", pooling="cls")(TEXTS))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({**modules[0], "type": "some.library.Other"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="pooling can't be chosen for .*: it has a module Other"):
        Embedder(folder, pooling="cls")(TEXTS)
    with pytest.raises(UserError, match="normalize can't be turned off for .*: its pooling is w"):
        Embedder(folder, normalize=False)(TEXTS)


def test_prompts(tmp_path):
    folder = encoders.sentence_encoder(tmp_path, prompts={"q": "find: ", "d": "say: "})
    stock = library.SentenceTransformer(str(folder), device="cpu")
    close(Embedder(folder, prompt_name="q")(TEXTS), stock.encode(TEXTS, prompt_name="q"))
    close(Embedder(folder, prompt="oh ")(TEXTS), stock.encode(TEXTS, prompt="oh "))
    assert abs(Embedder(folder)(TEXTS) - Embedder(folder, prompt="oh ")(TEXTS)).max() > 0.1
    with pytest.raises(UserError, match="prompt_name must be one of .*d.*q.*, got 'p'"):
        Embedder(folder, prompt_name="p")(TEXTS)


@pytest.mark.parametrize("kind", ["RobertaModel", "DistilBertModel", "DebertaV2Model"])
def test_a_folder_of_transformers(tmp_path, kind):
    """The last is a family that bertfast leaves as it is."""
    folder = encoders.save(tmp_path, kind)
    stock = library.SentenceTransformer(str(folder), device="cpu")
    embedder = Embedder(folder, normalize=True, tokens=64, device="cpu")
    close(embedder(TEXTS), stock.encode(TEXTS, normalize_embeddings=True))
    if kind == "DebertaV2Model":
        assert embedder.counts.computed > embedder.counts.tokens


def test_pairs(tmp_path):
    folder = encoders.save(tmp_path, "BertForSequenceClassification", num_labels=1)
    stock = library.CrossEncoder(str(folder), device="cpu")
    close(CrossScorer(folder, tokens=100, window=7)(PAIRS), stock.predict(PAIRS))
    stock.activation_fn = torch.nn.Tanh()
    stock.save_pretrained(str(tmp_path / "saved"))
    close(CrossScorer(tmp_path / "saved")(PAIRS), stock.predict(PAIRS))
    many = encoders.save(tmp_path / "many", "DistilBertForSequenceClassification", num_labels=3)
    stock = library.CrossEncoder(str(many), device="cpu")
    scorer = pickle.loads(pickle.dumps(CrossScorer(many)))
    close(scorer(PAIRS), stock.predict(PAIRS))
    assert scorer.counts.tokens == scorer.counts.computed


def test_pickles_hold_no_model(tmp_path):
    folder = encoders.save(tmp_path)
    embedder = Embedder(folder, column="body")
    vectors = embedder(TEXTS)
    pickled = pickle.dumps(embedder)
    assert len(pickled) < 2000
    batch = {"body": np.array(TEXTS, object), "n": np.arange(len(TEXTS))}
    found = pickle.loads(pickled)(batch)
    assert found.keys() == {"body", "n", "embedding"} and (found["embedding"] == vectors).all()


def test_batches_are_of_some_tokens():
    lengths = np.array([3, 40, 5, 5, 1, 9])
    batches = [rows.tolist() for rows in by_tokens(lengths, 18)]
    assert batches == [[1], [5, 2], [3, 0, 4]]


def test_wrong_arguments(tmp_path):
    for arguments, error, said in (
        ({"tokens": 0}, ValueError, "tokens must be"),
        ({"length": 0}, ValueError, "length must be"),
    ):
        with pytest.raises(error, match=said):
            Embedder(tmp_path, **arguments)
    with pytest.raises(UserError, match="must be a folder with a config.json or a modules.json"):
        Embedder(tmp_path)(TEXTS)
    folder = encoders.save(tmp_path)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got int"):
        Embedder(folder)(["a", 3])
    with pytest.raises(TypeError, match="a list of texts, got one text"):
        Embedder(folder)("a")
    with pytest.raises(ValueError, match="no 'text' among its columns 'body'"):
        Embedder(folder)({"body": ["a"]})
    with pytest.raises(ValueError, match=r"pairs\[0\] must be two texts"):
        CrossScorer(folder)(["ab"])
    with pytest.raises(UserError, match="length must be 40 or less, the model's positions, got 41"):
        Embedder(folder, length=41)(["a"])
    with pytest.raises(UserError, match="pooling must be one of mean, cls, max"):
        Embedder(folder, pooling="sum")(["a"])
