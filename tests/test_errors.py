"""Bad input: one line (name, expected, got) of the right type, the same on every backend, nothing written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cupy_nsa_meta
from cases import POISON
from cupy_nsa_meta import _check

FUNCTIONS = {
    "python": cupy_nsa_meta.fill_draft_extend_metadata_python,
    "auto": cupy_nsa_meta.fill_draft_extend_metadata,
    "triton": cupy_nsa_meta.fill_draft_extend_metadata_inplace,
    "async": cupy_nsa_meta.fill_draft_extend_metadata_async,
    "cuda": cupy_nsa_meta.fill_draft_extend_metadata_cuda,
}
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]


def arguments(device):
    return {
        "extend_seq_lens": torch.tensor([3, 2], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([10, 4], dtype=torch.int64, device=device),
        "nsa_index_topk": 2048,
        "out_seqlens_expanded": torch.full((8,), POISON, dtype=torch.int32, device=device),
        "out_nsa_cache_seqlens": torch.full((8,), POISON, dtype=torch.int32, device=device),
    }


def replaced(**changes):
    """A change that puts these values in the place of arguments; callables get the arguments."""

    def change(given):
        return {name: value(given) if callable(value) else value for name, value in changes.items()}

    return change


def shared_memory(given):
    device = given["seq_lens"].device
    return torch.full((16,), POISON, dtype=torch.int32, device=device)


def overlapping_outs(given):
    memory = shared_memory(given)
    return {"out_seqlens_expanded": memory[:8], "out_nsa_cache_seqlens": memory[7:15]}


def out_over_extend(given):
    memory = shared_memory(given)
    memory[6:8] = torch.tensor([3, 2])
    return {"extend_seq_lens": memory[6:8], "out_seqlens_expanded": memory[:7]}


def out_over_seq(given):
    memory = shared_memory(given)
    return {"seq_lens": memory[8:10].fill_(9), "out_nsa_cache_seqlens": memory[1:9]}


def out_over_a_strided_input(given):
    memory = shared_memory(given)
    memory[::8] = 2
    return {"extend_seq_lens": memory[::8], "out_seqlens_expanded": memory[1:9]}


BAD = {
    # name: (change, error type, message)
    "extend_dtype": (
        replaced(extend_seq_lens=lambda g: g["extend_seq_lens"].to(torch.int16)),
        TypeError,
        "extend_seq_lens: expected dtype torch.int32 or torch.int64, got torch.int16",
    ),
    "extend_float": (
        replaced(extend_seq_lens=lambda g: g["extend_seq_lens"].float()),
        TypeError,
        "extend_seq_lens: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "seq_bool": (
        replaced(seq_lens=lambda g: g["seq_lens"].bool()),
        TypeError,
        "seq_lens: expected dtype torch.int32 or torch.int64, got torch.bool",
    ),
    "out_int64": (
        replaced(out_seqlens_expanded=lambda g: g["out_seqlens_expanded"].long()),
        TypeError,
        "out_seqlens_expanded: expected dtype torch.int32, got torch.int64",
    ),
    "out_uint8": (
        replaced(out_nsa_cache_seqlens=lambda g: g["out_nsa_cache_seqlens"].to(torch.uint8)),
        TypeError,
        "out_nsa_cache_seqlens: expected dtype torch.int32, got torch.uint8",
    ),
    "extend_2d": (
        replaced(extend_seq_lens=lambda g: g["extend_seq_lens"][None]),
        ValueError,
        r"extend_seq_lens: expected a 1-D tensor, got shape \[1, 2\]",
    ),
    "seq_0d": (
        replaced(seq_lens=lambda g: g["seq_lens"][0]),
        ValueError,
        r"seq_lens: expected a 1-D tensor, got shape \[\]",
    ),
    "out_2d": (
        replaced(out_nsa_cache_seqlens=lambda g: g["out_nsa_cache_seqlens"].view(2, 4)),
        ValueError,
        r"out_nsa_cache_seqlens: expected a 1-D tensor, got shape \[2, 4\]",
    ),
    "length_mismatch": (
        replaced(seq_lens=lambda g: g["seq_lens"][:1]),
        ValueError,
        r"seq_lens: expected \[2\] like extend_seq_lens, got \[1\]",
    ),
    "seq_on_another_device": (
        replaced(seq_lens=lambda g: g["seq_lens"].to("meta")),
        ValueError,
        r"seq_lens: expected device (cpu|cuda:0) like extend_seq_lens, got meta",
    ),
    "all_on_meta": (
        lambda g: {n: t.to("meta") for n, t in g.items() if isinstance(t, torch.Tensor)},
        ValueError,
        "extend_seq_lens: expected a CUDA or CPU tensor, got meta",
    ),
    "out_strided": (
        replaced(out_seqlens_expanded=lambda g: shared_memory(g)[::2]),
        ValueError,
        "out_seqlens_expanded: expected a contiguous tensor, got stride 2",
    ),
    "out_expanded": (
        replaced(out_nsa_cache_seqlens=lambda g: shared_memory(g)[:1].expand(8)),
        ValueError,
        "out_nsa_cache_seqlens: expected a contiguous tensor, got stride 0",
    ),
    "outs_overlap": (
        overlapping_outs,
        ValueError,
        "out_nsa_cache_seqlens: expected memory of its own, got an overlap with out_seqlens_expanded",
    ),
    "same_out_twice": (
        lambda g: {"out_nsa_cache_seqlens": g["out_seqlens_expanded"]},
        ValueError,
        "out_nsa_cache_seqlens: expected memory of its own, got an overlap with out_seqlens_expanded",
    ),
    "out_over_extend": (
        out_over_extend,
        ValueError,
        "out_seqlens_expanded: expected memory of its own, got an overlap with extend_seq_lens",
    ),
    "out_over_seq": (
        out_over_seq,
        ValueError,
        "out_nsa_cache_seqlens: expected memory of its own, got an overlap with seq_lens",
    ),
    "out_over_a_strided_input": (
        out_over_a_strided_input,
        ValueError,
        "out_seqlens_expanded: expected memory of its own, got an overlap with extend_seq_lens",
    ),
    "topk_zero": (
        replaced(nsa_index_topk=0),
        ValueError,
        "nsa_index_topk: expected an int >= 1, got 0",
    ),
    "topk_negative": (
        replaced(nsa_index_topk=-7),
        ValueError,
        "nsa_index_topk: expected an int >= 1, got -7",
    ),
    "topk_float": (
        replaced(nsa_index_topk=2048.0),
        TypeError,
        "nsa_index_topk: expected an int >= 1, got float",
    ),
    "topk_bool": (
        replaced(nsa_index_topk=True),
        TypeError,
        "nsa_index_topk: expected an int >= 1, got bool",
    ),
    "topk_tensor": (
        replaced(nsa_index_topk=torch.tensor(8)),
        TypeError,
        "nsa_index_topk: expected an int >= 1, got Tensor",
    ),
    "topk_none": (
        replaced(nsa_index_topk=None),
        TypeError,
        "nsa_index_topk: expected an int >= 1, got NoneType",
    ),
    "adaptive_string": (
        replaced(use_adaptive="yes"),
        TypeError,
        "use_adaptive: expected a bool, got str",
    ),
    "total_negative": (
        replaced(total_tokens=-1),
        ValueError,
        "total_tokens: expected an int >= 0, got -1",
    ),
    "total_over_capacity": (
        replaced(total_tokens=9),
        ValueError,
        r"total_tokens: expected <= 8, the capacity of the out buffers .*, got 9",
    ),
    "total_float": (
        replaced(total_tokens=5.0),
        TypeError,
        "total_tokens: expected an int >= 0, got float",
    ),
    "total_bool": (
        replaced(total_tokens=False),
        TypeError,
        "total_tokens: expected an int >= 0, got bool",
    ),
    "extend_none": (
        replaced(extend_seq_lens=None),
        TypeError,
        "extend_seq_lens: expected a torch.Tensor or an object with __dlpack__, got NoneType",
    ),
    "seq_list": (
        replaced(seq_lens=[10, 4]),
        TypeError,
        "seq_lens: expected a torch.Tensor or an object with __dlpack__, got list",
    ),
    "out_none": (
        replaced(out_seqlens_expanded=None),
        TypeError,
        "out_seqlens_expanded: expected a torch.Tensor or an object with __dlpack__, got NoneType",
    ),
    "out_int": (
        replaced(out_nsa_cache_seqlens=8),
        TypeError,
        "out_nsa_cache_seqlens: expected a torch.Tensor or an object with __dlpack__, got int",
    ),
}

FROM_THE_DEVICE = {
    "negative_extend": (
        lambda g: {"extend_seq_lens": g["extend_seq_lens"] - torch.tensor([0, 5]).to(g["seq_lens"].device)},
        r"extend_seq_lens\[1\]: expected >= 0, got -3",
    ),
    "over_capacity": (
        lambda g: {"out_seqlens_expanded": g["out_seqlens_expanded"][:4]},
        r"expected room for sum\(extend_seq_lens\) = 5 rows, got capacity 4",
    ),
    "seq_outside_int32": (
        lambda g: {"seq_lens": g["seq_lens"] + 2**31},
        r"seq_lens\[0\]: expected a value within int32, got 2147483658",
    ),
    "extend_outside_int32": (
        lambda g: {"extend_seq_lens": g["extend_seq_lens"].long() + 2**33},
        r"extend_seq_lens\[0\]: expected a value within int32, got 8589934595",
    ),
    "sum_outside_int32": (
        lambda g: {"extend_seq_lens": g["extend_seq_lens"] + 2**30},
        r"expected sums within int32 \(<= 2147483647\), got 2147483653 after request 1",
    ),
}  # fmt: skip


def fails(function, given, error, message):
    before = {n: t.clone() for n, t in given.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=message) as caught:
        function(**given)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for name, tensor in before.items():
        if tensor.device.type != "meta":
            assert torch.equal(given[name], tensor), f"{name} was written"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, function, device):
    change, error, message = BAD[name]
    given = arguments(device)
    given.update(change(given))
    fails(FUNCTIONS[function], given, error, message)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", ["python", "auto", "triton", "cuda"])
@pytest.mark.parametrize("name", FROM_THE_DEVICE)
def test_bad_device_data(name, function, device):
    if function == "cuda" and device == "cpu":
        change, error, message = None, ValueError, "expected CUDA tensors, got cpu"
        fails(FUNCTIONS[function], arguments(device), error, message)
        return
    change, message = FROM_THE_DEVICE[name]
    given = arguments(device)
    given.update(change(given))
    fails(FUNCTIONS[function], given, ValueError, message)


@pytest.mark.gpu
def test_host_and_device_tensors_together():
    given = arguments("cuda")
    given["seq_lens"] = given["seq_lens"].cpu()
    fails(
        FUNCTIONS["cuda"],
        given,
        ValueError,
        "seq_lens: expected device cuda:0 like extend_seq_lens, got cpu",
    )


OUT_TOTAL = {
    "dtype": (lambda g: torch.zeros(2), TypeError, "out_total: expected dtype torch.int32, got torch.float32"),
    "shape": (
        lambda g: torch.zeros(3, dtype=torch.int32),
        ValueError,
        r"out_total: expected shape \[2\] \(total, status\), got \[3\]",
    ),
    "device": (
        lambda g: torch.zeros(2, dtype=torch.int32, device="meta"),
        ValueError,
        "out_total: expected device cpu like extend_seq_lens, got meta",
    ),
    "overlap": (
        lambda g: g["out_seqlens_expanded"][6:],
        ValueError,
        "out_total: expected memory of its own, got an overlap with out_seqlens_expanded",
    ),
    "list": (lambda g: [0, 0], TypeError, "out_total: expected a torch.Tensor or an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_TOTAL)
def test_bad_out_total(name):
    make, error, message = OUT_TOTAL[name]
    given = arguments("cpu")
    given["out_total"] = make(given)
    fails(FUNCTIONS["async"], given, error, message)


def test_an_out_between_the_elements_of_a_strided_input_is_legal():
    memory = torch.full((64,), POISON, dtype=torch.int32)
    memory[::16] = 2
    total = FUNCTIONS["auto"](
        memory[::16], torch.tensor([9, 9, 9, 9]), 2048, memory[1:12], memory[17:30]
    )
    assert total == 8
    assert memory[::16].tolist() == [2] * 4
    assert memory[1:9].tolist() == [8, 9] * 4
    assert memory[17:25].tolist() == [8, 9] * 4


def test_empty_tensors_may_share_a_pointer():
    none = torch.empty(0, dtype=torch.int32)
    for fill in (FUNCTIONS["python"], FUNCTIONS["triton"], FUNCTIONS["auto"]):
        assert fill(none, none, 1, none, none) == 0
        assert fill(none, none, 1, none, none, total_tokens=0) == 0


def test_numpy_integers_are_integers():
    given = arguments("cpu")
    given["nsa_index_topk"] = np.int64(9)
    assert FUNCTIONS["auto"](**given, total_tokens=np.int32(5)) == 5
    assert given["out_nsa_cache_seqlens"][:5].tolist() == [8, 9, 9, 3, 4]


# ---- Foreign arrays -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["python", "auto", "triton"])
def test_numpy_arrays_share_their_memory(function):
    outs = np.full((2, 8), POISON, dtype=np.int32)
    total = FUNCTIONS[function](
        np.array([3, 2], dtype=np.int32), np.array([10, 4]), 9, outs[0], outs[1]
    )
    assert total == 5
    assert outs.tolist() == [[8, 9, 10, 3, 4] + [POISON] * 3, [8, 9, 9, 3, 4] + [POISON] * 3]


def test_a_read_only_output_is_refused():
    given = arguments("cpu")
    given["out_seqlens_expanded"] = np.zeros(8, dtype=np.int32)
    given["out_seqlens_expanded"].flags.writeable = False
    with pytest.raises((TypeError, ValueError), match="out_seqlens_expanded: expected a writable"):
        FUNCTIONS["auto"](**given)
    assert not given["out_seqlens_expanded"].any()


def test_a_negative_stride_is_refused():
    given = arguments("cpu")
    given["extend_seq_lens"] = np.array([2, 3], dtype=np.int32)[::-1]
    with pytest.raises(ValueError, match=r"extend_seq_lens: expected strides >= 0, got \[-1\]"):
        FUNCTIONS["auto"](**given)


@pytest.mark.parametrize("name", ["extend_seq_lens", "out_seqlens_expanded"])
def test_sparse_and_nested_tensors_are_refused(name):
    given = arguments("cpu")
    dense = given[name]
    for other in (dense.to_sparse(), torch.nested.nested_tensor([dense, dense])):
        given[name] = other
        with pytest.raises(ValueError, match=f"{name}: expected a dense tensor"):
            FUNCTIONS["auto"](**given)


def test_an_exporter_from_before_dlpack_1():
    class Old:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, stream=None):
            return self.array.__dlpack__(stream=stream)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    given = arguments("cpu")
    out = np.zeros(8, dtype=np.int32)
    given["out_seqlens_expanded"] = Old(out)
    given["extend_seq_lens"] = Old(np.array([3, 2]))
    assert FUNCTIONS["auto"](**given) == 5
    assert out[:5].tolist() == [8, 9, 10, 3, 4]


def test_an_exporter_that_fails_is_named():
    class Broken:
        def __dlpack__(self, **keywords):
            raise BufferError("no export")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(
        TypeError, match=r"seq_lens: expected an array that DLPack can share.*no export"
    ):
        _check.as_tensor("seq_lens", Broken())
