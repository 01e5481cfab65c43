"""Pictures of a stored run: speed-up bars with the floor, growth curves, the fused family.

Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import BenchError, fused_results, plot_fused
from .floor import median_for
from .measure import END_TO_END, GPU
from .stored import Document
from .targets import series

SPEEDUP = "speedup.png"
GROWTH = "growth.png"
BASELINE = "python"
FLOOR_BS = 32
OURS = "#1a6fb0"
OTHERS = "#9aa5ad"
FLOOR = "#c0392b"


def draw(document: Document, folder: Path) -> list[Path]:
    """Draw what the rows allow; returns the files."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError(
            "--plot: expected matplotlib, got none; pip install 'cupy-nsa-meta[bench]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["rows"]
    gpu = document["environment"].get("gpu") or "CPU"
    drawn = []
    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        for name, make in _makers().items():
            figure = make(pyplot, rows, gpu)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / name, dpi=130, bbox_inches="tight")
                pyplot.close(figure)
                drawn.append(folder / name)
    return drawn


def _makers() -> dict[str, Callable[..., Any]]:
    """File name -> the function that makes its figure, or None of rows that do not allow it."""
    fused = {
        plot_fused.file_name(op): partial(plot_fused.tables_figure, op=op)
        for op in fused_results.TITLES
    }
    return {
        SPEEDUP: _speedup,
        GROWTH: _growth,
        **fused,
        plot_fused.EXTEND: plot_fused.extend_figure,
    }


def _speedup(pyplot: Any, rows: list[dict[str, Any]], gpu: str) -> Any:
    """Bars of the end-to-end times at the floor's batch size, as speed-up over the Python loop."""
    times: dict[str, float] = {}
    floor = None
    for row in rows:
        if row["metric"] != END_TO_END or row["case"].get("bs") != FLOOR_BS:
            continue
        if row["suite"] == "seed":
            times[row["provider"]] = row["median"]
        elif row["provider"] == "floor-graph":
            floor = median_for(row, "seed")
    baseline = times.get(BASELINE)
    if not baseline or len(times) < 2:
        return None
    names = sorted(times, key=lambda name: times[name], reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(names) + 1.4))
    bars = axes.barh(
        names,
        [baseline / times[name] for name in names],
        color=[OURS if name.startswith("cuda") else OTHERS for name in names],
        height=0.68,
    )
    labels = [f"{times[name]:,.1f} us  ({baseline / times[name]:,.1f}x)" for name in names]
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the floor's line
    axes.bar_label(bars, labels, padding=5, fontsize=10, bbox=behind, zorder=3)
    axes.set_xscale("log")
    right = baseline / min([*times.values(), floor or baseline])
    axes.set_xlim(0.5, right * 6)
    if floor:
        axes.axvline(baseline / floor, color=FLOOR, linestyle="--", linewidth=1.4)
        axes.annotate(
            f"floor: C++ graph launch and poll, {floor:.1f} us",
            (baseline / floor, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            color=FLOOR,
            ha="center",
            fontsize=10,
        )
    axes.set_xlabel("speed-up over the Python loop (log scale)")
    axes.set_title(f"Call that returns the total, bs {FLOOR_BS}, {gpu}", pad=24, loc="left")
    return figure


def _growth(pyplot: Any, rows: list[dict[str, Any]], gpu: str) -> Any:
    """GPU time over requests and over rows, on one scale."""
    panels = [
        (label, [curve for curve in curves if curve[1]])
        for label, curves in (
            ("requests (bs)", _curves_over_bs(rows)),
            ("rows (T)", _curves_over_rows(rows)),
        )
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 4.8), sharey=True, squeeze=False
    )
    for axes, (label, curves) in zip(all_axes[0], panels, strict=True):
        _panel(axes, rows, curves, label)
    all_axes[0][0].set_ylabel("GPU time per launch (us)")
    figure.suptitle(f"Growth of GPU time, {gpu}", x=0.02, ha="left")
    figure.tight_layout()
    return figure


Curve = tuple[str, list[tuple[int, float]], str, str]  # label, points, colour, line style


def _curves_over_bs(rows: list[dict[str, Any]]) -> list[Curve]:
    curves: list[Curve] = []
    for name, color in (("torch", OTHERS), ("aot-extension", "#8e6bbf"), ("triton", "#6a994e")):
        points = series(rows, "growth-bs", name, "bs", capacity_factor=1)
        curves.append((f"{name}, capacity T", points, color, "-"))
    for factor, line in ((1, "-"), (16, ":")):
        points = series(rows, "growth-bs", "cuda", "bs", capacity_factor=factor)
        capacity = "T" if factor == 1 else f"{factor} T"
        curves.append((f"cuda, capacity {capacity}", points, OURS, line))
    return curves


def _curves_over_rows(rows: list[dict[str, Any]]) -> list[Curve]:
    curves: list[Curve] = []
    for label, name, bs, color, line in (
        ("torch fill, same bytes", "fill", 1, OTHERS, "-"),
        ("triton, bs 1024", "triton", 1024, "#6a994e", "-"),
        ("cuda, bs 1", "cuda", 1, OURS, "-"),
        ("cuda, bs 1024", "cuda", 1024, OURS, ":"),
    ):
        curves.append((label, series(rows, "growth-t", name, "rows", bs=bs), color, line))
    return curves


def _panel(axes: Any, rows: list[dict[str, Any]], curves: list[Curve], x_label: str) -> None:
    for label, points, color, line in curves:
        x, y = zip(*points, strict=True)
        is_fill = label.startswith("torch fill")  # under our curve, which should cover it
        style = {"linewidth": 6, "alpha": 0.6} if is_fill else {"marker": "o", "markersize": 3.5}
        axes.plot(x, y, label=label, color=color, linestyle=line, **style)
    empty = [
        row["median"] for row in rows if (row["provider"], row["metric"]) == ("floor-empty", GPU)
    ]
    if empty:
        axes.axhline(empty[0], color=FLOOR, linestyle="--", linewidth=1.4)
        axes.annotate(
            f"floor: empty graph node, {empty[0]:.2f} us",
            (0.99, empty[0]),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            color=FLOOR,
            ha="right",
            fontsize=10,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.grid(True, which="major", color="#e5e8ea", linewidth=0.8)
    axes.legend(frameon=False, loc="upper left", fontsize=10)
