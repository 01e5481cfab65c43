"""``demo``: the expansion and the clamp of a small batch, drawn in the terminal or as a picture."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

import cupy_nsa_meta

from . import BAD_OPTIONS, FAILED, OK
from .terminal import Painter, print_json

EXTEND = (3, 2, 3)
SEQ = (10, 4, 1)  # the last request is a padding row of a CUDA graph
TOPK = 9
MAX_ROWS = 200  # a drawing, not a benchmark
NUMBERS_WIDTH = 55  # of the columns beside the bars
NARROWEST = 10  # cells of a bar
SHADES = {"kept": "█", "cut": "▒", "unseen": "·"}
PLAIN_SHADES = {"kept": "#", "cut": "+", "unseen": "."}
COLOURS = {"kept": "cyan", "cut": "yellow", "unseen": "dim"}
FILLS = {"kept": "#2f6fb3", "cut": "#f0a43c", "unseen": "#e4e6ea"}
CLAMPED = "#c0392b"
MEANINGS = {
    "kept": "seen, and within top-k",
    "cut": "seen, but over top-k: the clamp takes them off the count",
    "unseen": "later tokens of the same request",
}


class Drawn(NamedTuple):
    """A batch and what the package makes of it."""

    extend: list[int]
    seq: list[int]
    topk: int
    expanded: list[int]
    clamped: list[int]

    def rows(self) -> list[tuple[int, int, int]]:
        """(row, request, j) of every row."""
        starts = [0, *accumulate(self.extend)]
        return [
            (starts[request] + j, request, j)
            for request, q in enumerate(self.extend)
            for j in range(q)
        ]

    def parts(self, row: int, request: int) -> dict[str, int]:
        """KV tokens of a row by what becomes of them."""
        seen, kept = self.expanded[row], self.clamped[row]
        return {
            "kept": kept,
            "cut": seen - kept,
            "unseen": max(self.seq[request] - seen, 0),
        }


def integers(text: str) -> list[int]:
    """An argparse type: integers between commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers between commas, got {text!r}"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("--extend", EXTEND, "extend_seq_lens: query tokens of each request"),
        ("--seq", SEQ, "seq_lens: KV length of each request"),
    ):
        parser.add_argument(
            name, type=integers, default=list(default), metavar="N,N,...",
            help=f"{text}; default {','.join(map(str, default))}",
        )  # fmt: skip
    parser.add_argument(
        "--topk", type=int, default=TOPK, metavar="N", help=f"nsa_index_topk; default {TOPK}"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw into a file, by matplotlib: PNG, SVG, PDF",
    )


def run(args: argparse.Namespace) -> int:
    try:
        drawn = compute(args.extend, args.seq, args.topk)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # of bad lengths
        print(f"cupy_nsa_meta demo: error: {error}", file=sys.stderr)
        return BAD_OPTIONS
    if args.picture is not None:
        try:
            picture(drawn, args.picture)
        except ImportError:
            print(
                "cupy_nsa_meta demo: --picture: expected matplotlib, got none; "
                "pip install 'cupy-nsa-meta[bench]'",
                file=sys.stderr,
            )
            return FAILED
        except (OSError, ValueError) as error:  # no such folder; no such format
            print(f"cupy_nsa_meta demo: --picture: {error}", file=sys.stderr)
            return BAD_OPTIONS
    if args.json:
        print_json({"command": "demo", "ok": True, **drawn._asdict()})
    else:
        print(text(drawn))
        if args.picture is not None:
            print(f"\ndrawn: {args.picture}")
    return OK


def compute(extend: list[int], seq: list[int], topk: int) -> Drawn:
    """Run the operation on CPU tensors."""
    total = sum(extend)
    if total > MAX_ROWS:
        raise ValueError(f"--extend: expected at most {MAX_ROWS} rows to draw, got {total}")
    outs = torch.zeros((2, max(total, 0)), dtype=torch.int32)
    lengths = [torch.tensor(values, dtype=torch.int64) for values in (extend, seq)]
    total = cupy_nsa_meta.fill_draft_extend_metadata(lengths[0], lengths[1], topk, outs[0], outs[1])
    expanded, clamped = outs.tolist()
    return Drawn(extend, seq, topk, expanded, clamped)


# ---- In the terminal ----------------------------------------------------------------------------


