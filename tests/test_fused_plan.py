"""Plans of the fused family without a GPU: results through the reference, bytes of the launches."""

from __future__ import annotations

import ctypes
import inspect

import pytest
import torch

import cupy_nsa_meta
from cases import POISON
from cupy_nsa_meta import _fused_args, fused, fused_plan
from fake_device import set_stream
from fused_cases import BY_NAME, CASES, FUNCTIONS, Built, case, expected, lengths, random_cases
from fused_plans import PLANS, batch_of, plan_arguments, plan_of
from test_fused import MESSAGES

STATUS_AT = _fused_args.STATUS_AT


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_cases(item):
    wanted = expected(item)
    cupy_nsa_meta.last_status("cpu")
    built = Built(item)
    plan = plan_of(built)
    assert all((allocation == POISON).all() for allocation in built.allocations.values())
    plan.launch(**batch_of(built))
    built.check(wanted)
    assert plan.status(reset=False) == item.status
    assert plan.status() == item.status
    assert plan.status() == 0
    built.poison()
    if item.status:
        with pytest.raises(ValueError, match="expected"):
            plan.run(**batch_of(built))
    else:
        plan.run(**batch_of(built))
    built.check(wanted)
    assert plan.status() == 0
    assert cupy_nsa_meta.last_status("cpu") == 0  # a plan has a status of its own


@pytest.mark.parametrize("op", FUNCTIONS)
def test_random_batches(op):
    for item in random_cases(op, 40, seed=80, max_bs=60):
        built = Built(item)
        plan_of(built).launch(**batch_of(built))
        built.check(expected(item))


@pytest.mark.parametrize("name", MESSAGES)
def test_run_raises_by_status(name, monkeypatch):
    built = Built(BY_NAME[name])
    plan = plan_of(built)
    with pytest.raises(ValueError, match=MESSAGES[name]):
        plan.run(**batch_of(built))
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    with pytest.raises(ValueError, match=MESSAGES[name]):
        plan.launch(**batch_of(built))
    assert plan.status() == 0


# ---- One plan, many batches ---------------------------------------------------------------------


def sub_batches(op):
    """A case that a plan is made for, and smaller ones whose lengths lie in the same buffers."""
    whole = case(op, "whole", "", lengths(12, 0, 90, 1), lengths(12, 0, 6, 2) if "extend" in op else (),
                 next_n=3 if op == "verify" else 1, width=80, topk=20, pool_rows=30,
                 pool=range(12), pad_to=100 if op == "extend" else None)  # fmt: skip
    return whole, (12, 1, 0, 7, 12, 5)


@pytest.mark.parametrize("op", PLANS)
@pytest.mark.parametrize("is_total_given", [True, False])
def test_one_plan_serves_changing_batches(is_total_given, op):
    whole, sizes = sub_batches(op)
    built = Built(whole)
    plan = plan_of(built)
    for bs in sizes:
        built.poison()
        numbers = {"bs": bs}
        if "extend" in op:
            rows = sum(whole.extend[:bs])
            if is_total_given:
                numbers["total_len"] = rows
        if op == "extend":
            numbers["pad_to"] = rows + 3
        plan.launch(**numbers)
        direct = Built(whole)
        arguments = dict(direct.arguments) | {"bs": bs}
        if "extend" in op:
            arguments["total_len"] = rows
        if op == "extend":
            del arguments["bs"]
            arguments |= {"pad_to": rows + 3}
            for name in ("seq_lens", "extend_seq_lens"):
                arguments[name] = arguments[name][:bs]
        FUNCTIONS[op](**arguments)
        built.check(direct.allocations)
        assert plan.status() == 0
    cupy_nsa_meta.last_status("cpu")


def test_defaults_are_the_capacities():
    for op in PLANS:
        item = BY_NAME[f"{op}_basic_ps64"]
        built = Built(item)
        plan_of(built).run()
        built.check(expected(item))


def test_rows_from_the_device_are_bounded_by_the_capacity():
    item = BY_NAME["draft_extend_total_short"]
    built = Built(item)
    plan = plan_of(built)
    plan.launch()
    built.check(expected(item))
    assert plan.status() == 4
    with pytest.raises(ValueError, match=r"total_len: expected sum\(extend_seq_lens\) = 12, got 6"):
        plan.run()
    item = BY_NAME["draft_extend_total_long"]  # which bounds T
    built = Built(item)
    plan = plan_of(built)
    plan.run()
    built.check(expected(item))
    with pytest.raises(
        ValueError, match=r"total_len: expected sum\(extend_seq_lens\) = 12, got 15"
    ):
        plan.run(total_len=15)
    item = BY_NAME["draft_extend_extend_negative"]  # and another status is seen
    with pytest.raises(ValueError, match=r"extend_seq_lens\[1\]: expected >= 0, got -5"):
        plan_of(Built(item)).run()


