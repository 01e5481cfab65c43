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
from pathlib import Path
from typing import Any, NoReturn

from . import BenchError, targets
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
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
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
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*text, "", *_sentences(document)])


def _sentences(document: Document) -> list[str]:
    rows, environment = document["rows"], document["environment"]
    lines = [
        "Medians of calls with changing lengths, the device idle before each; the first columns "
        "return the total to the host. Lengths: 1 to 5 query tokens, up to 9,000 KV tokens."
    ]
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


def _median(
    rows: Sequence[dict[str, Any]], provider: str, metric: str, bs: int | None
) -> float | None:
    for row in rows:
        if (row["provider"], row["metric"]) == (provider, metric) and (
            bs is None or (row["case"].get("bs") == bs and row["suite"] in ("seed", "floor"))
        ):
            return float(row["median"])
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
        try:
            text = args.insert.read_text(encoding="utf-8")
        except OSError as error:
            raise BenchError(
                f"{args.insert}: expected a readable file, got {error.strerror}"
            ) from error
        args.insert.write_text(inserted(text, content, str(args.insert)), encoding="utf-8")
        print(f"{args.insert}: table inserted")
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
