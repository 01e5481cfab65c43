"""bench.py --suite fused on the CPU: batches, checks, providers, the suite, table, pictures, targets."""

from __future__ import annotations

import inspect
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import cupy_nsa_meta
import sglang_files
from bench_fakes import CPU, FakeGpu, fused_rows, stored_row
from benchmarks import (
    fused,
    fused_providers,
    fused_results,
    measure,
    plot,
    plot_fused,
    providers,
    readme,
    report,
    targets,
    upstream,
)
from benchmarks.fused import FusedCase, Shape, tables_of
from benchmarks.measure import Absent, Bound, Contest, Effort, Results
from benchmarks.session import Session
from benchmarks.suites import fused as suite

OPS = (*suite.OPS, "extend")
WIDTH = 512  # W of the cases here


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rows in a prefill step, few rows in the pool of tokens."""
    monkeypatch.setattr(fused, "EXTEND_ROWS", (60, 120))
    monkeypatch.setattr(fused, "TOKEN_ROWS", 13)


def made(op: str, page_table_1: bool = True, kv: str = "half", bs: int = 5) -> FusedCase:
    if op == "extend":
        return FusedCase(Shape(op, bs, seed=3), 64, CPU)
    shape = Shape(op, bs, WIDTH, page_table_1, kv, seed=3)
    return FusedCase(shape, 64, CPU, tables_of([shape], CPU))


def our_function(op: str):
    return getattr(cupy_nsa_meta, fused.FUNCTIONS[op])


def ours(case: FusedCase) -> Bound:
    return fused_providers._bound(case, case.call(our_function(case.op)))


def contest(case: FusedCase, bounds: dict[str, Bound], results: Results) -> Contest:
    return Contest(case, bounds, FakeGpu(), results, "fused", Effort(1, 5, 4, 20.0, 4))


# ---- Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", fused.KV)
@pytest.mark.parametrize("op", suite.OPS)
def test_lengths_change_and_stay_in_bounds(op, kv):
    case = made(op, kv=kv)
    seen, totals = set(), set()
    for _ in range(fused.POOL):
        after = case.seq + (fused.NEXT_N if op == "target_verify" else 0)
        low, high = (WIDTH // 2, WIDTH) if kv == "half" else (WIDTH, WIDTH)
        assert low <= int(after.min()) <= int(after.max()) <= high
        assert len(set(case.pool.tolist())) == case.shape.bs, "a permutation"
        assert 0 <= int(case.pool.min()) <= int(case.pool.max()) < fused.TOKEN_ROWS
        if op == "draft_extend_fused":
            assert 1 <= int(case.extend.min()) <= int(case.extend.max()) <= fused.MAX_EXTEND
            assert case.total == int(case.extend.sum())
        seen.add((*case.seq.tolist(), *case.pool.tolist()))
        totals.add(case.total)
        case.advance()
    assert len(seen) == fused.POOL
    if op == "draft_extend_fused":
        assert len(totals) > 1
        case.keep_total()
    (kept,) = {case.total for _ in range(fused.POOL) if case.advance() is None}
    assert kept == int(case.batch.extend.sum())


@pytest.mark.parametrize("width", [4096, 131072])
def test_short_requests_have_1024_tokens_whatever_the_width(width):
    shape = Shape("target_verify", 3, width, False, "1024")
    batches = fused.batches(shape, np.random.default_rng(0), False, CPU)
    assert {int(n) for batch in batches for n in batch.seq} == {1024 - fused.NEXT_N}


@pytest.mark.parametrize("bs", [1, 7])
def test_prefill_batches(bs):
    case = made("extend", bs=bs)
    lowest, highest = fused.EXTEND_ROWS
    totals = set()
    for _ in range(fused.POOL):
        assert lowest <= case.total <= highest
        assert case.total == int(case.extend.sum()) == sum(case.batch.extends)
        assert int(case.extend.min()) >= 1
        assert bool((case.seq >= case.extend).all())
        assert case.batch.seqs.tolist() == case.seq.tolist()
        totals.add(case.total)
        case.advance()
    assert len(totals) > 2
    case.keep_total()
    assert {case.total for _ in range(fused.POOL) if case.advance() is None} == {90}
    assert case.labels["max_extend"] <= highest


def test_the_longest_prompt_of_a_full_size_step_has_the_tokens_it_extends(monkeypatch):
    monkeypatch.undo()
    assert fused.EXTEND_ROWS[1] <= fused.EXTEND_WIDTH // 2


def test_the_seed_makes_the_batch():
    one, again = made("draft_extend_fused"), made("draft_extend_fused")
    assert torch.equal(one.tables.tokens, again.tables.tokens)
    assert all(torch.equal(a.seq, b.seq) for a, b in zip(one._batches, again._batches, strict=True))
    other = FusedCase(Shape("draft_extend_fused", 5, WIDTH, seed=4), 64, CPU, one.tables)
    assert not torch.equal(one.batch.seq, other.batch.seq)
    assert one.labels["seed"] == 3


LABELS = {
    "decode": {"bs": 5, "width": WIDTH, "page_table_1": True, "kv": "half", "rows": 5, "seed": 3},
    "target_verify": {"next_n": 4, "rows": 20},
    "draft_extend_fused": {"max_extend": 5},
    "extend": {"page_table_1": False, "width": fused.EXTEND_WIDTH, "kv": "half"},
}


@pytest.mark.parametrize("op", OPS)
def test_what_a_stored_case_says(op):
    case = made(op)
    assert LABELS[op].items() <= case.labels.items()
    assert json.loads(json.dumps(case.labels)) == case.labels
    assert case.name.startswith(f"{op} bs 5 ")


def test_bytes_that_must_move():
    case = made("draft_extend_fused")
    moved = []
    for _ in range(fused.POOL):
        read, written = case.seq, case.seq * case.extend
        pages = (case.seq + 63) // 64 * case.extend
        moved.append(4 * int((read + written + pages).sum()))
        case.advance()
    assert case.moved_bytes == pytest.approx(np.mean(moved))


def test_tables_have_the_stride_of_64_columns_more():
    case = made("decode")
    for name, columns in (("page_table_1", WIDTH + 64), ("real_page_table", WIDTH // 64 + 1)):
        assert case.out.views[name].stride() == (columns, 1)
    assert case.tables.tokens.stride(0) == WIDTH + 64


# ---- The check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_table_1", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_right_results_pass(op, page_table_1):
    case = made(op, page_table_1)
    for provider in ("cuda", "cuda-plan"):
        call = case.plan(fused.plan_maker(op)) if provider == "cuda-plan" else ours(case).enqueue
        for poisoned in (True, False):
            case.advance()
            if poisoned:
                case.poison()
            call(case.total)
            assert case.difference(case.total, None, poisoned) is None
    assert case.difference(case.total + 1) == (
        f"returned total: expected {case.total}, got {case.total + 1}"
    )


def outputs_of(op: str) -> list[str]:
    return [*fused.OUTPUTS[op], *(() if op == "extend" else ("page_table_1", "real_page_table"))]


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in outputs_of(op)], ids=str
)
def test_a_wrong_element_of_any_output_is_found(op, name):
    case = made(op)
    view = case.out.views[name]
    at = (2, 3) if view.dim() == 2 else (1,)
    for poisoned in (True, False):
        case.poison()
        ours(case).enqueue(case.total)
        view[at] += 1
        found = case.difference(case.total, None, poisoned)
        place = f"{name}[{', '.join(map(str, at))}]"
        assert found == f"{place}: expected {int(view[at]) - 1}, got {int(view[at])}"


def live(case: FusedCase, row: int) -> int:
    """KV tokens of the request that owns a row of decode."""
    return int(case.seq[row])


#: What nobody may write, as (block of the outputs, index in it)
BEHIND = {
    "page_table_1": lambda case: (case.out.views["page_table_1"], (2, live(case, 2))),
    "real_page_table": lambda case: (
        case.out.views["real_page_table"],
        (2, -(-live(case, 2) // 64)),
    ),
    "the gap": lambda case: (case.out.blocks[1], (2, WIDTH)),
    "the row behind": lambda case: (case.out.blocks[1], (-1, 0)),
    "behind a 1-D output": lambda case: (case.out.blocks[0], (5,)),
}


@pytest.mark.parametrize("what", BEHIND)
def test_a_write_beyond_is_found_where_it_is_forbidden(what):
    case = made("decode")
    while live(case, 2) == WIDTH:
        case.advance()
    case.poison()
    ours(case).enqueue(case.total)
    block, at = BEHIND[what](case)
    assert int(block[at]) == fused.SENTINEL
    block[at] = 7
    found = case.difference(case.total, None, True)
    if what in case.out.views:
        assert found == f"{what}[{', '.join(map(str, at))}]: expected no write, got 7"
    else:
        assert found == "expected no write behind the outputs"
    assert case.difference(case.total, None, False) is None, "SGLang may"


@pytest.mark.parametrize("name", ["seq", "extend", "pool"])
def test_a_write_to_an_input_is_found(name):
    case = made("draft_extend_fused")
    ours(case).enqueue(case.total)
    getattr(case, name)[0] += 1
    assert case.difference(case.total, None, False).endswith("an input: expected no write")


def test_rows_at_and_behind_the_total_keep_their_bytes():
    case = made("draft_extend_fused")
    while case.total == case.shape.max_rows:
        case.advance()
    case.poison()
    ours(case).enqueue(case.total)
    case.out.views["seqlens_expanded"][case.total] = 1
    assert case.difference(case.total) == (
        f"seqlens_expanded[{case.total}]: expected no write, got 1"
    )


def test_the_result_of_other_lengths_is_wrong():
    for op in OPS:
        case = made(op, kv="half" if op == "extend" else "1024")
        ours(case).enqueue(case.total)
        case.advance()
        assert case.difference(case.total, None, False) is not None, op


def test_returned_tensors_are_compared_in_length_and_dtype():
    case = made("extend")
    batch = case.batch
    right = fused_providers.extend_loop(case.seq, case.extend, batch.seqs, batch.extends, 64)
    assert case.difference(case.total, right, False) is None
    names = list(fused.OUTPUTS["extend"])
    for wrong, message in (
        (lambda t: t.to(torch.int64), "expected torch.int32, got torch.int64"),
        (lambda t: t[:-1], f"expected {case.total} elements, got {case.total - 1}"),
        (lambda t: t + 1, r"ks[0]: expected 0, got 1"),
    ):
        changed = [wrong(t) if n == "ks" else t for n, t in zip(names, right, strict=True)]
        assert message in case.difference(case.total, tuple(changed), False)


# ---- Providers ----------------------------------------------------------------------------------

STAND_IN = """
import cupy_nsa_meta
from functools import wraps

