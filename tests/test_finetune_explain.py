"""Explanations: numbers that are known, sums that must hold, and a model that is left as it was."""

import base64
import copy
import hashlib
import html.parser
import json
import re
import types
import zlib

import pytest
import torch
from support import encoders
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("captum")

import bertfast  # noqa: E402
from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.finetune.explain import attention as attention_module  # noqa: E402
from bertfast.recipes.finetune.explain import attributions, explain, page, targets  # noqa: E402
from bertfast.recipes.finetune.explain.encoded import encode  # noqa: E402
from bertfast.recipes.finetune.explain.unchanged import unchanged  # noqa: E402

HEADS = {
    "classify": "SequenceClassification",
    "pair": "SequenceClassification",
    "tag": "TokenClassification",
    "qa": "QuestionAnswering",
}
TEXTS = {
    "classify": "a cat sat",
    "tag": "a cat sat",
    "pair": ("a cat", "the dog"),
    "qa": ("who", "a cat or a dog"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a tiny model: its family and its task."""
    made = {}

    def folder(family, task):
        kind = f"{family}For{HEADS[task]}"
        if kind not in made:
            more = {} if task == "qa" else {"id2label": {0: "O", 1: "yes", 2: "no"}}
            made[kind] = encoders.save(tmp_path_factory.mktemp(kind), kind, **more)
        return made[kind]

    return folder


@pytest.fixture
def loaded(folders):
    def load(task, family="Bert"):
        folder = folders(family, task)
        model = getattr(transformers, f"{family}For{HEADS[task]}").from_pretrained(folder)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)

    return load


def explained(model, tokenizer, task, texts=None, labels=None):
    encoded = encode(model, tokenizer, TEXTS[task] if texts is None else texts, task)
    with unchanged(model):
        prediction = targets.predict(model, encoded, task)
        chosen = targets.targets_of(prediction, encoded, labels)
        return encoded, prediction, attributions.attributions_of(model, encoded, task, chosen)


class OfEmbeddings(transformers.PreTrainedModel):
    """A power of a linear function of the summed embeddings."""

    config_class = transformers.BertConfig

    def __init__(self, config, power):
        super().__init__(config)
        self.power = power
        self.embedding = nn.Embedding(config.vocab_size, 8)
        self.linear = nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        logits = self.linear(self.embedding(input_ids)).sum(1) ** self.power
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("power", [1, 2])
def test_attributions_that_are_known_exactly(power, loaded):
    """Of z^p with z = sum of x_t w + b: a_t = (x_t - pad) w * the mean of p z^(p-1) on the path."""
    _, tokenizer = loaded("classify")
    config = transformers.BertConfig(vocab_size=len(encoders.WORDS), num_labels=3)
    model = OfEmbeddings(config, power).double()
    encoded, prediction, made = explained(model, tokenizer, "classify")
    assert len(made) == 3 and [one.target.name for one in made][0] == prediction.targets[0].name
    x = model.embedding(encoded.inputs["input_ids"][0])
    pad = model.embedding(torch.tensor(tokenizer.pad_token_id))
    added = torch.tensor([token.special for token in encoded.tokens])
    terms = torch.where(added[:, None], 0.0, (x - pad) @ model.linear.weight.T)
    at_text = model.linear(x).sum(0)
    slope = 1 if power == 1 else 2 * at_text - terms.sum(0)
    for one in made:
        (label,) = one.target.indices[0]
        torch.testing.assert_close(one.scores, (terms * slope)[:, label].detach())
        # captum's weights of the integral are float32's
        assert abs(one.delta) <= 2**-23 * float(one.scores.abs().sum())
        assert one.steps == attributions.STEPS[0]
        assert one.scores[0] == one.scores[-1] == 0  # [CLS] and [SEP] are the baseline's too
        assert one.output == pytest.approx(float(at_text[label] ** power))


def with_lora(model, task):
    peft = pytest.importorskip("peft")
    kind = {"classify": "SEQ_CLS", "pair": "SEQ_CLS", "tag": "TOKEN_CLS", "qa": "QUESTION_ANS"}
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type=kind[task], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


FORMS = {
    "plain": lambda model, task: model,
    "converted": lambda model, task: bertfast.optimize(model),
    "LoRA": with_lora,
    "converted LoRA": lambda model, task: with_lora(bertfast.optimize(model), task),
}
CASES = [("Bert", task, form) for task in HEADS for form in FORMS]
CASES += [(family, "classify", "converted") for family in ("Roberta", "DistilBert", "Electra")]


@pytest.mark.parametrize(("family", "task", "form"), CASES, ids=["-".join(case) for case in CASES])
def test_attributions_sum_to_the_difference_of_outputs(family, task, form, loaded):
    """Outputs by a call of another kind: with the embeddings as arguments."""
    model, tokenizer = loaded(task, family)
    if task == "tag":  # so that not all tokens have the same label
        model.classifier.weight.data *= 4
    model = FORMS[form](model, task)
    encoded, prediction, made = explained(model, tokenizer, task)
    assert len(prediction.targets) == len(made) > 1
    inputs = dict(encoded.inputs)
    ids = inputs.pop("input_ids")
    with torch.no_grad(), bertfast.disabled():
        x, b = (model.get_input_embeddings()(chosen) for chosen in (ids, encoded.baseline))
        at_text, at_padding = (
            targets.outputs(model, {"inputs_embeds": given, **inputs}, task)[0] for given in (x, b)
        )
    for one in made:
        want = [sum(float(made[i]) for i in one.target.indices) for made in (at_text, at_padding)]
        assert [one.output, one.baseline] == pytest.approx(want, abs=1e-5)
        assert one.converged and abs(one.delta) <= 0.01 * float(one.scores.abs().sum())
        difference = one.output - one.baseline
        assert float(one.scores.sum()) == pytest.approx(difference + one.delta, abs=1e-6)
    assert max(float(one.scores.abs().max()) for one in made) > 0.05


def test_an_integral_that_is_cut_short_is_told(loaded, monkeypatch):
    model, tokenizer = loaded("classify", "DistilBert")
    (_, _, exact), steps = explained(model, tokenizer, "classify"), []
    monkeypatch.setattr(attributions, "STEPS", (1,))
    *_, made = explained(model, tokenizer, "classify")
    for one, better in zip(made, exact, strict=True):
        steps.append(better.steps)
        assert abs(one.delta) > 10 * abs(better.delta) and better.converged
    assert not all(one.converged for one in made)


def test_adapters_count(loaded):
    model, tokenizer = loaded("classify")
    *_, without = explained(copy.deepcopy(model), tokenizer, "classify", labels=["yes"])
    *_, made = explained(with_lora(model, "classify"), tokenizer, "classify", labels=["yes"])
    assert float((without[0].scores - made[0].scores).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("family", "form"), [*(("Bert", form) for form in FORMS), ("DistilBert", "converted")]
)
def test_weights_are_the_original_eager_ones(family, form, loaded):
    model, tokenizer = loaded("classify", family)
    model = FORMS[form](model, "classify")
    encoded = encode(model, tokenizer, TEXTS["classify"], "classify")
    with unchanged(model):
        weights = attention_module.weights_of(model, encoded)
    other = bertfast.revert(copy.deepcopy(model))
    for module in other.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation = "eager"
    with torch.no_grad():
        want = other(**encoded.inputs, output_attentions=True).attentions
    assert torch.equal(weights, torch.cat(want))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_an_adapter_before_the_text(loaded, tmp_path):
    """Its positions are left out, and what they take of the weights is told."""
    peft = pytest.importorskip("peft")
    model, tokenizer = loaded("classify")
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(bertfast.optimize(model), config).eval()
    encoded, _, made = explained(model, tokenizer, "classify")
    assert all(one.converged and float(one.scores.abs().max()) > 0.01 for one in made)
    with unchanged(model):
        weights = attention_module.weights_of(model, encoded)
    assert weights.shape[2:] == (len(encoded), len(encoded))
    data = read(explain(model, tokenizer, "a cat sat", task="classify", out=tmp_path / "p.html"))
    assert 0.1 < data["attention"]["outside"] == pytest.approx(1 - float(weights.sum(-1).mean()))


def state(model):
    """All that explaining could change."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items()}
        hooks = {key: list(value) for key, value in module.__dict__.items() if "hooks" in key}
        modules[name] = (type(module), module.training, attributes, hooks)
    config = dict(model.config.__dict__)
    tensors = {name: (p, p.grad, p.requires_grad) for name, p in model.named_parameters()}
    return modules, config, {name: (id(p), p._version, g, r) for name, (p, g, r) in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_left_as_it_was(form, loaded, tmp_path):
    model, tokenizer = loaded("classify")
    model = FORMS[form](model, "classify")
    model.train()
    layer = [m for m in model.modules() if type(m).__name__ == "BertLayer"][1].eval()
    inputs = tokenizer("a cat", return_tensors="pt")
    model(**inputs)
    before, random = state(model), torch.get_rng_state()
    pages = [
        explain(model, tokenizer, "a cat", task="classify", out=tmp_path / name).read_bytes()
        for name in ("one", "two")
    ]
    assert pages[0] == pages[1]  # without dropout
    assert state(model) == before and torch.equal(torch.get_rng_state(), random)
    assert model.training and not layer.training
    assert model.config._attn_implementation != "eager"
    with pytest.raises(RuntimeError, match="stopped"), unchanged(model):
        model.config._attn_implementation = "eager"
        model.register_forward_hook(print)
        raise RuntimeError("stopped")
    assert state(model) == before


def test_explaining_works_where_gradients_are_off(loaded, tmp_path):
    model, tokenizer = loaded("classify")
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            made = explain(model, tokenizer, "a cat", task="classify", out=tmp_path / off.__name__)
        assert read(made)["targets"][0]["converged"]


def read(made):
    """The data of a page, whose form a strict parser understands."""

    class Parser(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.scripts, self.inside = [], None

        def handle_starttag(self, tag, attributes):
            self.inside = None
            if tag == "script":
                self.scripts.append("")
                self.inside = tag

        def handle_endtag(self, tag):
            self.inside = None

        def handle_data(self, text):
            if self.inside:
                self.scripts[-1] += text

    parser = Parser()
    text = made.read_text()
    parser.feed(text)
    told, script = parser.scripts  # and no other
    for kind, content in (
        ("script", script),
        ("style", re.search("<style>(.*?)</style>", text, re.S)[1]),
    ):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in text
    return json.loads(told)


NASTY = "</script><b>x</b><!--<script> & \"q\" 'a' \\u003c ${data} \u2028 \u202e r2l 😀é\t\x00 $x"


def test_a_nasty_text_is_data(loaded, tmp_path):
    model, tokenizer = loaded("pair")
    model.config._name_or_path = "<i>$"
    model.config.id2label = {0: NASTY, 1: "yes", 2: "no"}
    made = explain(model, tokenizer, (NASTY * 2, "x"), task="pair", out=tmp_path / "page.html")
    data = read(made)
    text = "".join(t["before"] + t["text"] for t in data["tokens"] if t["segment"] == 0)
    assert text + data["rest"][0] == NASTY * 2 and data["model"] == "<i>$"
    assert NASTY in [one["name"] for one in data["targets"]]
    for piece in re.findall(r"<[^>]*>|\S", NASTY):
        assert json.loads(page.embedded(piece)) == piece
        assert not re.search("[<>&\u2028]", page.embedded(piece))


@pytest.mark.parametrize("trim", [True, False])
def test_tokens_of_bytes_spell_the_text(trim, loaded):
    """Several tokens may stand for one character, and one for a word and the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["[PAD]", "[CLS]", "[SEP]", *letters, "\u0120a", "ca"]
    merges = [("\u0120", "a"), ("c", "a")]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(
        ("[SEP]", 2), ("[CLS]", 1), trim_offsets=trim, add_prefix_space=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    model, _ = loaded("classify")
    text = " a  cat \U0001f600\u00e9! "
    encoded = encode(model, tokenizer, text, "classify")
    own = [token for token in encoded.tokens if not token.special]
    assert "".join(token.before + token.text for token in own) + encoded.rest[0] == text
    # 3 and 1 bytes behind a character's first one, and trimmed, 4 spaces that are tokens
    assert [token.text for token in own].count("") == 3 + 1 + 4 * trim
    assert [token.special for token in encoded.tokens].count(True) == 2


def test_a_page_holds_the_numbers(loaded, tmp_path):
    model, tokenizer = loaded("classify")
    encoded, prediction, made = explained(model, tokenizer, "classify")
    with unchanged(model):
        weights = attention_module.weights_of(model, encoded)
    data = read(explain(model, tokenizer, "a cat sat", task="classify", out=tmp_path / "p.html"))
    for told, one in zip(data["targets"], made, strict=True):
        assert told["name"] == one.target.name and told["steps"] == one.steps
        assert told["scores"] == pytest.approx(one.scores.tolist(), rel=1e-5)
        assert told["probability"] == pytest.approx(one.target.probability)
    assert sum(told["probability"] for told in data["targets"]) == pytest.approx(1)
    assert abs(data["attention"]["outside"]) < 1e-6
    packed = zlib.decompress(base64.b64decode(data["attention"]["bytes"]))
    stored = (torch.frombuffer(bytearray(packed), dtype=torch.uint8) / 255) ** 2
    # sqrt(p) is half a byte off at most, so p by 2 sqrt(p) / 510 + 1 / 510^2
    assert float((stored.view(weights.shape) - weights).abs().max()) <= 2 / 510 + 1 / 510**2


def test_a_large_page_is_small_and_a_huge_one_has_means():
    torch.manual_seed(0)
    weights = (3 * torch.randn(6, 12, 256, 256)).softmax(-1)
    kept = page._attention(weights)
    assert not kept["mean"] and len(kept["bytes"]) < 5_000_000
    huge = weights[:, :, :8, :8].expand(6, 12, 8, 8).repeat(6, 1, 20, 20)
    assert huge.numel() > page.MOST_WEIGHTS
    kept = page._attention(huge)
    packed = zlib.decompress(base64.b64decode(kept["bytes"]))
    assert kept["mean"] and kept["heads"] == 12 and len(packed) == 36 * 160 * 160


def test_a_long_text_is_cut_and_told(loaded, tmp_path):
    model, tokenizer = loaded("classify")
    data = read(explain(model, tokenizer, "a " * 500, task="classify", out=tmp_path / "page.html"))
    assert len(data["tokens"]) == data["limit"] == 32 and data["cut"] == 470
    assert data["rest"][0].endswith("more characters)") and len(data["rest"][0]) < 400
    model, tokenizer = loaded("qa")
    data = read(explain(model, tokenizer, ("why", "a " * 40), task="qa", out=tmp_path / "qa.html"))
    assert data["cut"] == 14 and [t["segment"] for t in data["tokens"]].count(0) == 3
    roberta, tokenizer = loaded("classify", "Roberta")
    tokenizer.model_max_length = 10**9  # its 40 positions begin behind the padding's, 0
    assert len(encode(roberta, tokenizer, "a " * 100, "classify")) == 39


def test_words_have_tags_and_those_with_one_are_explained(loaded):
    model, tokenizer = loaded("tag")
    model.classifier.weight.data *= 4
    text = "a cat, the dog sat on it at noon"
    encoded, prediction, made = explained(model, tokenizer, "tag", text)
    with torch.no_grad():
        labels = model(**encoded.inputs).logits[0].argmax(-1)
    words = [place for place, told in enumerate(prediction.of_tokens) if told is not None]
    assert [encoded.tokens[place].text for place in words] == list("ac,tdsoian")
    for place in words:
        assert prediction.of_tokens[place][0] == model.config.id2label[int(labels[place])]
    tagged = [one.target.name != "O" for one in made]
    assert tagged == sorted(tagged, reverse=True)
    name = made[0].target.name
    *_, only = explained(model, tokenizer, "tag", text, [name])
    assert {one.target.name for one in only} == {name}


def test_an_answer_is_in_the_context_and_not_backwards(loaded):
    model, tokenizer = loaded("qa")
    for number in range(5):
        model.qa_outputs.weight.data.normal_(generator=torch.Generator().manual_seed(number))
        encoded, prediction, made = explained(model, tokenizer, "qa")
        start, end = prediction.targets[0].token
        context = [place for place, token in enumerate(encoded.tokens) if token.segment == 1]
        assert start <= end and {start, end} <= set(context)
        with torch.no_grad():
            said = model(**encoded.inputs)
        best = max(
            float(said.start_logits[0, s] + said.end_logits[0, e])
            for s in context
            for e in context
            if s <= e
        )
        assert made[0].output == pytest.approx(best, rel=1e-5)
        torch.testing.assert_close(made[0].scores, made[1].scores + made[2].scores)


def test_a_regression_and_several_labels_at_once(loaded):
    model, tokenizer = loaded("classify")
    model.config.problem_type = "multi_label_classification"
    _, prediction, made = explained(model, tokenizer, "classify")
    for one in made:
        assert one.target.probability == pytest.approx(1 / (1 + 2.718281828459045**-one.output))
    model.config.problem_type = "regression"
    _, prediction, made = explained(model, tokenizer, "classify")
    assert [one.target.probability for one in made] == [None] * 3


WRONG = [
    ("guess", "a", {}, "task must be one of classify, tag, pair, qa, got 'guess'"),
    ("pair", "a", {}, r"'pair' explains 2 text\(s\), got 1"),
    ("classify", " \n", {}, "a text to explain must have words, got an empty one"),
    ("classify", "a \ud83d", {}, "a text to explain must be Unicode, got halves of surrogate"),
    ("classify", "\x00", {}, "a text to explain must have tokens, got one of which none is left"),
    ("classify", "a", {"labels": ["maybe"]}, "a label to explain must be one of O, yes, no, got"),
    ("qa", ("a", "b"), {"labels": ["yes"]}, "an answer has no labels to choose from"),
    ("qa", ("a " * 40, "b"), {}, "the question leaves no room for its context within 32 tokens"),
    ("tag", "a", {"model": "classify"}, "'tag' needs a model with its head, got a BertForSeq"),
    ("qa", ("a", "b"), {"model": "tag"}, "'qa' needs a model with its head, got a BertForToken"),
    ("classify", "a", {"model": "qa"}, "'classify' needs a model with its head, got a BertForQ"),
    ("classify", "a", {"out": "/nowhere/page.html"}, "the page: '/nowhere/page.html' can't be"),
]


@pytest.mark.parametrize(("task", "texts", "more", "said"), WRONG, ids=[w[-1][:30] for w in WRONG])
def test_wrong_requests_end_in_a_line(task, texts, more, said, loaded, tmp_path):
    more = dict(more)
    known = task if task in HEADS else "classify"
    model, tokenizer = loaded(more.pop("model", known))
    more["out"] = tmp_path / more.pop("out", "page.html")
    with pytest.raises(UserError, match=said):
        explain(model, tokenizer, texts, task=task, **more)
    assert not more["out"].exists()
