"""Calls on tensors that were met before: what is reused, and what must be looked at again."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import cupy_nsa_meta
from cases import BY_NAME, CASES, Outputs, case
from cupy_nsa_meta import (
    _check,
    _draft_extend_args,
    _form,
    _graphs,
    _known,
    _launch,
    draft_extend,
    plan_draft_extend_metadata,
)
from cupy_nsa_meta._status import FATAL
from fake_device import FakeDriverError, FakeState
from fused_cases import BY_NAME as BY_NAME_FUSED
from fused_cases import Built
from fused_plans import plan_of
from test_plan import check_plan

fill = cupy_nsa_meta.fill_draft_extend_metadata_cuda
fill_async = cupy_nsa_meta.fill_draft_extend_metadata_async
FIELDS = list(_draft_extend_args.LAYOUT.formats)
SMALL = [item for item in CASES if item.bs and item.bs <= _draft_extend_args.ONE_LAUNCH_MAX_BS]


@pytest.fixture
def unchecked(monkeypatch):
    """Fails where a call is checked attribute by attribute."""
    return lambda: monkeypatch.setattr(_check, "draft_extend", None)


def tensors_of(item):
    outputs = Outputs(item, "cpu")
    extend, seq = item.lengths("cpu")
    return (extend, seq, item.topk, outputs.expanded, outputs.clamped), outputs


@pytest.mark.parametrize("item", SMALL, ids=lambda item: item.name)
def test_every_case_again_and_again(item, fake_device: FakeState):
    arguments, outputs = tensors_of(item)
    expected = item.expected()
    for _ in range(6):
        outputs.poison()
        if item.total_tokens is not None:
            assert fill(*arguments, total_tokens=item.total_tokens) == item.total_tokens
        elif expected.status in FATAL:
            with pytest.raises(ValueError, match="extend_seq_lens|seq_lens"):
                fill(*arguments)
        else:
            assert fill(*arguments) == expected.total
        outputs.check(expected)
    out_total = torch.zeros(2, dtype=torch.int32)
    for _ in range(6):
        outputs.poison()
        out_total.fill_(-7)
        assert (
            fill_async(*arguments, total_tokens=item.total_tokens, out_total=out_total) is out_total
        )
        assert out_total.tolist() == [expected.total, expected.status]
        outputs.check(expected)


def test_a_known_call_is_replayed_without_a_check(fake_device, unchecked):
    item = BY_NAME["bs_33"]
    other = case("other", "other lengths", item.extend[::-1].copy(), item.seq + 5)
    arguments, outputs = tensors_of(item)
    for _ in range(4):
        assert fill(*arguments) == item.total
    replays = fake_device.runtime.replays
    unchecked()
    for batch in (other, item):
        arguments[0].copy_(torch.from_numpy(batch.extend))
        arguments[1].copy_(torch.from_numpy(batch.seq))
        outputs.poison()
        assert fill(*arguments) == batch.total
        outputs.check(batch.expected())
    assert fake_device.runtime.replays == replays + 2
    assert _graphs.cache_info()["hits"] >= 4


def test_any_total_of_known_tensors_needs_no_check(fake_device, unchecked):
    item = BY_NAME["bs_33"]
    arguments, outputs = tensors_of(item)
    for _ in range(3):
        fill(*arguments, total_tokens=item.total)
    unchecked()
    for total in (item.total, 0, 1, item.total - 3, item.total):
        outputs.poison()
        assert fill(*arguments, total_tokens=total) == total
        outputs.check(dataclasses.replace(item, total_tokens=total).expected())
    assert fake_device.runtime.replays == 0, "a number that varies costs no capture"


@pytest.mark.parametrize("total", [-1, 10**6, 2.0, True, "3", [5], None])
def test_a_bad_total_of_known_tensors(total, fake_device):
    arguments, outputs = tensors_of(BY_NAME["contract"])
    for _ in range(3):
        fill(*arguments, total_tokens=5)
    outputs.poison()
    launched = len(fake_device.launched)
    if total is None:
        assert fill(*arguments) == 5
        return
    with pytest.raises((TypeError, ValueError), match="total_tokens: expected"):
        fill(*arguments, total_tokens=total)
    assert len(fake_device.launched) == launched


CHANGES = {
    "resized": lambda t: t[3].resize_(3),
    "moved": lambda t: t[3].set_(torch.full((12,), -1, dtype=torch.int32)),
    "strided": lambda t: t[0].set_(torch.tensor([3, 9, 2, 9], dtype=t[0].dtype)[::2]),
    "dtype": lambda t: setattr(t[1], "data", t[1].to(torch.int32)),
    "float": lambda t: setattr(t[1], "data", t[1].float()),
    "two_dimensional": lambda t: setattr(t[4], "data", t[4].reshape(1, -1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_known_object_that_has_changed_is_looked_at_again(name, fake_device):
    def build():
        return (
            torch.tensor([3, 2], dtype=torch.int32), torch.tensor([10, 4]), 9,
            torch.full((12,), -1, dtype=torch.int32), torch.full((12,), -1, dtype=torch.int32),
        )  # fmt: skip

    def outcome(arguments):
        try:
            total = fill(*arguments)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return total, arguments[3].tolist(), arguments[4].tolist()

    known, new = build(), build()
    for _ in range(5):
        assert fill(*known) == 5
    known[3].fill_(-1)
    known[4].fill_(-1)
    CHANGES[name](known)
    CHANGES[name](new)
    wanted = outcome(new)
    assert outcome(known) == wanted
    assert outcome(known) == wanted


def test_streams_have_launches_of_their_own(fake_device):
    arguments, _ = tensors_of(BY_NAME["bs_33"])
    for stream in (11, 12, 11, 12, 11, 12, 11, 12):
        fake_device.stream = stream
        assert fill(*arguments) == BY_NAME["bs_33"].total
    assert _graphs.cache_info()["captures"] == 2
    assert fake_device.runtime.replays == 4


def test_known_calls_during_a_capture(fake_device):
    item = BY_NAME["contract"]
    arguments, _ = tensors_of(item)
    out_total = torch.zeros(2, dtype=torch.int32)
    fake_device.stream = 5
    for _ in range(4):
        fill(*arguments)
        fill(*arguments, total_tokens=5)
        fill_async(*arguments, out_total=out_total)
    replays = fake_device.runtime.replays
    fake_device.runtime.capturing[5] = recorded = []
    with pytest.raises(RuntimeError, match="total_tokens="):
        fill(*arguments)
    fill(*arguments, total_tokens=5)
    fill_async(*arguments, out_total=out_total)
    assert len(recorded) == 2, "the plain kernels are recorded"
    assert fake_device.runtime.replays == replays


def test_the_cache_can_be_switched_off_for_known_calls(fake_device, monkeypatch):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for _ in range(4):
        fill(*arguments)
    replays = fake_device.runtime.replays
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
    assert fill(*arguments) == 5
    assert fake_device.runtime.replays == replays


def test_debug_sync_reads_the_status_of_known_calls(fake_device, monkeypatch):
    arguments, _ = tensors_of(BY_NAME["contract"])
    out_total = torch.zeros(2, dtype=torch.int32)
    for _ in range(4):
        fill(*arguments, total_tokens=5)
        fill_async(*arguments, out_total=out_total)
        fill_async(*arguments, total_tokens=5, out_total=out_total)
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    arguments[0][1] = -4
    for call in (
        lambda: fill(*arguments, total_tokens=5),
        lambda: fill_async(*arguments, out_total=out_total),
        lambda: fill_async(*arguments, total_tokens=5, out_total=out_total),
    ):
        with pytest.raises(ValueError, match=r"extend_seq_lens\[1\]: expected >= 0, got -4"):
            call()


def test_debug_sync_reads_the_status_of_an_empty_batch(fake_device, monkeypatch):
    empty, out = torch.zeros(0, dtype=torch.int32), torch.full((9,), -1, dtype=torch.int32)
    arguments = empty, empty, 4, out[:4], out[4:]
    assert fill(*arguments, total_tokens=3) == 3
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    assert fill(*arguments) == fill(*arguments, total_tokens=0) == 0
    with pytest.raises(ValueError, match="total_tokens: expected"):
        fill(*arguments, total_tokens=3)
    assert out.tolist() == [-1] * 9


def test_a_captured_launch_that_fails_is_not_used_again(fake_device):
    arguments, outputs = tensors_of(BY_NAME["contract"])
    for _ in range(4):
        fill(*arguments)
    size = _graphs.cache_info()["size"]
    fake_device.answers = False
    with pytest.raises(RuntimeError, match="result did not arrive"):
        fill(*arguments)
    fake_device.answers = True
    gc.collect()
    assert _graphs.cache_info()["size"] == size - 1
    assert len(fake_device._retired) == 1, "its slot waits for the late word"
    for _ in range(4):
        outputs.poison()
        assert fill(*arguments) == 5
        outputs.check(BY_NAME["contract"].expected())


def test_no_tensor_is_kept_alive(fake_device):
    arguments, outputs = tensors_of(BY_NAME["contract"])
    out_total = torch.zeros(2, dtype=torch.int32)
    for _ in range(4):
        fill(*arguments)
        fill(*arguments, total_tokens=5)
        fill_async(*arguments, out_total=out_total)
    alive = [weakref.ref(t) for t in (*arguments, out_total) if isinstance(t, torch.Tensor)]
    del arguments, outputs, out_total
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_slots_of_captured_launches_come_back(fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for topk in (1, 2, 3) * 5:
        fill(*arguments[:2], topk, *arguments[3:])
    _graphs.thread.cache.graphs.clear()
    gc.collect()
    assert len(fake_device.free_slots) == fake_device.slots_made
    assert not fake_device.runtime.graphs


def test_launches_without_an_answer_leave_slots_alone(fake_device):
    decode = Built(BY_NAME_FUSED["decode_basic_ps64"])
    for _ in range(4):
        decode.run()
    assert not fake_device.slots_made
    arguments, _ = tensors_of(BY_NAME["contract"])
    plan = plan_draft_extend_metadata(*arguments)
    for _ in range(3):
        assert plan.run() == 5
        decode.run()
    plan_of(decode).launch()
    assert plan.run() == 5


def test_without_the_guards_of_torch(fake_device, monkeypatch):
    monkeypatch.setattr(_known, "_TensorGuards", None)
    monkeypatch.setattr(_check, "_layouts", {})
    item = BY_NAME["bs_33"]
    arguments, outputs = tensors_of(item)
    for _ in range(4):
        outputs.poison()
        assert fill(*arguments) == item.total
        outputs.check(item.expected())
    assert not _form._likenesses
    assert _graphs.cache_info()["hits"] == 2, "a launch is captured all the same"


def test_plans_on_a_fake_device(fake_device):
    for item in SMALL:
        if item.total_tokens is None:
            check_plan(item, "cpu")


@pytest.mark.parametrize("function", [fill, cupy_nsa_meta.fill_draft_extend_metadata_python])
@pytest.mark.parametrize("stride", [0, 6])
def test_an_output_of_one_element_does_not_let_its_stride_in(stride, function, request):
    """One element is contiguous at any stride; the layout that it leaves must not cover more."""
    if function is fill:
        request.getfixturevalue("fake_device")

    def column(rows):
        return memory.as_strided((rows,), (stride,))

    memory, other = torch.full((60,), -1, dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
    one = (torch.tensor([1]), torch.tensor([5]))
    for outs in ((column(1), other), (other, column(1))):
        assert function(*one, 9, *outs) == 1
    memory.fill_(-1)
    for outs, name in (((column(5), other), "expanded"), ((other, column(5)), "nsa_cache_seqlens")):
        with pytest.raises(ValueError, match=f"out_.*{name}: expected a contiguous tensor"):
            function(torch.tensor([3, 2]), torch.tensor([10, 4]), 9, *outs)
    assert (memory == -1).all()


@pytest.mark.parametrize("form", [fill, fill_async])
def test_arguments_come_back_where_packing_fails(form, fake_device, monkeypatch):
    item = BY_NAME["bs_16385"]
    arguments, _ = tensors_of(item)
    options = {"total_tokens": item.total}
    if form is fill_async:
        options["out_total"] = torch.zeros(2, dtype=torch.int32)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("no scratch")

    _launch._spare_arguments.clear()
    monkeypatch.setattr(draft_extend, "pack_call", out_of_memory)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            form(*arguments, **options)
    assert not fake_device.slots_made
    assert len(_launch._spare_arguments) == 1


# ---- Forms --------------------------------------------------------------------------------------


def anew(arguments):
    """The same memory as new tensors."""
    return tuple(t[:] if isinstance(t, torch.Tensor) else t for t in arguments)


def test_new_tensors_of_known_memory_are_replayed_without_a_check(fake_device, unchecked):
    item = BY_NAME["bs_33"]
    arguments, outputs = tensors_of(item)
    out_total = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        assert fill(*anew(arguments)) == item.total
        fill_async(*anew(arguments), out_total=out_total[:])
    replays = fake_device.runtime.replays
    unchecked()
    outputs.poison()
    assert fill(*anew(arguments)) == item.total
    outputs.check(item.expected())
    outputs.poison()
    fill_async(*anew(arguments), out_total=out_total[:])
    assert out_total.tolist() == [item.total, 0]
    outputs.check(item.expected())
    assert fake_device.runtime.replays == replays + 2


@pytest.mark.parametrize("total", [None, 5, 3])
def test_memory_that_was_never_seen_needs_no_check(total, fake_device, unchecked):
    item = dataclasses.replace(BY_NAME["contract"], total_tokens=total)
    for _ in range(2):
        fill(*tensors_of(item)[0])
    unchecked()
    kept = []
    for _ in range(20):
        arguments, outputs = tensors_of(item)
        kept.append(outputs)  # no address comes back
        assert fill(*arguments, total_tokens=total) == (5 if total is None else total)
        outputs.check(item.expected())
    assert not fake_device.runtime.replays


def test_sizes_that_alternate_are_all_known(fake_device, unchecked):
    items = [BY_NAME[name] for name in ("contract", "bs_17", "bs_33", "bs_129")]
    calls = [tensors_of(item) for item in items]
    for arguments, _ in calls:
        fill(*arguments)
        fill(*arguments)
    unchecked()
    for _ in range(3):
        for item, (arguments, outputs) in zip(items, calls, strict=True):
            outputs.poison()
            assert fill(*arguments) == item.total
            outputs.check(item.expected())
    assert fake_device.runtime.replays == 12


OVERLAPS = {
    "outputs": (lambda m: (m[0:2], m[4:6], m[10:22], m[20:32]), "out_nsa_cache_seqlens"),
    "extend": (lambda m: (m[21:23], m[4:6], m[10:22], m[30:42]), "out_seqlens_expanded"),
    "seq": (lambda m: (m[0:2], m[40:42], m[10:22], m[30:42]), "out_nsa_cache_seqlens"),
}


@pytest.mark.parametrize("total", [None, 5])
@pytest.mark.parametrize("name", OVERLAPS)
def test_overlaps_of_known_sizes_are_refused(name, total, fake_device):
    place, wrong = OVERLAPS[name]

    def call(extend, seq, expanded, clamped):
        return fill(extend, seq, 9, expanded, clamped, total_tokens=total)

    memory = torch.zeros(64, dtype=torch.int32)
    for _ in range(3):
        call(memory[0:2], memory[4:6], memory[10:22], memory[30:42])
    launched, before = len(fake_device.launched), memory.clone()
    for _ in range(3):
        with pytest.raises(ValueError, match=f"{wrong}: expected memory of its own"):
            call(*place(memory))
    assert len(fake_device.launched) == launched
    assert (memory == before).all()


def test_lengths_between_the_elements_of_an_output_are_looked_at_exactly(fake_device):
    """The spans meet, the elements do not."""
    memory = torch.zeros(200, dtype=torch.int32)
    extend, seq = memory[0:90:30], torch.tensor([9, 9, 9], dtype=torch.int32)
    for _ in range(3):
        assert fill(extend, seq, 9, memory[1:29], memory[31:59]) == 0
    with pytest.raises(ValueError, match="out_seqlens_expanded: expected memory of its own"):
        fill(extend, seq, 9, memory[3:31], memory[31:59])


@pytest.mark.parametrize("position", range(4))
def test_memory_that_is_gone_is_refused(position, fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for total in (None, None, 5, 5):
        fill(*arguments, total_tokens=total)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    gone = torch.zeros_like(tensors[position])
    gone.untyped_storage().resize_(0)
    tensors[position] = gone
    for total in (None, 5):
        with pytest.raises(ValueError, match="expected a tensor with memory"):
            fill(*tensors[:2], arguments[2], *tensors[2:], total_tokens=total)


def test_an_out_total_of_known_kind_is_looked_at(fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    memory = torch.zeros(8, dtype=torch.int32)
    for _ in range(4):
        fill_async(*arguments, out_total=memory[2:4])
    launched = len(fake_device.launched)
    gone = torch.zeros(2, dtype=torch.int32)
    gone.untyped_storage().resize_(0)
    for out_total, message in (
        (memory[2:5], r"expected shape \[2\] .*, got \[3\]"),
        (memory[2:6:2], "expected a contiguous tensor, got stride 2"),
        (memory.long()[2:4], "expected dtype torch.int32, got torch.int64"),
        (memory[2:4].reshape(1, 2), r"expected a 1-D tensor, got shape \[1, 2\]"),
        (gone, "expected a tensor with memory"),
        (arguments[3][2:4], "expected memory of its own, got an overlap with out_seqlens_expanded"),
        ([0, 0], "expected a torch.Tensor or an object with __dlpack__, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"out_total: {message}"):
            fill_async(*arguments, out_total=out_total)
    assert len(fake_device.launched) == launched


def test_a_nested_tensor_of_known_size(fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for _ in range(3):
        fill(*arguments)
    nested = torch.nested.nested_tensor([torch.zeros(2, dtype=torch.int32)])
    assert nested.numel() == arguments[0].numel()
    with pytest.raises(ValueError, match=r"expected a dense tensor \(torch.strided\), got nested"):
        fill(nested, *arguments[1:])


@pytest.mark.parametrize("topk", [9.0, True, None, [9], "9", 0])
def test_a_bad_topk_of_known_tensors(topk, fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for known in (9, 1):
        for _ in range(3):
            fill(*arguments[:2], known, *arguments[3:])
    with pytest.raises((TypeError, ValueError), match="nsa_index_topk: expected an int >= 1"):
        fill(*arguments[:2], topk, *arguments[3:])


@pytest.mark.parametrize("use_adaptive", [1, 1.0, None, "yes"])
def test_a_bad_use_adaptive_of_known_tensors(use_adaptive, fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for _ in range(3):
        fill(*arguments)
    with pytest.raises(TypeError, match="use_adaptive: expected a bool"):
        fill(*arguments, use_adaptive)


def test_more_totals_than_packed_launches_are_kept(fake_device, monkeypatch):
    monkeypatch.setattr(draft_extend, "MAX_PACKED", 4)
    item = BY_NAME["bs_33"]
    arguments, outputs = tensors_of(item)
    for _ in range(2):
        for total in (*range(9), item.total):
            outputs.poison()
            assert fill(*arguments, total_tokens=total) == total
            outputs.check(dataclasses.replace(item, total_tokens=total).expected())
    assert len(_graphs.thread.packed) == 4


def test_a_total_and_none_are_launches_of_their_own(fake_device):
    """The same form, memory and total; with an out_total and without."""
    item = BY_NAME["contract"]
    arguments, _ = tensors_of(item)
    out_total = torch.zeros(2, dtype=torch.int32)
    for total in (4, None, 4, 6, None, None):
        fill(*arguments, total_tokens=4)
        out_total.fill_(-7)
        fill_async(*arguments, total_tokens=total, out_total=out_total)
        assert out_total.tolist() == [5, 0 if total is None else 4]


def test_outputs_at_other_places_are_cut_up_otherwise(fake_device, monkeypatch):
    """Where rows are written four at a time, the places of both outputs decide."""
    monkeypatch.setattr(_draft_extend_args, "QUADS_MIN_ROWS", 32)
    memory = torch.zeros(400, dtype=torch.int32)
    first = (-memory.data_ptr() // 4) % 4  # of 16-byte places
    extend, seq = torch.tensor([3]), torch.tensor([9])
    for expanded, clamped, quads in ((0, 200, 1), (1, 200, 0), (0, 202, 0), (4, 204, 1)):
        outs = [memory[first + place : first + place + 100] for place in (expanded, clamped)]
        for total in (None, 3):
            assert fill(extend, seq, 9, *outs, total_tokens=total) == 3
            ((name, _),) = fake_device.launched[-1][1]
            wanted = quads and total is None
            assert name == ("draft_extend_warp_quads" if wanted else "draft_extend_warp")


def test_forms_are_bounded(fake_device, monkeypatch):
    monkeypatch.setattr(_form, "MAX_FORMS", 5)
    arguments, _ = tensors_of(BY_NAME["contract"])
    for topk in range(1, 30):
        fill(*arguments[:2], topk, *arguments[3:])
        assert len(_form._forms) <= 5
        fill(*arguments[:2], topk, *arguments[3:])
        assert len(_form._likenesses) <= 5
    assert fill(*arguments) == 5


def uninitialised():
    return torch.nn.parameter.UninitializedParameter(requires_grad=False)


KINDS = {
    "topk": lambda e, s, k, *outs: (e, s, np.int64(k), *outs),
    "one_tensor_twice": lambda e, s, k, *outs: (e, e, k, *outs),
    "dlpack": lambda e, s, k, *outs: (e.numpy(), s.numpy(), k, *(out.numpy() for out in outs)),
    "parameter": lambda e, s, k, *outs: (torch.nn.Parameter(e, False), s, k, *outs),
}


@pytest.mark.parametrize("name", KINDS)
def test_calls_of_any_kind_are_captured(name, fake_device):
    item = BY_NAME["contract"]
    arguments, outputs = tensors_of(item)
    wanted = 6 if name == "one_tensor_twice" else item.total
    if name == "one_tensor_twice":
        arguments[0].fill_(3)
    for _ in range(6):
        assert fill(*KINDS[name](*arguments)) == wanted
    assert fake_device.runtime.replays == 4
    if name != "one_tensor_twice":
        outputs.check(item.expected())


def test_kinds_of_calls_that_alternate_are_replayed(fake_device, unchecked):
    """The same sizes: other strides, other dtypes, other objects."""
    item = BY_NAME["contract"]
    arguments, outputs = tensors_of(item)
    extend, seq, *others = arguments
    calls = [
        arguments,
        (torch.stack((extend, extend), 1)[:, 0], seq, *others),
        (extend, torch.stack((seq, seq), 1)[:, 1], *others),
        (extend.long(), seq, *others),
    ]
    for _ in range(3):
        for call in calls:
            fill(*call)
    unchecked()
    replays = fake_device.runtime.replays
    for call in calls * 3:
        outputs.poison()
        assert fill(*call) == item.total
        outputs.check(item.expected())
    assert fake_device.runtime.replays == replays + 12
    assert _graphs.cache_info()["captures"] == 4


def test_sizes_that_never_come_back_are_not_captured(fake_device, monkeypatch):
    monkeypatch.setattr(_form, "MAX_FORMS", 8)
    memory = torch.zeros((2, 2000), dtype=torch.int32)
    extend, seq = torch.tensor([3, 2]), torch.tensor([10, 4])
    for rows in range(5, 400):
        assert fill(extend, seq, 9, memory[0, :rows], memory[1, :rows]) == 5
    assert _graphs.cache_info()["captures"] == 0


def test_a_call_inside_a_call(fake_device):
    """As a signal handler makes one: before the launch of the outer call, with all that is kept."""
    item = BY_NAME["contract"]
    (outer, _), (inner, inner_outputs) = tensors_of(item), tensors_of(item)
    out_total = torch.zeros(2, dtype=torch.int32)

    def inner_calls():
        for total in (1, 1, 1, 4, 4, 4, 5):
            fill(*inner, total_tokens=total)
        assert fill(*inner) == item.total

    calls = [
        lambda: fill(*outer, total_tokens=3),
        lambda: fill(*outer),
        lambda: fill_async(*outer, out_total=out_total),
    ]
    launch = fake_device.launch

    def interrupted(arguments, stream, launches):
        if depth:
            depth.pop()
            inner_calls()
        launch(arguments, stream, launches)

    fake_device.launch = interrupted
    for call in calls * 6:
        depth = [True]
        outer[3].fill_(-1)
        inner_outputs.poison()
        call()
        rows = 3 if call is calls[0] else 5
        assert outer[3][:rows].tolist() == [8, 9, 10, 3, 4][:rows]
        if not depth:
            inner_outputs.check(item.expected())


def test_the_same_call_inside_a_call_that_waits(fake_device, monkeypatch):
    """As a signal handler makes it: the outer call finds the answer of the inner one."""
    item = BY_NAME["contract"]
    arguments, outputs = tensors_of(item)
    for _ in range(4):
        fill(*arguments)
    totals = []

    class Looks:
        def __iter__(self):
            if not totals:
                totals.append(None)
                totals.append(fill(*arguments))
            return iter(range(3))

    monkeypatch.setattr(_launch, "QUICK_LOOKS", Looks())
    outputs.poison()
    assert fill(*arguments) == item.total
    assert totals == [None, item.total]
    outputs.check(item.expected())
    captures = _graphs.cache_info()["captures"]
    assert fill(*arguments) == item.total
    assert _graphs.cache_info()["captures"] == captures, "the captured launch is kept"


@pytest.mark.parametrize(
    ("name", "where", "error"),
    [
        ("contract", "launch", FakeDriverError("no code memory")),
        ("bs_16385", "pack_call", torch.OutOfMemoryError("no scratch")),
    ],
)
def test_calls_that_are_refused_use_up_no_slots(name, where, error, fake_device, monkeypatch):
    arguments, _ = tensors_of(BY_NAME[name])

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fake_device if where == "launch" else draft_extend, where, refuse)
        for _ in range(5):
            with pytest.raises(type(error)):
                fill(*arguments)
    assert len(fake_device.free_slots) == fake_device.slots_made == 1


def test_an_interrupted_launch_may_still_answer(fake_device, monkeypatch):
    """It was enqueued or not: its slot is not used before its word has come."""
    arguments, _ = tensors_of(BY_NAME["contract"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fake_device, "launch", interrupt)
        for made in (1, 2, 3):
            with pytest.raises(KeyboardInterrupt):
                fill(*arguments)
            assert fake_device.slots_made == made
    assert not fake_device.free_slots


def test_a_slot_that_was_packed_in_other_ways(fake_device, monkeypatch):
    """Where it holds a launch like the next one, only addresses and epoch are packed."""
    item = BY_NAME["contract"]
    calls = [tensors_of(item) for _ in range(3)]
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")

    def check_all():
        for arguments, outputs in calls:
            outputs.poison()
            assert fill(*arguments) == item.total
            outputs.check(item.expected())
            packed = _draft_extend_args.ARGS.unpack(fake_device.launched[-1][0])
            fields = dict(zip(FIELDS, packed, strict=True))
            addresses = [fields[name] for name in _check.DraftExtendArrays]
            assert [arguments[k].data_ptr() for k in (0, 1, 3, 4)] == addresses
            assert not any(fields[name] for name in ("launch_count", "out_total", "request_ends"))
            assert not fields["flags"] & _check.TOTAL_IS_GIVEN

    check_all()
    assert fake_device.slots_made == 1
    (arguments, _), *_ = calls
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    assert fill(*arguments, total_tokens=item.total) == item.total
    monkeypatch.delenv("CUPY_NSA_META_DEBUG_SYNC")
    check_all()
    plan = plan_draft_extend_metadata(*arguments)
    assert plan.run() == item.total
    del plan
    gc.collect()
    check_all()
    assert fake_device.slots_made == 1, "one slot for all of them"


@pytest.mark.parametrize("form", [fill, fill_async])
def test_a_capture_that_fails_does_not_fail_the_call(form, fake_device):
    arguments, outputs = tensors_of(BY_NAME["contract"])
    out_total = torch.zeros(2, dtype=torch.int32)
    options = {"out_total": out_total} if form is fill_async else {}
    instantiate = fake_device.runtime.graphInstantiate

    def out_of_memory(graph):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    fake_device.runtime.graphInstantiate = out_of_memory
    for _ in range(5):
        outputs.poison()
        form(*arguments, **options)
        outputs.check(BY_NAME["contract"].expected())
    assert len(fake_device.free_slots) == fake_device.slots_made
    fake_device.runtime.graphInstantiate = instantiate
    for _ in range(4):
        form(*arguments, **options)
    assert fake_device.runtime.replays >= 1


def test_a_launch_that_fails_in_a_capture_leaves_no_graph(fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    launch = fake_device.launch

    def out_of_memory(launched, stream, launches):
        if stream in fake_device.runtime.capturing:
            raise torch.OutOfMemoryError("no code memory")
        launch(launched, stream, launches)

    fake_device.launch = out_of_memory
    for _ in range(6):
        fill(*arguments)
    assert not fake_device.runtime.graphs
    assert not fake_device.runtime.capturing
    fake_device.launch = launch
    for _ in range(4):
        fill(*arguments)
    assert fake_device.runtime.replays >= 1


def test_a_capture_that_fails_does_not_fail_fused_calls_and_plans(fake_device):
    built = Built(BY_NAME_FUSED["decode_basic_ps64"])

    def out_of_memory(graph):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    fake_device.runtime.graphInstantiate = out_of_memory
    for _ in range(5):
        built.run()
    assert len(fake_device.launched) == 5
    plan = plan_of(built)
    for _ in range(3):
        plan.launch()
    assert len(fake_device.launched) == 8
    assert len(set(fake_device.launched[:5])) == len(set(fake_device.launched[5:])) == 1
    assert not fake_device.runtime.replays


@pytest.mark.parametrize("position", range(4))
def test_a_parameter_that_was_never_filled(position, fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    for _ in range(3):
        fill(*arguments)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    tensors[position] = uninitialised()
    with pytest.raises(TypeError, match="expected dtype torch.int"):
        fill(*tensors[:2], 9, *tensors[2:])


def test_a_nested_out_total(fake_device):
    arguments, _ = tensors_of(BY_NAME["contract"])
    nested = torch.nested.nested_tensor([torch.zeros(2, dtype=torch.int32)])
    for _ in range(3):
        with pytest.raises(ValueError, match="out_total: expected a dense tensor"):
            fill_async(*arguments, out_total=nested)
        fill_async(*arguments, out_total=torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("calls_before", [0, 3])
def test_the_first_of_two_errors(calls_before, fake_device):
    """The same one, whether the call is like an earlier one or not."""
    arguments, _ = tensors_of(BY_NAME["contract"])
    for _ in range(calls_before):
        fill(*arguments)
    with pytest.raises(ValueError, match="total_tokens: expected"):
        fill(*arguments[:4], arguments[3], total_tokens=-1)


# ---- Guards -------------------------------------------------------------------------------------


def test_what_a_guard_tells_apart():
    a, b = torch.zeros(4, dtype=torch.int32), torch.zeros((2, 3), dtype=torch.int64)
    same = _known.guard((a, b))
    assert same(a, b)
    assert same(torch.ones(4, dtype=torch.int32), torch.ones((2, 3), dtype=torch.int64))
    for other in (a[:3], a.long(), torch.zeros(8, dtype=torch.int32)[::2], a.reshape(2, 2), None, 4,
                  a.to("meta"), torch.nn.Parameter(a, requires_grad=False)):  # fmt: skip
        assert not same(other, b)
    assert not same(a, b.t())
    any_size = _known.guard((a, b), any_size=True)
    assert any_size(a[:2], torch.zeros((5, 3), dtype=torch.int64))
    assert not any_size(torch.zeros(8, dtype=torch.int32)[::2], b)
    assert _known.guard((a, a)) is None, "the same object twice is not compared"


def test_a_nested_tensor_is_not_shown_to_a_guard():
    a = torch.zeros(4, dtype=torch.int32)
    same = _known.guard((a,), any_size=True)
    nested = torch.nested.nested_tensor([torch.zeros(3, dtype=torch.int32)])
    assert _known.is_like(same, (a,))
    assert not _known.is_like(same, (nested,)), "it would end the process"
    assert not _known.is_like(same, (None,))
    assert not _known.is_like(same, (a.to_sparse(),))


def test_what_was_met_once_is_bounded():
    met = _known.MetOnce(3)
    assert [met.is_again(key) for key in (1, 2, 1, 3, 4, 1, 4)] == [0, 0, 1, 0, 0, 0, 1]
    met.forget(4)
    assert not met.is_again(4)


def find(calls: _known.KnownCalls, *tensors: Any) -> Any:
    """By the very objects, or else by their memory."""
    return calls.find(tensors)[0]


def keep(calls: _known.KnownCalls, value: str, *tensors: Any) -> None:
    _, memory = calls._by_memory(tuple(map(id, tensors)), tensors)
    calls.keep(memory, tensors, value)


def test_known_calls_are_bounded():
    calls = _known.KnownCalls(3)
    a = torch.zeros(20)
    for number in range(20):
        tensors = a, a[number:]
        assert find(calls, *tensors) is None
        due = [calls.is_due(number) for _ in range(9)]
        assert due == [False, True, False, False, False, False, False, True, False]
        keep(calls, str(number), *tensors)
        for _ in range(9):
            assert find(calls, a, a[number:]) == str(number)
        for kept in (calls.of_memory, calls._of_objects, calls._met):
            assert 1 <= len(kept) <= 3
        assert calls._of_objects.keys() == calls._alive.keys()
    alive = [(a[:], a[:]) for _ in range(9)]
    for number, tensors in enumerate(alive):
        keep(calls, str(number), *tensors)
        assert 1 <= len(calls._of_objects) <= 3
    for pattern in product((a, a[1:], None), repeat=3):
        find(calls, a, *pattern)
        assert len(calls._picks) <= 3


def test_what_is_kept_by_objects_ends_with_the_first_of_them():
    calls = _known.KnownCalls(3)
    memory = torch.zeros(8)
    first, second = memory[:4], memory[4:]
    keep(calls, "value", first, second)
    assert calls.find((first, second)) == ("value", None)
    del second
    gc.collect()
    assert not calls._of_objects
    assert not calls._alive
    assert find(calls, first, memory[4:]) == "value"


def test_what_known_calls_tell_apart():
    calls = _known.KnownCalls(99)
    a = torch.zeros(12, dtype=torch.int32)
    b, c = a[4:8], a[8:]
    kinds = {
        "all": (a, b, c),
        "other_memory": (a, b, a[7:11]),
        "without_the_last": (a, b, None),
        "without_the_middle": (a, None, b),
        "without_both": (a, None, None),
        "two_are_one": (a, b, b),
        "all_are_one": (b, b, b),
        "shorter": (a[:11], b, c),
        "exchanged": (a, c, b),
    }
    for name, tensors in kinds.items():
        keep(calls, name, *tensors)
    unknown = {"without_both", "all_are_one"}  # guards compare two tensors or more
    for _ in range(2):
        for name, tensors in kinds.items():
            assert find(calls, *tensors) == (None if name in unknown else name)
    for name in ("all", "without_the_last", "shorter"):
        views = (None if t is None else t.view(t.shape) for t in kinds[name])
        assert find(calls, *views) == name
    assert find(calls, a, b, b.view(4)) is None, "two views of one memory are not one object"
    assert find(calls, a, b, c.view(torch.float32)) is None
    assert find(calls, a, b, c[:3]) is None
    assert find(calls, a, b, c.reshape(2, 2)) is None


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("kind", ["none", "number", "array", "nested", "sparse", "ellipsis"])
def test_what_is_no_known_tensor(position, kind):
    calls = _known.KnownCalls(99)
    tensors = [torch.zeros(4, dtype=torch.int32) for _ in range(3)]
    keep(calls, "known", *tensors)
    good = tensors[position]
    tensors[position] = {
        "none": None,
        "number": 4,
        "array": np.zeros(4, np.int32),
        "nested": torch.nested.as_nested_tensor(good.reshape(1, 4)),
        "sparse": good.to_sparse(),
        "ellipsis": ...,
    }[kind]
    assert find(calls, *tensors) is None
    tensors[position] = good
    assert find(calls, *tensors) == "known"


def test_a_nested_tensor_in_known_memory():
    """A guard that is shown one ends the process."""
    calls = _known.KnownCalls(99)
    a, b = torch.zeros((2, 4), dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    keep(calls, "known", a, b)
    sizes, strides = torch.tensor([[4], [4]]), torch.tensor([[1], [1]])
    nested = torch._nested_view_from_buffer(b, sizes, strides, torch.tensor([0, 4]))
    assert nested.is_nested
    assert nested.data_ptr() == b.data_ptr()
    assert find(calls, a, nested) is None
    assert find(calls, a, b) == "known"
