"""The bridge into SGLang: on a stand-in, and on SGLang's real files, without a GPU."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys

import pytest
import torch

import cupy_nsa_meta
import sglang_files
import sglang_oracle
from cupy_nsa_meta import _module, dispatch
from cupy_nsa_meta.integrations import sglang as bridge
from fused_cases import BY_NAME, CASES, FUNCTIONS, Built, expected, random_cases
from sglang_files import KPOOL, MANAGER, METADATA, NAMES, PAD, VERSION
from test_fused import SIGNATURES

EARLY, LATE = (f"sglang.srt.layers.attention.{name}" for name in ("early", "late"))
OURS = dict(zip(NAMES, list(FUNCTIONS.values())[:3], strict=True)) | {
    "seqlens_expand_triton": cupy_nsa_meta.seqlens_expand
}
PARAMETERS = dict(zip(NAMES, list(SIGNATURES.values())[:3], strict=True)) | {
    "seqlens_expand_triton": "extend_seq_lens seq_lens total_len max_q_len"
}
PARAMETERS = {name: ", ".join(names.split()) for name, names in PARAMETERS.items()}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("CUPY_NSA_META_SGLANG", raising=False)
    with sglang_files.no_modules():
        yield
        bridge.uninstall()
        bridge._last_originals.clear()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    source = sglang_files.write_stand_in(tmp_path / "stand_in", PARAMETERS)
    monkeypatch.syspath_prepend(str(source))
    return source


def modules(*names):
    return [importlib.import_module(name) for name in names]


# ---- On a stand-in ------------------------------------------------------------------------------


def test_install_and_uninstall(stand_in):
    early, metadata = modules(EARLY, METADATA)
    theirs = {name: getattr(early, name) for name in OURS}
    bridge.install()
    late, pad, kpool = modules(LATE, PAD, KPOOL)
    for name, ours in OURS.items():
        assert getattr(early, name) is ours
        assert getattr(late, name) is ours
        assert getattr(pad if name == "seqlens_expand_triton" else metadata, name) is ours
    assert kpool.fused_dsa_decode_metadata_kpool() == "sglang"
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    assert early.Backend().expand(lengths, torch.tensor([5, 4]), 3, 2).tolist() == [4, 5, 4]
    bridge.install()  # again: nothing changes
    assert early.fused_dsa_decode_metadata is OURS["fused_dsa_decode_metadata"]
    bridge.uninstall()
    for module in (early, late):
        assert {name: getattr(module, name) for name in OURS} == theirs
    bridge.uninstall()
    assert early.fused_dsa_decode_metadata is theirs["fused_dsa_decode_metadata"]


def test_a_holder_by_another_name_and_one_imported_between_two_installs(stand_in):
    (metadata,) = modules(METADATA)
    theirs = metadata.fused_dsa_decode_metadata
    (early,) = modules(EARLY)
    early.decode = theirs
    bridge.install()
    assert early.decode is OURS["fused_dsa_decode_metadata"]
    early.again = theirs  # as from a cache that install() did not see
    bridge.install()
    assert early.again is OURS["fused_dsa_decode_metadata"]
    bridge.uninstall()
    assert early.decode is early.again is theirs


def test_status(stand_in):
    status = bridge.status()
    assert status["installed"] is False
    assert status["sglang_version"] is None
    assert set(status["functions"].values()) == {None}
    (early,) = modules(EARLY)
    before = early.Backend()
    assert set(bridge.status()["functions"].values()) == {"sglang"}
    assert bridge.status()["built_before"] == []

    bridge.install()
    between = early.Backend()
    status = bridge.status()
    assert status["installed"] is True
    assert status["sglang_version"] == VERSION
    assert set(status["functions"].values()) == {"cupy_nsa_meta"}
    assert status["modules"]["fused_dsa_decode_metadata"] == [METADATA, EARLY]
    assert status["modules"]["seqlens_expand_triton"] == [PAD, EARLY]
    assert status["built_before"] == [f"Backend at {id(before):#x}: _fused_decode_metadata"]

    bridge.uninstall()
    status = bridge.status()
    assert status["installed"] is False
    assert set(status["functions"].values()) == {"sglang"}
    assert not any(status["modules"].values())
    assert status["built_before"] == [f"Backend at {id(between):#x}: _fused_decode_metadata"]


def test_status_tells_what_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "_cuda_reasons", {0: None, 1: "no NVRTC", -1: "no device"})
    assert bridge.status()["devices"] == {"cuda:0": "CUDA C++", "cuda:1": "no NVRTC"}


def test_without_sglang(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match=rf"pip install sglang=={VERSION}"):
        bridge.install()
    assert bridge.status()["installed"] is False


def test_an_unknown_version_is_refused_unless_forced(stand_in, monkeypatch):
    modules("sglang")[0].__version__ = "0.9.1"
    with pytest.raises(RuntimeError, match=rf"expected version {VERSION}, got 0\.9\.1; .*force"):
        bridge.install()
    assert bridge.status()["installed"] is False
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", "1")
    with pytest.raises(RuntimeError, match="expected version"):
        bridge.plugin()
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", "force")
    bridge.plugin()
    assert bridge.status()["installed"] is True
    bridge.uninstall()
    bridge.install(force=True)
    assert bridge.status()["installed"] is True


@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_plugin_does_nothing_unasked(value, stand_in, monkeypatch):
    if value is not None:
        monkeypatch.setenv("CUPY_NSA_META_SGLANG", value)
    bridge.plugin()
    assert bridge.status()["installed"] is False
    assert METADATA not in sys.modules


def test_the_plugin_names_a_bad_value(monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", "yes")
    with pytest.raises(
        ValueError, match="CUPY_NSA_META_SGLANG: expected one of 0, 1, force, got 'yes'"
    ):
        bridge.plugin()


CHANGED = {
    "renamed": (PARAMETERS[NAMES[0]].replace("max_len", "width"), "got .*width"),
    "added": (PARAMETERS[NAMES[0]] + ", out_of_nowhere", "got .*out_of_nowhere"),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("force", [False, True])
def test_other_parameters_are_refused(force, name, tmp_path, monkeypatch):
    parameters, message = CHANGED[name]
    source = sglang_files.write_stand_in(tmp_path / "sgl", PARAMETERS | {NAMES[0]: parameters})
    monkeypatch.syspath_prepend(str(source))
    with pytest.raises(RuntimeError, match=f"{NAMES[0]}: expected the parameters .*{message}"):
        bridge.install(force=force)
    assert set(bridge.status()["functions"].values()) <= {"sglang", None}


def test_the_older_name_of_the_page_size_is_taken(tmp_path, monkeypatch):
    older = {n: p.replace("physical_page_size", "real_page_size") for n, p in PARAMETERS.items()}
    monkeypatch.syspath_prepend(str(sglang_files.write_stand_in(tmp_path / "sgl", older)))
    bridge.install()
    assert bridge.status()["installed"] is True


def test_a_missing_function_is_named(stand_in):
    del modules(METADATA)[0].fused_dsa_target_verify_metadata
    with pytest.raises(
        ImportError, match=f"expected fused_dsa_target_verify_metadata in {METADATA}"
    ):
        bridge.install(force=True)
    assert modules(PAD)[0].seqlens_expand_triton is not OURS["seqlens_expand_triton"]


def test_warm_up(stand_in, monkeypatch):
    """Warmed up where torch sees a device; refused, with nothing replaced, without the kernels."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "warmup", lambda: calls.append("warmup"))

    def no_cupy():
        raise _module.KernelUnavailableError("CuPy cannot be imported")

    monkeypatch.setattr(_module, "import_cupy", no_cupy)
    with pytest.raises(RuntimeError, match="CuPy cannot be imported"):
        bridge.install()
    assert bridge.status()["installed"] is False
    monkeypatch.setattr(_module, "import_cupy", lambda: None)
    bridge.install(warm=False)
    assert not calls
    bridge.install()
    assert calls == ["warmup"]
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", "1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    bridge.plugin()
    assert calls == ["warmup"]  # no memory of a GPU that the worker will not use


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_spawned_worker_of_the_stand_in(value, stand_in, tmp_path, monkeypatch):
    bridge.install()  # which a spawned process does not see
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", value)
    entry_points = sglang_files.write_entry_points(tmp_path / "site")
    status = sglang_files.run_worker(stand_in, entry_points, is_stand_in=True)
    check_worker(status, value == "1", [METADATA, LATE], [PAD, LATE])


