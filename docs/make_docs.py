#!/usr/bin/env python3
"""Write docs/api.md from the docstrings and docs/environment.md from the table of variables.

python docs/make_docs.py            write both
python docs/make_docs.py --check    exit status 1 where a file is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import cupy_nsa_meta  # noqa: E402
from cupy_nsa_meta.cli import environment  # noqa: E402
from cupy_nsa_meta.fused_plan import FusedPlan  # noqa: E402

MADE = "<!-- Made by docs/make_docs.py; edit the docstrings. -->\n"
API_HEAD = """# API reference

What each function computes. Arguments, errors, streams and graphs are in the docstrings:
`help(cupy_nsa_meta.fused_dsa_decode_metadata)`. The contract that all share is in the README.
"""
ENVIRONMENT_HEAD = """# Environment variables

Those of the package are read at each call unless the table says otherwise.
`python -m cupy_nsa_meta doctor` shows which are set, and names that are misspelled.

"""
GROUPS = {
    "The seed operation": (
        "fill_draft_extend_metadata",
        "plan_draft_extend_metadata",
        "DraftExtendPlan",
    ),
    "The fused family": (
        "fused_dsa",
        "seqlens_expand",
        "last_status",
        "plan_fused_dsa",
        "FusedPlan",
    ),
}
OTHERS = "Around them"
LONGEST = 96  # characters of a line of code


def api() -> str:
    """The page of all public names, in groups."""
    found = {
        name: getattr(cupy_nsa_meta, name)
        for name in cupy_nsa_meta.__all__
        if callable(getattr(cupy_nsa_meta, name))
    }
    found["FusedPlan"] = FusedPlan  # returned, not imported by users
    parts = [MADE + API_HEAD]
    for title, beginnings in (*GROUPS.items(), (OTHERS, ("",))):
        names = [name for beginning in beginnings for name in found if name.startswith(beginning)]
        parts.append(f"## {title}\n")
        parts += [entry(name, found.pop(name)) for name in dict.fromkeys(names)]
    return "\n".join(parts)


def entry(name: str, thing: Any) -> str:
    """A function, or a class with its public methods."""
    if not inspect.isclass(thing):
        return f"### `{name}`\n\n{code(signature(name, thing))}\n{summary(thing)}"
    methods = [
        f"- `{member}{inspect.signature(function)}`: ".replace("'", "").replace("torch.", "")
        + first_sentence(function)
        for member, function in vars(thing).items()
        if inspect.isfunction(function) and not member.startswith("_")
    ]
    return f"### `{name}`\n\n{summary(thing)}\n" + "\n".join(methods) + "\n"


def signature(name: str, function: Any) -> str:
    """The signature, broken between parameters."""
    text = f"{name}{inspect.signature(function)}".replace("'", "").replace("torch.Tensor", "Tensor")
    glued = re.sub(r"(?<!,) ", "\0", text)  # a space inside a parameter is no place to break
    lines = textwrap.wrap(
        glued, LONGEST, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


def code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def summary(thing: Any) -> str:
    """The docstring up to its sections, as Markdown."""
    text = inspect.getdoc(thing) or ""
    text = re.split(r"\n(?:Args|Returns|Raises|Errors|Stream|Source)\b.*:", text)[0]
    parts: list[str] = []
    for part in text.strip().replace("``", "`").split("\n\n"):
        if part == "::":  # by itself, before a block
            continue
        if part.startswith("  "):
            parts.append(f"```\n{textwrap.dedent(part)}\n```")
        else:
            parts.append(re.sub(r"::$", ":", part))
    return "\n\n".join(parts) + "\n"


def first_sentence(function: Any) -> str:
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return text.replace("``", "`")


def environment_page() -> str:
    made = MADE.replace("the docstrings", "cupy_nsa_meta/cli/environment.py")
    return made + ENVIRONMENT_HEAD + environment.table()


PAGES = {"api.md": api, "environment.md": environment_page}


def main() -> int:
    outdated = 0
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.is_file() and path.read_text() == text:
            continue
        outdated += 1
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        print(f"docs/{name}: {'out of date' if '--check' in sys.argv[1:] else 'written'}")
    return 1 if outdated and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
