"""Hostile input, kind by kind (``hostile.py``), and that the table would see what it is there for."""

from __future__ import annotations

import pytest
import torch

import hostile
from cupy_nsa_meta import _form, _known

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # torch's, about what kinds are made of


@pytest.mark.parametrize("surface", hostile.SURFACES)
def test_every_kind(surface):
    attempts, failures = 0, []
    for kind in hostile.kinds_of(surface, "cpu"):
        made, wrong = hostile.run_case(kind, surface, "cpu")
        attempts += made
        failures += wrong
    assert not failures, "\n".join(failures)
    assert attempts or surface == "warmup"  # which says first that there is no GPU


@pytest.mark.parametrize("surface", ["cuda", "async", "decode", "verify", "draft_extend", "extend"])
def test_every_kind_where_the_call_is_known(surface, fake_device, monkeypatch):
    """Calls on tensors that were met before are looked up before they are checked."""
    kept = []
    keep, find = _known.KnownCalls.keep, _form.find
    monkeypatch.setattr(
        _known.KnownCalls, "keep", lambda calls, *entry: kept.append(entry) or keep(calls, *entry)
    )

    def noted(*arguments):
        form = find(*arguments)
        if form is not None:
            kept.append(form)
        return form

    monkeypatch.setattr(_form, "find", noted)
    attempts, failures = 0, []
    for kind in hostile.kinds_of(surface, "cpu"):
        made, wrong = hostile.run_case(kind, surface, "cpu", calls_before=3)
        attempts += made
        failures += wrong
    assert not failures, "\n".join(failures)
    assert attempts > 40
    assert len(kept) > attempts // 2, "the good calls before are known"


@pytest.mark.parametrize("kind", hostile.DEVICE_KINDS)
@pytest.mark.parametrize("surface", hostile.device_surfaces("cpu"))
def test_what_only_the_device_knows(surface, kind):
    assert hostile.run_device_case(kind, surface, "cpu") == []


@pytest.mark.parametrize("name", hostile.FUSED_DEVICE_KINDS)
def test_batches_of_the_fused_family_with_a_status(name):
    assert hostile.run_fused_device_case(name, "cpu") == []


def test_there_are_enough_kinds_and_each_applies_somewhere():
    tried = {kind for device in ("cpu", "cuda") for kind, surface in applicable(device)}
    assert tried == set(hostile.KINDS)
    assert len(hostile.KINDS) >= 40
    assert len(hostile.DEVICE_KINDS) + len(hostile.FUSED_DEVICE_KINDS) >= 15


def applicable(device):
    """Pairs of kinds and functions, by the roles of arguments; their tensors are on the CPU here."""
    for surface in hostile.SURFACES:
        roles = hostile.SURFACES[surface]("cpu")
        for name, kind in hostile.KINDS.items():
            if kind.device in ("", device) and (
                not kind.surfaces or hostile.re.fullmatch(kind.surfaces, surface)
            ):
                targets = ("",) if kind.role == "call" else getattr(roles, kind.role)
                if any(kind.change(roles, target) is not None for target in targets):
                    yield name, surface


def test_every_public_function_is_there():
    import cupy_nsa_meta

    tried = {hostile.SURFACES[name]("cpu").function for name in hostile.SURFACES}
    without_arguments = {"get_kernel_info", "is_cuda_kernel_available"}
    for name in cupy_nsa_meta.__all__:
        function = getattr(cupy_nsa_meta, name)
        if callable(function) and not isinstance(function, type):
            assert function in tried or name in without_arguments, name


LAX = {
    # name: (function, what has to be said about it)
    "no_error": (lambda seq_lens, out: None, "expected TypeError, got no error"),
    "another_type": (lambda seq_lens, out: int("x"), "expected TypeError, got ValueError"),
    "another_message": (lambda seq_lens, out: len(5), "expected the message"),
    "two_lines": (lambda seq_lens, out: fail("seq_lens: expected this,\ngot that"), "expected one line"),
    "no_name": (lambda seq_lens, out: fail("seq_lens, expected this, got that"), "expected 'name: "),
    "writes": (lambda seq_lens, out: (out.zero_(), fail("seq_lens: expected this, got that")), "wrote to out"),
    "writes_behind": (
        lambda seq_lens, out: (out.as_strided((1,), (1,), out.storage_offset() + 9).zero_(),
                               fail("seq_lens: expected this, got that")),
        "wrote to out"),
}  # fmt: skip


def fail(message):
    raise TypeError(message)


@pytest.mark.parametrize("name", LAX)
def test_what_is_wrong_is_seen(name):
    function, said = LAX[name]
    arguments = {"seq_lens": torch.tensor([1]), "out": hostile._poisoned(8, "cpu")}
    message = "seq_lens.*expected" if name != "two_lines" else "(?s)seq_lens.*got"
    wrong = hostile.attempt(function, arguments, TypeError, message)
    assert wrong is not None
    assert wrong.startswith(said)
    right = hostile.attempt(
        lambda seq_lens, out: fail("seq_lens: expected this, got that"),
        arguments,
        TypeError,
        "got that",
    )
    assert right is None


@pytest.mark.gpu
def test_everything_on_a_gpu():
    found = hostile.run("cuda")
    assert found["failures"] == []
    assert found["kinds"] >= 40
    assert found["cases"] > 3000
    torch.cuda.synchronize()
