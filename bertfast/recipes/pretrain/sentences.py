"""Text cut into sentences, lightly: where NSP's segments begin and end.

A sentence ends at . ! ? … (and the quotes and brackets that close there) where white space and a
capital, a digit or an opening quote follow, or where a line ends; at 。！？ always; at an empty
line. Initials ("J. Smith") and a few titles and abbreviations ("Dr.", "e.g.") end none. A line that
ends otherwise goes on with the next: hard-wrapped text is as good as one line a paragraph.
"""

import re
from collections.abc import Iterator

_END = re.compile(
    r"""(?P<wide>[。！？]+[”’」』）]*)\s*
      | (?<=[^\W_])?(?P<mark>[.!?…]+)["'”’»)\]]*(?P<space>\s+)(?P<next>["'“‘«(\[]*.)
      | [ \t]*\n\s*\n\s*""",
    re.VERBOSE,
)
_SHORT = re.compile(
    r"(?:^|[\s(\[\"'])(?:[^\W\d_]|[^\W\d_]\.[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|cf|Fig|No)$"
)


def sentences(text: str) -> Iterator[str]:
    """The sentences, none of them empty, with single blanks for line breaks."""
    start = 0
    for found in _END.finditer(text):
        end = found.end()
        if found["mark"]:
            end = found.start("next")
            if not _ends(text, start, found):
                continue
        sentence = " ".join(text[start:end].split())
        start = end
        if sentence:
            yield sentence
    if sentence := " ".join(text[start:].split()):
        yield sentence


def _ends(text: str, start: int, found: re.Match) -> bool:
    following = found["next"][-1]
    lined = "\n" in found["space"]
    if found["mark"] == ".":
        before = text[max(start, found.start() - 8) : found.start()]
        if _SHORT.search(before):
            return lined and len(found["space"].split("\n")) > 2
    return lined or following.isupper() or following.isdigit() or len(found["next"]) > 1
