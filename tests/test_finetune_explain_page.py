"""The page of an explanation in a browser: what it shows, and that it needs nothing else."""

import os
import re
from pathlib import Path

import pytest
from support import browser as browsers
from support import encoders

transformers = pytest.importorskip("transformers")
pytest.importorskip("captum")

from bertfast.recipes.finetune.explain import attention as attention_module  # noqa: E402
from bertfast.recipes.finetune.explain import explain, page  # noqa: E402
from bertfast.recipes.finetune.explain.encoded import encode  # noqa: E402
from bertfast.recipes.finetune.explain.unchanged import unchanged  # noqa: E402

READY = "document.documentElement?.dataset.ready === 'true'"
NASTY = (
    '</script><b>x</b> <!-- & "q" \\u003c ${x} \u2028\u202e r2l 😀é <img src=/x onerror=a()>\t a'
)


@pytest.fixture(scope="module")
def browser():
    """A browser. Where BERTFAST_BROWSER is set, its absence is an error."""
    path = browsers.found()
    if path is None:
        reason = f"none of {', '.join(browsers.NAMES)} is on PATH"
        if os.environ.get("BERTFAST_BROWSER"):
            pytest.fail(f"BERTFAST_BROWSER is set, and {reason}")
        pytest.skip(reason)
    with browsers.browser(path) as opened:
        yield opened


@pytest.fixture
def opened(browser, tmp_path):
    """A function that explains a text and opens the page; then nothing else may have been asked
    for, and nothing complained of."""

    def open_(task, texts, **more):
        head = {"tag": "Token", "qa": "QuestionAnswering"}.get(task, "Sequence")
        kind = f"BertFor{head.removesuffix('QuestionAnswering')}Classification"
        kind = "BertForQuestionAnswering" if task == "qa" else kind
        folder = encoders.save(tmp_path / "model", kind, **more)
        model = getattr(transformers, kind).from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        made = explain(model, tokenizer, texts, task=task, out=tmp_path / "page.html")
        browser.show(1280, 900, "light")
        browser.open(made, READY)
        return model, tokenizer

    browser.events.clear()
    yield open_
    assert not browser.complaints()
    assert set(browser.asked()) == {(tmp_path / "page.html").as_uri()}


def texts_of(browser, selector):
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def numbers(texts):
    """Of what a page shows, by its own minus sign."""
    return [float(re.sub("[^0-9.e-]", "", text.replace("\u2212", "-"))) for text in texts]


def choose(browser, select, value):
    browser.run(
        f"(() => {{ const s = document.getElementById('{select}'); s.focus(); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); })()"
    )


def data(browser):
    return browser.run("JSON.parse(document.getElementById('data').textContent)")


LABELS = {n: f"label <{n}>" for n in range(12)}


def test_labels_are_chosen_and_their_numbers_shown(browser, opened):
    opened("classify", "a cat sat", id2label=LABELS)
    told = data(browser)
    assert len(told["targets"]) == 10
    assert texts_of(browser, "#unexplained") == ["2 more labels, less probable, are not explained."]
    assert texts_of(browser, ".target .name") == [one["name"] for one in told["targets"]]
    shown = numbers(texts_of(browser, ".target .number"))
    assert shown == pytest.approx([100 * one["probability"] for one in told["targets"]], abs=0.051)
    for number in (0, 7):
        browser.run(f"document.querySelectorAll('.target')[{number}].click()")
        one = told["targets"][number]
        places = [int(text) for text in texts_of(browser, "#ranking td:first-child")]
        scores = numbers(texts_of(browser, "#ranking td.number"))
        digits = max(map(abs, one["scores"])) / 100  # three digits of the largest
        for place, score in zip(places, scores, strict=True):
            assert score == pytest.approx(one["scores"][place], abs=digits)
        sizes = [abs(one["scores"][place]) for place in places]
        assert sizes == sorted(sizes, reverse=True)
        for name in ("output", "baseline", "sum", "delta"):
            assert numbers(texts_of(browser, f"#{name}")) == pytest.approx([one[name]], abs=digits)
        assert texts_of(browser, "#steps") == [str(one["steps"])]
        least, most = numbers(texts_of(browser, "#least, #most"))
        assert most == -least == pytest.approx(sizes[0], abs=digits)
        colours = browser.run(
            "[...document.querySelectorAll('#text .token')].map(e =>"
            " [e.classList.contains('for'), Number(e.style.getPropertyValue('--w'))])"
        )
        for (raises, weight), score in zip(colours, one["scores"], strict=True):
            assert raises == (score > 0) and weight == pytest.approx(abs(score) / sizes[0])


