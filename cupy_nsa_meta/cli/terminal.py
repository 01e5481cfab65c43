"""Text for people: colours where they are wanted, columns, one-line messages; JSON for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2"}


def has_colours(stream: TextIO) -> bool:
    """On a terminal that can show them, unless ``NO_COLOR`` is set (https://no-color.org)."""
    return (
        stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"
    )


class Painter:
    """Colours text for one stream, or leaves it as it is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._has_colours = has_colours(self._stream)

    def __call__(self, text: str, colour: str) -> str:
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self._has_colours else text

    def can_show(self, text: str) -> bool:
        """Whether the stream's encoding holds every character of ``text``."""
        try:
            text.encode(getattr(self._stream, "encoding", None) or "ascii")
        except UnicodeEncodeError:
            return False
        return True


def columns(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of cells as aligned text; the columns in ``right`` are aligned to the right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if idx in right else cell.ljust(width)
            for idx, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def one_line(message: object, longest: int = 600) -> str:
    """A message without line breaks, cut where it is very long."""
    line = " ".join(str(message).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."


def describe(error: BaseException) -> str:
    """An exception on one line, with its type."""
    return one_line(f"{type(error).__name__}: {error}")


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))