def check_worker(status, installed, decode_modules, expand_modules):
    assert status["installed"] is installed
    assert status["sglang_version"] == VERSION
    assert set(status["functions"].values()) == {"cupy_nsa_meta" if installed else "sglang"}
    assert status["modules"]["fused_dsa_decode_metadata"] == (decode_modules if installed else [])
    assert status["modules"]["seqlens_expand_triton"] == (expand_modules if installed else [])
    assert status["built_before"] == []
    assert status["used_cuda"] is False


# ---- On the real files --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return sglang_files.find(tmp_path_factory.mktemp("sglang"))


@pytest.fixture
def real(source):
    with sglang_files.in_modules(source):
        yield source


@pytest.mark.sglang
@pytest.mark.parametrize("value", ["0", "1"])
def test_a_spawned_worker(value, source, tmp_path, monkeypatch):
    """SGLang's own loader finds the entry point and installs."""
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", value)
    entry_points = sglang_files.write_entry_points(tmp_path / "site")
    status = sglang_files.run_worker(source, entry_points, is_stand_in=False)
    check_worker(status, value == "1", [METADATA, MANAGER], [PAD])


@pytest.mark.sglang
def test_a_real_backend_takes_ours(real):
    manager, kpool = modules(MANAGER, KPOOL)

    class Backend(manager.DSAMetadataManagementMixin):
        dsa_index_kpool, physical_page_size, dsa_index_topk = 1, 64, 2048

    old, new = Backend(), Backend()
    old._init_kpool_metadata_fusion()
    theirs, theirs_kpool = old._fused_decode_metadata, kpool.fused_dsa_decode_metadata_kpool
    bridge.install()
    new._init_kpool_metadata_fusion()
    held = ("_fused_decode_metadata", "_fused_verify_metadata", "_fused_draft_extend_metadata")
    assert [getattr(new, name) for name in held] == list(OURS.values())[:3]
    assert bridge.status()["built_before"] == [
        f"{Backend.__qualname__} at {id(old):#x}: {', '.join(sorted(held))}"
    ]
    assert kpool.fused_dsa_decode_metadata_kpool is theirs_kpool
    for name, op in zip(held, sglang_oracle.NAMES, strict=True):
        item = BY_NAME[f"{op}_basic_ps64"]
        built = Built(item)
        getattr(new, name)(**built.arguments)
        built.check(expected(item))
    bridge.uninstall()
    new._init_kpool_metadata_fusion()
    assert new._fused_decode_metadata is theirs


