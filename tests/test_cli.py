"""python -m cupy_nsa_meta: what it says, in text and JSON, its exit status, and that it finds faults."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cupy_nsa_meta
from cupy_nsa_meta import __main__ as command_line
from cupy_nsa_meta import _module, dispatch, reference, reference_fused
from cupy_nsa_meta.cli import batches, bench, demo, doctor, selftest, terminal
from cupy_nsa_meta.cli.batches import Batch
from cupy_nsa_meta.cli.doctor import Finding

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ESCAPE = "\x1b["


def call(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of a command line, in this process."""
    try:
        status = command_line.main(argv)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cupy_nsa_meta", *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def only(findings) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def on_gpu(monkeypatch):
    """As if torch saw one H200."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_cuda_reasons", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    _module.import_cupy.cache_clear()
    return monkeypatch


# ---- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "COMMAND"),
        (("doktor",), "invalid choice: 'doktor'"),
        (("doctor", "--jsn"), "unrecognized arguments: --jsn"),
        (("selftest", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("demo", "--extend", "3,x"), "expected integers between commas, got '3,x'"),
    ],
)
def test_bad_options(capsys, argv, message):
    status, out, err = call(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err


def test_the_version_and_the_help(capsys):
    assert call(capsys, "--version") == (0, f"{cupy_nsa_meta.__version__}\n", "")
    status, out, _ = call(capsys, "--help")
    assert status == 0
    for name in ("doctor", "selftest", "demo", "bench"):
        assert name in out
    assert "0 fine; 1 something does not work; 2 bad options" in " ".join(out.split())


def test_an_interrupt_and_a_closed_pipe(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    status, _, err = call(capsys, "demo")
    assert (status, err) == (130, "cupy_nsa_meta: interrupted\n")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "cupy_nsa_meta", "demo"],
            cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == ""


# ---- Colours ------------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert terminal.has_colours(FakeTerminal())
    assert terminal.Painter(FakeTerminal())("x", "red") == "\x1b[31mx\x1b[0m"
    assert terminal.Painter(io.StringIO())("x", "red") == "x"
    monkeypatch.setenv("NO_COLOR", "")  # empty counts as not set
    assert terminal.has_colours(FakeTerminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colours(FakeTerminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.has_colours(FakeTerminal())


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_real_terminal(no_color):
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": no_color}
    with os.fdopen(ours, "rb", buffering=0) as reader:
        child = subprocess.Popen(
            [sys.executable, "-m", "cupy_nsa_meta", "demo"], stdout=theirs, env=environ, cwd=ROOT
        )
        os.close(theirs)
        seen = b""
        try:
            while part := reader.read(4096):
                seen += part
        except OSError:  # the end of a pseudo-terminal
            pass
        assert child.wait(120) == 0
    assert b"seqlens_expanded" in seen
    assert (ESCAPE.encode() in seen) == (no_color == "")


def test_columns_and_lines():
    assert terminal.columns([("a", "1"), ("bcd", "22")], right=(1,)) == ["a     1", "bcd  22"]
    assert terminal.one_line("a\n  b\tc") == "a b c"
    assert terminal.one_line("x" * 700) == "x" * 600 + " ..."


# ---- doctor -------------------------------------------------------------------------------------

NAMES = {name for name, _ in doctor.CHECKS} - {"kernels", "pinned memory"}


def test_the_doctor_as_json(capsys):
    status, out, err = call(capsys, "doctor", "--json")
    document = json.loads(out)
    assert err == ""
    assert set(document) == {"command", "version", "ok", "checks"}
    assert document["command"] == "doctor"
    assert document["version"] == cupy_nsa_meta.__version__
    states = set()
    for check in document["checks"]:
        assert set(check) == {"name", "state", "found", "remedy", "data"}
        states.add(check["state"])
    assert states <= {"ok", "note", "fail"}
    assert document["ok"] == ("fail" not in states)
    assert status == (0 if document["ok"] else 1)
    names = {check["name"] for check in document["checks"]}
    assert names >= NAMES | {f"kernel {stem}" for stem in _module.KERNELS}


def test_the_doctor_without_a_gpu(on_cpu, capsys):
    status, out, _ = call(capsys, "doctor")
    assert status == 1
    assert ESCAPE not in out
    lines = out.splitlines()
    assert lines[-1] == "does not work: cuda backend"
    assert any(line.startswith("fail  cuda backend") and "no CUDA device" in line for line in lines)
    assert any(line.startswith("ok    python backend") for line in lines)
    assert any(line.startswith("ok    kernel fused") and "no GPU" in line for line in lines)
    assert any("python for cpu tensors" in line for line in lines)


def test_the_doctor_by_a_process():
    done = run("doctor", "--json", CUPY_NSA_META_BAKEND="cuda", CUPY_NSA_META_SGLANG="maybe")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 1
    assert done.stderr == ""
    found = [(check["state"], check["found"]) for check in checks]
    assert ("note", "CUPY_NSA_META_BAKEND is not a variable of this package") in found
    assert any(
        state == "fail" and text.startswith("CUPY_NSA_META_SGLANG: expected one of")
        for state, text in found
    )


def test_a_healthy_machine(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (("python", doctor.check_python),))
    status, out, _ = call(capsys, "doctor")
    assert status == 0
    assert out.splitlines()[-1] == "everything works"


def test_a_check_that_fails_itself_is_a_finding(capsys, monkeypatch):
    def broken():
        yield Finding("first", "ok", "seen before")
        raise OSError("no such\nthing")

    monkeypatch.setattr(doctor, "CHECKS", (("broken", broken), ("python", doctor.check_python)))
    status, out, _ = call(capsys, "doctor")
    assert status == 1
    assert "the check itself failed: OSError: no such thing" in out
    assert "python" in out, "the others go on"


def test_cupy_is_absent(on_cpu):
    on_cpu.setitem(sys.modules, "cupy", None)
    finding = only(doctor.check_cupy())
    assert finding.state == "note"
    assert "without a GPU nothing needs it" in finding.remedy
    assert only(doctor.check_nvrtc()).state == "note"
    assert list(doctor.check_kernels()) == []


def test_cupy_is_absent_on_a_gpu(on_gpu):
    on_gpu.setitem(sys.modules, "cupy", None)
    finding = only(doctor.check_cupy())
    assert finding.state == "fail"
    assert "CuPy cannot be imported" in finding.found
    assert "pip install 'cupy-nsa-meta[cuda12]'" in finding.remedy
    assert only(doctor.check_nvrtc()).state == "fail"


def test_several_cupy_distributions(monkeypatch):
    both = ["cupy-cuda12x", "cupy-cuda13x"]
    monkeypatch.setattr(_module, "_cupy_distributions", lambda: both)
    finding = only(doctor.check_cupy())
    assert finding.state == "fail"
    assert "cupy-cuda12x, cupy-cuda13x" in finding.found
    assert finding.remedy == "pip uninstall cupy-cuda12x cupy-cuda13x, then install one"


@pytest.mark.parametrize(("version", "state"), [("13.6.0", "fail"), ("14.0.1", "ok")])
def test_an_old_cupy(on_gpu, version, state):
    on_gpu.setitem(sys.modules, "cupy", SimpleNamespace(__version__=version))
    assert only(doctor.check_cupy()).state == state


def test_nvrtc_is_missing(on_gpu):
    def versions():
        return {"cupy_version": "14.2.0", "nvrtc_version": None}

    on_gpu.setattr(_module, "versions", versions)
    finding = only(doctor.check_nvrtc())
    assert finding.state == "fail"
    assert "needs nvidia-cuda-nvrtc (for CUDA 12 nvidia-cuda-nvrtc-cu12)" in finding.remedy


def test_nvrtc_and_the_architecture(on_gpu):
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    finding = only(doctor.check_nvrtc())
    assert finding.state == "ok"
    assert "sm_90 of the GPU among them" in finding.found
    on_gpu.setattr(nvrtc, "getSupportedArchs", lambda: (75, 80))
    finding = only(doctor.check_nvrtc())
    assert finding.state == "note"
    assert "sm_75 to sm_80; sm_90 of the GPU is not among them" in finding.found


@pytest.mark.parametrize(
    ("known", "nvrtc", "state"),
    [((13, 0), "13.0", "ok"), ((12, 4), "12.9", "ok"), ((12, 9), "13.0", "fail"),
     ((11, 8), None, "fail"), (None, "12.9", "fail")],
)  # fmt: skip
def test_the_driver(on_gpu, known, nvrtc, state):
    on_gpu.setattr(_module, "driver_version", lambda: known)
    on_gpu.setattr(_module, "versions", lambda: {"nvrtc_version": nvrtc})
    finding = only(doctor.check_driver())
    assert finding.state == state
    assert (finding.remedy is None) == (state == "ok")


@pytest.mark.parametrize(
    ("capability", "nvrtc", "state"),
    [
        ((9, 0), "13.0", "ok"),
        ((7, 0), "12.9", "ok"),
        ((7, 0), "13.0", "fail"),
        ((6, 1), "12.9", "fail"),
    ],
)
def test_the_compute_capability(on_gpu, capability, nvrtc, state):
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    on_gpu.setattr(_module, "versions", lambda: {"nvrtc_version": nvrtc})
    finding = only(doctor.check_gpu())
    assert finding.state == state
    assert finding.found == f"cuda:0 NVIDIA H200, sm_{capability[0]}{capability[1]}, current"


def test_the_kernel_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert only(doctor.check_cache()).state == "ok"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "new" / "folder"))
    assert only(doctor.check_cache()).found.endswith("can be made")
    assert not (tmp_path / "new").exists(), "the doctor leaves nothing behind"
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "folder"))
    finding = only(doctor.check_cache())
    assert finding.state == "fail"
    assert "cannot be written" in finding.found
    assert "CUPY_CACHE_DIR" in finding.remedy
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert only(doctor.check_cache()).state == "note"


def test_a_kernel_that_does_not_compile(on_cpu):
    pytest.importorskip("cupy")
    on_cpu.setattr(_module, "source", lambda stem: "#error planted\n")
    for finding in doctor.check_kernels():
        assert finding.state == "fail"
        assert "planted" in finding.found


def test_a_process_that_cannot_load_a_kernel(on_gpu):
    """Without a GPU the child of the doctor fails, which is told by its last line."""
    on_gpu.setattr(_module, "versions", lambda: {"nvrtc_version": "12.9"})
    on_gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = list(doctor.check_kernels())
    assert [finding.state for finding in findings] == ["fail"] * len(_module.KERNELS)
    assert "KernelUnavailableError" in findings[0].found


def test_the_sources(monkeypatch, tmp_path):
    assert only(doctor.check_sources()).state == "ok"
    (tmp_path / "fused.cu").touch()
    monkeypatch.setattr(_module, "source_dir", lambda: tmp_path)
    finding = only(doctor.check_sources())
    assert finding.state == "fail"
    assert finding.found.endswith("lacks draft_extend")


def test_a_wrong_python_backend(monkeypatch):
    monkeypatch.setattr(cupy_nsa_meta, "fill_draft_extend_metadata_python", lambda *_: 5)
    finding = only(doctor.check_python_backend())
    assert finding.state == "fail"
    assert "expected [5, [8, 9, 10, 3, 4], [8, 9, 9, 3, 4]]" in finding.found


def test_a_backend_that_was_asked_for_and_cannot_run(on_cpu):
    on_cpu.setenv("CUPY_NSA_META_BACKEND", "cuda")
    finding = only(doctor.check_choice())
    assert finding.state == "fail"
    assert "CUPY_NSA_META_BACKEND=cuda cannot run" in finding.found
    on_cpu.setenv("CUPY_NSA_META_BACKEND", "python")
    assert only(doctor.check_choice()).data == {"cpu": "python"}


def test_the_variables_in_force(monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
    monkeypatch.setenv("CUPY_NSA_META_DEBUGSYNC", "1")
    monkeypatch.setenv("CUPY_NSA_META_XYZZY_PLUGH", "1")
    first, *others = doctor.check_variables()
    assert "CUPY_NSA_META_GRAPH_CACHE=0" in first.found
    assert first.data["CUPY_NSA_META_GRAPH_CACHE"] == "0"
    remedies = {finding.found.split()[0]: finding.remedy for finding in others}
    assert remedies["CUPY_NSA_META_DEBUGSYNC"] == "did you mean CUPY_NSA_META_DEBUG_SYNC?"
    assert "CUPY_NSA_META_XYZZY_PLUGH" in remedies


@pytest.mark.parametrize(
    ("version", "wanted", "entry", "state", "text"),
    [
        (None, "0", False, "ok", "not installed"),
        (None, "1", False, "note", "not installed"),
        ("0.5.23", "0", True, "ok", "keeps its own functions"),
        ("0.5.23", "1", True, "ok", "the plugin installs"),
        ("0.5.23", "1", False, "fail", "entry point is not installed"),
        ("9.9.9", "1", True, "fail", "is known"),
        ("9.9.9", "force", True, "ok", "the plugin installs"),
    ],
)
def test_sglang(monkeypatch, version, wanted, entry, state, text):
    def version_of(name):
        if version is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version

    entries = [SimpleNamespace(name="cupy_nsa_meta")] if entry else []
    monkeypatch.setattr(doctor.importlib.metadata, "version", version_of)
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", wanted)
    finding = only(doctor.check_sglang())
    assert finding.state == state
    assert text in finding.found


# ---- selftest -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    """All rows of a run on the CPU."""
    return selftest.examine(CPU)


def test_the_selftest_passes_on_the_cpu(whole):
    assert [row for row in whole if row.state == "WRONG"] == []
    assert {row.backend for row in whole if row.state == "not run"} <= {"cuda", "triton"}
    assert all(row.detail for row in whole if row.state == "not run")


def test_the_selftest_calls_every_public_function(whole):
    named = {name for row in whole for name in row.function.split(", ")}
    functions = {
        name
        for name in cupy_nsa_meta.__all__
        if callable(getattr(cupy_nsa_meta, name))
        and not isinstance(getattr(cupy_nsa_meta, name), type)
    }
    of_a_gpu = {"warmup"}
    by_others = {"is_cuda_kernel_available"}  # by get_kernel_info
    assert functions - named == of_a_gpu | by_others


def test_the_batches_hold_the_edges():
    sizes = {batch.bs for batch in batches.BATCHES}
    assert sizes >= {1, 16, 17, 32, 33, 256, 257, 1024, 1025, 16385}
    assert {batch.dtypes for batch in batches.BATCHES} >= {
        ("int32", "int64"), ("int64", "int32"), ("int32", "int32"), ("int64", "int64"),
    }  # fmt: skip
    assert any(batch.stride > 1 for batch in batches.BATCHES)
    assert any(0 in batch.extend for batch in batches.BATCHES)
    assert any(q > kv for b in batches.BATCHES for q, kv in zip(b.extend, b.seq, strict=True))
    extend, seq = batches.BATCHES[0]._replace(stride=3, extend=(1, 2), seq=(3, 4)).lengths(CPU)
    assert (extend.stride(), extend.tolist(), seq.tolist()) == ((3,), [1, 2], [3, 4])


def test_the_definition_by_hand():
    batch = Batch("by hand", (3, 2, 3), (10, 4, 1), topk=9)
    assert batches.expansion(batch) == ([8, 9, 10, 3, 4, 0, 0, 1], [8, 9, 9, 3, 4, 0, 0, 1])
    arrays = batches.FusedBuffers("extend", Batch("", (3, 2), (10, 4), topk=9), CPU)._arrays()
    assert arrays["ks"] == [0, 0, 0, 10, 10]
    assert arrays["ke"] == [8, 9, 10, 13, 14]
    assert arrays["dsa_cu_seqlens_k"] == [0, 8, 17, 26, 29, 33]
    assert arrays["cu_seqlens_q"] == [0, 3, 5]
    assert arrays["positions"] == [7, 8, 9, 2, 3]


@pytest.fixture
def few_batches(monkeypatch):
    few = tuple(batch for batch in batches.BATCHES if batch.bs <= 17)
    monkeypatch.setattr(selftest, "BATCHES", few)
    monkeypatch.setattr(selftest, "FUSED_BATCHES", few)
    return monkeypatch


right_python = cupy_nsa_meta.fill_draft_extend_metadata_python


def wrong_row(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
    total = right_python(extend, seq, topk, expanded, clamped, use_adaptive, **options)
    if total > 3:
        expanded[total - 1] += 1
    return total


def wrong_clamp(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
    return right_python(extend, seq, topk + 1, expanded, clamped, use_adaptive, **options)


def no_clamp_at_zero(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
    total = right_python(extend, seq, topk, expanded, clamped, use_adaptive, **options)
    expanded[:total][expanded[:total] == 0] = -1
    return total


def wrong_binary_search(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
    total = right_python(extend, seq, topk, expanded, clamped, use_adaptive, **options)
    if not use_adaptive and total > 1:
        clamped[0] += 1
    return total


def writes_behind(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
    total = right_python(extend, seq, topk, expanded, clamped, use_adaptive, **options)
    clamped[total:] = 0
    return total


def wrong_total(*arguments, **options):
    return right_python(*arguments, **options) + 1


def raises(*arguments, **options):
    raise RuntimeError("an illegal\nmemory access")


@pytest.mark.parametrize(
    ("mistake", "detail"),
    [
        (wrong_row, "out_seqlens_expanded[5]: expected"),
        (wrong_clamp, "out_nsa_cache_seqlens["),
        (no_clamp_at_zero, "padding rows: out_seqlens_expanded[4]: expected 0, got -1"),
        (wrong_binary_search, "out_nsa_cache_seqlens[0]: expected"),
        (writes_behind, "one row: out_nsa_cache_seqlens[1]: expected -1234567, got 0"),
        (wrong_total, "one row: total: expected 1, got 2 (and"),
        (raises, "one row: RuntimeError: an illegal memory access"),
    ],
)
def test_the_selftest_finds_mistakes_of_a_backend(few_batches, capsys, mistake, detail):
    few_batches.setattr(cupy_nsa_meta, "fill_draft_extend_metadata_python", mistake)
    status, out, _ = call(capsys, "selftest", "--device", "cpu")
    assert status == 1
    lines = out.splitlines()
    at = next(
        idx
        for idx, line in enumerate(lines)
        if line.startswith("fill_draft_extend_metadata_python ")
    )
    assert lines[at].endswith("WRONG")
    assert detail in lines[at + 1]
    assert " wrong, " in lines[-1]


def test_the_selftest_finds_a_missing_error(few_batches):
    few_batches.setattr(
        cupy_nsa_meta, "fill_draft_extend_metadata_python", lambda *arguments, **options: 4
    )
    rows = {row.function: row for row in selftest.examine(CPU)}
    row = rows["fill_draft_extend_metadata_python, bad input"]
    assert row.state == "WRONG"
    assert "negative extend length: expected a ValueError, got the total 4" in row.detail


def test_the_selftest_finds_mistakes_of_the_references(few_batches):
    right = reference_fused.metadata

    def wrong(call):
        status = right(call)
        call.outputs.dsa_cu_seqlens_k[-1 - batches.SLACK :] += 1
        return status

    few_batches.setattr(reference_fused, "metadata", wrong)
    few_batches.setattr(
        reference, "draft_extend", lambda extend, seq, topk: (seq.int()[:1], seq.int()[:1])
    )
    wrong_rows = {row.function for row in selftest.examine(CPU) if row.state == "WRONG"}
    names = set(selftest.NAMES.values())
    assert wrong_rows >= names | {f"plan_{name}" for name in names} | {"reference.draft_extend"}


def test_the_selftest_as_json(few_batches, capsys):
    status, out, _ = call(capsys, "selftest", "--json", "--device", "cpu")
    document = json.loads(out)
    assert status == 0
    assert set(document) == {"command", "version", "ok", "device", "seconds", "rows"}
    assert (document["command"], document["ok"], document["device"]) == ("selftest", True, "cpu")
    for row in document["rows"]:
        assert set(row) == {"function", "backend", "state", "num_batches", "ms", "detail"}


def test_the_selftest_in_debug_mode(few_batches):
    few_batches.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    assert [row for row in selftest.examine(CPU) if row.state == "WRONG"] == []


def test_a_gpu_that_the_cuda_backend_cannot_use_is_a_failure(monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_unavailable_reason", lambda device=None: "no CuPy")
    row = next(iter(selftest._seed_rows(torch.device("cuda", 0))))
    assert (row.backend, row.state, row.detail) == ("cuda", "WRONG", "no CuPy")


def test_a_gpu_that_is_not_there(on_cpu, capsys):
    status, out, err = call(capsys, "selftest", "--device", "cuda")
    assert (status, out) == (1, "")
    assert "torch sees no CUDA device" in err


# ---- demo ---------------------------------------------------------------------------------------


def test_the_demo_draws_the_example_of_the_readme(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = call(capsys, "demo")
    assert status == 0
    assert ESCAPE not in out
    lines = out.splitlines()
    assert lines[2].split() == ["0", "████████··", "8", "8"]
    assert lines[4].split() == ["2", "█████████▒", "10", "9", "<-", "top-k"]
    assert lines[8] == "request 2: extend_seq_lens 3, seq_lens 1, padding"
    assert lines[9].split()[:4] == ["5", "·", "0", "0"]
    assert lines[9].endswith("<- 0")
    assert not lines[10].endswith("<- 0"), "0 is its true length"
    readme = (ROOT / "README.md").read_text()
    for name, column in (("seqlens_expanded", 2), ("nsa_cache_seqlens", 3)):
        drawn = [line.split()[column] for line in lines if line[:5].strip().isdigit()]
        (in_readme,) = (line for line in readme.splitlines() if line.startswith(f"{name} "))
        assert in_readme.partition("<-")[0].split()[1:] == drawn


def test_the_demo_as_json(capsys):
    status, out, _ = call(
        capsys, "demo", "--json", "--extend", "2,0,1", "--seq", "5,7,3", "--topk", "4"
    )
    assert status == 0
    assert json.loads(out) == {
        "command": "demo", "ok": True, "extend": [2, 0, 1], "seq": [5, 7, 3], "topk": 4,
        "expanded": [4, 5, 3], "clamped": [4, 4, 3],
    }  # fmt: skip


def test_long_bars_are_scaled():
    drawn = demo.compute([1, 0, 2], [100_000, 5, 50_000], 2048)
    lines = demo.text(drawn, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "one character is up to" in lines[-1]
    assert "request 1: extend_seq_lens 0, seq_lens 5" in lines, "also without rows"
    assert 0 < lines[5].count("▒") < lines[2].count("▒")


def test_the_demo_of_a_terminal_without_its_characters():
    done = run("demo", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "########.." in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--extend", "3"), "seq_lens: expected [1] like extend_seq_lens, got [3]"),
        (("--extend=3,-1,2",), "extend_seq_lens[1]: expected >= 0, got -1"),
        (("--topk", "0"), "nsa_index_topk: expected"),
        (("--extend", "500,1,1"), "expected at most 200 rows to draw, got 502"),
        (("--extend", f"{2**70},1,1"), "--extend: expected at most 200 rows"),
        (("--seq", f"{2**70},1,1"), "error: "),
        (("--picture", "drawing.nothing"), "--picture: "),
        (("--picture", "no_such_folder/drawing.png"), "--picture: "),
    ],
)
def test_bad_options_of_the_demo(capsys, argv, message):
    status, out, err = call(capsys, "demo", *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.png"
    status, out, _ = call(capsys, "demo", "--picture", str(path))
    assert status == 0
    assert out.splitlines()[-1] == f"drawn: {path}"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    for fill in demo.FILLS.values():
        wanted = torch.tensor([int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        close = (torch.from_numpy(image.copy()) - wanted).abs().amax(-1) < 0.01
        assert int(close.sum()) > 500, f"{fill} is not in the picture"
    svg = tmp_path / "demo.svg"
    assert call(capsys, "demo", "--json", "--picture", str(svg))[0] == 0
    assert "<svg" in svg.read_text()


def test_many_rows_and_no_rows_are_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    for name, extend, seq in (
        ("many", [100, 100], [5000, 3]),
        ("none", [0], [4]),
        ("empty", [], []),
    ):
        demo.picture(demo.compute(extend, seq, 64), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert demo.text(demo.compute(extend, seq, 64), width=60)


def test_the_picture_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = call(capsys, "demo", "--picture", str(tmp_path / "demo.png"))
    assert (status, out) == (1, "")
    assert "expected matplotlib, got none; pip install 'cupy-nsa-meta[bench]'" in err


# ---- bench --------------------------------------------------------------------------------------


def test_bench_forwards_its_arguments(monkeypatch):
    done = run("bench", "--help")
    assert done.returncode == 0
    assert "usage: bench.py" in done.stdout
    done = run("bench", "--topk", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("bench.py: error: ")
    seen: list[list[str]] = []
    monkeypatch.setattr(
        bench.subprocess, "run", lambda words: seen.append(words) or SimpleNamespace(returncode=7)
    )
    assert command_line.main(["bench", "--suite", "all", "--json", "a.json"]) == 7
    assert seen[0][1:] == [str(ROOT / "bench.py"), "--suite", "all", "--json", "a.json"]


def test_bench_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    status, out, err = call(capsys, "bench", "--quick")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "part of the source checkout and not of the wheel" in err


# ---- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_doctor_on_a_gpu():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for stem in _module.KERNELS:
        data = checks[f"kernel {stem}"]["data"]
        assert set(data) == {"cold_ms", "warm_ms"}
        assert min(data.values()) > 0
    assert checks["cuda backend"]["state"] == checks["pinned memory"]["state"] == "ok"
    assert checks["chosen backend"]["data"] == {"cpu": "python", "cuda:0": "cuda"}


@pytest.mark.gpu
def test_the_selftest_on_a_gpu():
    done = run("selftest", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0, [row for row in document["rows"] if row["state"] == "WRONG"]
    ran = {row["function"] for row in document["rows"] if row["state"] == "ok"}
    assert {
        "fill_draft_extend_metadata_cuda",
        "fill_draft_extend_metadata_fused_simple",
        "warmup",
    } <= ran
    assert {f"{name}, replay" for name in selftest.NAMES.values()} <= ran


@pytest.mark.gpu
def test_the_selftest_finds_a_mistake_on_a_gpu(few_batches):
    right = cupy_nsa_meta.fill_draft_extend_metadata_cuda

    def wrong(extend, seq, topk, expanded, clamped, use_adaptive=True, **options):
        total = right(extend, seq, topk, expanded, clamped, use_adaptive, **options)
        if not use_adaptive:
            clamped[:1] += 1
        return total

    few_batches.setattr(cupy_nsa_meta, "fill_draft_extend_metadata_cuda", wrong)
    rows = {row.function: row for row in selftest.examine(torch.device("cuda", 0))}
    assert rows["fill_draft_extend_metadata_cuda"].state == "WRONG"
