"""Providers of the seed operation: ours, what a user would pick instead, the recipes it replaces.

A provider is a function that loads it for a device and returns a function that binds it to a case.
Either raises ``Absent`` with the reason where it cannot run.

    ours         cuda, cuda-fresh, cuda-uncached, cuda-total-tokens, cuda-plan, cuda-async, triton,
                 python (the loop of aranges)
    instead      torch (vectorised), torch-compile, aot-extension, sglang
    replaced     seed-triton, seed-cuda
    bound        fill: torch fills two buffers of the same bytes; empty-node: an empty kernel;
                 bare-graph, bare-launch: our kernel launched and awaited from Python, all else left
                 out, what no drop-in call or plan can be quicker than
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any

import torch

import cupy_nsa_meta
from cupy_nsa_meta import _check, _launch, dispatch, draft_extend
from cupy_nsa_meta._draft_extend_args import ONE_LAUNCH_MAX_BS, shape_of
from cupy_nsa_meta._graphs import AnsweringLaunch

from . import build, upstream
from .draft_extend import MAX_EXTEND, DraftExtendCase
from .measure import Absent, Binder, Bound, Loader, time_limit

CACHE_SWITCH = "CUPY_NSA_META_GRAPH_CACHE"
#: cuda-fresh: different places of the outputs. More than any launch cache holds, and 16 bytes apart
#: so that the kernels are those of the other providers.
FRESH_PLACES = 1 << 16
PLACE_STEP = 4  # int32 elements
COMPILE_LIMIT_S = 60.0  # torch.compile, all shapes together
TORCH_MAX_ROWS = 1 << 26  # its int64 intermediates are several times the outputs


# ---- Ours ---------------------------------------------------------------------------------------


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("it takes CUDA tensors")


def needs_cuda_backend(device: torch.device) -> None:
    needs_gpu(device)
    reason = dispatch.cuda_unavailable_reason(device.index)
    if reason is not None:
        raise Absent(reason)


def load_cuda(device: torch.device) -> Binder:
    """The drop-in call on the same buffers every time."""
    needs_cuda_backend(device)

    def bind(case: DraftExtendCase) -> Bound:
        out_total = torch.empty(2, dtype=torch.int32, device=device)
        return Bound(
            run=partial(cupy_nsa_meta.fill_draft_extend_metadata_cuda, *arguments(case)),
            record=partial(
                cupy_nsa_meta.fill_draft_extend_metadata_async,
                *arguments(case),
                out_total=out_total,
            ),
        )

    return bind


def load_cuda_fresh(device: torch.device) -> Binder:
    """The drop-in call on outputs that it has never seen."""
    needs_cuda_backend(device)
    fill = cupy_nsa_meta.fill_draft_extend_metadata_cuda

    def bind(case: DraftExtendCase) -> Bound:
        room = -(-case.capacity // PLACE_STEP) * PLACE_STEP + FRESH_PLACES * PLACE_STEP
        arenas = [torch.empty(room, dtype=torch.int32, device=device) for _ in range(2)]
        place = 0
        outs = [arena[: case.capacity] for arena in arenas]

        def prepare() -> None:
            nonlocal place
            place = (place + 1) % FRESH_PLACES
            begin = place * PLACE_STEP
            outs[:] = [arena[begin : begin + case.capacity] for arena in arenas]

        return Bound(
            run=lambda: fill(case.extend, case.seq, case.topk, outs[0], outs[1]),
            prepare=prepare,
            outputs=lambda: (outs[0], outs[1]),
        )

    return bind


def load_cuda_uncached(device: torch.device) -> Binder:
    """The drop-in call with its cache of captured launches off."""
    needs_cuda_backend(device)
    if cache_info() is None:
        raise Absent("this version keeps no captured launches")

    def bind(case: DraftExtendCase) -> Bound:
        return Bound(
            run=partial(cupy_nsa_meta.fill_draft_extend_metadata_cuda, *arguments(case)),
            environ={CACHE_SWITCH: "0"},
        )

    return bind


def load_cuda_total_tokens(device: torch.device) -> Binder:
    """The drop-in call that is told the total, another one each time."""
    needs_cuda_backend(device)
    fill = cupy_nsa_meta.fill_draft_extend_metadata_cuda

    def bind(case: DraftExtendCase) -> Bound:
        extend, seq, topk, expanded, clamped = arguments(case)
        return Bound(
            enqueue=lambda total: fill(extend, seq, topk, expanded, clamped, total_tokens=total)
        )

    return bind


def load_cuda_plan(device: torch.device) -> Binder:
    needs_cuda_backend(device)
    make_plan = getattr(cupy_nsa_meta, "plan_draft_extend_metadata", None)
    if make_plan is None:
        raise Absent("this version has no plan_draft_extend_metadata")

    def bind(case: DraftExtendCase) -> Bound:
        plan = make_plan(*arguments(case))
        launch = plan.launch
        return Bound(run=plan.run, enqueue=lambda total: launch(), record=launch)

    return bind


def load_cuda_async(device: torch.device) -> Binder:
    needs_cuda_backend(device)
    fill = cupy_nsa_meta.fill_draft_extend_metadata_async

    def bind(case: DraftExtendCase) -> Bound:
        out_total = torch.empty(2, dtype=torch.int32, device=device)
        extend, seq, topk, expanded, clamped = arguments(case)

        def launch(total: int = 0) -> object:
            return fill(extend, seq, topk, expanded, clamped, out_total=out_total)

        return Bound(enqueue=launch, record=launch)

    return bind


def load_triton(device: torch.device) -> Binder:
    reason = dispatch.triton_unavailable_reason()
    if reason is not None:
        raise Absent(reason)
    needs_gpu(device)
    from cupy_nsa_meta import draft_extend_triton

    fill = draft_extend_triton.fill_draft_extend_metadata_inplace
    fill_async = draft_extend_triton.fill_draft_extend_metadata_triton_async

    def bind(case: DraftExtendCase) -> Bound:
        out_total = torch.empty(2, dtype=torch.int32, device=device)
        extend, seq, topk, expanded, clamped = arguments(case)
        return Bound(
            run=partial(fill, *arguments(case)),
            enqueue=lambda total: fill(extend, seq, topk, expanded, clamped, total_tokens=total),
            record=partial(fill_async, *arguments(case), out_total=out_total),
        )

    return bind


def load_python(device: torch.device) -> Binder:
    fill = cupy_nsa_meta.fill_draft_extend_metadata_python
    return lambda case: Bound(run=partial(fill, *arguments(case)))


# ---- What a user would pick instead -------------------------------------------------------------


def vectorised(
    extend: torch.Tensor,
    seq: torch.Tensor,
    topk: int,
    expanded: torch.Tensor,
    clamped: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """The operation in torch operators, nothing read back; ``rows`` is arange(capacity).

    Returns the total, a 0-d tensor. Rows behind it keep their values.
    """
    ends = torch.cumsum(extend, 0)
    request = torch.searchsorted(ends, rows, right=True).clamp(max=extend.numel() - 1)
    values = ((seq + 1 - ends)[request] + rows).clamp(min=0)
    live = rows < ends[-1]
    expanded.copy_(torch.where(live, values, expanded))
    clamped.copy_(torch.where(live, values.clamp(max=topk), clamped))
    return ends[-1]


def load_torch(device: torch.device) -> Binder:
    return lambda case: _bind_vectorised(vectorised, case)


def load_torch_compile(device: torch.device) -> Binder:
    """``torch.compile`` of the vectorised form, for the sizes of each case."""
    if device.type != "cuda":
        raise Absent("compiled for a GPU only")
    _one_compiler_process()
    spent = 0.0

    def bind(case: DraftExtendCase) -> Bound:
        nonlocal spent
        if spent > COMPILE_LIMIT_S / 2:
            raise Absent(f"{spent:.0f} s were spent on compiling other sizes")
        importlib.import_module("torch._dynamo").reset()
        bound = _bind_vectorised(torch.compile(vectorised, dynamic=False), case)
        assert bound.run is not None
        begin = monotonic()
        try:
            with time_limit(COMPILE_LIMIT_S - spent, "torch.compile"):
                bound.run()
        finally:
            spent += monotonic() - begin
        return bound

    return bind


def _one_compiler_process() -> None:
    """Inductor's pool of compilers would stay and share the machine with what is timed."""
    config = importlib.import_module("torch._inductor.config")
    config.compile_threads = 1  # type: ignore[attr-defined]