def _as_sglang(function):
    @wraps(function)
    def call(**arguments):
        function(**arguments)
        lengths, table = arguments["cache_seqlens"], arguments["page_table_1"]
        if table is not None:
            rows = len(table)
            if "total_len" in arguments:
                rows = arguments["total_len"]
            width = arguments.get("max_len", arguments.get("max_seqlen_k"))
            if rows == len(lengths):  # decode: to the end of the block of 128 columns
                for row, kv in enumerate(lengths.tolist()):
                    table[row, kv:min(-(-kv // 128) * 128, width)] = 0
        expanded = arguments.get("seqlens_expanded")
        if "total_len" in arguments:
            expanded[arguments["total_len"]:] = 0
        {fault}
    return call

fused_dsa_decode_metadata = _as_sglang(cupy_nsa_meta.fused_dsa_decode_metadata)
fused_dsa_target_verify_metadata = _as_sglang(cupy_nsa_meta.fused_dsa_target_verify_metadata)
fused_dsa_draft_extend_metadata = _as_sglang(cupy_nsa_meta.fused_dsa_draft_extend_metadata)
"""


def write_sglang(folder: Path, version: str = upstream.VERSION, fault: str = "pass") -> Path:
    """A folder with an ``sglang/`` whose functions write more than they have to."""
    package = folder / "sglang"
    package.mkdir(parents=True)
    (package / "_version.py").write_text(f'__version__ = version = "{version}"\n')
    path = folder.joinpath(*upstream.METADATA.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(STAND_IN.format(fault=fault))
    return folder


@pytest.fixture
def any_device(monkeypatch):
    """Providers that ask for a GPU take the CPU."""
    monkeypatch.setattr(providers, "needs_gpu", lambda device: None)
    monkeypatch.setattr(providers, "needs_cuda_backend", lambda device: None)


@pytest.mark.parametrize(
    "name",
    ["cuda", "cuda-views", "cuda-plan", "cuda-plan-device", "bare-graph", "sglang", "copy"],
)
def test_without_a_gpu_a_provider_says_why(name, tmp_path, monkeypatch):
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(write_sglang(tmp_path)))
    with pytest.raises(Absent, match="it takes CUDA tensors"):
        fused_providers.PROVIDERS[name](CPU)


def test_where_sglang_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(upstream.SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Absent, match="sglang is not installed, and CUPY_NSA_META_SGLANG_SOURCE"):
        upstream.fused_metadata()
    with pytest.raises(Absent, match="sglang is not installed"):
        providers.load_sglang(CPU)
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(tmp_path))
    with pytest.raises(Absent, match="expected a folder with sglang/ in it, got "):
        upstream.fused_metadata()
    write_sglang(tmp_path / "other", "0.5.18")
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(Absent, match="SGLang 0.5.23 is compared, this one is 0.5.18"):
        upstream.fused_metadata()
    with pytest.raises(Absent, match="this sglang has no sglang.srt.layers.attention.utils"):
        providers.load_sglang(CPU)


def test_an_installed_sglang_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.delenv(upstream.SOURCE_VARIABLE, raising=False)
    (write_sglang(tmp_path) / "sglang/__init__.py").write_text("raise ImportError('no deps')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = upstream.fused_metadata()
    assert found is upstream.fused_metadata(), "its compiled kernels are kept"
    assert callable(found.fused_dsa_decode_metadata)
    assert not any(sglang_files.is_sglang(name) for name in sys.modules)


@pytest.mark.sglang
def test_the_real_functions_take_our_keywords(tmp_path, monkeypatch):
    """From SGLang's own file, beside the expansion that the seed table compares."""
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(sglang_files.find(tmp_path)))
    module = upstream.fused_metadata()
    for op in suite.OPS:
        for page_table_1 in (False, True):
            seen = []
            case = made(op, page_table_1)
            case.call(lambda seen=seen, **arguments: seen.append(arguments))(case.total)
            real = inspect.signature(getattr(module, fused.FUNCTIONS[op]))
            bound = real.bind(**seen[0])
            missing = set(real.parameters) - set(bound.arguments)
            assert missing <= {"paged_mqa_ctx_lens_2d", "static_extend_len"}
    monkeypatch.setattr(providers, "needs_gpu", lambda device: None)
    assert callable(providers.load_sglang(CPU))


def test_writing_more_is_allowed_to_sglang_alone(tmp_path, monkeypatch, any_device):
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(write_sglang(tmp_path)))
    for op in suite.OPS:
        case, results = made(op), Results()
        theirs = fused_providers.load_sglang(CPU)(case)
        assert theirs.writes_more
        strict = Bound(enqueue=theirs.enqueue, record=theirs.record)
        measured = contest(case, {"sglang": theirs, "strict": strict, "cuda": ours(case)}, results)
        both = {"sglang", "cuda"} | ({"strict"} if op == "target_verify" else set())
        assert set(measured.host()) == both, op
        case.keep_total()
        assert set(measured.gpu()) == both, op
        assert set(results.first_mismatches) == {"sglang", "cuda", "strict"} - both


def test_a_wrong_sglang_is_not_timed(tmp_path, monkeypatch, any_device):
    fault = 'arguments["dsa_cu_seqlens_k"][1] += 1'
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(write_sglang(tmp_path, fault=fault)))
    case, results = made("decode"), Results()
    bounds = {"sglang": fused_providers.load_sglang(CPU)(case), "cuda": ours(case)}
    assert list(contest(case, bounds, results).host()) == ["cuda"]
    assert list(contest(case, bounds, results).gpu()) == ["cuda"]
    assert results.first_mismatches["sglang"].startswith(
        f"fused, {case.name}, host_us: dsa_cu_seqlens_k[1]: expected "
    )
    assert {found["provider"] for found in results.rows} == {"cuda"}


