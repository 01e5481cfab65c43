"""Trace replay: every step that serves a request trace (``benchmarks/replay.py``)."""

from __future__ import annotations

from ..session import Session

NAME = "trace"


def run(session: Session) -> None:
    if session.replay is not None:
        session.replay(session)