def _bind_vectorised(form: Callable[..., torch.Tensor], case: DraftExtendCase) -> Bound:
    if case.capacity > TORCH_MAX_ROWS:
        raise Absent(f"its intermediates are not timed above {TORCH_MAX_ROWS:,} rows")
    rows = torch.arange(case.capacity, device=case.device)
    call = partial(form, *arguments(case), rows)
    return Bound(run=lambda: int(call().item()), enqueue=lambda total: call(), record=call)


def load_aot_extension(device: torch.device) -> Binder:
    module = _extension(device)

    def bind(case: DraftExtendCase) -> Bound:
        if case.bs > module.max_bs:
            raise Absent(f"it holds at most {module.max_bs:,} requests")
        total = torch.empty(1, dtype=torch.int32, device=device)
        pinned = torch.empty(1, dtype=torch.int32, pin_memory=True)
        enqueue = partial(module.aot_enqueue, *arguments(case), total)
        return Bound(
            run=partial(module.aot_run, *arguments(case), total, pinned),
            enqueue=lambda known: enqueue(),
            record=enqueue,
        )

    return bind


_SGLANG_MODULES = (  # newest first
    "sglang.kernels.ops.attention.pad",
    "sglang.srt.layers.attention.triton_ops.pad",
    "sglang.srt.layers.attention.utils",
)