@pytest.mark.parametrize("name", ["loop", "torch"])
@pytest.mark.parametrize("bs", [1, 7])
def test_forms_of_extend_that_run_anywhere_are_right(name, bs):
    case, results = made("extend", bs=bs), Results()
    measured = contest(case, {name: fused_providers.PROVIDERS[name](CPU)(case)}, results)
    assert measured.end_to_end()
    assert measured.host()
    case.keep_total()
    assert list(measured.gpu()) == ([] if name == "loop" else ["torch"]), "a wait in the loop"
    assert (results.mismatches, results.left_out) == (0, [])


def test_every_provider_of_extend_is_waited_for(any_device):
    case = made("extend")
    waits = []
    case.wait = lambda: waits.append(0)
    for name in suite.EXTEND_PROVIDERS:
        bound = fused_providers.PROVIDERS[name](CPU)(case)
        bound.enqueue(case.total)
        assert waits == []
        assert bound.run() == case.total
        assert waits == [0], name
        waits.clear()


@pytest.mark.parametrize("op", OPS)
def test_a_plan_is_told_the_numbers_of_each_batch(op):
    told = []
    parameters = inspect.signature(getattr(cupy_nsa_meta, f"plan_{fused.FUNCTIONS[op]}"))

    class Plan:
        def __init__(self, **arguments):
            parameters.bind(**arguments)

        def launch(self, *numbers):
            told.append(numbers)

    case = made(op)
    launch = case.plan(Plan)
    for _ in range(3):
        launch(case.total)
        has_rows = op in ("draft_extend_fused", "extend")
        assert told[-1] == ((5, case.total) if has_rows else (5,))
        case.advance()


