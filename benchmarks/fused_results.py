"""Reading the rows of the suite ``fused``: by point, as ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]

SUITE = "fused"
#: op -> what it is called, in the order of tables and pictures; without EXTEND, which has no tables
TITLES = {
    "decode": "decode",
    "target_verify": "target-verify",
    "draft_extend_fused": "draft-extend",
}


class Point(NamedTuple):
    """A measured case, less what does not tell it from others."""

    op: str
    bs: int
    width: int
    page_table_1: bool
    kv: str

    def __str__(self) -> str:
        table = "" if self.page_table_1 else "no "
        return f"{self.op} bs {self.bs} W {self.width} {table}page_table_1 kv {self.kv}"


def medians(rows: Iterable[Row], provider: str, metric: str, op: str = "") -> dict[Point, float]:
    """Of one provider, of one operation or of all."""
    return {
        Point(row["op"], *(row["case"][name] for name in Point._fields[1:])): float(row["median"])
        for row in rows
        if (row["suite"], row["provider"], row["metric"]) == (SUITE, provider, metric)
        and row["op"] == (op or row["op"])
    }


def ratios(
    over: dict[Point, float],
    under: dict[Point, float],
    wanted: Callable[[Point], bool] = lambda point: True,
) -> dict[Point, float]:
    """Where both are measured."""
    return {
        point: value / under[point]
        for point, value in over.items()
        if under.get(point) and wanted(point)
    }


def geometric_mean(values: Iterable[float]) -> float | None:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def values_of(points: Iterable[Point], field: str) -> list[Any]:
    """The different values of a field, in order."""
    return sorted({getattr(point, field) for point in points})
