"""The operators torch.ops.nsa_meta.*: schemas, fake kernels, torch.compile; eager calls avoid them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import cupy_nsa_meta
import fused_cases
from cases import Case, Outputs
from cupy_nsa_meta import _ops, reference
from cupy_nsa_meta._status import INT32_MAX
from fused_cases import FUNCTIONS, Built, FusedCase
from fused_plans import batch_of, plan_of

ops = torch.ops.nsa_meta

#: What each operator writes and how many tensors it returns.
WRITES: dict[str, tuple[set[str], int]] = {
    "fill_draft_extend_metadata": ({"out_seqlens_expanded", "out_nsa_cache_seqlens"}, 0),
    "fill_draft_extend_metadata_async": (
        {"out_seqlens_expanded", "out_nsa_cache_seqlens", "out_total"},
        0,
    ),
    "draft_extend_metadata": (set(), 2),
    "fused_dsa_decode_metadata": (
        {"cache_seqlens", "cu_seqlens_k", "page_table_1", "dsa_cache_seqlens", "dsa_cu_seqlens_k",
         "real_page_table"}, 0),
    "fused_dsa_target_verify_metadata": (
        {"cache_seqlens", "cu_seqlens_k", "page_table_1", "seqlens_expanded", "dsa_cache_seqlens",
         "dsa_cu_seqlens_k", "real_page_table", "paged_mqa_ctx_lens_2d"}, 0),
    "fused_dsa_draft_extend_metadata": (
        {"cache_seqlens", "cu_seqlens_k", "page_table_1", "seqlens_expanded", "dsa_cache_seqlens",
         "dsa_cu_seqlens_k", "real_page_table"}, 0),
    "fused_dsa_extend_metadata": (
        {*fused_cases.EXTEND_REQUEST_OUTPUTS, *fused_cases.EXTEND_ROW_OUTPUTS, *fused_cases.TABLES,
         "page_table_1_flattened"}, 0),
    "seqlens_expand": (set(), 1),
}  # fmt: skip

FUSED_NAMES = [
    "decode_basic_ps64", "decode_basic_ps1_pages_only", "decode_two_tables_ps1", "decode_empty",
    "decode_stride_zero", "decode_outside_pool", "decode_unaligned",
    "verify_basic_ps64", "verify_basic_ps1", "verify_padding_rows", "verify_dtypes_1",
    "draft_extend_basic_ps64", "draft_extend_static", "draft_extend_total_short",
    "draft_extend_total_long", "draft_extend_dtypes_2", "draft_extend_bs_257",
    "extend_basic_ps64", "extend_contract", "extend_padded", "extend_one_output",
    "extend_arrays_only", "extend_flattened_short", "extend_no_rows_padded",
]  # fmt: skip


def with_total(item: Case) -> Case:
    """The case with total_tokens, without which nothing can be traced."""
    if item.total_tokens is not None:
        return item
    return dataclasses.replace(item, total_tokens=min(max(item.total, 0), item.capacity))


SEED_CASES = [with_total(item) for item in cases.CASES if item.bs < 5000]
SEED_CASES = [item for item in SEED_CASES if item.capacity < 100_000]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Many sizes of one function on purpose; and no status from before."""
    torch._dynamo.reset()
    cupy_nsa_meta.last_status("cpu")
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[str]:
        """Names of our operators in all graphs, in order."""
        return [str(node.target).removeprefix("nsa_meta.") for node in self.calls()]

    def calls(self) -> list[torch.fx.Node]:
        """Calls of our operators in all graphs, in order."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return [node for node in nodes if str(node.target).startswith("nsa_meta.")]


def compiled(function, backend="eager", **options):
    """``function`` without a graph break, with dynamic shapes."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=True, **options)


def check_seed(fill, item: Case, device: str) -> None:
    """One batch through a synchronous function with total_tokens, every byte compared."""
    extend, seq = item.lengths(device)
    outputs = Outputs(item, device)
    total = fill(
        extend, seq, item.topk, outputs.expanded, outputs.clamped, total_tokens=item.total_tokens
    )
    assert total == item.total_tokens
    outputs.check(item.expected())


def check_fused(function, item: FusedCase, device: str) -> None:
    """One batch of the fused family, every byte and the status compared."""
    built = Built(item, device)
    function(**built.arguments)
    assert cupy_nsa_meta.last_status(device) == item.status, item.name
    built.check(fused_cases.expected(item))
    cupy_nsa_meta.last_status("cpu")


