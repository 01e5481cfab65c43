"""Pictures of the suite ``fused``: one for each operation."""

from __future__ import annotations

import math
from typing import Any

from .fused import EXTEND_ROWS, HALF
from .fused_results import TITLES, Point, medians, values_of
from .measure import END_TO_END, GPU, HOST

EXTEND = "fused-extend.png"
ENQUEUE_WIDTH = 32768  # the host's time does not follow W: one panel for all
OURS, PLAN, THEIRS, TORCH = "#1a6fb0", "#12395c", "#8b959c", "#6a994e"
COLORS = {"cuda": OURS, "cuda-plan": PLAN, "sglang": THEIRS, "loop": THEIRS, "torch": TORCH}
NAMES = {"sglang": "SGLang", "cuda": "ours", "cuda-plan": "ours, plan"}
KV_LINES = {HALF: ("-", "W/2 to W"), "1024": (":", "1,024")}
TABLES = {False: "real_page_table alone", True: "with page_table_1"}

Series = dict[str, list[tuple[int, float]]]


def file_name(op: str) -> str:
    return f"fused-{TITLES[op]}.png"


def tables_figure(pyplot: Any, rows: list[dict[str, Any]], gpu: str, op: str) -> Any:
    """GPU time by requests for each W, without and with page_table_1; the host's time beside it."""
    on_gpu, on_host = (
        {name: medians(rows, name, metric, op) for name in ("sglang", "cuda")}
        for metric in (GPU, HOST)
    )
    on_host["cuda-plan"] = medians(rows, "cuda-plan", HOST, op)
    points = on_gpu["cuda"]
    if not points:
        return None
    widths = [w for w in values_of(points, "width") if _is_curve(points, w)]
    kinds = [kind for kind in TABLES if kind in values_of(points, "page_table_1")]
    if not widths:
        return None
    columns = len(widths) + 1
    figure, grid = pyplot.subplots(
        len(kinds), columns, figsize=(3.5 * columns, 3.0 * len(kinds) + 0.9), squeeze=False
    )
    for axes_of_row, page_table_1 in zip(grid, kinds, strict=True):
        for axes, width in zip(axes_of_row, widths, strict=False):
            for name, measured in on_gpu.items():
                for kv, (line, _) in KV_LINES.items():
                    _line(axes, name, _by_bs(measured, width, page_table_1, kv), line)
            axes.set_title(f"GPU time, W {width:,}", fontsize=11)
        beside = axes_of_row[-1]
        width = ENQUEUE_WIDTH if ENQUEUE_WIDTH in widths else widths[0]
        for name, measured in on_host.items():
            _line(beside, name, _by_bs(measured, width, page_table_1, HALF), "-")
        beside.set_title(f"enqueue on the host, W {width:,}", fontsize=11)
        axes_of_row[0].set_ylabel(f"{TABLES[page_table_1]}\nus per call")
    for axes in grid.flat:
        _finish(axes, values_of(points, "bs"))
    for axes in grid[-1]:
        axes.set_xlabel("requests (bs)")
    _share_y([axes for axes_of_row in grid for axes in axes_of_row[:-1]])
    _share_y([axes_of_row[-1] for axes_of_row in grid])
    _legend(figure, pyplot, [name for name in on_host if on_host[name]])
    figure.suptitle(f"{TITLES[op]}, {gpu}", x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    return figure


def extend_figure(pyplot: Any, rows: list[dict[str, Any]], gpu: str) -> Any:
    """EXTEND: the call with its wait, what it takes to enqueue, GPU time."""
    panels = []
    everybody = ("loop", "torch", "cuda", "cuda-plan")
    for metric, title, names in (
        (END_TO_END, "call and wait", everybody),
        (HOST, "enqueue on the host", everybody),
        (GPU, "GPU time (the loop cannot be captured)", ("torch", "cuda")),
    ):
        series = {
            name: sorted((p.bs, us) for p, us in medians(rows, name, metric, "extend").items())
            for name in names
        }
        if series["cuda"]:
            panels.append((title, series))
    if not panels:
        return None
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.0), sharey=True, squeeze=False
    )
    labels = {"loop": "loop over the requests", "torch": "torch, vectorised", **NAMES}
    for axes, (title, series) in zip(grid[0], panels, strict=True):
        for name, points in series.items():
            _line(axes, name, points, "-", labels[name])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("requests (bs)")
        _finish(axes, sorted({bs for points in series.values() for bs, _ in points}))
    grid[0][0].set_ylabel("us per call")
    grid[0][0].legend(frameon=False, fontsize=10, loc="upper left")
    rows_text = " to ".join(f"{count:,}" for count in EXTEND_ROWS)
    figure.suptitle(f"EXTEND, {rows_text} rows, all 1-D arrays, {gpu}", x=0.02, ha="left")
    figure.tight_layout()
    return figure


def _is_curve(points: dict[Point, float], width: int) -> bool:
    return len({point.bs for point in points if point.width == width}) > 1


def _by_bs(
    measured: dict[Point, float], width: int, page_table_1: bool, kv: str
) -> list[tuple[int, float]]:
    return sorted(
        (point.bs, us)
        for point, us in measured.items()
        if (point.width, point.page_table_1, point.kv) == (width, page_table_1, kv)
    )


def _line(
    axes: Any, name: str, points: list[tuple[int, float]], line: str, label: str | None = None
) -> None:
    if points:
        x, y = zip(*points, strict=True)
        style = {"marker": "o", "markersize": 3.5, "linewidth": 1.7}
        axes.plot(x, y, color=COLORS[name], linestyle=line, label=label, **style)


def _finish(axes: Any, batch_sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batch_sizes, [str(bs) for bs in batch_sizes], fontsize=9.5)
    axes.yaxis.set_major_formatter(lambda us, position: f"{us:,.10g}")
    axes.yaxis.set_minor_formatter(lambda us, position: "")
    axes.grid(True, which="major", color="#e5e8ea", linewidth=0.8)


def _share_y(all_axes: list[Any]) -> None:
    """One scale of whole decades for panels that are to be compared."""
    ends = [axes.dataLim.intervaly for axes in all_axes]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    for axes in all_axes:
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))


def _legend(figure: Any, pyplot: Any, names: list[str]) -> None:
    def sample(color: str, line: str) -> Any:
        return pyplot.Line2D([], [], color=color, linestyle=line, linewidth=1.7)

    entries = [(sample(COLORS[name], "-"), NAMES[name]) for name in names]
    entries += [(sample("black", line), f"KV lengths {text}") for line, text in KV_LINES.values()]
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=10)
