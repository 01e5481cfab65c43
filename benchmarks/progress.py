"""A progress bar on stderr: rich where it is installed, else one line; nothing off a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

INTERVAL = 0.2  # seconds; drawn between steps, never by a thread beside the timed calls


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many of ``total`` items are done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        yield _throttled(total, lambda done: _draw_line(label, done, total))
        sys.stderr.write("\n")
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(label, total=total)
        yield _throttled(total, lambda done: bar.update(task, completed=done, refresh=True))


def _draw_line(label: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{label}: {done:,} of {total:,} ({done / max(total, 1):.0%})")
    sys.stderr.flush()


def _throttled(total: int, draw: Callable[[int], None]) -> Callable[[int], None]:
    last = 0.0

    def update(done: int) -> None:
        nonlocal last
        now = monotonic()
        if now - last >= INTERVAL or done == total:
            last = now
            draw(done)

    return update