@pytest.mark.parametrize("name", ["static", "static_broken", "static_total_8", "static_total_16"])
def test_a_static_promise_changes_no_result(name):
    item = BY_NAME[f"draft_extend_{name}"]
    built, plain = Built(item), Built(item)
    FUNCTIONS["draft_extend"](**plain.arguments | {"static_extend_len": False})
    plan = plan_of(built)
    plan.launch(total_len=item.rows)
    built.check(plain.allocations)
    assert plan.status() == item.status


# ---- Errors -------------------------------------------------------------------------------------

LAUNCH_ERRORS = {
    "bs_over": ("decode", {"bs": 5}, ValueError, "bs: expected an int <= 4, got 5"),
    "bs_negative": ("verify", {"bs": -1}, ValueError, "bs: expected an int >= 0, got -1"),
    "bs_type": ("decode", {"bs": 3.5}, TypeError, "bs: expected an int >= 0, got float"),
    "bs_list": ("decode", {"bs": [3]}, TypeError, "bs: expected an int >= 0, got list"),
    "total_of_decode": ("decode", {"total_len": 4}, TypeError, "total_len: expected None (plan_fused_dsa_decode"),
    "pad_of_verify": ("verify", {"pad_to": 4}, TypeError, "pad_to: expected None (plan_fused_dsa_target_verify"),
    "total_over": ("draft_extend", {"total_len": 12}, ValueError,
                   "total_len: expected <= 11 (max_total_len 11, bs 4 * max_extend_len 5), got 12"),
    "total_over_bs": ("draft_extend", {"bs": 1, "total_len": 6}, ValueError, "total_len: expected <= 5 (max_"),
    "total_type": ("extend", {"total_len": "5"}, TypeError, "total_len: expected an int >= 0, got str"),
    "pad_without_room": ("extend", {"pad_to": 5}, ValueError, "pad_to: expected None (a plan without max_pad_to), got 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCH_ERRORS)
@pytest.mark.parametrize("method", ["launch", "run"])
def test_launch_errors(method, name):
    op, numbers, error, message = LAUNCH_ERRORS[name]
    item = BY_NAME[f"{op}_basic_ps64"]
    built = Built(item)
    plan = plan_of(built)
    with pytest.raises(error) as caught:
        getattr(plan, method)(**numbers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((allocation == POISON).all() for allocation in built.allocations.values())
    plan.run()  # as good as before
    built.check(expected(item))


def test_pad_to_is_bounded():
    plan = plan_of(Built(BY_NAME["extend_padded"]))
    with pytest.raises(ValueError, match="pad_to: expected an int <= 9, got 10"):
        plan.launch(pad_to=10)
    with pytest.raises(ValueError, match="pad_to: expected an int >= 5, got 4"):
        plan.launch(total_len=5, pad_to=4)


PLAN_ERRORS = {
    "short": ("decode", {"max_bs": 50}, ValueError, "seq_lens: expected [>= 50] (bs), got [4]"),
    "rows": ("draft_extend", {"max_total_len": 50}, ValueError, "seqlens_expanded: expected [>= 50], got [16]"),
    "none": ("decode", {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k: expected a torch.Tensor, got None"),
    "seq_none": ("decode", {"seq_lens": None}, TypeError, "seq_lens: expected a torch.Tensor, got None"),
    "seq_type": ("extend", {"seq_lens": [1]}, TypeError, "seq_lens: expected a torch.Tensor"),
    "bs_type": ("decode", {"max_bs": 4.0}, TypeError, "max_bs: expected an int >= 0, got float"),
    "next_n": ("verify", {"next_n": 0}, ValueError, "next_n: expected an int >= 1, got 0"),
    "both": ("decode", {"real_page_size": 64}, TypeError, "physical_page_size, real_page_size: expected one"),
    "output": ("extend", {"cu_seqlens": None}, TypeError, "cu_seqlens: expected the name of an output"),
    "pad": ("extend", {"max_pad_to": 3}, ValueError, "max_pad_to: expected an int >= 11, got 3"),
    "static": ("draft_extend", {"static_extend_len": 2}, TypeError, "static_extend_len: expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAN_ERRORS)
def test_plan_errors(name):
    op, changes, error, message = PLAN_ERRORS[name]
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    with pytest.raises(error) as caught:
        PLANS[op](**plan_arguments(built) | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_are_those_of_the_functions():
    renamed = {"bs": "max_bs", "total_len": "max_total_len", "pad_to": "max_pad_to"}
    for op in ("decode", "verify", "draft_extend"):
        function = inspect.signature(FUNCTIONS[op]).parameters
        wanted = [renamed.get(n, n) for n in function if (op, n) != ("draft_extend", "total_len")]
        assert list(inspect.signature(PLANS[op]).parameters) == wanted
    missing = {renamed.get(n, n) for n in inspect.signature(FUNCTIONS["extend"]).parameters}
    missing -= set(inspect.signature(PLANS["extend"]).parameters)
    assert missing == set(fused.FusedOutputs._fields) - {"paged_mqa_ctx_lens_2d"}


# ---- Bytes of the launches ----------------------------------------------------------------------


def without_status(args):
    return args[:STATUS_AT] + args[STATUS_AT + 8 :]


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_a_launch_packs_what_the_function_packs(item, fake_device):
    built = Built(item)
    built.run()
    plan = plan_of(built)
    plan.launch(**batch_of(built))
    plan.launch(**batch_of(built))  # from what was kept
    (direct, direct_grid), (first, grid), (second, _) = fake_device.launched
    assert grid == direct_grid
    assert without_status(first) == without_status(direct)
    assert first == second
    assert int.from_bytes(first[STATUS_AT : STATUS_AT + 8], "little") == plan._status.data_ptr()


@pytest.mark.parametrize("op", PLANS)
def test_smaller_batches_pack_what_the_function_packs(op, fake_device):
    whole, sizes = sub_batches(op)
    built = Built(whole)
    plan = plan_of(built)
    for bs in sizes:
        if bs == 0:
            continue  # the function leaves out pointers that nothing reads
        fake_device.launched.clear()
        arguments = dict(built.arguments) | {"bs": bs}
        numbers = {"bs": bs}
        if "extend" in op:
            numbers["total_len"] = arguments["total_len"] = sum(whole.extend[:bs])
        if op == "extend":
            del arguments["bs"]
            numbers["pad_to"] = arguments["pad_to"] = sum(whole.extend[:bs]) + 3
            for name in ("seq_lens", "extend_seq_lens"):
                arguments[name] = arguments[name][:bs]
        FUNCTIONS[op](**arguments)
        plan.launch(**numbers)
        (direct, direct_grid), (ours, grid) = fake_device.launched
        assert grid == direct_grid
        assert without_status(ours) == without_status(direct)


class Unhashable(int):
    def __eq__(self, other):
        return int(self) == other


def test_a_number_that_cannot_be_kept_launches_nothing(fake_device):
    plan = plan_of(Built(BY_NAME["extend_basic_ps64"]))
    with pytest.raises(TypeError, match="unhashable"):
        plan.launch(Unhashable(1))
    assert fake_device.launched == []


def test_large_batches_bring_their_scratch(fake_device):
    bs = _fused_args.ONE_LAUNCH_MAX_BS + 1
    item = case("decode", "large", "", [1] * bs, tables=(), pool_rows=1)
    built = Built(item)
    plan = plan_of(built)
    plan.launch()
    plan.launch(100)
    (large, in_order), (small, one) = fake_device.launched
    assert [name for name, _ in in_order] == ["fused_tiles", "fused"]
    assert [name for name, _ in one] == ["fused_direct_uniform"]
    at = _fused_args.LAYOUT.at("tile_sums")
    assert int.from_bytes(large[at : at + 8], "little") == plan._scratch.data_ptr()
    assert plan._scratch.numel() == _fused_args.NUM_TILE_SUMS * 65
    assert int.from_bytes(small[at : at + 8], "little") == 0


def test_rows_from_the_device_are_a_flag(fake_device):
    built = Built(BY_NAME["draft_extend_basic_ps64"])
    plan = plan_of(built)
    plan.launch(total_len=11)
    plan.launch()
    at = _fused_args.LAYOUT.at("flags")
    (given, _), (bounded, _) = fake_device.launched
    flags = [int.from_bytes(args[at : at + 4], "little") for args in (given, bounded)]
    assert flags[1] == flags[0] | _fused_args.TOTAL_IS_CAPACITY
    assert flags[1] != flags[0]
    assert given[:at] + given[at + 4 :] == bounded[:at] + bounded[at + 4 :]


def test_a_launch_reads_no_tensor(fake_device, monkeypatch):
    plans = [plan_of(Built(BY_NAME[f"{op}_basic_ps64"])) for op in PLANS]
    for name in ("data_ptr", "size", "stride", "numel", "dim"):
        monkeypatch.setattr(torch.Tensor, name, None, raising=False)
    for plan in plans:
        for bs in (4, 3, 4):
            plan.launch(bs)
    assert len(fake_device.launched) == 12


def test_a_plan_that_pads_to_nothing():
    item = case("extend", "empty", "", [5, 6], (0, 0), pad_to=0, width=16)
    built = Built(item)
    plan_of(built).launch(pad_to=0)
    built.check(expected(item))


def test_few_sizes_are_kept(fake_device, monkeypatch):
    monkeypatch.setattr(fused_plan, "MAX_REMEMBERED", 2)
    plan = plan_of(Built(BY_NAME["decode_basic_ps64"]))
    for bs in (1, 2, 3, 4, 1):
        plan.launch(bs)
        assert 1 <= len(plan._packed) <= 2


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_launch_in_a_compiled_region_is_not_half_traced(op, fake_device, monkeypatch):
    """What Dynamo (torch 2.11) makes of named tuples behind a graph break ends in an IndexError."""
    set_stream(monkeypatch, ctypes.CDLL(None).abs)  # a function that it does not know
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    plan, batch = plan_of(built), batch_of(built)

    def step(values):
        doubled = values * 2
        plan.launch(**batch)
        return doubled + 1

    values = torch.arange(3)
    function = torch.compile(step, backend="eager")
    for launches in range(1, 5):
        assert torch.equal(function(values), values * 2 + 1)
        assert len(fake_device.launched) == launches
