"""Every file of cuda_src/ by NVRTC, for every architecture, without a GPU: no spills, few registers."""

from __future__ import annotations

import re

import pytest

from cupy_nsa_meta import _check, _draft_extend_args, _fused_args, _module

nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
if nvrtc.getVersion()[0] == 12:  # NVRTC 13 has dropped Volta
    ARCHITECTURES.insert(0, "sm_70")
MAX_REGISTERS = {
    # A block of 512 threads per multiprocessor, with 16 loads of 16 bytes in flight per thread.
    "draft_extend_large": 128,
}
DEFAULT_MAX_REGISTERS = 64  # four blocks of 256 threads share 65,536 registers
MAX_STATIC_SHARED = 48 * 1024


def compile_source(text: str, architecture: str) -> tuple[bytes, str]:
    program = nvrtc.createProgram(text, "test.cu", (), ())
    options = (*_module.compile_options(), f"-arch={architecture}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and shared memory of each kernel, from the report of ptxas."""
    found: dict[str, dict[str, int]] = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", part)),
            "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
        }
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", _module.KERNELS)
def test_compiles_without_spills(stem, architecture):
    cubin, log = compile_source(_module.source(stem), architecture)
    assert cubin[:4] == b"\x7fELF"
    found = resources(log)
    assert set(found) == set(_module.KERNELS[stem])
    for name, used in found.items():
        assert used["spills"] == 0, name
        assert used["registers"] <= MAX_REGISTERS.get(name, DEFAULT_MAX_REGISTERS), name
        assert used["shared"] <= MAX_STATIC_SHARED, name
    # The one warning there may be is NVRTC's own, about architectures before sm_75.
    assert [
        line for line in log.splitlines() if "warning" in line and "deprecated" not in line
    ] == []


@pytest.mark.parametrize("stem", _module.PROGRAMS)
def test_the_programs_of_a_file_share_out_its_kernels(stem):
    programs = _module.PROGRAMS[stem]
    assert sorted(name for names in programs for name in names) == sorted(_module.KERNELS[stem])
    for number, names in enumerate(programs):
        _, log = compile_source(_module.program_source(stem, number), "sm_90")
        assert set(resources(log)) == set(names)


def test_the_report_is_read():
    spilling = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
      float v[48];
      #pragma unroll
      for (int i = 0; i < 48; ++i) v[i] = p[i * 97];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 48; ++i) p[i * 89] = v[i] * v[47 - i] + v[(i * 5) % 48];
    }"""
    found = resources(compile_source(spilling, "sm_80")[1])
    assert found["spills"]["spills"] > 0


def test_every_source_file_is_listed():
    stems = {path.stem for path in _module.source_dir().glob("*.cu")}
    assert stems == set(_module.KERNELS)


def test_an_edited_header_changes_the_cache_key(monkeypatch, tmp_path):
    """CuPy's cache key holds the source text and the options, but no included file."""
    for path in _module.source_dir().glob("*.cu*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(_module, "source_dir", lambda: tmp_path)

    def options():
        _module.source_digest.cache_clear()
        return _module.compile_options()

    try:
        before = options()
        assert options() == before
        with (tmp_path / "common.cuh").open("a") as header:
            header.write("// edited\n")
        assert options() != before
    finally:
        _module.source_digest.cache_clear()


def test_the_constants_of_host_and_device_agree():
    text = _module.source("draft_extend") + (_module.source_dir() / "common.cuh").read_text()
    for device_name, value in {
        "kBlockThreads": _draft_extend_args.BLOCK_THREADS,
        "kWarpMaxBs": _draft_extend_args.WARP_MAX_BS,
        "kMaxItems": _draft_extend_args.MAX_ITEMS,
        "kLargeThreads": _draft_extend_args.LARGE_THREADS,
        "kQuad": _draft_extend_args.QUAD,
        "kQuadTileRows": "kQuad * kThreads",
        "kQuadModeRowsPerRequest": "4 * kQuad",
        "kQuads": _draft_extend_args.QUADS,
        "kMaxEntries": _draft_extend_args.MAX_ENTRIES,
        "kGroup": _draft_extend_args.GROUP,
        "kOneLaunchMaxBs": _draft_extend_args.ONE_LAUNCH_MAX_BS,
        "kExtendIsInt64": _check.EXTEND_IS_INT64,
        "kSeqIsInt64": _check.SEQ_IS_INT64,
        "kLinearSearch": _draft_extend_args.LINEAR_SEARCH,
        "kTotalIsGiven": _check.TOTAL_IS_GIVEN,
    }.items():
        assert re.search(rf"\b{device_name} = {re.escape(str(value))}[,;]", text), device_name


@pytest.mark.parametrize(
    ("stem", "struct", "module"),
    [("draft_extend", "DraftExtendArgs", _draft_extend_args), ("fused", "FusedArgs", _fused_args)],
)
def test_the_fields_of_host_and_device_agree(stem, struct, module):
    text = _module.source(stem)
    body = text.partition(f"struct {struct} {{")[2].partition("};")[0]
    types = {"int": "i", "u32": "I", "i64": "q"}
    declared = [
        (name, "Q" if "*" in kind else types[kind])
        for kind, name in re.findall(r"^  ([\w* ]+[*\w]) (\w+);", body, re.MULTILINE)
    ]
    assert declared == list(module.LAYOUT.formats.items())
    assert f"sizeof({struct}) == {module.ARGS.size}," in text
