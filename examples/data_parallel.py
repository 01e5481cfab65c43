"""Data-parallel ranks make their own metadata and agree on a padding; run by torchrun:

    torchrun --nproc-per-node 4 examples/data_parallel.py

On GPUs with nccl, else on the CPU with gloo. Each rank serves a part of the requests. Ranks have
different numbers of tokens, but a collective over their rows needs equal shapes: the ranks exchange
their totals, and each pads its rows to the largest (``pad_to``). The result is checked against the
same batch in a single process, cut by rank.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import cupy_nsa_meta

TOPK = 2048
#: Longest KV length and most query tokens of a request in the example's batches.
MAX_KV, MAX_QUERY = 9000, 600


def batch(step: int, num_requests: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend and KV lengths of one step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    extend = torch.randint(0, MAX_QUERY, (num_requests,), generator=generator, dtype=torch.int32)
    seq = extend + torch.randint(0, MAX_KV, (num_requests,), generator=generator)
    return extend.to(device), seq.to(device)


def part(num_requests: int, rank: int, world: int) -> slice:
    """The requests of a rank; ranks may have none."""
    return slice(num_requests * rank // world, num_requests * (rank + 1) // world)


def metadata(
    extend: torch.Tensor, seq: torch.Tensor, total_len: int, pad_to: int
) -> dict[str, torch.Tensor]:
    """What a forward pass with sparse attention needs, for one rank: one launch."""

    def room(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=seq.device)

    out = {
        "seqlens_expanded": room(total_len),
        "ke": room(total_len),
        "dsa_cache_seqlens": room(pad_to),
        "dsa_cu_seqlens_k": room(pad_to + 1),
    }
    cupy_nsa_meta.fused_dsa_extend_metadata(
        seq, extend, total_len=total_len, dsa_index_topk=TOPK, pad_to=pad_to, **out
    )
    return out


def exchange_totals(total: int, world: int, device: torch.device) -> list[int]:
    """The number of tokens of every rank."""
    totals = torch.empty((world, 1), dtype=torch.int64, device=device)
    dist.all_gather(list(totals), torch.tensor([total], device=device))
    return totals.flatten().tolist()


def check(
    gathered: torch.Tensor,
    own: dict[str, torch.Tensor],
    totals: list[int],
    rank: int,
    whole: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Every rank's rows, and this rank's other arrays, against one process with the whole batch."""
    extend, seq = whole
    single = metadata(extend, seq, sum(totals), sum(totals))
    begin = 0
    for other, (total, padded) in enumerate(zip(totals, gathered, strict=True)):
        rows = slice(begin, begin + total)
        expect(f"rows of rank {other}", padded[:total], single["dsa_cache_seqlens"][rows])
        expect(f"padding of rank {other}", padded[total:], torch.zeros_like(padded[total:]))
        if other == rank:
            expect("seqlens_expanded", own["seqlens_expanded"], single["seqlens_expanded"][rows])
            sums = single["dsa_cu_seqlens_k"][begin : begin + total + 1]
            expect("dsa_cu_seqlens_k", own["dsa_cu_seqlens_k"][: total + 1], sums - sums[0])
            flat = own["dsa_cu_seqlens_k"][total:]
            expect("its padding", flat, flat[:1].expand(flat.shape))
            before = seq[: part(len(seq), rank, len(totals)).start].sum()  # KV of earlier ranks
            expect("ke", own["ke"] + before, single["ke"][rows].to(torch.int64))
        begin += total


def expect(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(got, wanted):
        raise SystemExit(f"rank {dist.get_rank()}: {name}: expected {wanted}, got {got}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=37, help="in the batch, over all ranks")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        cupy_nsa_meta.warmup(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    num_rows = num_padded = 0
    for step in range(arguments.steps):
        # The last step has fewer requests than ranks: some ranks have nothing to do, but pad.
        num_requests = arguments.requests if step < arguments.steps - 1 else max(world - 1, 1)
        extend, seq = batch(step, num_requests, device)
        mine = part(num_requests, rank, world)
        total = int(extend[mine].sum())  # a scheduler knows it without asking the device
        totals = exchange_totals(total, world, device)
        pad_to = max(totals)
        own = metadata(extend[mine], seq[mine], total, pad_to)
        gathered = torch.empty((world, pad_to), dtype=torch.int32, device=device)
        dist.all_gather(list(gathered), own["dsa_cache_seqlens"])
        check(gathered, own, totals, rank, (extend, seq))
        num_rows += sum(totals)
        num_padded += world * pad_to
    status = cupy_nsa_meta.last_status(device)
    if status:
        raise SystemExit(f"rank {rank}: last_status: expected 0, got {status}")
    dist.barrier()
    if rank == 0:
        print(
            f"{world} ranks on {device.type}, {arguments.steps} steps, {num_rows} rows "
            f"({num_padded} padded): equal to one process"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
