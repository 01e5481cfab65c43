"""Hostile input for every public function: one table of kinds, each with its error, nothing written.

A kind says what becomes of an argument, and what must be said about it. It is tried on every
argument of its role in every function (``SURFACES``), each time with all buffers compared byte for
byte before and after. ``run(device)`` goes through all of it; the reliability report calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cases import POISON
from fused_cases import BY_NAME, FUNCTIONS, Built, expected
from fused_plans import PLANS, plan_arguments

# ---- The functions, their good arguments, and which of them play which role ---------------------


@dataclass
class Surface:
    """One public function with good arguments for it."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    lengths: tuple[str, ...] = ()  # 1-D inputs
    outs: tuple[str, ...] = ()  # 1-D outputs
    tables: tuple[str, ...] = ()
    ints: tuple[str, ...] = ()
    bools: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # None is a value for these
    takes_arrays: bool = False  # anything with __dlpack__


SEED_FUNCTIONS = {
    "auto": cupy_nsa_meta.fill_draft_extend_metadata,
    "cuda": cupy_nsa_meta.fill_draft_extend_metadata_cuda,
    "triton": cupy_nsa_meta.fill_draft_extend_metadata_inplace,
    "python": cupy_nsa_meta.fill_draft_extend_metadata_python,
    "async": cupy_nsa_meta.fill_draft_extend_metadata_async,
    "plan": cupy_nsa_meta.plan_draft_extend_metadata,
}


def _poisoned(size: int, device: str) -> torch.Tensor:
    """A buffer between guards."""
    return torch.full((size + 16,), POISON, dtype=torch.int32, device=device)[8 : size + 8]


