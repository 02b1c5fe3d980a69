"""The README's table of products with a GELU on Hopper: counts of the budget's hot paths."""

from .hot_budget import Lines
from .sass import capability

_HEADINGS = ("in a turn", "outside", "shared bytes", "L2 bytes", "registers", "blocks")
_OTHERS = ("tanh", "tail", "gated")  # in names and labels of what the table leaves out
# By what in a kernel's name: how it multiplies.
_HOW = {"ping_pong": "wgmma by turns", "tma": "wgmma"}


def markdown(lines: Lines) -> str:
    """In bfloat16 with the exact GELU: instructions for each sum, the fewest outside first."""
    found = []
    for (source, kernel, label, dtypes, arch), line in lines.items():
        plain = dtypes == "bfloat16" and not any(word in kernel + label for word in _OTHERS)
        ours = kernel.startswith("linear_") and line.outside is not None
        if not (ours and plain and capability(arch) == 90):
            continue
        pass_ = "backward" if "backward" in kernel else "forward"
        how = [word for part, word in _HOW.items() if part in kernel] or ["mma.sync"]
        numbers = (line.instructions, line.outside, line.shared_bytes, line.cache_bytes)
        cells = ["-" if n is None else f"{n:.2f}" for n in numbers]
        cells += [str(line.registers), str(line.blocks)]
        name = f"{pass_}: {source}, {how[0]}, {label}"
        found.append((pass_ != "forward", line.outside, f"| {name} | {' | '.join(cells)} |"))
    heading = f"|  | {' | '.join(_HEADINGS)} |"
    rule = "| --- |" + " ---: |" * len(_HEADINGS)
    return "\n".join([heading, rule, *(text for *_, text in sorted(found))])
