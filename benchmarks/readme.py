"""README table and pictures from a stored run, and its targets.

    python -m benchmarks.readme FILE.json                     print the table and the targets
    python -m benchmarks.readme FILE.json --insert README.md  put the table between its markers
    python -m benchmarks.readme FILE.json --plot DIR          draw the pictures, too

Exit status: 0; 2 bad options or input. (``benchmarks.targets`` fails where a target is missed.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from . import BenchError, targets
from .floor import median_for
from .fused import EXTEND_ROWS, HALF
from .fused_results import TITLES, Point, geometric_mean, medians, ratios, values_of
from .measure import BANDWIDTH, END_TO_END, FIRST_CALL, GPU, HOST
from .report import number
from .stored import Document, read_document

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
FLOOR_BS = 32
#: providers in the order of the table, with what each is
LABELS = {
    "cuda-plan": "`plan.run()`",
    "cuda": "`fill_draft_extend_metadata_cuda`, buffers met before",
    "cuda-fresh": "the same, never-seen buffers",
    "cuda-uncached": "the same, launch cache off",
    "cuda-total-tokens": "the same, `total_tokens=`",
    "cuda-async": "`fill_draft_extend_metadata_async`, `out_total=`",
    "triton": "`fill_draft_extend_metadata_inplace` (Triton)",
    "python": "`fill_draft_extend_metadata_python` (loop of aranges)",
    "torch": "torch operators, vectorised",
    "torch-compile": "the same, `torch.compile`",
    "aot-extension": "C++ extension: one launch, 4-byte copy, sync",
    "sglang": "SGLang `seqlens_expand_triton` + clamp",
    "seed-triton": "seed: cat, cumsum, `.item()`, Triton linear search",
    "seed-cuda": "seed: C++ extension, cumsum, two `.item()`",
    "bare-graph": "bound: CuPy's `graphLaunch` and a poll, from Python",
    "bare-launch": "bound: CuPy's `launchKernel` and a poll, from Python",
}
#: Batches of the fused family that have a column: requests, W
FUSED_BATCHES = ((1, 4096), (32, 4096), (256, 4096), (256, 32768), (1024, 131072))
FUSED_ENQUEUE = (32, 4096)
EXTEND_LABELS = {
    "cuda": "`fused_dsa_extend_metadata`",
    "cuda-plan": "its plan",
    "cuda-plan-device": "its plan, T from the device",
    "torch": "torch operators, vectorised",
    "loop": "loop over the requests, as in SGLang 0.5.23",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchError(message)


def table(document: Document) -> str:
    """The Markdown between the markers."""
    rows = document["rows"]
    batch_sizes = sorted(
        {row["case"]["bs"] for row in rows if row["suite"] == "seed" and "bs" in row["case"]}
    )
    floors = {
        metric: _median(rows, provider, metric, None)
        for provider, metric in (
            ("floor-graph", END_TO_END),
            ("floor-graph", HOST),
            ("floor-empty", GPU),
        )
    }
    end_to_end = [f"bs {bs}" for bs in batch_sizes]
    header = ["us", *end_to_end, "floor", "x floor", f"enqueue, bs {FLOOR_BS}"]
    header.append(f"GPU, bs {FLOOR_BS}")
    lines = _with_rule(header)
    for provider, label in LABELS.items():
        times = [_median(rows, provider, END_TO_END, bs) for bs in batch_sizes]
        enqueue, gpu = (_median(rows, provider, metric, FLOOR_BS) for metric in (HOST, GPU))
        if not any((*times, enqueue, gpu)):
            continue
        floor = floors[END_TO_END]
        whole = _median(rows, provider, END_TO_END, FLOOR_BS)
        ratio = f"{whole / floor:.2f}" if whole and floor else ""
        cells = [_cell(time) for time in times]
        lines.append(
            [label, *cells, _cell(floor) if whole else "", ratio, _cell(enqueue), _cell(gpu)]
        )
    blank = [""] * len(batch_sizes)
    floor_cells = [_cell(floors[END_TO_END]), "", _cell(floors[HOST]), ""]
    lines.append(["floor: C++ `cudaGraphLaunch` and poll, bs 32", *blank, *floor_cells])
    lines.append(["floor: empty graph node", *blank, "", "", "", _cell(floors[GPU])])
    parts = [lines, _fused_table(rows), _extend_table(rows)]
    text = [_markdown(part) for part in parts if part]
    return "\n\n".join([*text, "\n".join(_sentences(document))])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_rule(header: Sequence[str]) -> list[list[str]]:
    return [list(header), ["---", *["---:"] * (len(header) - 1)]]


def _fused_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The fused family beside SGLang; EXTEND is in a table of its own."""
    gpu, their_gpu, enqueue, their_enqueue = (
        medians(rows, provider, metric) for metric in (GPU, HOST) for provider in ("cuda", "sglang")
    )
    views, plan = (medians(rows, provider, HOST) for provider in ("cuda-views", "cuda-plan"))
    batches = [batch for batch in FUSED_BATCHES if any(point[1:3] == batch for point in gpu)]
    header = ["GPU us (SGLang)", *(f"bs {bs:,}, W {width:,}" for bs, width in batches)]
    header += ["ratio, geometric mean", "ratio, largest", "enqueue (SGLang)"]
    header += ["on new tensor objects", "`plan.launch()`"]
    lines = _with_rule(header)
    for op, page_table_1 in product(TITLES, (False, True)):
        if not any((point.op, point.page_table_1) == (op, page_table_1) for point in gpu):
            continue
        found = [
            ratio
            for point, ratio in ratios(gpu, their_gpu).items()
            if (point.op, point.page_table_1) == (op, page_table_1)
        ]
        mean = geometric_mean(found)
        points = [Point(op, *batch, page_table_1, HALF) for batch in (*batches, FUSED_ENQUEUE)]
        lines.append(
            [
                f"{TITLES[op]}{', `page_table_1`' if page_table_1 else ''}",
                *(_beside(gpu, their_gpu, point) for point in points[:-1]),
                "" if mean is None else f"{mean:.2f}",
                f"{max(found):.2f}" if found else "",
                _beside(enqueue, their_enqueue, points[-1]),
                _cell(views.get(points[-1])),
                _cell(plan.get(points[-1])),
            ]
        )
    return lines if len(lines) > 2 else []


