"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def size_text(nbytes: float) -> str:
    """`nbytes` with a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """`seconds` with a unit that leaves one to three digits before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def shorten(text: str, length: int) -> str:
    """`text`, cut to at most `length` characters with an ellipsis at its end."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Lines of a text table; the first `left` columns are aligned to the left."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: tuple[str, ...]) -> str:
        aligned = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return [line(head), line(tuple("-" * w for w in widths)), *(line(r) for r in rows)]
