"""CuPy's compiler and its disk cache without a GPU, and many processes that start at once.

Everything is CuPy's and NVRTC's own but the last step: a cubin that would be loaded by the driver is
kept instead. As a program: ``python kernel_cache.py cpu|gpu COUNT`` with CUPY_CACHE_DIR set prints
one JSON line for what COUNT processes have found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

ARCHITECTURE = "90"


class KeptModule:
    """In the place of ``cupy.cuda.function.Module``: keeps what would be loaded."""

    mapping = None

    def load(self, binary: bytes) -> None:
        self.binary = binary

    def _set_mapping(self, mapping: Any) -> None:
        pass

    def get_function(self, name: str) -> SimpleNamespace:
        assert name.encode() in self.binary
        return SimpleNamespace(ptr=1, module=self)


def raw_module(code: str, options: tuple[str, ...], backend: str) -> SimpleNamespace:
    """``cupy.RawModule`` for the architecture above, with a kept module."""
    from cupy.cuda import compiler

    compiler.function = SimpleNamespace(Module=KeptModule)
    compiler._get_arch_for_options_for_nvrtc = lambda arch: (f"-arch=sm_{arch}", "cubin")
    module = compiler._compile_with_cache_cuda(code, options, ARCHITECTURE)
    return SimpleNamespace(
        get_function=lambda name: SimpleNamespace(kernel=module.get_function(name))
    )


def cubin(stem: str = "fused") -> str:
    """Digest of the cubin of a source file, compiled or taken from the cache."""
    from cupy_nsa_meta import _module

    module = raw_module(_module.source(stem), _module.compile_options(), "nvrtc")
    kernel = module.get_function(_module.KERNELS[stem][0]).kernel
    return sha256(kernel.module.binary).hexdigest()


def first_call() -> list[Any]:
    """The first call of a process on the GPU."""
    import torch

    import cupy_nsa_meta

    extend = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
    seq = torch.tensor([10, 4], device="cuda")
    outs = torch.full((2, 8), -1, dtype=torch.int32, device="cuda")
    total = cupy_nsa_meta.fill_draft_extend_metadata_cuda(extend, seq, 9, outs[0], outs[1])
    cu = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    cupy_nsa_meta.fused_dsa_extend_metadata(
        seq, extend, total_len=5, dsa_index_topk=9, cu_seqlens_k=cu
    )
    return [total, outs[:, :5].tolist(), cu.tolist()]


def start_together(count: int, action: Any) -> list[Any]:
    """What ``action`` returns, or the text of its error, in ``count`` forked processes at once."""
    gate, opener = os.pipe()
    children = []
    for _ in range(count):
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                signal.alarm(240)
                os.close(opener)
                os.read(gate, 1)  # until the parent closes it
                os.write(write, json.dumps(action()).encode())
            except BaseException:
                os.write(write, json.dumps(traceback.format_exc()).encode())
            finally:
                os._exit(0)
        os.close(write)
        children.append(read)
    os.close(opener)
    found = []
    for read in children:
        with os.fdopen(read) as pipe:
            found.append(json.loads(pipe.read() or '"nothing"'))
    for _ in children:
        os.wait()
    return found


if __name__ == "__main__":
    import torch  # noqa: F401 (once, before the forks; it does not touch the GPU)

    kind, number = sys.argv[1:]
    if kind == "cpu":
        import cupy  # noqa: F401

        import cupy_nsa_meta  # noqa: F401
    print(json.dumps(start_together(int(number), cubin if kind == "cpu" else first_call)))
