"""A family of models is one file: nothing of it stands elsewhere."""

import importlib
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from bertfast import hf  # noqa: E402
from bertfast.hf.families import FAMILIES  # noqa: E402

FOLDER = Path(hf.__file__).parent
MOST_LINES = 120
FILES = {path.stem: path for path in (FOLDER / "families").glob("*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("name", FILES)
def test_a_family_is_a_short_file_of_its_own(name):
    family = importlib.import_module(f"bertfast.hf.families.{name}").FAMILY
    text = FILES[name].read_text()
    assert family in FAMILIES and len(text.splitlines()) <= MOST_LINES
    classes = [*family.swapped, *family.heads]
    named = re.compile(r"\b(" + "|".join(classes) + r")\b")
    other = [path for path in FOLDER.rglob("*.py") if path != FILES[name]]
    for path in other:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        assert not named.search(code), path


def test_all_are_found():
    assert len(FAMILIES) == len(FILES) == len({family.title for family in FAMILIES})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_its_classes_are_transformers(family):
    for name in (*family.swapped, *family.heads):
        swapped = getattr(hf, name)
        assert swapped.__name__ == name and swapped._original.__module__ == family.module
        assert hf.why_unknown(swapped._original) is None


def test_contributing_shows_one():
    text = (FOLDER.parents[1] / "CONTRIBUTING.md").read_text()
    assert f"```python\n{FILES['camembert'].read_text()}```" in text