def load_sglang(device: torch.device) -> Binder:
    """SGLang's expansion, its clamp, and the copies into the caller's buffers.

    It is told the total and the longest extend length, which SGLang keeps on the host.
    """
    expand: Callable[..., torch.Tensor] | None = None
    for name in _SGLANG_MODULES:
        try:
            expand = upstream.module(name).seqlens_expand_triton
            break
        except Absent as absent:
            reason = str(absent)
        except Exception as error:  # a file of an older version needs more of SGLang
            reason = f"seqlens_expand_triton cannot be imported: {error}"
    if expand is None:
        raise Absent(reason)
    needs_gpu(device)

    def bind(case: DraftExtendCase) -> Bound:
        if case.max_rows > MAX_EXTEND * case.bs:
            raise Absent("one block per request: not for long requests")

        def enqueue(total: int) -> None:
            values = expand(case.extend, case.seq.to(torch.int32), total, MAX_EXTEND)
            case.out_expanded[:total] = values
            torch.clamp(values, max=case.topk, out=case.out_clamped[:total])

        return Bound(enqueue=enqueue)

    return bind


# ---- What is replaced ---------------------------------------------------------------------------


def load_seed_triton(device: torch.device) -> Binder:
    needs_gpu(device)
    try:
        from . import seed_triton
    except ImportError as error:
        raise Absent(f"Triton cannot be imported: {error}") from error
    return lambda case: Bound(run=partial(seed_triton.fill, *arguments(case)))


def load_seed_cuda(device: torch.device) -> Binder:
    module = _extension(device)

    def bind(case: DraftExtendCase) -> Bound:
        fill = partial(module.seed_cuda, *arguments(case))
        return Bound(run=lambda: int(fill().item()))

    return bind


# ---- Bound --------------------------------------------------------------------------------------


def load_fill(device: torch.device) -> Binder:
    def bind(case: DraftExtendCase) -> Bound:
        expanded, clamped = case.out_expanded, case.out_clamped

        def record() -> None:
            expanded.fill_(1)
            clamped.fill_(2)

        return Bound(record=record, checked=False)

    return bind


def load_empty_node(device: torch.device) -> Binder:
    """An empty kernel, captured as the providers are: the floor inside this very process.

    Where work has run on eight streams, each node of a graph takes 0.18 us more, an empty one
    included; ``floor-empty`` is measured in a process of its own.
    """
    needs_cuda_backend(device)
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void empty() {}', "empty")
    with cupy.cuda.Device(device.index):
        kernel.compile()

    def record() -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel((1,), (32,), (), stream=cupy.cuda.ExternalStream(stream))

    return lambda case: Bound(record=record, checked=False)


def load_bare_graph(device: torch.device) -> Binder:
    """CuPy's call that replays a captured launch, and a poll: no check, no stream looked up."""
    needs_cuda_backend(device)

    def bind(case: DraftExtendCase) -> Bound:
        captured, stream, _ = _captured(case)
        return _bare(captured, partial(captured.state.runtime.graphLaunch, captured.graph, stream))

    return bind