def test_a_copy_moves_the_bytes_of_the_case(any_device):
    case = made("target_verify")
    bound = fused_providers.load_copy(CPU)(case)
    assert not bound.checked
    copied = bound.record()
    assert 2 * copied.numel() * copied.element_size() == pytest.approx(case.moved_bytes, abs=8)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_on_a_gpu_our_providers_are_right_and_captured(op):
    device = torch.device("cuda", 0)
    shape = Shape(op, 5, seed=3) if op == "extend" else Shape(op, 5, WIDTH, True, seed=3)
    tables = tables_of([shape], device) if shape.has_tables else None
    cupy_nsa_meta.last_status(device)
    session = Session(device, 64, effort=Effort(1, 5, 4, 20.0, 4))
    names = suite.EXTEND_PROVIDERS if op == "extend" else ("cuda", "cuda-plan", "copy")
    if op == "draft_extend_fused":
        names += ("cuda-plan-device",)
    names = (*names, "cuda-views", "bare-graph")
    case = FusedCase(shape, 64, device, tables)
    measured = session.contest("fused", case, names, loaders=fused_providers.PROVIDERS)
    assert set(measured.host()) == set(names) - {"copy"}
    assert set(measured.end_to_end()) == (set(suite.EXTEND_PROVIDERS) if op == "extend" else set())
    case.keep_total()
    assert set(measured.gpu()) == set(names) - {"loop", "cuda-views", "bare-graph"}
    assert (session.results.mismatches, session.results.left_out) == (0, [])
    assert cupy_nsa_meta.last_status(device) == 0, "no launch was told a wrong total"