@pytest.mark.sglang
def test_signatures_begin_with_sglangs(real):
    for name, ours in OURS.items():
        module = PAD if name == "seqlens_expand_triton" else METADATA
        theirs = inspect.signature(getattr(modules(module)[0], name)).parameters
        parameters = inspect.signature(ours).parameters
        for (their_name, their), (our_name, our) in zip(
            theirs.items(), parameters.items(), strict=False
        ):
            assert their_name == our_name
            if their.default is not their.empty:
                assert their.default == our.default, f"{name}: {our_name}"
            assert our.kind is our.POSITIONAL_OR_KEYWORD


HELD_AS = {
    "_fused_decode_metadata": NAMES[0],
    "_fused_verify_metadata": NAMES[1],
    "_fused_draft_extend_metadata": NAMES[2],
    "seqlens_expand_triton": "seqlens_expand_triton",
}


@pytest.mark.sglang
def test_every_call_site_binds(source):
    """The arguments of each call in SGLang's backend fit the parameters of ours."""
    counts = dict.fromkeys(OURS, 0)
    for file in ("dsa_backend.py", "dsa/dsa_backend_mtp_precompute.py"):
        tree = ast.parse((source / "sglang/srt/layers/attention" / file).read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name not in HELD_AS:
                continue
            assert not any(isinstance(argument, ast.Starred) for argument in node.args)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert None not in keywords
            bound = inspect.signature(OURS[HELD_AS[name]]).bind(*node.args, **keywords)
            required = PARAMETERS[HELD_AS[name]].split(", ")
            optional = {"paged_mqa_ctx_lens_2d", "static_extend_len"}
            assert set(required) - optional <= set(bound.arguments), f"{file}:{node.lineno}"
            counts[HELD_AS[name]] += 1
    assert list(counts.values()) == [2, 2, 1, 5]


# ---- Their kernels, in Triton's interpreter -----------------------------------------------------


@pytest.fixture
def interpreted(real, monkeypatch):
    """SGLang's kernels on CPU tensors."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1; on a GPU, test_gpu_sglang.py runs the same kernels")
    builder = interpreter.InterpreterBuilder

    # Broadcasting a comparison of scalars, the interpreter makes a mask of integers.
    def with_boolean_mask(name, position):
        original = getattr(builder, name)

        def access(self, *arguments):
            mask = arguments[position]
            mask.data = mask.data.astype(bool)
            return original(self, *arguments)

        monkeypatch.setattr(builder, name, access)

    with_boolean_mask("create_masked_load", 1)
    with_boolean_mask("create_masked_store", 2)


def interpret(function, arguments):
    """Call a launcher that asserts CUDA tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        return function(**arguments)


COMPARED = [item for item in CASES if sglang_oracle.is_defined(item)]


@pytest.mark.sglang
@pytest.mark.parametrize("item", COMPARED, ids=lambda item: item.name)
def test_sglangs_kernels_agree(item, interpreted):
    theirs = getattr(modules(METADATA)[0], sglang_oracle.NAMES[item.op])
    sglang_oracle.check(item, theirs, "cpu", interpret)


@pytest.mark.sglang
@pytest.mark.parametrize("op", sglang_oracle.NAMES)
def test_sglangs_kernels_agree_on_random_batches(op, interpreted):
    theirs = getattr(modules(METADATA)[0], sglang_oracle.NAMES[op])
    items = [item for item in random_cases(op, 200, seed=70, max_bs=20, max_width=300)
             if sglang_oracle.is_defined(item)]  # fmt: skip
    assert len(items) >= 20
    for item in items[:20]:
        sglang_oracle.check(item, theirs, "cpu", interpret)


@pytest.mark.sglang
def test_the_comparison_sees_a_difference(interpreted):
    item = BY_NAME["draft_extend_basic_ps64"]
    theirs = modules(METADATA)[0].fused_dsa_draft_extend_metadata
    for name, at in {
        "cache_seqlens": -1, "cu_seqlens_k": 0, "seqlens_expanded": -1, "dsa_cache_seqlens": 0,
        "dsa_cu_seqlens_k": -1, "page_table_1": (10, 512), "real_page_table": (10, 8),
    }.items():  # fmt: skip

        def wrong(function, arguments, name=name, at=at):
            interpret(function, arguments)
            arguments[name][at] += 1

        with pytest.raises(AssertionError, match=f"{name}: 1 elements differ"):
            sglang_oracle.check(item, theirs, "cpu", wrong)


@pytest.mark.sglang
def test_sglangs_seqlens_expand_agrees(interpreted):
    theirs = modules(PAD)[0].seqlens_expand_triton
    items = [item for item in CASES if sglang_oracle.has_expansion(item)]
    assert len(items) > 10
    for item in items:
        sglang_oracle.check_expansion(item, theirs, "cpu", interpret)