def test_layers_and_heads_are_chosen_and_their_weights_shown(browser, opened):
    model, tokenizer = opened("pair", ("a cat", "dogs sat"), num_labels=2)
    encoded = encode(model, tokenizer, ("a cat", "dogs sat"), "pair")
    with unchanged(model):
        weights = attention_module.weights_of(model, encoded)
    shown_of = {}
    for layer in (0, 1):
        for head in (-1, 0, 1):
            choose(browser, "layer", layer)
            choose(browser, "head", head)
            want = weights[layer].mean(0) if head < 0 else weights[layer, head]
            for query in (0, 3):
                browser.run(f"document.querySelectorAll('#queries .token')[{query}].click()")
                places = [int(text) for text in texts_of(browser, "#keys td:first-child")]
                shown = numbers(texts_of(browser, "#keys td.number"))
                near = [100 * float(want[query, place]) for place in places]
                assert shown == pytest.approx(near, abs=0.4 + 0.051)
                assert len(places) == min(12, len(encoded)) and shown == sorted(shown)[::-1]
                shown_of[layer, head, query] = shown, places
            largest = numbers(texts_of(browser, "#largest"))
            assert largest == pytest.approx([100 * float(want.max())], abs=0.45)
    assert len({str(made) for made in shown_of.values()}) == len(shown_of)
    # the picture has the same: a cell's strength is the weight's square root
    picture = """(() => {
        const map = document.getElementById('map'), size = tokens.length;
        const margin = (map.clientWidth - 64) / size >= 11 ? 64 : 0;
        const cell = (map.width - margin) / size, context = map.getContext('2d');
        const line = context.getImageData(0, margin + 5.5 * cell, map.width, 1).data;
        const at = (column) => line[4 * Math.round(margin + (column + 0.5) * cell) + 3] / 255;
        return Array.from({length: size}, (_, column) => at(column));
    })()"""
    want = (weights[1, 1, 5] / weights[1, 1].max()).sqrt()
    assert browser.run(picture) == pytest.approx(want.tolist(), abs=0.02)


def test_a_nasty_text_is_shown_verbatim(browser, opened):
    # Behind the tokens that are read, and in a label, it isn't cut into tokens.
    opened("classify", NASTY * 2, id2label={0: NASTY, 1: "other"})
    assert NASTY in texts_of(browser, ".target .name")
    assert "</script>" in texts_of(browser, "#text .rest")[0]
    for box in ("text", "queries"):
        shown = browser.run(
            f"(() => {{ const box = document.getElementById('{box}').cloneNode(true);"
            "box.querySelectorAll('.added').forEach(e => { e.nextSibling.remove(); e.remove(); });"
            "return box.textContent; })()"
        )
        assert shown == NASTY * 2
    assert browser.run("document.querySelectorAll('main b, main img, script').length") == 2
    assert browser.run("document.title") == "model: classify, explained"


def test_a_text_gives_its_own_direction(browser, opened):
    opened("pair", ("\u0647\u0630\u0627 a", "a cat"), num_labels=2)
    shown = browser.run(
        "[...document.querySelectorAll('#text p')].map(p => p.matches(':dir(rtl)'))"
    )
    assert shown == [True, False]
    browser.run("document.querySelector('#text .token').focus()")
    browser.press("ArrowLeft", "ArrowDown", "ArrowLeft", "ArrowRight")
    assert browser.run("document.activeElement.dataset.place") == "2"


