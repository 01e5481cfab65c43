"""Request traces, and the serving simulation that turns them into draft-extend batches.

NumPy only. A trace is a list of requests (arrival, context tokens, generated tokens). ``simulate``
runs them through continuous batching with chunked prefill and speculative decoding; every step of
it is one batch of the seed operation: ``extend_seq_lens`` and ``seq_lens`` of the running requests.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import BenchError

IntArray = npt.NDArray[np.int64]

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_KV_LEN = 2**31 - 1  # seqlens_expanded is int32

# Log-normal medians and shapes, and the arrival rate, of one hour of chat requests.
SYNTHETIC_CONTEXT = (760.0, 0.99)
SYNTHETIC_GENERATED = (151.0, 0.86)
SYNTHETIC_MAX_CONTEXT = 16384
SYNTHETIC_MAX_GENERATED = 1000
SYNTHETIC_RATE = 5.5  # requests per second


class TraceError(BenchError):
    """A trace that cannot be read."""


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival; all arrays are [number of requests]."""

    source: str
    arrival: npt.NDArray[np.float64]  # seconds after the first request
    context: IntArray  # prompt tokens, >= 0
    generated: IntArray  # output tokens, >= 0

    def __len__(self) -> int:
        return len(self.arrival)


def read_trace(path: Path) -> Requests:
    """Read a CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Further columns are ignored. Timestamps are ISO 8601 with any number of fractional digits (those
    behind the microsecond are dropped); without a time zone they count as UTC. Rows may come in any
    order.

    Raises:
        TraceError: the file cannot be read, a column is missing, there is no row, or a value is not
            what its column holds.
    """
    rows: list[tuple[datetime, int, int]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            if not set(COLUMNS) <= set(header):
                raise TraceError(
                    f"{path}: expected the columns {', '.join(COLUMNS)}, "
                    f"got {', '.join(header)[:200] if any(header) else 'an empty first line'}"
                )
            positions = [header.index(name) for name in COLUMNS]
            for row in reader:
                if not row or row == [""]:
                    continue  # a blank line
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    raise TraceError(f"{where}: expected {len(header)} fields, got {len(row)}")
                texts = [row[position] for position in positions]
                context, generated = (
                    _tokens(where, name, text)
                    for name, text in zip(COLUMNS[1:], texts[1:], strict=True)
                )
                if context + generated > MAX_KV_LEN:
                    raise TraceError(
                        f"{where}: expected ContextTokens + GeneratedTokens <= {MAX_KV_LEN}, "
                        f"got {context + generated}"
                    )
                rows.append((_timestamp(where, texts[0]), context, generated))
    except OSError as error:
        raise TraceError(
            f"{path}: expected a readable CSV file, got {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{path}: expected UTF-8 text, got other bytes ({error.reason})"
        ) from error
    except csv.Error as error:
        raise TraceError(f"{path}: expected CSV rows, got an error: {error}") from error
    if not rows:
        raise TraceError(f"{path}: expected at least one request, got a header without rows")
    rows.sort(key=lambda row: row[0])  # stable: equal times stay in file order
    first = rows[0][0]
    return Requests(
        path.name,
        np.array([(time - first).total_seconds() for time, _, _ in rows]),
        np.array([context for _, context, _ in rows], dtype=np.int64),
        np.array([generated for _, _, generated in rows], dtype=np.int64),
    )


def _tokens(where: str, name: str, text: str) -> int:
    digits = text.strip()
    # 10 digits hold every value up to MAX_KV_LEN.
    if not (digits.isascii() and digits.isdigit() and len(digits.lstrip("0")) <= 10):
        raise TraceError(
            f"{where}: {name}: expected an integer from 0 to {MAX_KV_LEN}, got {text[:40]!r}"
        )
    return int(digits)


def _timestamp(where: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text.strip())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise TraceError(
            f"{where}: TIMESTAMP: expected a time like 2023-11-16 18:15:46.68, got {text[:40]!r}"
        ) from None


def synthetic(num_requests: int, rate: float = SYNTHETIC_RATE, seed: int = 0) -> Requests:
    """Requests like those of a chat service: Poisson arrivals, log-normal lengths, by seed."""
    rng = np.random.default_rng((seed, 0))
    gaps = rng.exponential(1.0 / rate, num_requests)
    gaps[0] = 0.0

    def lengths(median: float, sigma: float, longest: int) -> IntArray:
        drawn = rng.lognormal(math.log(median), sigma, num_requests)
        return drawn.round().clip(1, longest).astype(np.int64)

    return Requests(
        "synthetic",
        np.cumsum(gaps),
        lengths(*SYNTHETIC_CONTEXT, SYNTHETIC_MAX_CONTEXT),
        lengths(*SYNTHETIC_GENERATED, SYNTHETIC_MAX_GENERATED),
    )


@dataclass(frozen=True)
class Options:
    """The serving engine that is simulated."""

    max_running: int = 256  # requests in one batch
    draft_tokens: int = 3  # proposed per request and step; 0: no speculative decoding
    acceptance: float = 0.7  # probability that a draft token is accepted if those before it were
    prefill_budget: int = 8192  # prompt tokens per step; a longer prompt is prefilled in chunks
    step_ms: float = 60.0  # duration of a step without tokens
    token_us: float = 20.0  # added per query token
    seed: int = 0


class Step(NamedTuple):
    """One batch; all arrays are [bs], in the order in which the requests were admitted."""

    extend_seq_lens: npt.NDArray[np.int32]  # query tokens of the step
    seq_lens: IntArray  # KV length after the step
    request_ids: IntArray  # positions in ``Requests``


def simulate(requests: Requests, options: Options) -> Iterator[Step]:
    """Serve all requests: first come, first served, prefill and decode mixed in one batch.

    A request is admitted once it has arrived, a place is free and prompt tokens are left in the
    step's budget. Its prompt is prefilled in one or more steps. Then every step verifies
    ``draft_tokens`` tokens and appends the accepted ones and one more, until the request has
    generated all its tokens. So the query tokens of a request add up to context + generated, which
    is its last KV length. A request without any token takes part in one step with length 0.

    The clock advances by ``step_ms`` and ``token_us`` per query token, or to the next arrival where
    nothing runs.
    """
    rng = np.random.default_rng((options.seed, 1))
    num_requests, arrival, context = len(requests), requests.arrival, requests.context
    request_ids, kv_len, prompt_left, output_left = (np.empty(0, dtype=np.int64) for _ in range(4))
    next_id = 0
    now = 0.0
    while len(request_ids) or next_id < num_requests:
        if not len(request_ids):
            now = max(now, float(arrival[next_id]))
        first_id = next_id
        places = options.max_running - len(request_ids)
        budget = options.prefill_budget - int(prompt_left.sum())
        # Nobody is admitted behind a prompt that uses up the budget: at most one is in chunks.
        while (
            next_id < num_requests
            and arrival[next_id] <= now
            and next_id - first_id < places
            and budget > 0
        ):
            budget -= int(context[next_id])
            next_id += 1
        if next_id > first_id:
            admitted = slice(first_id, next_id)
            request_ids = np.concatenate((request_ids, np.arange(first_id, next_id)))
            kv_len = np.concatenate((kv_len, np.zeros(next_id - first_id, dtype=np.int64)))
            prompt_left = np.concatenate((prompt_left, context[admitted]))
            output_left = np.concatenate((output_left, requests.generated[admitted]))

        decodes = prompt_left == 0
        accepted = _accepted(rng, len(request_ids), options)
        decoded = np.where(decodes, np.minimum(accepted + 1, output_left), 0)
        prompt_before = np.cumsum(prompt_left) - prompt_left
        prefilled = np.clip(options.prefill_budget - prompt_before, 0, prompt_left)
        extend = decoded + prefilled
        kv_len = kv_len + extend
        prompt_left = prompt_left - prefilled
        output_left = output_left - decoded
        yield Step(extend.astype(np.int32), kv_len, request_ids)

        now += 1e-3 * options.step_ms + 1e-6 * options.token_us * int(extend.sum())
        runs = (prompt_left > 0) | (output_left > 0)
        if not runs.all():
            request_ids, kv_len, prompt_left, output_left = (
                array[runs] for array in (request_ids, kv_len, prompt_left, output_left)
            )


def _accepted(rng: np.random.Generator, bs: int, options: Options) -> IntArray:
    """Accepted draft tokens of each request: P(>= k) = acceptance ** k, up to draft_tokens."""
    uniform = 1.0 - rng.random(bs)  # (0, 1]
    if options.acceptance <= 0.0:
        return np.zeros(bs, dtype=np.int64)
    if options.acceptance >= 1.0:
        return np.full(bs, options.draft_tokens, dtype=np.int64)
    run = np.floor(np.log(uniform) / math.log(options.acceptance))
    return np.minimum(run, options.draft_tokens).astype(np.int64)


@dataclass(frozen=True)
class Summary:
    """Sizes of a list of steps."""

    requests: int  # distinct requests that take part
    steps: int
    rows: int
    median_bs: float
    max_bs: int
    max_rows: int


def summarize(steps: Sequence[Step]) -> Summary:
    """Count the requests, steps and rows of a replay."""
    sizes = [len(step.request_ids) for step in steps]
    rows = [int(step.extend_seq_lens.sum(dtype=np.int64)) for step in steps]
    # Requests are admitted in order of their ids, so the largest one counts them.
    last = max((int(step.request_ids[-1]) for step in steps), default=-1)
    return Summary(
        requests=last + 1,
        steps=len(sizes),
        rows=sum(rows),
        median_bs=float(np.median(sizes)) if sizes else 0.0,
        max_bs=max(sizes, default=0),
        max_rows=max(rows, default=0),
    )