def load_bare_launch(device: torch.device) -> Binder:
    """The driver's launch call, by CuPy, on arguments packed before, and a poll."""
    needs_cuda_backend(device)

    def bind(case: DraftExtendCase) -> Bound:
        captured, stream, launches = _captured(case)
        state, params = captured.state, captured.slot.params
        ((name, grid),) = launches
        function, block = state.kernel(name)
        return _bare(
            captured,
            partial(
                state.cupy.cuda.driver.launchKernel,
                *(function, grid, 1, 1, block, 1, 1, 0, stream, params, 0),
            ),
        )

    return bind


def _captured(case: DraftExtendCase) -> tuple[AnsweringLaunch, int, _launch.Launches]:
    """A captured launch of the case, which packed its slot and has the kernel count its launches;
    torch's current stream; kernels and grids.
    """
    _, key = _check.draft_extend(*arguments(case), True, None)
    if key.bs > ONE_LAUNCH_MAX_BS:
        raise Absent("it makes one launch")
    state = _launch.device_state(key.device)
    launches = shape_of(key, state.num_sms).launches
    return draft_extend.capture(state, key), _launch.current_raw_stream(key.device), launches


def _bare(captured: AnsweringLaunch, launch: Callable[[], object]) -> Bound:
    state = captured.state
    halves, low = state.halves, 2 * captured.slot.index
    high = low + 1

    def enqueue(total: int = 0) -> None:
        captured.slot.epoch += 1
        launch()

    def run() -> int:
        slot = captured.slot
        slot.epoch = epoch = slot.epoch + 1
        launch()
        fine = epoch << _launch.EPOCH_SHIFT - _launch.STATUS_SHIFT
        for _ in _launch.QUICK_LOOKS:
            if halves[high] == fine:
                return halves[low]
        return state.wait(slot, _launch.current_raw_stream(state.device))

    return Bound(run=run, enqueue=enqueue)


# ---- Shared -------------------------------------------------------------------------------------

PROVIDERS: dict[str, Loader] = {
    "cuda-plan": load_cuda_plan,
    "cuda": load_cuda,
    "cuda-fresh": load_cuda_fresh,
    "cuda-uncached": load_cuda_uncached,
    "cuda-total-tokens": load_cuda_total_tokens,
    "cuda-async": load_cuda_async,
    "triton": load_triton,
    "python": load_python,
    "torch": load_torch,
    "torch-compile": load_torch_compile,
    "aot-extension": load_aot_extension,
    "sglang": load_sglang,
    "seed-triton": load_seed_triton,
    "seed-cuda": load_seed_cuda,
    "fill": load_fill,
    "empty-node": load_empty_node,
    "bare-graph": load_bare_graph,
    "bare-launch": load_bare_launch,
}
BUILT = ("aot-extension", "seed-cuda")  # from one C++ extension
SLOW_TO_LOAD = (*BUILT, "torch-compile")  # left out of a quick run unless built before


def arguments(
    case: DraftExtendCase,
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]:
    return case.extend, case.seq, case.topk, case.out_expanded, case.out_clamped


def _extension(device: torch.device) -> Any:
    needs_gpu(device)
    try:
        return build.extension(build.architecture(device))
    except ImportError as error:
        raise Absent(f"the extension cannot be imported: {error}") from error


def left_out_of_quick(name: str, device: torch.device) -> str | None:
    """Why a provider is not part of a quick run, if so."""
    if name not in SLOW_TO_LOAD:
        return None
    if name in BUILT and device.type == "cuda":
        try:
            if build.extension_path(build.architecture(device)).exists():
                return None
        except Absent as absent:
            return str(absent)
    return "takes long to compile; not part of a quick run"


def cache_info() -> Mapping[str, int] | None:
    """Hits, misses and captures of the drop-in call's cache of launches; None without one."""
    try:
        info = importlib.import_module("cupy_nsa_meta._graphs").cache_info()
    except Exception:
        return None
    if hasattr(info, "_asdict"):
        info = info._asdict()
    if not isinstance(info, Mapping) or "hits" not in info or "misses" not in info:
        return None
    return {name: value for name, value in info.items() if isinstance(value, int)}