def operator_calls(device: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """A call of every operator, and several of those with optional outputs."""
    item = cases.BY_NAME["strided"]
    extend, seq = item.lengths(device)

    def room(rows: int) -> torch.Tensor:
        return torch.full((rows,), cases.POISON, dtype=torch.int32, device=device)

    total = item.total
    outs = (room(total + 7), room(total + 9))
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("fill_draft_extend_metadata", (extend, seq, 9, *outs), {"total_tokens": total}),
        ("fill_draft_extend_metadata_async", (extend, seq, 9, *outs), {"out_total": room(2)}),
        (
            "fill_draft_extend_metadata_async",
            (extend, seq, 9, *outs, False),
            {"out_total": room(2), "total_tokens": 5},
        ),
        ("draft_extend_metadata", (extend, seq, 9), {"total_tokens": total}),
        ("seqlens_expand", (extend, seq, total, 9), {}),
    ]
    for name in (
        "decode_basic_ps64", "decode_basic_ps64_pages_only", "decode_two_tables_ps1",
        "verify_basic_ps64", "verify_basic_ps64_pages_only", "draft_extend_basic_ps64",
        "draft_extend_static", "extend_contract", "extend_one_output",
    ):  # fmt: skip
        fused = fused_cases.BY_NAME[name]
        calls.append((FUNCTIONS[fused.op].__name__, (), Built(fused, device).arguments))
    assert {name for name, *_ in calls} == set(WRITES)
    return calls


NUM_CALLS = len(operator_calls("cpu"))


# ---- Registration -------------------------------------------------------------------------------