# ---- The suite ----------------------------------------------------------------------------------


def small_suite(monkeypatch, **sizes) -> Session:
    for name, value in (
        *(("BATCH_SIZES", (3,)), ("WIDTHS", (128,)), ("EXTEND_BATCH_SIZES", (2,))),
        *(("FURTHER", (("decode", 256, False, 4),)), ("LARGE_BYTES", 1 << 30)),
        *sizes.items(),
    ):
        monkeypatch.setattr(suite, name, value)
    monkeypatch.setattr(suite, "less", lambda effort: effort)
    return Session(CPU, 64, timing=FakeGpu(), effort=Effort(1, 5, 4, 20.0, 4))


def test_every_case_and_provider_has_its_rows(tmp_path, monkeypatch, any_device):
    monkeypatch.setenv(upstream.SOURCE_VARIABLE, str(write_sglang(tmp_path)))
    session = small_suite(monkeypatch)
    session.seed = 5
    suite.run(session)
    results = session.results
    assert (results.mismatches, results.notes) == (0, [])
    found = {
        (r["op"], *(r["case"][n] for n in ("width", "bs", "page_table_1", "kv")), r["provider"], r["metric"])
        for r in results.rows
    }  # fmt: skip
    on_cpu = [name for name in suite.PROVIDERS if name != "bare-graph"]
    where_rows_vary = [*on_cpu, "cuda-plan-device"]
    assert {name for _, name, _ in results.left_out} == {"bare-graph"}
    expected = {
        (op, width, bs, page_table_1, kv, provider, metric)
        for op in suite.OPS
        for width in (128,)
        for bs in (3,)
        for page_table_1 in (False, True)
        for kv in fused.KV
        for provider in (where_rows_vary if op == "draft_extend_fused" else on_cpu)
        for metric in ("host_us", "gpu_us")
    }
    expected |= {
        ("decode", 256, 4, False, kv, provider, metric)
        for kv in fused.KV
        for provider in on_cpu
        for metric in ("host_us", "gpu_us")
    }
    expected = {row for row in expected if row[-2:] != ("cuda-views", "gpu_us")}
    expected |= {
        ("extend", fused.EXTEND_WIDTH, 2, False, "half", provider, metric)
        for provider in suite.EXTEND_PROVIDERS
        for metric in ("end_to_end_us", "host_us", "gpu_us")
        if (provider, metric) != ("loop", "gpu_us")
    }
    assert found == expected
    assert len(results.rows) == len(expected), "each once"
    assert {r["suite"] for r in results.rows} == {"fused"}
    assert {r["case"]["seed"] for r in results.rows} == {5}
    lines = report.suite_tables(results.rows, "fused").splitlines()
    title = lines.index("fused, decode: GPU time, us")
    assert lines[title + 1].split() == ["case", *(p for p in on_cpu if p != "cuda-views")]
    assert sum(line.startswith("bs 4 width 256") for line in lines) == 4, "a line a case and metric"
    title = lines.index("fused, extend: end-to-end, us")
    assert lines[title + 1].split() == ["case", *suite.EXTEND_PROVIDERS]