def text(drawn: Drawn, width: int | None = None) -> str:
    """A bar for each row, scaled to the width of the terminal, and the two numbers beside it."""
    paint = Painter()
    shades = SHADES if paint.can_show("".join(SHADES.values())) else PLAIN_SHADES
    if width is None:
        width = shutil.get_terminal_size().columns
    longest = max([*drawn.seq, *drawn.expanded, 1])
    cells = max(NARROWEST, min(longest, width - NUMBERS_WIDTH))
    per_cell = -(-longest // cells)
    cells = -(-longest // per_cell)
    header = f"{'row':>5}   {'sees KV tokens'.ljust(cells)}  seqlens_expanded  nsa_cache_seqlens"
    lines = [paint(header, "dim")]
    last = -1
    for row, request, _ in drawn.rows():
        if request != last:
            lines += _skipped(drawn, last, request, paint)
            lines.append(_heading(drawn, request, paint))
            last = request
        bar = _bar(drawn.parts(row, request), per_cell, shades, paint, cells)
        clamps = [
            note
            for note, holds in (
                ("0", _raw(drawn, row, request) < 0),
                ("top-k", drawn.clamped[row] < drawn.expanded[row]),
            )
            if holds
        ]
        line = f"{row:>5}   {bar}  {drawn.expanded[row]:>16}  {drawn.clamped[row]:>17}"
        lines.append(line + "".join(f"  <- {note}" for note in clamps))
    lines += _skipped(drawn, last, len(drawn.extend), paint)
    lines.append("")
    lines += [f"{paint(shades[part], COLOURS[part])} {MEANINGS[part]}" for part in shades]
    lines.append(f"<- 0, <- top-k: clamped there; top-k is {drawn.topk}")
    if per_cell > 1:
        lines.append(f"one character is up to {per_cell} tokens")
    return "\n".join(lines)


def _heading(drawn: Drawn, request: int, paint: Painter) -> str:
    q, kv = drawn.extend[request], drawn.seq[request]
    kind = ", padding" if kv < q else ""
    return paint(f"request {request}: extend_seq_lens {q}, seq_lens {kv}{kind}", "blue")


def _skipped(drawn: Drawn, last: int, request: int, paint: Painter) -> list[str]:
    """Headings of the requests without rows between two others."""
    return [_heading(drawn, between, paint) for between in range(last + 1, request)]


def _raw(drawn: Drawn, row: int, request: int) -> int:
    """The length before the clamp at 0."""
    j = row - sum(drawn.extend[:request])
    return drawn.seq[request] - drawn.extend[request] + 1 + j


def _bar(
    parts: dict[str, int], per_cell: int, shades: dict[str, str], paint: Painter, cells: int
) -> str:
    bar = ""
    end = drawn_cells = 0
    for part, tokens in parts.items():
        end += tokens
        upto = -(-end // per_cell)
        if upto > drawn_cells:
            bar += paint(shades[part] * (upto - drawn_cells), COLOURS[part])
            drawn_cells = upto
    return bar + " " * (cells - drawn_cells)


# ---- As a picture -------------------------------------------------------------------------------

ROW_INCHES = 0.34
LABELLED_ROWS = 40  # above, numbers would overlap


def picture(drawn: Drawn, path: Path) -> None:
    """Draw into a file; its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or has no format that matplotlib knows.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    rows = drawn.rows()
    num_rows = max(len(rows), 1)
    height = 1.9 + min(num_rows * ROW_INCHES, 14.0)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(9.5, height), dpi=150, layout=layout)
    axes = figure.add_subplot()
    longest = max([*drawn.seq, *drawn.expanded, 1])
    starts = [0, *accumulate(drawn.extend)]
    for request, (begin, end) in enumerate(pairwise(starts)):
        if request % 2 and end > begin:
            axes.axhspan(begin - 0.5, end - 0.5, color="#f6f7f9", zorder=0)
        if begin not in (0, end):
            axes.axhline(begin - 0.5, color="#9aa0a8", linewidth=0.8, zorder=1)
    for row, request, _ in rows:
        left = 0
        for part, tokens in drawn.parts(row, request).items():
            axes.barh(row, tokens, left=left, height=0.72, color=FILLS[part], zorder=2)
            left += tokens
    if drawn.topk < longest:
        axes.axvline(drawn.topk, color=CLAMPED, linewidth=1.2, linestyle="--", zorder=3)
        axes.annotate(
            f"top-k {drawn.topk}", (drawn.topk, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", color=CLAMPED, ha="center", fontsize=9,
        )  # fmt: skip
    if len(rows) <= LABELLED_ROWS:
        _numbers(drawn, axes)
    axes.set_xlim(0, longest)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xlabel("KV tokens of the request")
    _request_labels(drawn, axes, starts)
    if longest <= 25:
        axes.set_xticks(range(longest + 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(
        handles=[Patch(color=FILLS[part], label=MEANINGS[part]) for part in FILLS],
        loc="outside lower center", ncols=1, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def _request_labels(drawn: Drawn, axes: object, starts: list[int]) -> None:
    """The requests as groups of rows on the left; the rows themselves where there is room."""
    set_yticks: Callable[..., object] = axes.set_yticks  # type: ignore[attr-defined]
    places, labels = [], []
    for request, (begin, end) in enumerate(pairwise(starts)):
        if end == begin:
            continue
        kv, q = drawn.seq[request], drawn.extend[request]
        places.append((begin + end - 1) / 2)
        kind = " (padding)" if kv < q else ""
        labels.append(f"request {request}{kind}\nseq {kv}, extend {q}")
    set_yticks(places, labels, fontsize=9)


def _numbers(drawn: Drawn, axes: object) -> None:
    """The row, seqlens_expanded and nsa_cache_seqlens beside each bar; clamped numbers in red."""
    annotate: Callable[..., object] = axes.annotate  # type: ignore[attr-defined]
    rows = drawn.rows()
    at_zero = [_raw(drawn, row, request) < 0 for row, request, _ in rows]
    at_topk = [drawn.clamped[row] < drawn.expanded[row] for row, _, _ in rows]
    for x, name, values, is_clamped in (
        (1.04, "row", [row for row, _, _ in rows], [False] * len(rows)),
        (1.13, "seqlens_\nexpanded", drawn.expanded, at_zero),
        (1.25, "nsa_cache_\nseqlens", drawn.clamped, at_topk),
    ):
        annotate(
            name, (x, 1.0), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, annotation_clip=False,
        )  # fmt: skip
        for row, value in enumerate(values):
            annotate(
                str(value), (x, row), xycoords=("axes fraction", "data"), va="center", ha="center",
                fontsize=9, color=CLAMPED if is_clamped[row] else "black", annotation_clip=False,
            )  # fmt: skip