def test_importing_registers_and_imports_no_compiler():
    code = """
        import sys, torch
        before = set(sys.modules)
        import cupy_nsa_meta
        new = {name for name in set(sys.modules) - before if not name.startswith("cupy_nsa_meta")}
        assert not [n for n in new if n.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
        assert not torch.cuda.is_initialized()
        for name in sys.argv[1:]:
            getattr(torch.ops.nsa_meta, name).default
        cupy_nsa_meta.fused_dsa_extend_metadata(
            torch.tensor([9]), torch.tensor([2]), total_len=2, dsa_index_topk=8,
            ke=torch.zeros(2, dtype=torch.int32))
        torch.ops.nsa_meta.seqlens_expand(torch.tensor([2]), torch.tensor([9]), 2, 2)
        torch.ops.nsa_meta.seqlens_expand(
            torch.tensor([2], device="meta"), torch.tensor([9], device="meta"), 2, 2)
        after = set(sys.modules) - before
        assert not [n for n in after if n.startswith(("torch._dynamo", "torch._inductor"))]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *WRITES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", WRITES)
def test_schema(name):
    operator = getattr(ops, name).default
    written, returned = WRITES[name]
    schema = operator._schema
    assert {
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    } == written
    assert [str(result.type) for result in schema.returns] == ["Tensor"] * returned
    assert all(result.alias_info is None for result in schema.returns)
    letters = re.findall(r"Tensor\((\w)!\)", str(schema))
    assert len(set(letters)) == len(written), "no two outputs may be the same memory"
    assert schema.is_mutable == bool(written)
    # Every int is symbolic: a graph serves every batch.
    assert not re.search(r"\bint\b", str(schema))
    assert torch.Tag.pt2_compliant_tag in operator.tags
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_meta::{name}", key)


def test_every_schema_is_registered_and_documented():
    assert {schema.partition("(")[0] for schema in _ops.SCHEMAS} == set(WRITES)
    for schema in _ops.SCHEMAS:
        name = schema.partition("(")[0]
        registered = str(getattr(ops, name).default._schema).removeprefix("nsa_meta::")
        assert registered.replace(" ", "") == schema.replace(" ", ""), name
        assert re.search(rf"^{name} ", _ops.__doc__, re.MULTILINE), name


@pytest.mark.parametrize("number", range(NUM_CALLS))
def test_opcheck(number):
    name, arguments, keywords = operator_calls("cpu")[number]
    results = torch.library.opcheck(getattr(ops, name), arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


# ---- Eager calls --------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The operators that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        return [name for name in self.names if name.startswith("nsa_meta::")]


def public_calls(device: str) -> dict[str, Any]:
    """A call of each public function that can be traced."""
    item = with_total(cases.BY_NAME["bs_17"])
    extend, seq = item.lengths(device)
    outputs = Outputs(item, device)
    seed = (extend, seq, item.topk, outputs.expanded, outputs.clamped)
    calls = {
        "fill": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*seed, total_tokens=item.total),
        "python": lambda: cupy_nsa_meta.fill_draft_extend_metadata_python(
            *seed, total_tokens=item.total
        ),
        "triton": lambda: cupy_nsa_meta.fill_draft_extend_metadata_inplace(
            *seed, total_tokens=item.total
        ),
        "async": lambda: cupy_nsa_meta.fill_draft_extend_metadata_async(*seed),
        "seqlens_expand": lambda: cupy_nsa_meta.seqlens_expand(extend, seq, item.total, 100),
    }
    if device != "cpu":
        calls["cuda"] = lambda: cupy_nsa_meta.fill_draft_extend_metadata_cuda(
            *seed, total_tokens=item.total
        )
    for op, function in FUNCTIONS.items():
        built = Built(fused_cases.BY_NAME[f"{op}_basic_ps64"], device)
        calls[op] = lambda function=function, built=built: function(**built.arguments)
    return calls


@pytest.mark.parametrize("name", public_calls("cpu"))
def test_eager_calls_do_not_dispatch(name):
    call = public_calls("cpu")[name]
    with Recorder() as recorder:
        call()
    assert recorder.names, "plain torch runs torch operators"
    assert recorder.ours() == []


def test_the_recorder_sees_our_operators():
    extend, seq = cases.BY_NAME["contract"].lengths()
    with Recorder() as recorder:
        ops.seqlens_expand(extend, seq, 5, 3)
    assert recorder.ours() == ["nsa_meta::seqlens_expand"]


@pytest.mark.parametrize(
    ("name", "operator"),
    [("fill", "fill_draft_extend_metadata"), ("python", "fill_draft_extend_metadata"),
     ("triton", "fill_draft_extend_metadata"), ("async", "fill_draft_extend_metadata_async"),
     ("seqlens_expand", "seqlens_expand")]
    + [(op, function.__name__) for op, function in FUNCTIONS.items()],
)  # fmt: skip
def test_compiled_calls_are_one_operator_in_one_graph(name, operator):
    graphs = Graphs()
    call = public_calls("cpu")[name]
    torch.compile(call, backend=graphs, fullgraph=True, dynamic=True)()
    assert len(graphs.graphs) == 1
    assert graphs.operators() == [operator]
    explained = torch._dynamo.explain(call)()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_seed_operation_compiled(backend):
    fill = compiled(cupy_nsa_meta.fill_draft_extend_metadata, backend)
    for item in SEED_CASES:
        check_seed(fill, item, "cpu")


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_fused_family_compiled(backend, op):
    function = compiled(FUNCTIONS[op], backend)
    for name in FUSED_NAMES:
        item = fused_cases.BY_NAME[name]
        if item.op == op:
            check_fused(function, item, "cpu")


def check_with_inductor(device: str) -> None:
    """Functions of the seed operation and the family between torch operators, by Inductor."""
    item = with_total(cases.BY_NAME["bs_17"])
    check_seed(compiled(cupy_nsa_meta.fill_draft_extend_metadata, "inductor"), item, device)
    for name in (
        "decode_basic_ps64",
        "verify_basic_ps1",
        "draft_extend_basic_ps64",
        "extend_contract",
    ):
        case = fused_cases.BY_NAME[name]
        check_fused(compiled(FUNCTIONS[case.op], "inductor"), case, device)

    def between(extend, seq, total):
        expanded, clamped = ops.draft_extend_metadata(extend, seq + 1, 9, total_tokens=total)
        return expanded * 2, clamped + 1, cupy_nsa_meta.seqlens_expand(extend, seq, total, 100) - 1

    function = compiled(between, "inductor")
    for bs in (4, 7, 11):
        item = cases.random_case(f"bs_{bs}", "another size", bs, 5, bs)
        extend, seq = item.lengths(device)
        expanded, clamped = reference.draft_extend(extend, seq + 1, 9)
        results = function(extend, seq, item.total)
        assert torch.equal(results[0], expanded * 2)
        assert torch.equal(results[1], clamped + 1)
        assert torch.equal(results[2], reference.draft_extend(extend, seq, 9)[0] - 1)


def test_inductor():
    check_with_inductor("cpu")


@pytest.mark.parametrize("op", ["seed", *FUNCTIONS])
# Sizes that are equal by accident in the first batch would be taken for one symbol.
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_other_sizes_are_not_traced_again(op):
    """Every size of a serving step changes; the graph does not."""
    graphs = Graphs()
    function = compiled(FUNCTIONS.get(op, cupy_nsa_meta.fill_draft_extend_metadata), graphs)
    for number in range(6):
        bs = 5 + number
        if op == "seed":
            item = cases.random_case(f"bs_{bs}", "another size", bs, 5, bs, topk=30 + number)
            check_seed(function, with_total(item), "cpu")
            continue
        extend = [2 + number, *range(bs - 1)] if op in ("draft_extend", "extend") else ()
        fused = fused_cases.case(
            op, f"bs_{bs}", "another size", range(3, 3 + 20 * bs, 20), extend,
            next_n=3 + number if op == "verify" else 1, width=100 + 9 * number, topk=30 + number,
        )  # fmt: skip
        check_fused(function, fused, "cpu")
    assert len(graphs.graphs) == 1


def test_async_compiled():
    item = cases.BY_NAME["bs_17"]
    function = compiled(cupy_nsa_meta.fill_draft_extend_metadata_async, "aot_eager")
    for total_tokens, status in ((None, 0), (item.total, 0), (item.total - 3, 4)):
        wanted = dataclasses.replace(item, total_tokens=total_tokens)
        for given in (None, torch.full((2,), -5, dtype=torch.int32)):
            extend, seq = item.lengths()
            outputs = Outputs(item)
            outcome = function(
                extend, seq, item.topk, outputs.expanded, outputs.clamped,
                total_tokens=total_tokens, out_total=given,
            )  # fmt: skip
            assert outcome.tolist() == [item.total, status]
            assert given is None or given.tolist() == [item.total, status]
            outputs.check(wanted.expected())


def test_the_functional_form():
    for item in SEED_CASES:
        expected = item.expected()
        extend, seq = item.lengths()
        results = ops.draft_extend_metadata(extend, seq, item.topk, total_tokens=item.total_tokens)
        for got, wanted in zip(results, (expected.expanded, expected.clamped), strict=True):
            assert got.dtype == torch.int32
            assert got.shape == (item.total_tokens,)
            assert torch.equal(got[: len(wanted)], wanted), item.name
            assert not got[len(wanted) :].any(), item.name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_outputs_inside_the_graph_and_slices_of_one_buffer(backend):
    extend, seq = cases.BY_NAME["contract"].lengths()
    expected = torch.tensor([[8, 9, 10, 3, 4, -1, -1], [8, 9, 9, 3, 4, -1, -1]], dtype=torch.int32)

    def inside(extend, seq, total):
        outs = torch.full((2, 7), -1, dtype=torch.int32)
        cupy_nsa_meta.fill_draft_extend_metadata(
            extend, seq, 9, outs[0], outs[1], total_tokens=total
        )
        return outs, outs + 1

    outs, more = compiled(inside, backend)(extend, seq, 5)
    assert torch.equal(outs, expected)
    assert torch.equal(more, expected + 1)
    outs = torch.full((2, 7), -1, dtype=torch.int32)
    fill = compiled(cupy_nsa_meta.fill_draft_extend_metadata, backend)
    assert fill(extend, seq, 9, outs[0], outs[1], total_tokens=5) == 5
    assert torch.equal(outs, expected)


def test_sizes_that_only_the_device_knows():
    """A total from .item() is an unbacked SymInt: no fake kernel may ask about it."""

    def step(extend, seq, pool, tokens, outs):
        total, bs = extend.sum().item(), (seq > -1).sum().item()
        for size in (total, bs):
            torch._check(size >= 0)
        cupy_nsa_meta.fill_draft_extend_metadata(extend, seq, 9, *outs, total_tokens=total)
        expanded, clamped = ops.draft_extend_metadata(extend, seq, 9, total_tokens=total)
        rows = [torch.zeros(n, dtype=torch.int32) for n in (bs, bs + 1, total, total, total + 1)]
        pages = torch.zeros((total, 4), dtype=torch.int32)
        cupy_nsa_meta.fused_dsa_draft_extend_metadata(
            seq, extend, pool, tokens, rows[0], rows[1], None, *rows[2:], pages, bs, total, 16, 9, 4,
            8, 100,
        )  # fmt: skip
        return (
            expanded,
            clamped,
            rows[2],
            rows[3],
            cupy_nsa_meta.seqlens_expand(extend, seq, total, 8),
        )

    extend, seq = torch.tensor([3, 2, 3], dtype=torch.int32), torch.tensor([10, 4, 1])
    outs = torch.zeros((2, 12), dtype=torch.int32).unbind()
    tokens = torch.zeros((3, 16), dtype=torch.int32)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        results = compiled(step, "aot_eager")(extend, seq, torch.tensor([0, 1, 2]), tokens, outs)
    expanded, clamped = reference.draft_extend(extend, seq, 9)
    for got, wanted in zip(results, (expanded, clamped, expanded, clamped, expanded), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(outs[0][:8], expanded)
    assert torch.equal(outs[1][:8], clamped)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Step(torch.nn.Module):
        def forward(self, extend, seq):
            outs = torch.zeros((2, 8), dtype=torch.int32)
            cupy_nsa_meta.fill_draft_extend_metadata(extend, seq, 9, *outs.unbind(), total_tokens=8)
            return outs, cupy_nsa_meta.seqlens_expand(extend, seq, 8, 8)

    extend, seq = torch.tensor([3, 2, 3], dtype=torch.int32), torch.tensor([10, 4, 1])
    program = torch.export.export(Step(), (extend, seq), strict=strict)
    assert "nsa_meta.fill_draft_extend_metadata" in str(program.graph)
    outs, expanded = program.module()(extend.flip(0), seq)
    wanted = reference.draft_extend(extend.flip(0), seq, 9)
    assert torch.equal(outs, torch.stack(wanted))
    assert torch.equal(expanded, wanted[0])


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "name",
    ["fill_draft_extend_metadata", "fill_draft_extend_metadata_cuda",
     "fill_draft_extend_metadata_python", "fill_draft_extend_metadata_inplace",
     "fill_draft_extend_metadata_fused_simple"],
)  # fmt: skip
def test_without_total_tokens(name, fullgraph):
    extend, seq = cases.BY_NAME["contract"].lengths()
    outs = [torch.full((7,), -1, dtype=torch.int32) for _ in range(2)]
    if name.endswith("simple"):
        outs = []
    function = torch.compile(getattr(cupy_nsa_meta, name), backend="eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match="pass total_tokens="):
        function(extend, seq, 9, *outs)
    assert all((out == -1).all() for out in outs)


def test_the_backend_is_that_of_the_function():
    extend, seq = cases.BY_NAME["contract"].lengths()
    outs = [torch.full((7,), -1, dtype=torch.int32) for _ in range(2)]
    with pytest.raises(ValueError, match="expected CUDA tensors, got cpu"):
        compiled(cupy_nsa_meta.fill_draft_extend_metadata_cuda)(
            extend, seq, 9, *outs, total_tokens=5
        )
    for backend in _ops.BACKENDS:
        assert _ops._fill_of(backend).__name__.removeprefix("fill_draft_extend_metadata") == {
            "auto": "", "cuda": "_cuda", "triton": "_inplace", "python": "_python"}[backend]  # fmt: skip
    for arguments in ((extend, seq), (extend.to("meta"), seq.to("meta"))):
        placed = [out.to(arguments[0].device) for out in outs]
        with pytest.raises(ValueError, match="backend: expected one of auto, cuda.*got 'hip'"):
            ops.fill_draft_extend_metadata(*arguments, 9, *placed, total_tokens=5, backend="hip")


def test_errors_of_the_run_time_come_through():
    extend, seq = cases.BY_NAME["contract"].lengths()
    outs = [torch.full((4,), -1, dtype=torch.int32) for _ in range(2)]
    function = compiled(cupy_nsa_meta.fill_draft_extend_metadata)
    with pytest.raises(ValueError, match="total_tokens: expected <= 4"):
        function(extend, seq, 9, *outs, total_tokens=5)
    assert all((out == -1).all() for out in outs)


# ---- Aliases ------------------------------------------------------------------------------------


def decode_into(page_table_1, real_page_table, page_size):
    """A decode step of three requests, W 16."""
    device = page_table_1.device
    outs = [torch.full((n,), -1, dtype=torch.int32, device=device) for n in (3, 4, 3, 4)]
    cupy_nsa_meta.fused_dsa_decode_metadata(
        torch.tensor([10, 4, 1], device=device), torch.tensor([2, 0, 1], device=device),
        torch.arange(64, dtype=torch.int32, device=device).view(4, 16),
        outs[0], outs[1], page_table_1, outs[2], outs[3], real_page_table, 3, 16, 9, page_size,
    )  # fmt: skip
    return outs[0]


def poisoned_table() -> torch.Tensor:
    return torch.full((3, 16), -1, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_table_at_page_size_1(backend, dynamic):
    expected = poisoned_table()
    decode_into(expected, expected, 1)
    function = torch.compile(decode_into, backend=backend, fullgraph=True, dynamic=dynamic)
    same, viewed = poisoned_table(), poisoned_table()
    for first, second in ((same, same), (viewed[:], viewed[:])):
        assert function(first, second, 1).tolist() == [10, 4, 1]
        assert torch.equal(first, expected)

    def views_inside():
        table = poisoned_table()
        view = table[:]
        decode_into(table, view, 1)
        return table, view

    function = torch.compile(views_inside, backend=backend, fullgraph=True, dynamic=dynamic)
    for table in function():
        assert torch.equal(table, expected)


def test_one_table_is_traced_as_one_argument():
    graphs = Graphs()
    table = poisoned_table()
    compiled(decode_into, graphs)(table, table, 1)
    (call,) = graphs.calls()
    assert call.args[5] is not None
    assert call.args[8] is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_overlaps_are_refused(backend):
    table = poisoned_table()
    overlap = "real_page_table: expected memory of its own, got an overlap with page_table_1"
    function = compiled(decode_into, backend)
    with pytest.raises(RuntimeError, match=overlap):  # while it is traced
        function(table, table, 4)
    with pytest.raises(ValueError, match=overlap):  # when the graph runs
        function(table[:], table[:], 4)
    assert (table == -1).all()
    extend, seq = cases.BY_NAME["contract"].lengths()
    fill = compiled(cupy_nsa_meta.fill_draft_extend_metadata, backend)
    out = torch.full((7,), -1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="out_nsa_cache_seqlens: expected memory of its own"):
        fill(extend, seq, 9, out, out, total_tokens=5)


# ---- Fake kernels -------------------------------------------------------------------------------


def moved(value: Any, move) -> Any:
    return move(value) if isinstance(value, torch.Tensor) else value


def check_fake(number: int, move) -> None:
    name, arguments, keywords = operator_calls("cpu")[number]
    real = getattr(ops, name)(*arguments, **keywords)
    fake = getattr(ops, name)(
        *[moved(value, move) for value in arguments],
        **{key: moved(value, move) for key, value in keywords.items()},
    )
    device = move(torch.zeros(1)).device
    for got, wanted in zip(
        torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real), strict=True
    ):
        if wanted is None:
            assert got is None
            continue
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert got.device == device


@pytest.mark.parametrize("number", range(NUM_CALLS))
def test_meta_tensors(number):
    check_fake(number, lambda tensor: tensor.to("meta"))


@pytest.mark.parametrize("number", range(NUM_CALLS))
def test_fake_tensors(number):
    mode = FakeTensorMode()
    check_fake(number, mode.from_tensor)


INT = torch.int32


def _bad_calls() -> dict[str, tuple[str, dict[str, Any], type[Exception], str]]:
    """Kinds of bad arguments that need no memory to be told: case, changes, error."""
    return {
        "dtype_of_an_input": ("decode_basic_ps64", {"seq_lens": torch.zeros(4)}, TypeError,
                              "seq_lens: expected dtype torch.int32 or torch.int64"),
        "dims_of_an_input": ("decode_basic_ps64", {"seq_lens": torch.zeros((4, 1), dtype=INT)},
                             ValueError, "seq_lens: expected a 1-D tensor"),
        "short_input": ("decode_basic_ps64", {"req_pool_indices": torch.zeros(3, dtype=INT)},
                        ValueError, r"req_pool_indices: expected \[>= 4\]"),
        "dtype_of_an_output": ("decode_basic_ps64", {"cache_seqlens": torch.zeros(4)}, TypeError,
                               "cache_seqlens: expected dtype torch.int32"),
        "dims_of_an_output": ("verify_basic_ps64", {"seqlens_expanded": torch.zeros((4, 4), dtype=INT)},
                              ValueError, "seqlens_expanded: expected a 1-D tensor"),
        "stride_of_an_output": ("verify_basic_ps64",
                                {"seqlens_expanded": torch.zeros((32, 2), dtype=INT)[:, 0]},
                                ValueError, "seqlens_expanded: expected a contiguous tensor"),
        "short_output": ("verify_basic_ps64", {"dsa_cu_seqlens_k": torch.zeros(16, dtype=INT)},
                         ValueError, r"dsa_cu_seqlens_k: expected \[>= 17\], got \[16\]"),
        "positions": ("extend_contract", {"positions": torch.zeros(9, dtype=INT)}, TypeError,
                      "positions: expected dtype torch.int64"),
        "flattened": ("extend_contract", {"page_table_1_flattened": torch.zeros(9)}, TypeError,
                      "page_table_1_flattened: expected dtype"),
        "dtype_of_a_table": ("decode_basic_ps64", {"page_table_1": torch.zeros((9, 999))}, TypeError,
                             "page_table_1: expected dtype torch.int32"),
        "dims_of_a_table": ("decode_basic_ps64", {"page_table_1": torch.zeros(9, dtype=INT)},
                            ValueError, "page_table_1: expected a 2-D tensor"),
        "short_table": ("verify_basic_ps64", {"page_table_1": torch.zeros((15, 999), dtype=INT)},
                        ValueError, "page_table_1: expected .>= 16, >= 769"),
        "narrow_table": ("decode_basic_ps64", {"real_page_table": torch.zeros((9, 12), dtype=INT)},
                         ValueError, "real_page_table: expected .>= 4, >= 13"),
        "narrow_tokens": ("decode_basic_ps64", {"req_to_token": torch.zeros((9, 12), dtype=INT)},
                          ValueError, "req_to_token: expected .>= 0, >= 769"),
        "stride_of_a_table": ("decode_basic_ps64",
                              {"page_table_1": torch.zeros((999, 9), dtype=INT).t()},
                              ValueError, "page_table_1: expected column stride 1"),
        "mqa": ("verify_basic_ps64", {"paged_mqa_ctx_lens_2d": torch.zeros((4, 3), dtype=INT)},
                ValueError, "paged_mqa_ctx_lens_2d: expected .>= 4, >= 4"),
        "bs": ("decode_basic_ps64", {"bs": -1}, ValueError, "bs: expected an int >= 0"),
        "topk": ("decode_basic_ps64", {"dsa_index_topk": 0}, ValueError, "dsa_index_topk: expected an int >= 1"),
        "page_size": ("decode_basic_ps64", {"physical_page_size": 48}, ValueError,
                      "physical_page_size: expected a power of two"),
        "next_n": ("verify_basic_ps64", {"next_n": 0}, ValueError, "next_n: expected an int >= 1"),
        "total_over_extend": ("draft_extend_basic_ps64", {"max_extend_len": 2}, ValueError,
                              "total_len: expected <= 8"),
        "total_over_max": ("draft_extend_basic_ps64", {"max_total_len": 10}, ValueError,
                           "total_len: expected <= 10|expected an int >= 11"),
        "pad_to": ("extend_padded", {"pad_to": 4}, ValueError, "pad_to"),
        "bs_of_extend": ("extend_contract", {"extend_seq_lens": torch.zeros(3, dtype=INT)}, ValueError,
                         r"extend_seq_lens: expected \[2\] like seq_lens"),
        "no_pool": ("extend_contract", {"req_pool_indices": None}, ValueError,
                    "page_table_1: expected req_pool_indices to fill it from"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _bad_calls())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_kernels_refuse_what_the_real_ones_refuse(kind, device):
    name, changes, error, message = _bad_calls()[kind]
    item = fused_cases.BY_NAME[name]
    arguments = Built(item).arguments | changes
    placed = {key: moved(value, lambda t: t.to(device)) for key, value in arguments.items()}
    if device == "meta":
        for key, value in arguments.items():  # .to() makes what it copies contiguous
            if isinstance(value, torch.Tensor):
                placed[key] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="meta"
                )
    with pytest.raises(error, match=message):
        getattr(ops, FUNCTIONS[item.op].__name__)(**placed)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"seq_lens": torch.zeros(4, dtype=INT)},
            ValueError,
            r"seq_lens: expected \[2\] like extend_seq_lens",
        ),
        ({"nsa_index_topk": 0}, ValueError, "nsa_index_topk: expected an int >= 1"),
        (
            {"out_seqlens_expanded": torch.zeros(9)},
            TypeError,
            "out_seqlens_expanded: expected dtype",
        ),
        ({"out_nsa_cache_seqlens": torch.zeros(4, dtype=INT)}, ValueError, "expected.*got"),
        ({"total_tokens": -1}, ValueError, "total_tokens: expected an int >= 0"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["fill_draft_extend_metadata", "fill_draft_extend_metadata_async"])
def test_bad_calls_of_the_seed_operators(name, device, changes, error, message):
    extend, seq = cases.BY_NAME["contract"].lengths()
    arguments: dict[str, Any] = {
        "extend_seq_lens": extend,
        "seq_lens": seq,
        "nsa_index_topk": 9,
        "out_seqlens_expanded": torch.zeros(9, dtype=INT),
        "out_nsa_cache_seqlens": torch.zeros(9, dtype=INT),
        "total_tokens": 5,
    }
    if name.endswith("async"):
        arguments["out_total"] = torch.zeros(2, dtype=INT)
    placed = {k: moved(v, lambda t: t.to(device)) for k, v in (arguments | changes).items()}
    with pytest.raises(error, match=message):
        getattr(ops, name)(**placed)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_out_total_and_the_functional_form_refuse(device):
    extend, seq, outs, more = (
        torch.zeros(n, dtype=INT, device=device) for n in (2, 2, 9, 9)
    )  # fmt: skip
    for room, message in ((3, r"out_total: expected shape \[2\]"), (1, "out_total: expected")):
        with pytest.raises(ValueError, match=message):
            ops.fill_draft_extend_metadata_async(
                extend, seq, 9, outs, more, out_total=torch.zeros(room, dtype=INT, device=device)
            )
    with pytest.raises(ValueError, match="pass total_tokens="):
        ops.draft_extend_metadata(extend, seq, 9, total_tokens=-1)
    with pytest.raises(ValueError, match="total_len: expected"):
        ops.seqlens_expand(extend, seq, 9, 4)
    with pytest.raises(ValueError, match="total_len: expected an int >= 0"):
        ops.seqlens_expand(extend, seq, -1, 4)


@pytest.mark.parametrize("name", ["fill_draft_extend_metadata", "fused_dsa_decode_metadata"])
def test_devices_may_not_mix(name):
    """With fake tensors, of which a CPU build of torch has CUDA ones too."""
    _, arguments, keywords = next(call for call in operator_calls("cpu") if call[0] == name)
    with FakeTensorMode() as mode:
        placed = [moved(value, mode.from_tensor) for value in arguments]
        named = {key: moved(value, mode.from_tensor) for key, value in keywords.items()}
        there = torch.empty(999, dtype=INT, device="cuda")
        if placed:
            placed[4] = there
        else:
            named["dsa_cu_seqlens_k"] = there
        with pytest.raises(ValueError, match="expected device cpu like .*, got cuda"):
            getattr(ops, name)(*placed, **named)


# ---- Plans --------------------------------------------------------------------------------------


def test_a_plan_in_a_compiled_region():
    """It is not traced: a graph break, and an error where none is allowed."""
    item = cases.BY_NAME["contract"]
    extend, seq = item.lengths()
    outputs = Outputs(item)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(
        extend, seq, item.topk, outputs.expanded, outputs.clamped
    )

    def step(values):
        doubled = values * 2
        plan.launch()
        return doubled + 1

    values = torch.arange(3)
    with pytest.raises(RuntimeError, match="Unsupported|not know how to trace"):
        torch.compile(step, backend="eager", fullgraph=True)(values)
    assert torch.equal(torch.compile(step, backend="eager")(values), values * 2 + 1)
    outputs.check(item.expected())
    with pytest.raises(RuntimeError):
        torch.compile(lambda values: values + plan.run(), backend="eager", fullgraph=True)(values)
    assert plan.run() == item.total


def check_fused_plan(op: str, device: str) -> None:
    """Launches of a plan between compiled operators write what they write elsewhere."""
    item = fused_cases.BY_NAME[f"{op}_basic_ps64"]
    built = Built(item, device)
    plan, batch = plan_of(built), batch_of(built)

    def step(values):
        doubled = values * 2
        plan.launch(**batch)
        return doubled + 1

    values = torch.arange(3, device=device)
    function = torch.compile(step, backend="eager")
    for _ in range(3):
        built.poison()
        assert torch.equal(function(values), values * 2 + 1)
        built.check(fused_cases.expected(item))
    assert plan.status() == item.status


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_fused_plan_in_a_compiled_region(op):
    check_fused_plan(op, "cpu")


def test_the_references_under_a_compiler():
    """A graph break may leave plain torch to Dynamo: it must still write its rows."""
    for item in (cases.BY_NAME["contract"], cases.BY_NAME["total_short"]):
        outputs = Outputs(item)
        limit = item.capacity if item.total_tokens is None else item.total_tokens
        outcome = compiled(reference.draft_extend_into)(
            *item.lengths(), item.topk, outputs.expanded, outputs.clamped, limit,
            item.total_tokens is not None,
        )  # fmt: skip
        assert outcome.tolist() == [item.expected().total, item.expected().status]
        outputs.check(item.expected())


def test_topk_beyond_int32():
    extend, seq = cases.BY_NAME["contract"].lengths()
    expanded, clamped = ops.draft_extend_metadata(extend, seq, 2**40, total_tokens=5)
    assert torch.equal(expanded, clamped)
    assert int(clamped.max()) < INT32_MAX
