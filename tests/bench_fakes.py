"""What the tests of bench.py share: a GPU made of Python, and rows of runs that never happened."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Effort

CPU = torch.device("cpu")
SMALL = Effort(rounds=2, block=6, replays=4, graph_us=20.0, max_nodes=8)
NODE_US = 3.0


class FakeGpu(measure.Device):
    """Records and replays in Python, so that the paths of a GPU run without one.

    Its times are made up, so that no test depends on how busy this machine is: NODE_US for each
    node of a graph, up to 2 % more or less, in turn.
    """

    is_gpu = True

    def __init__(self) -> None:
        super().__init__(CPU)
        self.replayed: list[object] = []
        self._nodes: dict[object, int] = {}
        self._factors = cycle((0.98, 0.99, 1.0, 1.01, 1.02))

    def graph(self, record, count):
        def replay():
            for _ in range(count):
                record()

        self._nodes[replay] = count
        return replay

    def time_us(self, replay):
        replay()
        self.replayed.append(replay)
        return NODE_US * self._nodes[replay] * next(self._factors)


def stored_row(suite, provider, metric, median, op="draft_extend", **case) -> dict[str, Any]:
    return {
        "op": op,
        "suite": suite,
        "case": case,
        "provider": provider,
        "metric": metric,
        "median": median,
        "p20": median * 0.9,
        "p80": median * 1.1,
    }


def fused_rows() -> list[dict[str, Any]]:
    """A run of the suite fused that meets every target."""
    grid = list(
        product(
            ("decode", "target_verify", "draft_extend_fused"),
            (1, 8, 32, 64, 256, 1024),
            (4096, 32768, 131072),
            (False, True),
            ("half", "1024"),
        )
    )
    grid += [("decode", 1024, 8192, False, kv) for kv in ("half", "1024")]
    rows = []
    for op, bs, width, page_table_1, kv in grid:
        case = {"bs": bs, "width": width, "page_table_1": page_table_1, "kv": kv, "seed": 0}

        def add(provider, metric, median, op=op, case=case):
            rows.append(stored_row("fused", provider, metric, median, op=op, **case))

        tokens = 0.75 * width if kv == "half" else 1024
        moved = bs * tokens * 4 * (2 if op == "decode" else 4)  # bytes
        written = moved / 4.0e6  # us, at 4 TB/s
        blocks = bs * width / 128 / 400
        theirs = 2.0 + max(written, blocks) + (bs * 0.3 if op == "draft_extend_fused" else 0)
        ours = 1.4 + bs / 400 + (written if page_table_1 else written / 64)
        add("sglang", "gpu_us", theirs + 5)
        add("sglang", "host_us", 40.0 + bs / 200)
        for provider, us in (("cuda", 5.0), ("cuda-plan", 2.0)):
            add(provider, "gpu_us", ours)
            add(provider, "host_us", us)
        add("cuda-views", "host_us", 6.0)
        if op == "draft_extend_fused":
            add("cuda-plan-device", "host_us", 1.9)
        add("bare-graph", "host_us", 1.8)
        if page_table_1 and moved >= 1 << 27:
            for provider, factor in (("cuda", 0.95), ("copy", 1.0)):
                add(provider, "gb_per_s", 4000.0 * factor)
    for bs in (1, 16, 64, 256):
        case = {"bs": bs, "width": 32768, "page_table_1": False, "kv": "half", "rows": 12288}
        for provider, enqueue, waits, gpu in (
            ("loop", 190 + 44.0 * bs, 40.0, None),
            ("torch", 200.0, 10.0, 60.0),
            ("cuda", 5.5, 5.5, 3.0),
            ("cuda-plan", 2.1, 5.5, 3.0),
        ):
            figures = (("end_to_end_us", enqueue + waits), ("host_us", enqueue), ("gpu_us", gpu))
            rows += [
                stored_row("fused", provider, metric, us, op="extend", **case)
                for metric, us in figures
                if us is not None
            ]
    return rows
