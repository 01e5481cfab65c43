"""The suites of ``bench.py --suite``: one module each, with ``run(session)``, and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:  # the command line reads the names without importing torch
    from ..session import Session

#: name -> module in this folder, in the order of a run
SUITES: dict[str, str] = {
    "cold": "cold",
    "seed": "seed",
    "growth-bs": "growth_bs",
    "growth-t": "growth_t",
    "fused": "fused",
    "trace": "trace",
}


class Suite(Protocol):
    def run(self, session: Session) -> None:
        """Measure; rows and remarks go to ``session.results``."""


def load(name: str) -> Suite:
    return cast(Suite, importlib.import_module(f".{SUITES[name]}", __name__))