def test_large_tables_have_a_bandwidth(monkeypatch, any_device):
    def absent():
        raise Absent("none here")

    monkeypatch.setattr(upstream, "fused_metadata", absent)
    session = small_suite(monkeypatch, LARGE_BYTES=12000)
    large, small = Shape("target_verify", 3, WIDTH, True), Shape("decode", 1, WIDTH, True)
    for _ in suite._of_one_width(session, [large, small], session.effort):
        pass
    rows = {(r["op"], r["provider"], r["metric"]): r for r in session.results.rows}
    measured = {provider for _, provider, metric in rows if metric == "gb_per_s"}
    assert measured == {"cuda", "cuda-plan", "copy"}
    assert {op for op, _, metric in rows if metric == "gb_per_s"} == {"target_verify"}
    bandwidth, us = (rows["target_verify", "cuda", name] for name in ("gb_per_s", "gpu_us"))
    case = FusedCase(large, 64, CPU, tables_of([large], CPU))
    case.keep_total()
    assert bandwidth["p80"] == pytest.approx(case.moved_bytes / us["p20"] / 1e3, rel=1e-3)
    assert ("target_verify", "copy", "host_us") not in rows
    assert session.results.really_absent() == {
        "sglang": "none here",
        "bare-graph": "the plan has no captured launch",
    }


def test_what_does_not_fit_is_a_note(monkeypatch, any_device):
    session = small_suite(monkeypatch, WIDTHS=(128,), EXTEND_BATCH_SIZES=(), FURTHER=())
    monkeypatch.setattr(fused, "KV", ("half",))
    room = Shape("target_verify", 3, 128, True).bytes_needed
    monkeypatch.setattr(session, "free_bytes", lambda: room)
    suite.run(session)
    assert session.results.notes == [
        "fused: draft_extend_fused bs 3 width 128 page_table_1 True does not fit the memory"
    ]
    assert ("draft_extend_fused", 3, False) in {
        (r["op"], r["case"]["bs"], r["case"]["page_table_1"]) for r in session.results.rows
    }


def test_the_largest_case_fits_either_gpu(monkeypatch):
    monkeypatch.undo()
    largest = max(shape.bytes_needed for shape in suite.shapes(False, 0))
    tables = 5 * 1024 * 131072 * 4
    assert 4 * tables < largest < 40 << 30


def test_the_grid_of_a_full_run():
    chosen = suite.shapes(False, 0)
    assert len(chosen) == len(set(chosen)) == 2 * (3 * 6 * 3 * 2 + 1)
    named = [("draft_extend_fused", 256, 4096), ("decode", 1024, 8192)]
    for op, bs, width in named:
        assert {Shape(op, bs, width, False, kv) for kv in fused.KV} <= set(chosen)
    quick = suite.shapes(True, 0)
    assert set(quick) < set(chosen)
    assert len(quick) == 12
    widths = [shape.width for shape in chosen]
    assert len([1 for a, b in pairwise(widths) if a != b]) == 3, "by width"


def test_a_full_run_takes_less_of_each_case():
    effort = suite.less(Effort())
    assert (effort.rounds, effort.block, effort.replays) == (10, 16, 10)
    assert effort.graph_us == pytest.approx(320)
    quick = suite.less(measure.QUICK)
    assert (quick.rounds, quick.block, quick.replays) == (1, 10, 4)