def _beside(ours: dict[Point, float], theirs: dict[Point, float], point: Point) -> str:
    text = _cell(ours.get(point))
    return f"{text} ({number(theirs[point])})" if text and point in theirs else text


def _extend_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    times = {name: medians(rows, name, END_TO_END, "extend") for name in EXTEND_LABELS}
    batch_sizes = values_of((point for points in times.values() for point in points), "bs")
    if not batch_sizes:
        return []
    lines = _with_rule(["EXTEND, us until the device is idle", *(f"bs {bs}" for bs in batch_sizes)])
    for name, label in EXTEND_LABELS.items():
        by_bs = {point.bs: us for point, us in times[name].items()}
        if by_bs:
            lines.append([label, *(_cell(by_bs.get(bs)) for bs in batch_sizes)])
    return lines


def _sentences(document: Document) -> list[str]:
    rows, environment = document["rows"], document["environment"]
    lines = [
        "Medians of calls with changing lengths, the device idle before each; the first columns "
        "return the total to the host. Lengths: 1 to 5 query tokens, up to 9,000 KV tokens."
    ]
    lines += _fused_sentences(rows)
    shares = []
    for bs in (1, 1024):
        ours = dict(targets.series(rows, "growth-t", "cuda", "rows", BANDWIDTH, bs=bs))
        fill = dict(targets.series(rows, "growth-t", "fill", "rows", BANDWIDTH, bs=bs))
        largest = max((n for n in ours if n in fill), default=None)
        if largest is not None:
            shares.append(
                f"{number(ours[largest])} GB/s at bs {bs} (torch fill: {number(fill[largest])}) "
                f"for {largest:,} rows"
            )
    if shares:
        lines.append("Large batches: " + "; ".join(shares) + ".")
    cold = {
        row["case"]["cache"]: row["median"]
        for row in rows
        if (row["suite"], row["provider"], row["metric"]) == ("cold", "cuda", FIRST_CALL)
        and row["case"].get("call") == "first"
    }
    if cold:
        parts = [
            f"{number(seconds)} s with {cache} kernel cache" for cache, seconds in cold.items()
        ]
        lines.append("First call of a process: " + ", ".join(parts) + ".")
    lines.append(
        ", ".join(
            f"{name} {environment[key]}"
            for name, key in (
                ("", "gpu"),
                ("driver", "driver"),
                ("torch", "torch"),
                ("CuPy", "cupy"),
                ("NVRTC", "nvrtc"),
                ("Triton", "triton"),
                ("Python", "python"),
                ("commit", "commit"),
            )
            if environment.get(key)
        ).strip()
        + f". Made by `python {environment.get('command', 'bench.py')}`."
    )
    absent = document.get("absent", {})
    if absent:
        lines.append(f"Not run there: {', '.join(absent)}.")
    return ["  \n".join(lines)]


def _fused_sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    if medians(rows, "cuda", GPU):
        lines.append(
            "The fused family: KV lengths from W / 2 to W, 4 query tokens in target-verify, 1 to 5 "
            "in draft-extend, pages of 64; ratios to SGLang's GPU time over all sizes measured, "
            "with 1,024 KV tokens in each request, too; enqueue at "
            f"bs {FUSED_ENQUEUE[0]}, W {FUSED_ENQUEUE[1]:,}."
        )
    shares = ratios(medians(rows, "cuda", BANDWIDTH), medians(rows, "copy", BANDWIDTH))
    if shares:
        lines.append(
            f"Large tables: {min(shares.values()):.2f} to {max(shares.values()):.2f} of the "
            "bandwidth of a torch copy of the same bytes."
        )
    if medians(rows, "cuda", END_TO_END, "extend"):
        lowest, highest = EXTEND_ROWS
        lines.append(f"EXTEND: {lowest:,} to {highest:,} rows, all 1-D arrays.")
    return lines


def _median(
    rows: Sequence[dict[str, Any]], provider: str, metric: str, bs: int | None
) -> float | None:
    for row in rows:
        if (row["provider"], row["metric"]) == (provider, metric) and (
            bs is None or (row["case"].get("bs") == bs and row["suite"] in ("seed", "floor"))
        ):
            return median_for(row, "seed")
    return None


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)


def inserted(text: str, content: str, where: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with everything between the markers replaced."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BenchError(f"{where}: expected one {begin} before one {end}")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{content}\n{end}{tail}"


def insert(path: Path, content: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what a file holds between the markers."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path}: expected a readable file, got {error.strerror}") from error
    path.write_text(inserted(text, content, str(path), begin, end), encoding="utf-8")
    print(f"{path}: table inserted")


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.readme", allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--insert", type=Path, metavar="README.md")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    return parser


def run(args: argparse.Namespace) -> None:
    document = read_document(args.file)
    content = table(document)
    if args.insert is not None:
        insert(args.insert, content)
    else:
        print(content)
    if args.plot is not None:
        from . import plot

        for path in plot.draw(document, args.plot):
            print(f"drawn: {path}")
    print()
    print(targets.text(targets.targets(document)))


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv))
    except BenchError as error:
        print(f"readme: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
