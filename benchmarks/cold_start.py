"""One cold start, in a process of its own.

    python -m benchmarks.cold_start PROVIDER DEVICE TOPK SIZES

Prints one JSON line. The clock starts behind the imports (CuPy's among them) and the tensors.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any


def main(argv: Sequence[str]) -> int:
    provider, device_name, topk, sizes = argv[0], argv[1], int(argv[2]), json.loads(argv[3])
    if provider == "cuda":
        try:
            importlib.import_module("cupy")
        except ImportError as error:
            return _print({"absent": f"CuPy cannot be imported: {error}"})
    import torch

    device = torch.device(device_name)
    try:
        fill = _load(provider)
    except ImportError as error:
        return _print({"absent": f"{provider} cannot be imported: {error}"})

    from benchmarks.draft_extend import serving_case

    cases = [serving_case(bs, topk, device, factor) for bs, factor in sizes]
    for case in cases:
        case.poison()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    calls: list[dict[str, Any]] = []
    mismatch = None
    files_after_first = 0
    for idx, case in enumerate(cases):
        begin = perf_counter()
        total = fill(case.extend, case.seq, case.topk, case.out_expanded, case.out_clamped)
        seconds = perf_counter() - begin
        if idx == 0:
            files_after_first = _cache_files()
        calls.append({**case.labels, "first_call_s": seconds})
        mismatch = mismatch or case.difference(total)
    first, *later = calls
    return _print(
        {
            "first_call_s": first["first_call_s"],
            "rows": first["rows"],
            "later": later,
            "compiled_later": _cache_files() - files_after_first,
            "mismatch": mismatch,
        }
    )


def _load(provider: str) -> Callable[..., int]:
    fill: Callable[..., int]
    if provider == "seed-triton":
        fill = importlib.import_module("benchmarks.seed_triton").fill
        return fill
    import cupy_nsa_meta

    names = {
        "cuda": "fill_draft_extend_metadata_cuda",
        "triton": "fill_draft_extend_metadata_inplace",
        "python": "fill_draft_extend_metadata_python",
    }
    fill = getattr(cupy_nsa_meta, names[provider])
    return fill


def _cache_files() -> int:
    """Compiled kernels in the caches."""
    folders = [os.environ.get(name) for name in ("CUPY_CACHE_DIR", "TRITON_CACHE_DIR")]
    return sum(1 for folder in folders if folder for _ in Path(folder).rglob("*.cubin"))


def _print(result: dict[str, Any]) -> int:
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