def _lengths(device: str) -> dict[str, torch.Tensor]:
    return {
        "extend_seq_lens": torch.tensor([3, 2], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([10, 4], dtype=torch.int64, device=device),
    }


def _seed(name: str, device: str) -> Surface:
    arguments: dict[str, Any] = {
        **_lengths(device),
        "nsa_index_topk": 9,
        "out_seqlens_expanded": _poisoned(8, device),
        "out_nsa_cache_seqlens": _poisoned(8, device),
        "use_adaptive": True,
    }
    surface = Surface(
        SEED_FUNCTIONS[name],
        arguments,
        lengths=("extend_seq_lens", "seq_lens"),
        outs=("out_seqlens_expanded", "out_nsa_cache_seqlens"),
        ints=("nsa_index_topk",),
        bools=("use_adaptive",),
        takes_arrays=True,
    )
    if name != "plan":
        arguments["total_tokens"] = 5
        surface.ints += ("total_tokens",)
        surface.optional = ("total_tokens",)
    if name == "async":
        arguments["out_total"] = _poisoned(2, device)
        surface.outs += ("out_total",)
        surface.optional += ("out_total",)
    return surface


FUSED_INTS = {
    "decode": ("bs", "max_len", "dsa_index_topk", "physical_page_size"),
    "verify": ("bs", "max_seqlen_k", "dsa_index_topk", "physical_page_size", "next_n"),
    "draft_extend": ("bs", "total_len", "max_seqlen_k", "dsa_index_topk", "physical_page_size",
                     "max_extend_len", "max_total_len"),
    "extend": ("total_len", "max_seqlen_k", "dsa_index_topk", "physical_page_size", "pad_to"),
}  # fmt: skip
PLAN_NAMES = {"bs": "max_bs", "total_len": "max_total_len", "pad_to": "max_pad_to"}


def _fused(op: str, device: str, is_plan: bool) -> Surface:
    built = Built(BY_NAME[f"{op}_basic_ps64"], device)
    arguments = plan_arguments(built) if is_plan else dict(built.arguments)
    ints = FUSED_INTS[op]
    if is_plan:
        ints = tuple(dict.fromkeys(PLAN_NAMES.get(name, name) for name in ints))
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    inputs = tuple(n for n in tensors if n in ("seq_lens", "extend_seq_lens", "req_pool_indices"))
    tables = tuple(n for n in tensors if arguments[n].dim() == 2)
    outs = tuple(n for n in tensors if n not in inputs + tables)
    optional = ("page_table_1", "real_page_table", "paged_mqa_ctx_lens_2d")
    if op == "extend":
        optional += (*outs, "max_seqlen_k", "pad_to", "max_pad_to")
    return Surface(
        PLANS[op] if is_plan else FUNCTIONS[op],
        arguments,
        lengths=inputs,
        outs=outs,
        tables=tables,
        ints=ints,
        bools=("static_extend_len",) if op == "draft_extend" else (),
        optional=optional,
    )


def _fused_simple(device: str) -> Surface:
    return Surface(
        cupy_nsa_meta.fill_draft_extend_metadata_fused_simple,
        {**_lengths(device), "nsa_index_topk": 9},
        lengths=("extend_seq_lens", "seq_lens"),
        ints=("nsa_index_topk",),
        takes_arrays=True,
    )


def _seqlens_expand(device: str) -> Surface:
    return Surface(
        cupy_nsa_meta.seqlens_expand,
        {**_lengths(device), "total_len": 5, "max_q_len": 3},
        lengths=("extend_seq_lens", "seq_lens"),
        ints=("total_len", "max_q_len"),
        takes_arrays=True,
    )


def _plan_launch(op: str, method: str, device: str) -> Surface:
    built = Built(BY_NAME[f"{op}_basic_ps64"], device)
    plan = PLANS[op](**plan_arguments(built))
    surface = Surface(getattr(plan, method), {"bs": built.case.bs}, ints=("bs",), optional=("bs",))
    if op in ("draft_extend", "extend"):
        surface.arguments["total_len"] = built.case.rows
        surface.ints += ("total_len",)
        surface.optional += ("total_len",)
    surface.arguments["_watched"] = list(built.allocations.values())
    return surface


def _last_status(device: str) -> Surface:
    return Surface(cupy_nsa_meta.last_status, {"device": device, "reset": True}, bools=("reset",))


def _warmup(device: str) -> Surface:
    return Surface(cupy_nsa_meta.warmup, {"device": device})


SURFACES: dict[str, Callable[[str], Surface]] = {
    **{name: lambda device, name=name: _seed(name, device) for name in SEED_FUNCTIONS},
    **{op: lambda device, op=op: _fused(op, device, False) for op in FUNCTIONS},
    **{f"plan_{op}": lambda device, op=op: _fused(op, device, True) for op in FUNCTIONS},
    **{
        f"plan_{op}_{method}": lambda device, op=op, method=method: _plan_launch(op, method, device)
        for op in FUNCTIONS
        for method in ("launch", "run")
    },
    "fused_simple": _fused_simple,
    "seqlens_expand": _seqlens_expand,
    "last_status": _last_status,
    "warmup": _warmup,
}  # fmt: skip

# ---- The kinds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is done to each argument of a role; ``{name}`` in the message is that argument."""

    role: str  # a field of Surface, or "call"
    change: Callable[[Surface, str], dict[str, Any] | None]  # None: does not apply
    error: type[Exception]
    message: str  # a regular expression
    surfaces: str = ""  # a regular expression over the names of surfaces; default: all
    device: str = ""  # only on this one
    reason: str = field(default="", compare=False)


def becomes(value: Any) -> Callable[[Surface, str], dict[str, Any]]:
    """The argument becomes this value; a function gets the good one."""
    return lambda surface, name: {
        name: value(surface.arguments[name]) if callable(value) else value
    }


def tensor_becomes(change: Callable[[torch.Tensor], Any]) -> Callable[..., dict[str, Any] | None]:
    """The same for a tensor that has elements."""
    return lambda surface, name: {name: change(surface.arguments[name])}


def required(value: Any) -> Callable[[Surface, str], dict[str, Any] | None]:
    return lambda surface, name: None if name in surface.optional else {name: value}


def array_becomes(change: Callable[[np.ndarray], Any]) -> Callable[..., dict[str, Any] | None]:
    """A NumPy array with the same numbers, changed; for functions that take such arrays."""

    def apply(surface: Surface, name: str) -> dict[str, Any] | None:
        tensor = surface.arguments[name]
        if not surface.takes_arrays:
            return None
        return {name: change(tensor.cpu().numpy().copy())}

    return apply


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


class JaxLike:
    """Immutable, and unable to say so through DLPack, as JAX arrays are."""

    __module__ = "jaxlib.xla_extension"

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Unwilling:
    """An exporter whose export fails."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("this array cannot be exported")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def functional(tensor: torch.Tensor) -> torch.Tensor:
    return torch._to_functional_tensor(tensor)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor, tensor])


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full((2 * tensor.numel(),), POISON, dtype=tensor.dtype, device=tensor.device)[::2]


def stacked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.numel())


def wide_columns(tensor: torch.Tensor) -> torch.Tensor:
    rows, columns = tensor.shape
    return torch.full((rows, 2 * columns), POISON, dtype=tensor.dtype, device=tensor.device)[:, ::2]


def overlapping_rows(surface: Surface, name: str) -> dict[str, Any] | None:
    """Rows that begin before the one before has ended; inputs may do that."""
    table = surface.arguments[name]
    rows, columns = table.shape
    if name == "req_to_token":
        return None
    memory = torch.full((rows * columns,), POISON, dtype=table.dtype, device=table.device)
    return {name: memory.as_strided((rows, columns), (columns - 1, 1))}


def as_another_out(surface: Surface, name: str) -> dict[str, Any] | None:
    """The argument is another output of the same kind."""
    for other in reversed(surface.outs):
        theirs, ours = surface.arguments[other], surface.arguments[name]
        if other != name and theirs.dtype == ours.dtype and theirs.numel() >= ours.numel():
            return {name: theirs[: ours.numel()]}
    return None


def over_the_end_of_another(surface: Surface, name: str) -> dict[str, Any] | None:
    """One element of it is the last of another output."""
    for other in surface.outs:
        theirs, ours = surface.arguments[other], surface.arguments[name]
        if other == name or theirs.dtype != ours.dtype:
            continue
        memory = torch.full(
            (theirs.numel() + ours.numel() - 1,), POISON, dtype=ours.dtype, device=ours.device
        )
        return {other: memory[: theirs.numel()], name: memory[theirs.numel() - 1 :]}
    return None


def over_an_input(surface: Surface, name: str) -> dict[str, Any] | None:
    """An input lies in the output."""
    out = surface.arguments[name]
    lengths = surface.arguments["seq_lens"]
    if out.dtype != torch.int32 or out.numel() < lengths.numel():
        return None
    memory = out.clone()
    memory[: lengths.numel()] = lengths
    return {name: memory, "seq_lens": memory[: lengths.numel()]}


def table_over_table(surface: Surface, name: str) -> dict[str, Any] | None:
    """The page table is written where it is read from."""
    if name not in ("page_table_1", "real_page_table"):
        return None
    ours, tokens = surface.arguments[name], surface.arguments["req_to_token"]
    memory = torch.zeros(
        max(ours.shape[0], tokens.shape[0]),
        tokens.shape[1],
        dtype=tokens.dtype,
        device=tokens.device,
    )
    return {name: memory[: ours.shape[0], : ours.shape[1]], "req_to_token": memory}


def shorter(surface: Surface, name: str) -> dict[str, Any] | None:
    """Too short for the sizes that are given."""
    tensor = surface.arguments[name]
    return {name: tensor[:1]}


def more_requests(surface: Surface, name: str) -> dict[str, Any] | None:
    return {name: 50} if name in ("bs", "max_bs") else None


def only(names: str, value: Any) -> Callable[[Surface, str], dict[str, Any] | None]:
    """For the ints with such names."""
    return lambda surface, name: {name: value} if re.fullmatch(names, name) else None


def not_for(names: str, value: Any) -> Callable[[Surface, str], dict[str, Any] | None]:
    return lambda surface, name: None if re.fullmatch(names, name) else {name: value}


def without(surface: Surface, name: str) -> dict[str, Any] | None:
    """The argument is left out."""
    return None if name in surface.optional else {name: LEFT_OUT}


LEFT_OUT = object()
SEED = "auto|cuda|triton|python|async|plan"
FUSED = "(plan_)?(decode|verify|draft_extend|extend)"
BOTH_NAMES = "physical_page_size, real_page_size: expected one of the two names"
NUMBER = "expected an int >= [0-9]+"
LIMITS = "physical_page_size|nsa_index_topk|dsa_index_topk"

KINDS: dict[str, Kind] = {
    # ---- no tensor at all
    "lengths_none": Kind("lengths", required(None), TypeError, "{name}: expected a torch.Tensor.*, got None",
                         surfaces=f"{SEED}|fused_simple|seqlens_expand|(plan_)?(decode|verify|draft_extend)"),
    "lengths_list": Kind("lengths", becomes([3, 2]), TypeError, "{name}: expected a torch.Tensor.*, got list"),
    "lengths_tuple": Kind("lengths", becomes((3, 2)), TypeError, "{name}: expected a torch.Tensor.*, got tuple"),
    "lengths_str": Kind("lengths", becomes("3, 2"), TypeError, "{name}: expected a torch.Tensor.*, got str"),
    "lengths_int": Kind("lengths", becomes(5), TypeError, "{name}: expected a torch.Tensor.*, got int"),
    "lengths_float": Kind("lengths", becomes(5.0), TypeError, "{name}: expected a torch.Tensor.*, got float"),
    "lengths_dict": Kind("lengths", becomes({0: 3}), TypeError, "{name}: expected a torch.Tensor.*, got dict"),
    "out_none": Kind("outs", required(None), TypeError, "{name}: expected a torch.Tensor.*, got None"),
    "out_list": Kind("outs", becomes([0] * 9), TypeError, "{name}: expected a torch.Tensor.*, got list"),
    "out_int": Kind("outs", becomes(140_000_000), TypeError, "{name}: expected a torch.Tensor.*, got int"),
    "table_none": Kind("tables", required(None), (TypeError), "{name}: expected a torch.Tensor, got None",
                       surfaces="(plan_)?(decode|verify|draft_extend)"),
    "table_list": Kind("tables", becomes([[0]]), TypeError, "{name}: expected a torch.Tensor, got list"),
    "array_unwilling": Kind("lengths", lambda s, n: {n: Unwilling()} if s.takes_arrays else None, TypeError,
                            "{name}: expected an array that DLPack can share, got Unwilling"),
    # ---- dtypes
    **{
        f"lengths_{str(dtype)[6:]}": Kind("lengths", tensor_becomes(lambda t, d=dtype: t.to(d)), TypeError,
                                          f"{{name}}: expected dtype torch.int32 or torch.int64, got {dtype}")
        for dtype in (torch.float32, torch.float16, torch.int16, torch.uint8, torch.bool, torch.complex64)
    },
    "lengths_quantized": Kind(
        "lengths", tensor_becomes(lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint32)),
        TypeError, "{name}: expected dtype torch.int32 or torch.int64, got torch.qint32", device="cpu"),
    "lengths_with_a_gradient": Kind("lengths", tensor_becomes(lambda t: t.float().requires_grad_()), TypeError,
                                    "{name}: expected dtype .*, got torch.float32"),
    **{
        f"out_{str(dtype)[6:]}": Kind("outs", tensor_becomes(lambda t, d=dtype: t.to(d)), TypeError,
                                      f"{{name}}: expected dtype torch.int(32|64), got {dtype}")
        for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool, torch.complex64)
    },
    "out_of_the_other_int": Kind(
        "outs", tensor_becomes(lambda t: t.to(torch.int64 if t.dtype == torch.int32 else torch.int32)),
        TypeError, "{name}: expected dtype torch.int(32|64), got torch.int(64|32)"),
    "table_int64": Kind("tables", tensor_becomes(torch.Tensor.long), TypeError,
                        "{name}: expected dtype torch.int32, got torch.int64"),
    "table_float": Kind("tables", tensor_becomes(torch.Tensor.float), TypeError,
                        "{name}: expected dtype torch.int32, got torch.float32"),
    # ---- shapes
    "lengths_2d": Kind("lengths", tensor_becomes(lambda t: t[None]), ValueError,
                       r"{name}: expected a 1-D tensor, got shape \[1, "),
    "lengths_0d": Kind("lengths", tensor_becomes(lambda t: t[0]), ValueError,
                       r"{name}: expected a 1-D tensor, got shape \[\]"),
    "lengths_differ": Kind("lengths", shorter, ValueError,
                           r"(seq_lens|{name}): expected \[(>= )?[0-9]+\].*, got \[[0-9]+\]|total_len: expected <= 3 ",
                           surfaces=f"{SEED}|fused_simple|seqlens_expand|{FUSED[8:]}|plan_(decode|verify|draft_extend)"),
    "out_2d": Kind("outs", tensor_becomes(lambda t: t[None]), ValueError,
                   r"{name}: expected a 1-D tensor, got shape \[1, "),
    "out_0d": Kind("outs", tensor_becomes(lambda t: t[0]), ValueError,
                   r"{name}: expected a 1-D tensor, got shape \[\]"),
    "out_short": Kind("outs", shorter, ValueError, r"{name}: expected \[>= [0-9]+\], got \[1\]", surfaces=FUSED),
    "out_short_for_total_tokens": Kind("outs", shorter, ValueError,
                                       r"total_tokens: expected <= 1, .*, got 5|out_total: expected shape \[2\].*, got \[1\]",
                                       surfaces="auto|cuda|triton|python|async"),
    "out_total_long": Kind("outs", lambda s, n: {n: s.arguments[n].repeat(2)} if n == "out_total" else None,
                           ValueError, r"out_total: expected shape \[2\] \(total, status\), got \[4\]"),
    "table_1d": Kind("tables", tensor_becomes(lambda t: t[0]), ValueError, "{name}: expected a 2-D tensor, got shape"),
    "table_3d": Kind("tables", tensor_becomes(lambda t: t[None]), ValueError, "{name}: expected a 2-D tensor, got shape"),
    "table_narrow": Kind("tables", tensor_becomes(lambda t: t[:, :3]), ValueError,
                         r"{name}: expected \[>= [0-9]+, >= [0-9]+\] \(columns: .*\), got \["),
    "table_few_rows": Kind("tables", lambda s, n: None if n == "req_to_token" else {n: s.arguments[n][:1]},
                           ValueError, r"{name}: expected \[>= [0-9]+, >= [0-9]+\] \(columns: .*\), got \[1, "),
    # ---- devices
    **{
        f"{role}_on_meta": Kind(role, tensor_becomes(lambda t: t.to("meta")), ValueError,
                                "expected (device|a CUDA or CPU tensor).*got (meta|cpu|cuda:0)")
        for role in ("lengths", "outs", "tables")
    },
    **{
        f"{role}_on_the_cpu": Kind(role, tensor_becomes(elsewhere), ValueError,
                                   "expected device (cuda:0|cpu) like .*, got (cpu|cuda:0)", device="cuda")
        for role in ("lengths", "outs", "tables")
    },
    # ---- layouts
    **{
        f"{role}_{what}": Kind(role, tensor_becomes(change), ValueError, f"{{name}}: expected a dense tensor .*, got {got}")
        for role in ("lengths", "outs", "tables")
        for what, change, got in (("sparse", torch.Tensor.to_sparse, "torch.sparse_coo"), ("nested", nested, "nested"))
    },
    "table_sparse_csr": Kind("tables", tensor_becomes(torch.Tensor.to_sparse_csr), ValueError,
                             "{name}: expected a dense tensor .*, got torch.sparse_csr"),
    "out_strided": Kind("outs", tensor_becomes(strided), ValueError, "{name}: expected a contiguous tensor, got stride 2"),
    "out_stride_zero": Kind("outs", tensor_becomes(stacked), ValueError,
                            "{name}: expected a contiguous tensor, got stride 0"),
    "lengths_backwards": Kind("lengths", array_becomes(lambda a: a[::-1]), ValueError,
                              r"{name}: expected strides >= 0, got \[-1\]", device="cpu"),
    "table_column_stride": Kind("tables", tensor_becomes(wide_columns), ValueError, "{name}: expected column stride 1, got 2"),
    "table_stride_zero": Kind("tables", tensor_becomes(lambda t: t[:, :1].expand(t.shape)), ValueError,
                              "{name}: expected column stride 1, got 0"),
    "table_rows_overlap": Kind("tables", overlapping_rows, ValueError,
                               "{name}: expected rows that do not overlap .*, got row stride"),
    "table_one_row_expanded": Kind(
        "tables", lambda s, n: None if n == "req_to_token" else {n: s.arguments[n][:1].expand(s.arguments[n].shape)},
        ValueError, "{name}: expected rows that do not overlap .*, got row stride 0"),
    "out_read_only": Kind("outs", array_becomes(read_only), ValueError,
                          "{name}: expected a writable array, got a read-only ndarray", device="cpu"),
    "out_jax_like": Kind("outs", array_becomes(JaxLike), ValueError,
                         "{name}: expected a writable array, got a read-only JaxLike", device="cpu"),
    # ---- tensors without memory
    **{
        f"{role}_{what}": Kind(role, tensor_becomes(change), ValueError, "{name}: expected a tensor with memory, got ")
        for role in ("lengths", "outs", "tables")
        for what, change in (("fake", fake), ("functional", functional))
    },
    # ---- overlaps
    "out_is_another_out": Kind("outs", as_another_out, ValueError, "expected memory of its own, got an overlap with "),
    "out_over_the_end_of_another": Kind("outs", over_the_end_of_another, ValueError,
                                        "expected memory of its own, got an overlap with "),
    "out_over_an_input": Kind("outs", over_an_input, ValueError, "expected memory of its own, got an overlap with seq_lens"),
    "table_over_req_to_token": Kind("tables", table_over_table, ValueError,
                                    "{name}: expected memory of its own, got an overlap with req_to_token"),
    # ---- numbers
    "int_none": Kind("ints", required(None), TypeError, f"{{name}}: {NUMBER}, got NoneType"),
    "int_str": Kind("ints", becomes("4"), TypeError, f"{{name}}: {NUMBER}, got str"),
    "int_float": Kind("ints", becomes(4.0), TypeError, f"{{name}}: {NUMBER}, got float"),
    "int_nan": Kind("ints", becomes(float("nan")), TypeError, f"{{name}}: {NUMBER}, got float"),
    "int_bool": Kind("ints", becomes(True), TypeError, f"{{name}}: {NUMBER}, got bool"),
    "int_list": Kind("ints", becomes([4]), TypeError, f"{{name}}: {NUMBER}, got list"),
    "int_tensor": Kind("ints", becomes(lambda _: torch.tensor(4)), TypeError, f"{{name}}: {NUMBER}, got Tensor"),
    "int_numpy_float": Kind("ints", becomes(np.float64(4)), TypeError, f"{{name}}: {NUMBER}, got float64"),
    "int_negative": Kind("ints", becomes(-1), ValueError, f"{{name}}: {NUMBER}.*, got -1"),
    "int_very_negative": Kind("ints", becomes(-(2**63) - 1), ValueError, f"{{name}}: {NUMBER}.*, got -9223372036854775809"),
    "int_huge": Kind("ints", not_for(f"{LIMITS}|max_extend_len|max_total_len|max_q_len", 2**70), ValueError,
                     r"expected .*(1180591620717411303424|got )", surfaces="(?!plan_).*|plan_.*_(launch|run)"),
    "requests_over_the_buffers": Kind("ints", more_requests, ValueError,
                                      r"seq_lens: expected \[>= 50\] \(bs\), got|bs: expected an int <= 4, got 50|total_len: expected <= "),
    "topk_zero": Kind("ints", only("nsa_index_topk|dsa_index_topk", 0), ValueError, "{name}: expected an int >= 1, got 0"),
    **{
        f"page_size_{value}": Kind("ints", only("physical_page_size", value), ValueError,
                                   f"physical_page_size: expected (a power of two in .*|an int >= 1), got {value}")
        for value in (0, 3, 48, 512)
    },
    "next_n_zero": Kind("ints", only("next_n", 0), ValueError, "next_n: expected an int >= 1, got 0"),
    "width_over_the_tables": Kind("ints", only("max_len|max_seqlen_k", 100_000), ValueError,
                                  r"expected \[>= [0-9]+, >= (100000|1563)\] .*, got \["),
    "pad_to_small": Kind("ints", only("pad_to|max_pad_to", 2), ValueError, "{name}: expected an int >= 11, got 2"),
    "total_over_the_bounds": Kind("ints", only("total_len", 1000), ValueError,
                                  r"total_len: expected <= [0-9]+ .*, got 1000|[a-z_]+: expected \[>= 100[01]\], got "),
    "bool_int": Kind("bools", becomes(1), TypeError, "{name}: expected a bool, got int"),
    "bool_str": Kind("bools", becomes("yes"), TypeError, "{name}: expected a bool, got str"),
    "bool_none": Kind("bools", becomes(None), TypeError, "{name}: expected a bool, got NoneType"),
    # ---- the call itself
    "both_page_sizes": Kind("call", lambda s, _: {"real_page_size": 64}, TypeError, BOTH_NAMES, surfaces=FUSED),
    "unknown_keyword": Kind("call", lambda s, _: {"page_sizes": 64}, TypeError,
                            "unexpected keyword argument 'page_sizes'|page_sizes: expected the name of an output"),
    "page_table_without_pool": Kind("call", lambda s, _: {"req_pool_indices": None}, ValueError,
                                    "page_table_1: expected req_pool_indices to fill it from, got None",
                                    surfaces="(plan_)?extend"),
    "page_table_without_tokens": Kind("call", lambda s, _: {"req_to_token": None}, ValueError,
                                      "page_table_1: expected req_to_token to fill it from, got None",
                                      surfaces="(plan_)?extend"),
    "lengths_left_out": Kind("lengths", without, TypeError, "missing 1 required .*argument.*'{name}'",
                             surfaces=f"{SEED}|fused_simple|seqlens_expand|(plan_)?(decode|verify|draft_extend)"),
    "int_left_out": Kind("ints", without, TypeError,
                         "missing 1 required .*argument.*'{name}'|{name}: expected an int, got nothing",
                         surfaces=f"{SEED}|fused_simple|seqlens_expand|(plan_)?(decode|verify|draft_extend)"),
    **{
        f"device_{what}_{device}": Kind("call", lambda s, _, value=value: {"device": value}, error,
                               f"device: expected a CUDA device( or the CPU)?, got {got}", surfaces=surfaces, device=device)
        for surfaces, device in (("last_status", "cpu"), ("last_status|warmup", "cuda"))
        for what, value, error, got in (
            ("of_another_kind", "meta", ValueError, "meta"), ("unknown", "gpu", ValueError, "'gpu'"),
            ("float", 0.0, TypeError, "float"), ("bool", True, TypeError, "bool"), ("list", [0], TypeError, "list"))
    },
    "device_that_is_not_there": Kind("call", lambda s, _: {"device": 99}, ValueError,
                                     "device: expected the index of one of [0-9]+ CUDA devices, got 99",
                                     surfaces="last_status"),
    "warmup_of_the_cpu": Kind("call", lambda s, _: {"device": "cpu"}, ValueError,
                              "device: expected a CUDA device, got cpu", surfaces="warmup", device="cuda"),
}  # fmt: skip

# ---- What only the device knows -----------------------------------------------------------------


@dataclass(frozen=True)
class DeviceKind:
    """Lengths of the seed operation that only the device can judge; nothing may be written."""

    change: Callable[[Surface], dict[str, Any]]
    status: int
    message: str


DEVICE_KINDS = {
    "negative_extend": DeviceKind(
        lambda s: {"extend_seq_lens": s.arguments["extend_seq_lens"] - 3}, 2,
        r"extend_seq_lens\[1\]: expected >= 0, got -1"),
    "total_over_the_capacity": DeviceKind(
        lambda s: {"extend_seq_lens": s.arguments["extend_seq_lens"] + 3}, 1,
        r"expected room for sum\(extend_seq_lens\) = 11 rows, got capacity 8"),
    "seq_beyond_int32": DeviceKind(
        lambda s: {"seq_lens": s.arguments["seq_lens"] + 2**31}, 3,
        r"seq_lens\[0\]: expected a value within int32, got 2147483658"),
    "seq_below_int32": DeviceKind(
        lambda s: {"seq_lens": s.arguments["seq_lens"] - 2**40}, 3,
        r"seq_lens\[0\]: expected a value within int32, got -1099511627766"),
    "extend_beyond_int32": DeviceKind(
        lambda s: {"extend_seq_lens": s.arguments["extend_seq_lens"].long() + 2**33}, 3,
        r"extend_seq_lens\[0\]: expected a value within int32, got 8589934595"),
    "extend_int64_edge": DeviceKind(
        lambda s: {"extend_seq_lens": s.arguments["extend_seq_lens"].long() + (2**63 - 4)}, 3,
        r"extend_seq_lens\[0\]: expected a value within int32, got 9223372036854775807"),
    "sum_beyond_int32": DeviceKind(
        lambda s: {"extend_seq_lens": s.arguments["extend_seq_lens"] + 2**30}, 3,
        "expected sums within int32 .*, got 2147483653 after request 1"),
}  # fmt: skip

#: Named batches of the fused family whose status is not 0: all bytes are checked against the
#: reference, guards included.
FUSED_DEVICE_KINDS = sorted(name for name, item in BY_NAME.items() if item.status)

# ---- Running ------------------------------------------------------------------------------------


def _memory(value: Any) -> torch.Tensor | None:
    """All bytes behind an argument, also those between and around its elements."""
    if isinstance(value, JaxLike):
        value = value.array
    if isinstance(value, np.ndarray):
        base = value if value.base is None else value.base
        return torch.from_numpy(np.array(base).reshape(-1).view(np.uint8))
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_nested:
        return None
    if type(value) is not torch.Tensor or torch._is_functional_tensor(value):
        return None
    if value.layout is not torch.strided:
        return value.detach().to_dense().reshape(-1).clone().view(torch.uint8)
    if value.is_quantized:
        return value.int_repr().reshape(-1).view(torch.uint8).clone()
    storage = value.untyped_storage()
    view = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
    return view.cpu() if view.is_cuda else view.clone()


def _written(arguments: dict[str, Any], before: dict[str, torch.Tensor | None]) -> list[str]:
    after = {name: _memory(value) for name, value in _watched(arguments)}
    return [
        name
        for name, memory in before.items()
        if memory is not None and not torch.equal(memory, after[name])
    ]


def _watched(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if name == "_watched":
            yield from ((f"allocation {i}", tensor) for i, tensor in enumerate(value))
        else:
            yield name, value


def attempt(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    is_pythons: bool = False,
) -> str | None:
    """Call, and say what was not as it has to be; None where all was."""
    before = {name: _memory(value) for name, value in _watched(arguments)}
    given = {n: v for n, v in arguments.items() if n != "_watched" and v is not LEFT_OUT}
    try:
        function(**given)
    except Exception as caught:
        text = str(caught)
        if type(caught) is not error:
            return f"expected {error.__name__}, got {type(caught).__name__}: {text[:200]}"
        if not re.search(message, text):
            return f"expected the message {message!r}, got {text[:200]!r}"
        if "\n" in text:
            return f"expected one line, got {text[:200]!r}"
        named = r"^[\w\[\]]+(, [\w\[\]]+)*: expected .+"
        if not (re.match(named, text) or re.search(r"argument", text)):
            return f"expected 'name: expected ..., got ...', got {text[:200]!r}"
    else:
        return f"expected {error.__name__}, got no error"
    written = _written(arguments, before)
    return f"wrote to {', '.join(written)}" if written else None


def kinds_of(surface_name: str, device: str) -> list[str]:
    """The kinds that apply to a function."""
    surface = SURFACES[surface_name](device)
    return [
        name
        for name, kind in KINDS.items()
        if (not kind.surfaces or re.fullmatch(kind.surfaces, surface_name))
        and (not kind.device or kind.device == device)
        and (kind.role == "call" or getattr(surface, kind.role))
    ]


def cases(device: str) -> Iterator[tuple[str, str]]:
    """Pairs (kind, function)."""
    for surface_name in SURFACES:
        for kind_name in kinds_of(surface_name, device):
            yield kind_name, surface_name


def run_case(
    kind_name: str, surface_name: str, device: str, calls_before: int = 0
) -> tuple[int, list[str]]:
    """Try a kind on every argument of its role: attempts and failures.

    ``calls_before``: good calls with the same tensors, which are known then.
    """
    kind = KINDS[kind_name]
    attempts, failures = 0, []
    names = ("",) if kind.role == "call" else getattr(SURFACES[surface_name](device), kind.role)
    for name in names:
        surface = SURFACES[surface_name](device)
        changes = kind.change(surface, name)
        if changes is None:
            continue
        attempts += 1
        for _ in range(calls_before):
            surface.function(**surface.arguments)
        wrong = attempt(
            surface.function,
            surface.arguments | changes,
            kind.error,
            kind.message.replace("{name}", name),
        )
        if wrong:
            failures.append(f"{kind_name}, {surface_name}({name}) on {device}: {wrong}")
    return attempts, failures


def run_device_case(kind_name: str, surface_name: str, device: str) -> list[str]:
    """Lengths that only the device can judge, given to a function of the seed operation."""
    kind = DEVICE_KINDS[kind_name]
    surface = SURFACES[surface_name](device)
    arguments = surface.arguments | kind.change(surface)
    arguments.pop("total_tokens", None)
    where = f"{kind_name}, {surface_name} on {device}"
    if surface_name == "async":
        del arguments["out_total"]
        before = {name: _memory(value) for name, value in arguments.items()}
        status = int(surface.function(**arguments)[1])
        wrong = "" if status == kind.status else f"expected status {kind.status}, got {status}"
        wrong = wrong or ", ".join(_written(arguments, before))
        return [f"{where}: {wrong}"] if wrong else []
    if surface_name == "plan":
        plan = surface.function(**arguments)
        wrong = attempt(lambda **_: plan.run(), arguments, ValueError, kind.message)
    else:
        wrong = attempt(surface.function, arguments, ValueError, kind.message)
    return [f"{where}: {wrong}"] if wrong else []


def device_surfaces(device: str) -> list[str]:
    return [name for name in SEED_FUNCTIONS if name != "cuda" or device != "cpu"]


def run_fused_device_case(name: str, device: str) -> list[str]:
    """A batch of the fused family with a status: all bytes as the reference leaves them."""
    item = BY_NAME[name]
    wanted = expected(item)
    cupy_nsa_meta.last_status("cpu")
    cupy_nsa_meta.last_status(device)
    built = Built(item, device)
    built.run()
    failures = []
    status = cupy_nsa_meta.last_status(device)
    if status != item.status:
        failures.append(f"{name} on {device}: expected status {item.status}, got {status}")
    try:
        built.check(wanted)
    except AssertionError as error:
        failures.append(str(error))
    return failures


def run(device: str) -> dict[str, Any]:
    """Everything, on "cpu" or "cuda": counts of kinds and cases, and what went wrong."""
    device = "cuda:0" if device == "cuda" else device
    kind = device.partition(":")[0]
    num_cases, failures = 0, []
    kinds = set()
    for kind_name, surface_name in cases(kind):
        attempts, wrong = run_case(kind_name, surface_name, kind)
        num_cases += attempts
        failures += wrong
        if attempts:
            kinds.add(kind_name)
    for kind_name in DEVICE_KINDS:
        for surface_name in device_surfaces(kind):
            num_cases += 1
            failures += run_device_case(kind_name, surface_name, kind)
    for name in FUSED_DEVICE_KINDS:
        num_cases += 1
        failures += run_fused_device_case(name, kind)
    return {
        "device": device,
        "kinds": len(kinds) + len(DEVICE_KINDS) + len(FUSED_DEVICE_KINDS),
        "functions": len(SURFACES),
        "cases": num_cases,
        "failures": failures,
    }
