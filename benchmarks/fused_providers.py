"""Providers of the fused family: ours, SGLang's, and what builds EXTEND metadata today.

ours         cuda (the eager function), cuda-views (the same, on new tensors of the same memory),
             cuda-plan (``plan.launch``), cuda-plan-device (the same where rows vary, not told how
             many there are, so that one captured launch serves every batch)
replaced     sglang: its Triton kernels of decode, target-verify and draft-extend;
             loop: EXTEND as SGLang builds it, request by request; torch: the same, vectorised
bound        copy: torch copies as many bytes as the tables need; bare-graph: CuPy's call that
             replays a captured launch of the plan, all else left out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

import cupy_nsa_meta
from cupy_nsa_meta._launch import current_raw_stream

from . import providers, upstream
from .fused import FUNCTIONS, OUTPUTS, FusedCase, plan_maker
from .measure import Absent, Binder, Bound, Loader


def load_cuda(device: torch.device) -> Binder:
    """The eager function on the tensor objects of the previous call."""
    providers.needs_cuda_backend(device)

    def bind(case: FusedCase) -> Bound:
        return _bound(case, case.call(getattr(cupy_nsa_meta, FUNCTIONS[case.op])))

    return bind


def load_cuda_views(device: torch.device) -> Binder:
    """The eager function on tensor objects that it has never seen; its host time."""
    providers.needs_cuda_backend(device)

    def bind(case: FusedCase) -> Bound:
        enqueue, renew = case.call_on_views(getattr(cupy_nsa_meta, FUNCTIONS[case.op]))
        return Bound(enqueue=enqueue, prepare=renew)

    return bind


def load_cuda_plan(device: torch.device) -> Binder:
    providers.needs_cuda_backend(device)
    return lambda case: _bound(case, case.plan(plan_maker(case.op)))


def load_cuda_plan_device(device: torch.device) -> Binder:
    providers.needs_cuda_backend(device)
    return lambda case: _bound(case, case.plan(plan_maker(case.op), tells_total=False))


def load_bare_graph(device: torch.device) -> Binder:
    """What no plan can be quicker than; without a total, so that one launch serves every batch."""
    providers.needs_cuda_backend(device)

    def bind(case: FusedCase) -> Bound:
        plan = case.make_plan(plan_maker(case.op))
        for _ in range(2):  # the second is captured
            plan.launch(case.shape.bs)
        if not plan._captured:
            raise Absent("the plan has no captured launch")
        (captured,) = plan._captured.values()
        graph_launch = captured.state.runtime.graphLaunch
        stream = current_raw_stream(captured.state.device)

        def enqueue(total: int, kept: object = plan) -> None:
            graph_launch(captured.graph, stream)

        return Bound(enqueue=enqueue)

    return bind


def load_sglang(device: torch.device) -> Binder:
    """It writes whole blocks of columns, and all rows below the total that it is told."""
    module = upstream.fused_metadata()
    providers.needs_gpu(device)

    def bind(case: FusedCase) -> Bound:
        return _bound(case, case.call(getattr(module, FUNCTIONS[case.op])), writes_more=True)

    return bind


def load_copy(device: torch.device) -> Binder:
    """Half of the bytes are read, half written."""
    providers.needs_gpu(device)

    def bind(case: FusedCase) -> Bound:
        size = int(case.moved_bytes) // 8
        source, target = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2))
        return Bound(record=lambda: target.copy_(source), checked=False)

    return bind


def _bound(case: FusedCase, enqueue: Callable[[int], object], writes_more: bool = False) -> Bound:
    """Host and GPU time; of EXTEND also the time until the device is idle again, for everybody
    alike, since some of its providers wait inside their call and others do not."""

    def run() -> int:
        enqueue(case.total)
        case.wait()
        return case.total

    return Bound(
        run=run if case.op == "extend" else None,
        enqueue=enqueue,
        record=lambda: enqueue(case.total),
        writes_more=writes_more,
    )


# ---- EXTEND in torch ----------------------------------------------------------------------------

Tensors = tuple[torch.Tensor, ...]


def extend_loop(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    seqs: torch.Tensor,
    extends: Sequence[int],
    topk: int,
) -> Tensors:
    """The 1-D arrays as SGLang 0.5.23 builds them: five launches per request, and a wait.

    ``seqs`` and ``extends`` are the lengths on the host. Returns new tensors in the order of
    ``fused.OUTPUTS``.
    """
    int32, device = torch.int32, seq_lens.device

    def seen(kv: int, q: int) -> torch.Tensor:
        return torch.arange(kv - q + 1, kv + 1, dtype=int32, device=device)

    expanded = torch.cat([seen(kv, q) for kv, q in zip(seqs.tolist(), extends, strict=True)])
    ks_list, ke_list, request_list = [], [], []
    begin = 0
    for request, q in enumerate(extends):
        kv = int(seqs[request].item())
        ks = torch.full((q,), begin, dtype=int32, device=device)
        ks_list.append(ks)
        ke_list.append(ks + seen(kv, q))
        request_list.append(torch.full((q,), request, dtype=int32, device=device))
        begin += kv
    cache, clamped = seq_lens.to(int32), expanded.clamp(max=topk)
    cu_k, cu_q = _running_sum(cache), _running_sum(extend_seq_lens)
    offsets = torch.repeat_interleave(cu_k[:-1], extend_seq_lens)  # waits for its own size
    return _in_order(
        cache_seqlens=cache,
        cu_seqlens_k=cu_k,
        cu_seqlens_q=cu_q,
        extend_start_loc=cu_q[:-1],
        seqlens_expanded=expanded,
        dsa_cache_seqlens=clamped,
        dsa_cu_seqlens_k=_running_sum(clamped),
        token_to_batch_idx=torch.cat(request_list),
        ks=torch.cat(ks_list),
        ke=torch.cat(ke_list),
        topk_indices_offset=offsets,
        positions=expanded.to(torch.int64) - 1,
    )


def extend_vectorised(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    total: int,
    topk: int,
    rows: torch.Tensor,
) -> Tensors:
    """The same arrays in operators over all requests, nothing waited for.

    ``rows`` is an int32 arange, at least ``total`` long.
    """
    cache = seq_lens.to(torch.int32)
    cu_k, cu_q = _running_sum(cache), _running_sum(extend_seq_lens)
    starts = cu_q[:-1]
    requests = torch.arange(len(cache), dtype=torch.int32, device=cache.device)
    request = torch.repeat_interleave(requests, extend_seq_lens, output_size=total)
    ks = cu_k[:-1][request]
    position = (cache - extend_seq_lens - starts)[request] + rows[:total]
    expanded = (position + 1).clamp_(min=0)
    clamped = expanded.clamp(max=topk)
    return _in_order(
        cache_seqlens=cache,
        cu_seqlens_k=cu_k,
        cu_seqlens_q=cu_q,
        extend_start_loc=starts,
        seqlens_expanded=expanded,
        dsa_cache_seqlens=clamped,
        dsa_cu_seqlens_k=_running_sum(clamped),
        token_to_batch_idx=request,
        ks=ks,
        ke=ks + expanded,
        topk_indices_offset=ks,
        positions=position.to(torch.int64),
    )


def _running_sum(lengths: torch.Tensor) -> torch.Tensor:
    return pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def _in_order(**arrays: torch.Tensor) -> Tensors:
    return tuple(arrays[name] for name in OUTPUTS["extend"])


def load_loop(device: torch.device) -> Binder:
    def bind(case: FusedCase) -> Bound:
        def call(total: int) -> Tensors:
            batch = case.batch
            return extend_loop(case.seq, case.extend, batch.seqs, batch.extends, case.topk)

        bound = _returning(case, call)
        bound.record = None  # a wait cannot be captured
        return bound

    return bind


def load_torch(device: torch.device) -> Binder:
    def bind(case: FusedCase) -> Bound:
        rows = torch.arange(case.shape.max_rows, dtype=torch.int32, device=device)

        def call(total: int) -> Tensors:
            return extend_vectorised(case.seq, case.extend, total, case.topk, rows)

        return _returning(case, call)

    return bind


def _returning(case: FusedCase, call: Callable[[int], Tensors]) -> Bound:
    """A provider that returns new tensors."""
    returned: Tensors = ()

    def enqueue(total: int) -> None:
        nonlocal returned
        returned = call(total)

    bound = _bound(case, enqueue)
    bound.outputs = lambda: returned
    return bound


PROVIDERS: dict[str, Loader] = {
    "sglang": load_sglang,
    "cuda": load_cuda,
    "cuda-views": load_cuda_views,
    "cuda-plan": load_cuda_plan,
    "cuda-plan-device": load_cuda_plan_device,
    "bare-graph": load_bare_graph,
    "loop": load_loop,
    "torch": load_torch,
    "copy": load_copy,
}
