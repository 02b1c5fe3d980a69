"""Text cut into sentences, lightly: where NSP's segments begin and end.

A sentence ends at . ! ? … (and the quotes and brackets that close there) where white space and a
capital, a digit or an opening quote follow, or where a line ends; at 。！？ always; at an empty
line. Initials ("J. Smith") and a few titles and abbreviations ("Dr.", "e.g.") end none. A line that
ends otherwise goes on with the next: hard-wrapped text is as good as one line a paragraph.
"""

import re
from collections.abc import Iterator

# It opens with a set of characters, which re looks for fast, and takes time linear in the text's
# length: no two matches can be tried over the same run of marks or blanks.
_END = re.compile(
    r"""[.!?…。！？\n](?:
        (?<=[。！？])[”’」』）]*
      | (?<=\n)\s*\n
      | (?<=[.!?…])(?<![.!?…][.!?…])(?P<more>[.!?…]*)["'”’»)\]]*(?P<space>\s+)(?P<next>["'“‘«(\[]*.)
    )""",
    re.VERBOSE,
)
_SHORT = re.compile(
    r"(?:^|[\s(\[\"'])(?:[^\W\d_]|[^\W\d_]\.[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|cf|Fig)$"
)
_LONGEST_SHORT = 6  # "Prof" and what stands before it, and to spare


def sentences(text: str) -> Iterator[str]:
    """The sentences, none of them empty, with single blanks for line breaks."""
    start = 0
    for found in _END.finditer(text):
        end = found.end()
        if found["next"]:
            if not _ends(text, start, found):
                continue
            end = found.start("next")
        if sentence := " ".join(text[start:end].split()):
            yield sentence
        start = end
    if sentence := " ".join(text[start:].split()):
        yield sentence


def _ends(text: str, start: int, found: re.Match[str]) -> bool:
    lines = found["space"].count("\n")
    if lines > 1:
        return True
    if text[found.start()] == "." and not found["more"]:
        before = text[max(start, found.start() - _LONGEST_SHORT) : found.start()]
        if _SHORT.search(before):
            return False
    quote, following = found["next"][:1] in "\"'“‘«", found["next"][-1]
    capital = following.isalnum() and following == following.upper()
    return lines > 0 or quote or capital