def test_all_suites_include_fused():
    assert "fused" in bench.suite_names(bench.parser().parse_args(["--suite", "all"]))


def test_the_suite_on_the_cpu(tmp_path, capsys, monkeypatch):
    """EXTEND in torch, and a reason for each of the others."""
    monkeypatch.delenv(upstream.SOURCE_VARIABLE, raising=False)
    path = tmp_path / "run.json"
    argv = ["--suite", "fused", "--quick", "--device", "cpu", "--json", str(path)]
    assert bench.main(argv) == 0
    document = json.loads(path.read_text())
    assert {(r["op"], r["provider"], r["metric"]) for r in document["rows"]} == {
        ("extend", "loop", "end_to_end_us"),
        ("extend", "torch", "end_to_end_us"),
    }
    assert set(document["absent"]) == {
        *("sglang", "cuda", "cuda-views", "cuda-plan", "cuda-plan-device", "bare-graph")
    }
    assert "fused, extend: end-to-end, us" in capsys.readouterr().out


# ---- A stored run: targets, table, pictures ------------------------------------------------------


def stored() -> dict:
    rows = fused_rows()
    rows.append(stored_row("floor", "floor-graph", "host_us", 1.5, bs=32, rows=96))
    return {"rows": rows, "environment": {"gpu": "A GPU", "command": "bench.py --suite fused"}}


def outcomes(document: dict) -> dict[str, targets.Outcome]:
    found = [o for o in targets.targets(document) if o.what.startswith("fused: ")]
    assert len({o.what for o in found}) == len(found)
    return {o.what.removeprefix("fused: "): o for o in found}


def test_every_target_of_the_fused_family_is_met():
    found = outcomes(stored())
    assert len(found) == 18
    assert [what for what, o in found.items() if o.met is not True] == []


MISSED = {
    "GPU / SGLang's, every case": (12, {"op": "decode", "bs": 8, "width": 32768, "kv": "1024", "page_table_1": False, "provider": "cuda", "metric": "gpu_us"}),
    "GPU / SGLang's, geometric mean, without page_table_1": (9, {"provider": "cuda", "metric": "gpu_us", "page_table_1": False}),
    "GPU / SGLang's, geometric mean, with page_table_1": (9, {"provider": "cuda", "metric": "gpu_us", "page_table_1": True}),
    "enqueue / SGLang's, every case": (2.5, {"op": "target_verify", "bs": 1, "width": 4096, "provider": "cuda", "metric": "host_us"}),
    "enqueue / SGLang's, geometric mean": (2.5, {"provider": "cuda", "metric": "host_us"}),
    "draft_extend_fused bs 256 W 4096, no page_table_1: GPU, us": (3, {"op": "draft_extend_fused", "bs": 256, "width": 4096, "page_table_1": False, "kv": "1024", "provider": "cuda"}),
    "decode bs 1024 W 8192, no page_table_1: GPU, us": (2, {"op": "decode", "width": 8192, "kv": "half", "provider": "cuda"}),
    "bandwidth / torch copy of the same bytes, large tables": (0.85, {"provider": "cuda", "metric": "gb_per_s", "bs": 1024, "width": 32768, "op": "target_verify"}),
    "plan enqueue, told T / floor-graph enqueue, every case": (1.2, {"provider": "cuda-plan", "metric": "host_us", "op": "draft_extend_fused", "bs": 64, "width": 4096}),
    "plan enqueue, told T / floor-graph enqueue, geometric mean": (1.2, {"provider": "cuda-plan", "metric": "host_us"}),
    "plan enqueue, T from the device / floor-graph enqueue, every case": (1.2, {"provider": "cuda-plan", "metric": "host_us", "op": "decode", "bs": 64, "width": 4096}),
    "plan enqueue, T from the device / floor-graph enqueue, geometric mean": (3, {"provider": "cuda-plan-device", "metric": "host_us"}),
    "EXTEND, loop / ours, bs 1": (0.5, {"provider": "loop", "bs": 1}),
    "EXTEND, loop / ours, bs 16": (0.5, {"provider": "loop", "bs": 16}),
    "EXTEND, loop / ours, bs 64": (0.5, {"provider": "loop", "bs": 64}),
    "EXTEND, loop / ours, bs 256": (0.5, {"provider": "loop", "bs": 256}),
    "EXTEND, torch / ours": (0.7, {"provider": "torch", "bs": 64}),
    "EXTEND, call and wait, us": (1.25, {"provider": "cuda", "op": "extend", "bs": 256, "metric": "end_to_end_us"}),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSED)
