"""Limits of the kernels that make a product and its GELU at once."""

import torch

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 8  # of widths: 16 bytes
MAX_ROWS = 2**30  # rows are numbered in 32 bits, with room for a tile
MAX_WIDTH = 2**24

# Numbers of rows up to which "auto" tells calls apart.
ROWS = (256, 1024, 4096, 16384)


def rows_class(rows: int) -> int:
    """Of ROWS the one that serves a call; the rows themselves where they are beyond the limit."""
    if rows > MAX_ROWS:
        return rows
    return next((most for most in ROWS if rows <= most), ROWS[-1])


def unsupported_reason(
    dtype: torch.dtype | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    rows: int | None = None,
    pass_: str | None = None,
) -> str | None:
    """pass_: "backward" for the other half, which has the same limits."""
    if dtype is not None and dtype not in DTYPES:
        return f"its tensor-core kernels take float16 and bfloat16, got {dtype}"
    for name, width in (("inputs", inputs), ("outputs", outputs)):
        if width is not None and (width % MULTIPLE or not MULTIPLE <= width <= MAX_WIDTH):
            return (
                f"{name} must be a multiple of {MULTIPLE} between {MULTIPLE} and {MAX_WIDTH}, "
                f"got {width}"
            )
    if rows is not None and rows > MAX_ROWS:
        return f"there must be at most {MAX_ROWS} rows, got {rows}"
    return None
