"""Reading a stored run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import BenchError

Document = dict[str, Any]
ROW_KEYS = ("op", "suite", "case", "provider", "metric", "median", "p20", "p80")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BenchError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BenchError(f"{path}: expected a readable file, got {reason}") from error
    except json.JSONDecodeError as error:
        raise BenchError(f"{path}: expected JSON, got an error: {error}") from error


def read_document(path: Path) -> Document:
    """A file that ``bench.py --suite ... --json`` has written.

    Raises:
        BenchError: it cannot be read, or is something else.
    """
    document: Document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise BenchError(f"{path}: expected a file of bench.py --suite ... --json, got other JSON")
    for row in document["rows"]:
        if not isinstance(row, dict) or any(key not in row for key in ROW_KEYS):
            raise BenchError(f"{path}: expected rows with {', '.join(ROW_KEYS)}")
    return document