def test_a_target_missed(what):
    factor, wanted = MISSED[what]
    document = stored()
    count = 0
    for found in document["rows"]:
        fields = {**found["case"], **found}
        if all(fields.get(name) == value for name, value in wanted.items()):
            found["median"] *= factor
            count += 1
    assert count
    outcome = outcomes(document)[what]
    assert outcome.met is False
    assert outcome.detail


def test_what_a_plan_reaches_is_beside_it():
    document = stored()
    found = outcomes(document)
    assert found["EXTEND, loop / ours, bs 64"].detail.endswith("; its plan 401")
    assert found["EXTEND, call and wait, us"].detail.endswith("; its plan 7.60 at most")
    document["rows"] = [r for r in document["rows"] if r["provider"] != "cuda-plan"]
    assert outcomes(document)["EXTEND, torch / ours"].detail.endswith("; its plan -")


def test_the_worst_case_is_named():
    detail = outcomes(stored())["bandwidth / torch copy of the same bytes, large tables"].detail
    assert detail.startswith("3,800 / 4,000 GB/s at decode bs 256 W 131072 page_table_1 kv half")
    assert detail.endswith("; 0 of 9 missed")


def test_without_sglang_its_targets_are_not_measured():
    document = stored()
    document["rows"] = [r for r in document["rows"] if r["provider"] != "sglang"]
    found = outcomes(document)
    assert {what for what, o in found.items() if o.met is None} == {
        what for what in found if "SGLang" in what
    }


def test_the_readme_tables():
    text = readme.table(stored())
    assert "| GPU us (SGLang) | bs 1, W 4,096 | bs 32, W 4,096 |" in text
    decode = next(line for line in text.splitlines() if line.startswith("| decode |"))
    cells = [cell.strip() for cell in decode.strip("|").split("|")]
    assert cells[2] == "1.48 (9.56)"
    assert cells[-3:] == ["5.00 (40.2)", "6.00", "2.00"]
    found = fused_results.ratios(
        *(fused_results.medians(stored()["rows"], name, "gpu_us", "decode") for name in ("cuda", "sglang")),
        lambda point: not point.page_table_1,
    )  # fmt: skip
    assert cells[-5:-3] == [
        f"{np.exp(np.mean(np.log(list(found.values())))):.2f}",
        f"{max(found.values()):.2f}",
    ]
    assert "| loop over the requests, as in SGLang 0.5.23 | 274 | 934 | 3,046 | 11,494 |" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert "Large tables: 0.95 to 0.95 of the bandwidth of a torch copy" in text


def test_the_readme_without_sglang_has_our_times_alone():
    document = stored()
    document["rows"] = [r for r in document["rows"] if r["provider"] != "sglang"]
    text = readme.table(document)
    assert "| decode | 1.40 | 1.48 |" in text


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["fused-decode.png", "fused-target-verify.png", "fused-draft-extend.png"]
    drawn = plot.draw(stored(), tmp_path)
    assert [path.name for path in drawn] == [*names, plot_fused.EXTEND]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20000


def test_a_picture_shows_every_series():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = plot_fused.tables_figure(pyplot, stored()["rows"], "A GPU", "decode")
    panels = figure.axes
    assert len(panels) == 2 * 4
    assert [len(axes.lines) for axes in panels] == [4, 4, 4, 3] * 2
    assert {axes.get_yscale() for axes in panels} == {"log"}
    at = dict(zip(*panels[1].lines[2].get_data(), strict=True))  # ours, W/2 to W
    assert (
        at[256]
        == fused_results.medians(stored()["rows"], "cuda", "gpu_us")[
            fused_results.Point("decode", 256, 32768, False, "half")
        ]
    )
    pyplot.close(figure)
    figure = plot_fused.extend_figure(pyplot, stored()["rows"], "A GPU")
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 2]
    pyplot.close(figure)


def test_a_quick_run_has_pictures_of_what_it_has(tmp_path):
    pytest.importorskip("matplotlib")
    document = stored()
    document["rows"] = [
        r for r in document["rows"] if r["case"]["bs"] in (32, 256) and r["case"].get("width") == 4096
    ]  # fmt: skip
    assert len(plot.draw(document, tmp_path)) == 3