def test_keys_alone_do_it_all(browser, opened):
    opened("tag", "a cat, a dog", id2label={0: "O", 1: "animal", 2: "other"})
    told = data(browser)
    active = "document.activeElement"
    browser.run("document.querySelector('.target input').focus()")
    browser.press("ArrowDown")
    assert browser.run(f"{active}.value") == "1" and browser.run(f"{active}.checked")
    target = told["targets"][1]
    place = target["span"][0]
    assert browser.run("document.querySelector('#text .about').dataset.place") == str(place)
    name = told["tokens"][place]["text"]
    (said,) = texts_of(browser, "#attends")
    assert said == f"\u201c{name}\u201d (place {place}) attends to"
    browser.press("Tab")
    assert browser.run(f"{active}.closest('#text') !== null")
    browser.press("Home", "ArrowRight")
    assert browser.run(f"{active}.dataset.place") == "1"
    (readout,) = texts_of(browser, "#readout")
    assert readout.startswith("a: ") and "place 1" in readout and "label " in readout
    assert numbers([readout.split(" \u00b7 ")[0]]) == pytest.approx(
        [target["scores"][1]], abs=max(map(abs, target["scores"])) / 100
    )
    browser.press("End")
    assert texts_of(browser, "#readout")[0].startswith("[SEP]: ")
    stops = []
    for _ in range(4):
        browser.press("Tab")
        stops.append(browser.run(f"{active}.id || {active}.classList[0]"))
    assert stops == ["panel", "layer", "head", "token"]
    browser.press("Home", "ArrowRight", "ArrowRight")
    assert texts_of(browser, "#attends")[0].endswith("(place 2) attends to")
    tags = texts_of(browser, "#text .tag")
    assert tags == [made[0] for made in told["labels"] if made and made[0] != "O"]
    names = {f"{word} \u2192" for word in ("a", "cat", ",", "dog")}
    assert {name[: name.index("\u2192") + 1] for name in texts_of(browser, ".name")} == names


def test_an_answer_and_a_text_that_was_cut(browser, opened):
    opened("qa", ("who sat", "a cat or a dog sat " * 5))
    told = data(browser)
    start, end = told["targets"][0]["span"]
    chosen = browser.run(
        "[...document.querySelectorAll('#text .about')].map(e => +e.dataset.place)"
    )
    assert chosen == list(range(start, end + 1))
    assert f"The text was cut: {told['cut']} of" in texts_of(browser, "#notes")[0]
    assert texts_of(browser, "#text .rest") == [told["rest"][1]]
    (headline,) = texts_of(browser, "h1")
    answer = "".join(t["before"] + t["text"] for t in told["tokens"][start : end + 1]).strip()
    assert headline.startswith(f"Answer: \u201c{answer}\u201d")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_fits_a_phone(browser, opened, scheme):
    opened("tag", "a cat, a dog " * 2 + "a" * 15, id2label={0: "O", 1: "animal", 2: "x" * 40})
    browser.show(1280, 900, scheme)
    contrasts = browser.run((Path(__file__).parent / "data" / "contrast.js").read_text())
    assert len(contrasts) > 50
    assert not [found for found in contrasts if found[1] < 4.5]  # WCAG's AA
    browser.show(360, 800, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= 360


def test_means_alone_and_no_weights(browser, opened, monkeypatch):
    monkeypatch.setattr(page, "MOST_WEIGHTS", 10)
    opened("classify", "a cat", num_labels=2)
    assert texts_of(browser, "#head option") == ["mean of all 2"]
    assert browser.run("document.getElementById('means').checkVisibility()")


def test_a_model_without_weights_says_so(browser, opened, monkeypatch):
    monkeypatch.setattr("bertfast.recipes.finetune.explain.weights_of", lambda *_: None)
    opened("classify", "a cat", num_labels=2)
    assert browser.run("document.getElementById('without').checkVisibility()")
    assert not browser.run("document.getElementById('weights').checkVisibility()")
