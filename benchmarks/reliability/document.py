"""The file: sections that are measured one by one, what failed in it, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import BenchError
from ..stored import read_json
from . import KEYS, TOOLS, Result, hostility

Document = dict[str, Any]
NEEDS_NO_GPU = frozenset(("random-cpu",))  # may be measured on another machine than the rest
CPU = "CPU"
RANDOM_HALVES = {"random-gpu": "gpu", "random-cpu": "cpu_sanitized"}
RANDOM_LABELS = {
    "seed": "seed operation",
    "decode": "decode",
    "verify": "target-verify",
    "draft_extend": "draft-extend",
    "extend": "EXTEND",
    "seqlens_expand": "`seqlens_expand`",
}


def read(path: Path, missing_is_empty: bool = False) -> Document:
    """A file of this program.

    Raises:
        BenchError: it cannot be read, or is something else.
    """
    if missing_is_empty and not path.exists():
        return {}
    document: Document = read_json(path)
    if not isinstance(document, dict) or not set(document) <= {"environment", *KEYS}:
        raise BenchError(
            f"{path}: expected a file of python -m benchmarks.reliability, got other JSON"
        )
    return document


def merged(document: Document, environment: Result, part: str, result: Result) -> Document:
    """The document with one part measured anew; everything else stays.

    Each section says when, where and from which commit it was measured.
    """
    key = part.partition("-")[0]
    measured = {name: environment.get(name) for name in ("commit", "date", "command")}
    measured["device"] = CPU if part in NEEDS_NO_GPU else environment.get("gpu")
    section = dict(document.get(key, {}))
    if key == "random":
        half = RANDOM_HALVES[part]
        section.pop(f"failed_{half}", None)
        for name, value in result.items():
            if name in RANDOM_LABELS:
                section[name] = section.get(name, {}) | value
            elif name == "failed":
                section[f"failed_{half}"] = value
        section["measured"] = section.get("measured", {}) | {half: measured}
        section["ok"] = all(ok is True for ok in _random_verdicts(section))
    else:
        section = result | {"measured": measured}
    found = {**document, key: section}
    if part not in NEEDS_NO_GPU or "environment" not in found:
        found["environment"] = environment
    return {name: found[name] for name in ("environment", *KEYS) if name in found}


def _random_verdicts(section: Result) -> Iterator[bool]:
    for name, value in section.items():
        if name.startswith("failed"):
            yield False
        elif name in RANDOM_LABELS:
            yield from (half["ok"] for half in value.values())


def failures(document: Document) -> list[str]:
    """The sections in which something failed. A tool that refuses the machine is none."""
    return [key for key in KEYS if key in document and document[key].get("ok") is False]


# ---- The table ----------------------------------------------------------------------------------


def table(document: Document) -> str:
    """Markdown: a line for each check, what was done, what was found."""
    lines = [("check", "done", "found"), ("---", "---", "---")]
    for key in KEYS:
        if key in document:
            lines += _ROWS.get(key, _tool_rows)(key, document[key])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*text, "", _origin(document)])


def _verdict(section: Result, good: str) -> str:
    if section.get("ok"):
        return good
    return f"**failed**: {_short(section.get('failed') or section.get('first_report') or good)}"


def _short(text: str) -> str:
    """One line that no table breaks at."""
    return " ".join(text.replace("|", "/").split())[:160]


def _of(done: Any, wanted: Any) -> str:
    return f"{done:,}" if done == wanted or not wanted else f"{done:,} of {wanted:,}"


def _tool_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    name = f"compute-sanitizer {key} ({section.get('scope', '')})"
    if section.get("refused"):
        runtime = section.get("runtime", "")
        return [(name, "refused", f"{_short(section['refused'])} ({_short(runtime)})")]
    if not section.get("cases"):
        return [(name, "nothing", _verdict(section, _short(section.get("words", "no case ran"))))]
    fault = section.get("planted_fault", {})
    kernels = len(section.get("kernels") or ())
    done = f"{_of(section['cases'], section['of_cases'])} cases, {kernels} kernels"
    found = f"{section['errors']} errors; planted fault "
    found += f"caught: {_short(fault['report'])}" if fault.get("caught") else "not caught"
    return [(name, f"{done}, {section['seconds']:.0f} s", _verdict(section, found))]


def _random_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    rows = []
    for half, where in (("gpu", "GPU"), ("cpu_sanitized", "CPU, ASan and UBSan")):
        parts = {
            label: section[name][half]
            for name, label in RANDOM_LABELS.items()
            if half in section.get(name, {})
        }
        failed = section.get(f"failed_{half}")
        if not parts and not failed:
            continue
        done = ", ".join(
            f"{label} {_of(own['batches'], own['of_batches'])}" for label, own in parts.items()
        )
        mismatches = sum(own["mismatches"] for own in parts.values())
        good = not mismatches and not failed
        found = _verdict({"ok": good, "failed": failed}, f"{mismatches:,} mismatches")
        rows.append((f"random batches, {where}, all bytes compared", done, found))
    return rows


def _threads_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    if "operations" not in section:
        return [("threads", "nothing", _verdict(section, ""))]
    counts = ", ".join(f"{kind} {count:,}" for kind, count in section["operations"].items())
    name = f"{section['threads']} threads, {section['streams']} streams, every result checked"
    found = _verdict(section, f"{section['mismatches']:,} mismatches")
    return [(name, f"{section['seconds']:.0f} s: {counts}", found)]


def _hang_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    if "fault_in_between" not in section:
        return [("faults in between", "nothing", _verdict(section, ""))]
    faults, waits = section["fault_in_between"], section["gil_is_free"]
    slowest = max(found["seconds"] or 0 for found in faults.values())
    raised = f"error raised within {slowest:.3f} s, no total"
    gap = max(found.get("longest_gap_seconds", 0) for found in waits.values())
    ran = f"a second thread waited {1000 * gap:.1f} ms at most"
    good_faults = all(map(hostility.is_raised, faults.values()))
    good_waits = all(map(hostility.ran_meanwhile, waits.values()))
    return [
        (
            "a kernel that faults before ours",
            f"waiting by {', '.join(faults)}",
            _verdict({"ok": good_faults, "failed": str(faults)}, raised),
        ),
        (
            "Python behind 100 ms of GPU work",
            f"waiting by {', '.join(waits)}",
            _verdict({"ok": good_waits, "failed": str(waits)}, ran),
        ),
    ]


def _bad_input_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    if "cases" not in section:
        return [("hostile arguments", "nothing", _verdict(section, ""))]
    done = f"{section['cases']:,} calls of {section['kinds']} kinds"
    failed = section["failures"]
    verdict = {"ok": section["ok"], "failed": f"{len(failed)}, first: {[*failed, 'none'][0]}"}
    found = _verdict(verdict, "each its error, nothing written")
    return [("hostile arguments to every public function", done, found)]


def _soak_rows(key: str, section: Result) -> list[tuple[str, str, str]]:
    titles = {
        "plan_runs": "`plan.run()`",
        "fused_launches": "`launch()` of a fused plan",
        "eager_calls": "calls on ever-new tensors",
    }
    rows = []
    for name, title in titles.items():
        if name not in section:
            continue
        own = section[name]
        growth = ", ".join(
            f"{where} {grown / 1024:+,.0f} KiB" for where, grown in own["memory"]["growth"].items()
        )
        good = not own["mismatches"] and own["memory"]["flat"]
        verdict = f"{own['mismatches']:,} wrong; memory flat ({growth})"
        rows.append(
            (
                f"soak: {title}",
                f"{_of(own['runs'], own['of_runs'])} in {own['seconds']:.0f} s",
                verdict if good else f"**failed**: {own['mismatches']:,} wrong; {growth}",
            )
        )
    if section.get("failed"):
        rows.append(("soak", "ended early", _verdict(section, "")))
    return rows


_ROWS = {
    "random": _random_rows,
    "threads": _threads_rows,
    "hang": _hang_rows,
    "bad_input": _bad_input_rows,
    "soak": _soak_rows,
}


def _origin(document: Document) -> str:
    environment = document.get("environment", {})
    tools = {document[key].get("tool") for key in TOOLS if key in document} - {None}
    parts = [
        f"{name} {environment[key]}".strip()
        for name, key in (
            *(("", "gpu"), ("driver", "driver"), ("torch", "torch"), ("CuPy", "cupy")),
            *(("NVRTC", "nvrtc"), ("Python", "python")),
        )
        if environment.get(key)
    ]
    parts += [f"compute-sanitizer {tool}" for tool in sorted(tools)]
    stamps = [document[key].get("measured", {}) for key in KEYS if key in document]
    # "random" has a stamp for each of its halves.
    stamps += [half for stamp in stamps for half in stamp.values() if isinstance(half, dict)]
    commits = sorted({stamp["commit"] for stamp in stamps if stamp.get("commit")})
    if commits:
        parts.append(f"commit {', '.join(commits)}")
    return f"{', '.join(parts)}. Made by `python -m benchmarks.reliability`."
