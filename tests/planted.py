"""Faults to plant into a copy of the CUDA sources: a check that cannot fail is not one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Patch:
    """A fault to plant: one text of one source file, replaced."""

    file: str
    old: str
    new: str

    def apply(self, sources: Path) -> None:
        """Plant the fault in a folder that is a copy of ``cuda_src/``."""
        path = sources / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.old!r} is not once in {self.file}"
        path.write_text(text.replace(self.old, self.new))
