"""bench.py on the CPU: the simulation, the trace reader, the check, the report, the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
from benchmarks import progress, replay, workload
from benchmarks.workload import Options, Requests, read_trace, simulate, synthetic
from cupy_nsa_meta import fill_draft_extend_metadata_python, reference

ROOT = Path(__file__).resolve().parent.parent
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
CPU = torch.device("cpu")


def requests_of(*rows: tuple[float, int, int]) -> Requests:
    arrival, context, generated = zip(*rows, strict=True)
    return Requests(
        "test",
        np.array(arrival, dtype=np.float64),
        np.array(context, dtype=np.int64),
        np.array(generated, dtype=np.int64),
    )


# ---- Simulation ---------------------------------------------------------------------------------

WITH_ZEROS = requests_of(
    (0, 0, 0), (0, 5, 0), (0, 0, 7), (0, 40, 3), (0.1, 0, 0), (0.2, 1, 1), (900, 0, 0), (900, 3, 2)
)
WORKLOADS = {
    "defaults": (synthetic(60, seed=1), Options()),
    "no speculation": (synthetic(25, seed=2), Options(draft_tokens=0)),
    "nothing accepted": (synthetic(25, seed=3), Options(acceptance=0.0)),
    "all accepted": (synthetic(60, seed=4), Options(acceptance=1.0, draft_tokens=7)),
    "one at a time": (synthetic(25, seed=5), Options(max_running=1)),
    "few places": (synthetic(60, rate=100.0, seed=6), Options(max_running=4)),
    "many chunks": (synthetic(25, seed=7), Options(prefill_budget=100)),
    "no time passes": (synthetic(60, seed=8), Options(step_ms=0.0, token_us=0.0)),
    "zero lengths": (WITH_ZEROS, Options()),
    "zero lengths, one token per step": (WITH_ZEROS, Options(prefill_budget=1, max_running=2)),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_request_gets_its_tokens_and_finishes(name):
    requests, options = WORKLOADS[name]
    kv_lens = np.full(len(requests), -1)  # -1: not admitted yet
    last_step = np.full(len(requests), -1)
    for step_idx, step in enumerate(simulate(requests, options)):
        ids = step.request_ids
        assert step.extend_seq_lens.dtype == np.int32
        assert step.seq_lens.dtype == np.int64
        assert len(step.extend_seq_lens) == len(step.seq_lens) == len(ids)
        assert 1 <= len(ids) <= options.max_running
        assert (np.diff(ids) > 0).all(), "each request once, in order of admission"
        assert (step.extend_seq_lens >= 0).all()
        assert (step.seq_lens >= step.extend_seq_lens).all()
        admitted_before = kv_lens[ids] >= 0
        assert (last_step[ids[admitted_before]] == step_idx - 1).all(), (
            "in every step until its end"
        )
        before = np.maximum(kv_lens[ids], 0)
        assert (step.seq_lens == before + step.extend_seq_lens).all()
        context = requests.context[ids]
        prefilled = np.minimum(step.seq_lens, context) - np.minimum(before, context)
        decoded = step.extend_seq_lens - prefilled
        assert prefilled.sum() <= options.prefill_budget
        assert (decoded <= options.draft_tokens + 1).all()
        assert not ((prefilled > 0) & (decoded > 0)).any()
        has_tokens = context + requests.generated[ids] > 0
        assert (step.extend_seq_lens[has_tokens] > 0).all(), "nobody waits inside the batch"
        kv_lens[ids] = step.seq_lens
        last_step[ids] = step_idx
    assert (kv_lens == requests.context + requests.generated).all()


def test_the_seed_decides():
    def run(seed: int) -> list[list[list[int]]]:
        steps = simulate(synthetic(40, seed=seed), Options(seed=seed))
        return [[array.tolist() for array in step] for step in steps]

    assert run(3) == run(3)
    assert run(3) != run(4)
    same_requests = synthetic(40, seed=3)
    runs = [
        [step.extend_seq_lens.tolist() for step in simulate(same_requests, Options(seed=seed))]
        for seed in (3, 4)
    ]
    assert runs[0] != runs[1], "the acceptance is drawn by seed, too"


def test_the_clock_decides_who_shares_a_batch():
    requests = requests_of((0, 10, 8), (1.0, 10, 8))

    def largest(step_ms: float, token_us: float) -> int:
        options = Options(step_ms=step_ms, token_us=token_us, draft_tokens=0)
        return max(len(step.request_ids) for step in simulate(requests, options))

    # 9 steps and 18 tokens of the first request; the second arrives after 1 s.
    assert largest(100, 0) == 1
    assert largest(130, 0) == 2
    assert largest(0, 50_000) == 1
    assert largest(0, 60_000) == 2


def test_accepted_tokens_per_step():
    steps = list(simulate(requests_of((0, 1, 100_000)), Options(acceptance=0.7, draft_tokens=3)))[
        1:-1
    ]
    counts = np.bincount(np.concatenate([step.extend_seq_lens for step in steps]), minlength=5)
    probabilities = np.array([0.0, 0.3, 0.7 * 0.3, 0.49 * 0.3, 0.343])
    np.testing.assert_allclose(counts / counts.sum(), probabilities, atol=0.01)


def test_summary():
    steps = list(simulate(requests_of((0, 4, 0), (0, 3, 2)), Options(draft_tokens=0)))
    assert workload.summarize(steps) == workload.Summary(
        requests=2, steps=3, rows=9, median_bs=1.0, max_bs=2, max_rows=7
    )
    assert workload.summarize([]).requests == 0


# ---- Traces -------------------------------------------------------------------------------------


def test_a_trace_is_read_and_sorted(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(
        b"\xef\xbb\xbfTIMESTAMP, ContextTokens,Model,GeneratedTokens\r\n"
        b"2023-11-16 18:15:50.9951690,396,a,109\r\n"
        b"2023-11-16 18:15:46.6805900,374,a,44\r\n"
        b"\r\n"
        b"2023-11-16 18:15:47,0,b,0\r\n"
        b"2023-11-16T19:15:47.5+01:00,7,b,1"
    )
    requests = read_trace(path)
    assert requests.source == "trace.csv"
    np.testing.assert_allclose(requests.arrival, [0, 0.31941, 0.81941, 4.314579], atol=1e-9)
    assert requests.context.tolist() == [374, 0, 7, 396]
    assert requests.generated.tolist() == [44, 0, 1, 109]


BAD_TRACES = {
    "empty": (b"", "expected the columns TIMESTAMP, .* got an empty first line"),
    "no rows": (HEADER.encode(), "expected at least one request"),
    "missing column": (
        b"TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,1\n",
        "expected the columns .*GeneratedTokens, got TIMESTAMP, ContextTokens",
    ),
    "short row": (HEADER.encode() + b"2023-11-16 18:15:46,1\n", "line 2: expected 3 fields, got 2"),
    "long row": (
        HEADER.encode() + b"2023-11-16 18:15:46,1,2,3\n",
        "line 2: expected 3 fields, got 4",
    ),
    "no number": (
        HEADER.encode() + b"2023-11-16 18:15:46,1,2\n2023-11-16 18:15:46,x,2\n",
        "line 3: ContextTokens: expected an integer from 0 .* got 'x'",
    ),
    "no integer": (
        HEADER.encode() + b"2023-11-16 18:15:46,1,2.5\n",
        "GeneratedTokens: .* got '2.5'",
    ),
    "no value": (HEADER.encode() + b"2023-11-16 18:15:46,,2\n", "ContextTokens: .* got ''"),
    "negative": (HEADER.encode() + b"2023-11-16 18:15:46,1,-2\n", "GeneratedTokens: .* got '-2'"),
    "over int32": (
        HEADER.encode() + b"2023-11-16 18:15:46,2147483647,1\n",
        "expected ContextTokens . GeneratedTokens <= 2147483647, got 2147483648",
    ),
    "very long number": (
        HEADER.encode() + b"2023-11-16 18:15:46," + b"9" * 5000 + b",1\n",
        "got '999",
    ),
    "no time": (
        HEADER.encode() + b"yesterday,1,2\n",
        "TIMESTAMP: expected a time .* got 'yesterday'",
    ),
    "not text": (b"\xff\xfe\x00", "expected UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_is_one_line_and_status_2(name, tmp_path, capsys):
    content, message = BAD_TRACES[name]
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    fails(["--trace", str(path)], f"bad.csv.*{message}", capsys)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_trace_that_is_no_file(name, tmp_path, capsys):
    fails(["--trace", str(tmp_path / name)], "expected a readable CSV file, got ", capsys)


# ---- Options ------------------------------------------------------------------------------------


def fails(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line refuses: status 2, one line on stderr, nothing on stdout."""
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("bench.py: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


BAD_OPTIONS = {
    "--steps -1": "--steps: expected an integer from 0 .* got '-1'",
    "--steps many": "--steps: expected an integer .* got 'many'",
    "--max-running 0": "--max-running: expected an integer from 1 .* got '0'",
    "--draft-tokens -1": "--draft-tokens: .* got '-1'",
    "--acceptance 1.5": "--acceptance: expected a number >= 0 and <= 1, got '1.5'",
    "--acceptance nan": "--acceptance: .* got 'nan'",
    "--prefill-budget 0": "--prefill-budget: .* got '0'",
    "--step-ms inf": "--step-ms: expected a number >= 0, got 'inf'",
    "--token-us -1": "--token-us: .* got '-1'",
    "--rate 0": "--rate: expected a number > 0, got '0'",
    "--requests 0": "--requests: .* got '0'",
    "--topk 0": "--topk: .* got '0'",
    "--seed -1": "--seed: .* got '-1'",
    "--backend cudda": "--backend: expected one of cuda, triton, python, .* got 'cudda'",
    "--backend python,": "--backend: expected one of .* got ''",
    "--device tpu": "--device: invalid choice: 'tpu'",
    "--stepps 3": "unrecognized arguments: --stepps 3",
    "--json /missing/folder/x.json": "--json: expected a file in an existing folder",
    "--json .": "--json: expected a file that can be written",
    "--trace x.csv --rate 3": "--rate: expected without --trace",
    "--trace x.csv --requests 3": "--requests: expected without --trace",
    "--device cpu --backend cuda": "--backend cuda cannot run: .*CUDA",
    "--device cpu --backend python --backend all,cuda": "--backend cuda cannot run: .*CUDA",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_status_2(options, capsys):
    fails(options.split(), BAD_OPTIONS[options], capsys)


def test_a_backend_or_device_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(["--device", "cuda"], "--device cuda: expected an NVIDIA GPU, got none", capsys)
    monkeypatch.setattr(replay, "_triton_interprets", lambda: False)
    monkeypatch.setattr(replay.dispatch, "triton_unavailable_reason", lambda: "no\n  Triton")
    fails(["--backend", "triton"], "--backend triton cannot run: no Triton", capsys)


def test_what_all_means(monkeypatch):
    monkeypatch.setattr(replay.dispatch, "cuda_unavailable_reason", lambda device=None: None)
    monkeypatch.setattr(replay.dispatch, "triton_unavailable_reason", lambda: "not\ninstalled")
    gpu = torch.device("cuda", 0)
    assert list(replay.select(["all"], CPU).fills) == ["python", "reference"]
    assert replay.select(["all"], CPU).absent == {}
    assert list(replay.select(["all"], gpu).fills) == ["cuda", "python"]
    assert replay.select(["all"], gpu).absent == {"triton": "not installed"}
    assert list(replay.select(["reference", "python", "python"], gpu).fills) == [
        "python",
        "reference",
    ]
    with pytest.raises(replay.BackendError, match="--backend triton cannot run: not installed"):
        replay.select(["all", "triton"], gpu)


# ---- The check ----------------------------------------------------------------------------------


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """The whole buffer around a tensor, as int32."""
    return torch.empty(0, dtype=torch.int32).set_(tensor.untyped_storage())


def wrong_total(extend, seq, topk, expanded, clamped):
    return fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped) + 1


def total_of_another_type(extend, seq, topk, expanded, clamped):
    return np.int64(fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped))


def wrong_row(extend, seq, topk, expanded, clamped):
    total = fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped)
    expanded[total - 1] -= 1
    return total


def no_clamp(extend, seq, topk, expanded, clamped):
    return fill_draft_extend_metadata_python(extend, seq, topk + 1, expanded, clamped)


def writes_nothing(extend, seq, topk, expanded, clamped):
    return int(extend.sum())


def writes_behind(extend, seq, topk, expanded, clamped):
    total = fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped)
    clamped[total] = 0
    return total


def writes_in_front(extend, seq, topk, expanded, clamped):
    total = fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped)
    storage(expanded)[expanded.storage_offset() - 2] = 0
    return total


def writes_past_the_end(extend, seq, topk, expanded, clamped):
    total = fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped)
    storage(clamped)[clamped.storage_offset() + len(clamped)] = 0
    return total


def writes_an_input(extend, seq, topk, expanded, clamped):
    total = fill_draft_extend_metadata_python(extend, seq, topk, expanded, clamped)
    seq[0] += 1
    return total


def fails_in_the_call(extend, seq, topk, expanded, clamped):
    raise RuntimeError("planted\nfault")


PLANTED = {
    wrong_total: r"returned total: expected \d+, got \d+",
    total_of_another_type: r"returned total: expected \d+, got np.int64",
    wrong_row: r"out_seqlens_expanded\[\d+\]: expected \d+, got \d+",
    no_clamp: r"out_nsa_cache_seqlens\[\d+\]: expected 64, got 65",
    writes_nothing: r"out_seqlens_expanded\[0\]: expected 1, got no write",
    writes_behind: r"out_nsa_cache_seqlens\[\d+\]: expected no write, got 0",
    writes_in_front: "2 elements in front of out_seqlens_expanded: expected no write, got 0",
    writes_past_the_end: "0 elements behind out_nsa_cache_seqlens: expected no write, got 0",
    writes_an_input: r"seq_lens\[0\], an input: expected \d+, got \d+",
    fails_in_the_call: "raised RuntimeError: planted fault",
}
FEW_STEPS = list(simulate(synthetic(6, rate=50.0, seed=5), Options()))[:12]


@pytest.mark.parametrize("fill", PLANTED, ids=lambda fill: fill.__name__)
def test_a_planted_wrong_backend_is_found_and_not_timed(fill):
    fills = {"right": fill_draft_extend_metadata_python, "wrong": fill}
    outcome = replay.replay(FEW_STEPS, fills, CPU, topk=64)
    right, wrong = outcome.results
    assert (right.mismatches, right.steps, len(right.times_ns)) == (0, 12, 12)
    assert right.percentiles_us() is not None
    assert wrong.mismatches == (1 if fill is fails_in_the_call else 12)
    assert wrong.times_ns == []
    assert wrong.percentiles_us() is None
    with pytest.raises(AssertionError, match=r"step 0 \(bs \d+, T \d+\): " + PLANTED[fill]):
        raise AssertionError(wrong.first_mismatch)
    assert outcome.stopped is None


def test_one_wrong_step_among_many():
    calls = []

    def wrong_in_step_7(*arguments):
        calls.append(0)
        check_of_step_7 = len(calls) == 15  # each step: a check and a timed call
        return (wrong_row if check_of_step_7 else fill_draft_extend_metadata_python)(*arguments)

    (result,) = replay.replay(FEW_STEPS, {"wrong": wrong_in_step_7}, CPU, topk=64).results
    assert (result.steps, result.mismatches, len(result.times_ns)) == (12, 1, 7)
    assert result.first_mismatch.startswith("step 7 ")
    assert result.percentiles_us() is None


def test_a_wrong_total_of_the_timed_call_counts():
    calls = []

    def wrong_second_call(*arguments):
        calls.append(0)
        total = fill_draft_extend_metadata_python(*arguments)
        return total + 1 if len(calls) == 2 else total

    (result,) = replay.replay(FEW_STEPS, {"wrong": wrong_second_call}, CPU, topk=64).results
    assert result.mismatches == 1
    assert "(second call)" in result.first_mismatch
    assert result.percentiles_us() is None


def test_the_expected_rows_come_from_the_reference(monkeypatch):
    draft_extend = reference.draft_extend

    def changed(*arguments):
        expanded, clamped = draft_extend(*arguments)
        return expanded + 1, clamped

    monkeypatch.setattr(reference, "draft_extend", changed)
    fills = {"python": fill_draft_extend_metadata_python}
    assert replay.replay(FEW_STEPS, fills, CPU, topk=64).mismatches == len(FEW_STEPS)


def test_steps_without_rows():
    steps = list(simulate(WITH_ZEROS, Options(max_running=1)))
    assert not steps[0].extend_seq_lens.any()
    fills = {name: replay.load_fill(name) for name in ("python", "reference")}
    outcome = replay.replay(steps, fills, CPU, topk=64)
    assert [result.mismatches for result in outcome.results] == [0, 0]
    assert [result.steps for result in outcome.results] == [len(steps)] * 2


# ---- The command --------------------------------------------------------------------------------


def test_a_replayed_trace_as_table_and_json(tmp_path, capsys):
    trace, results = tmp_path / "small trace.csv", tmp_path / "results.json"
    rows = ("2023-11-16 18:15:47.5,300,9", "2023-11-16 18:15:46.6805900,2500,20")
    trace.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    argv = ["--device", "cpu", "--trace", str(trace), "--backend", "python", "--backend=reference"]
    assert bench.main([*argv, f"--json={results}"]) == 0
    out, err = capsys.readouterr()
    assert not err, "no progress bar off a terminal"
    assert "MISMATCH" not in out
    assert "small trace.csv, 2 of 2 requests" in out
    document = json.loads(results.read_text())
    assert set(document["environment"]) >= {
        *("gpu", "driver", "torch", "cupy", "triton", "python", "commit", "date", "command")
    }
    assert str(tmp_path) not in results.read_text(), "names of files, not their folders"
    assert document["environment"]["command"].endswith(
        "--trace 'small trace.csv' --backend python --backend=reference --json=results.json"
    )
    assert document["workload"]["source"] == "small trace.csv"
    assert document["workload"]["requests"] == 2
    assert document["workload"]["rows"] == 300 + 9 + 2500 + 20
    assert document["workload"]["options"]["max_running"] == Options().max_running
    assert document["mismatches"] == 0
    assert type(document["mismatches"]) is int
    assert [row["backend"] for row in document["backends"]] == ["python", "reference"]
    for row in document["backends"]:
        assert type(row["mismatches"]) is int
        assert row["mismatches"] == 0
        assert (row["requests"], row["rows"]) == (2, 2829)
        assert row["steps"] == document["workload"]["steps"]
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert f"{row['median_us']:,.1f}" in out


def test_steps_limit_the_replay(tmp_path, capsys):
    trace, results = tmp_path / "trace.csv", tmp_path / "results.json"
    trace.write_text(HEADER + "2023-11-16 18:15:46,10,50\n")

    def steps(*options: str) -> int:
        argv = ["--device", "cpu", "--backend", "python", "--json", str(results), *options]
        assert bench.main(argv) == 0
        return json.loads(results.read_text())["backends"][0]["steps"]

    all_steps = steps("--trace", str(trace))
    assert all_steps > 5
    assert steps("--trace", str(trace), "--steps", "0") == all_steps
    assert steps("--trace", str(trace), "--steps", "5") == 5
    assert steps("--steps", "3") == 3
    assert steps() == bench.DEFAULT_STEPS
    assert steps("--requests", "1", "--steps", "0") < bench.DEFAULT_STEPS
    capsys.readouterr()


def test_a_mismatch_is_status_1_and_valid_json(monkeypatch, tmp_path, capsys):
    load_fill = replay.load_fill
    planted = {"python": wrong_row, "reference": fails_in_the_call}
    results = tmp_path / "results.json"
    argv = ["--device", "cpu", "--steps", "6", "--json", str(results)]

    monkeypatch.setattr(replay, "load_fill", lambda name: planted.get(name) or load_fill(name))
    assert bench.main(argv) == 1  # the second backend ends midway, the first one goes on
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "python: MISMATCH, first in step 0 (bs 1, " in lines["python:"] + "\n"
    assert lines["python"].split()[4:] == ["MISMATCH", "6"]
    assert lines["reference"].split()[4:] == ["MISMATCH", "1"]
    document = json.loads(results.read_text())
    assert document["mismatches"] == 7
    for row in document["backends"]:
        assert row["mismatches"] > 0
        assert row["median_us"] is row["p20_us"] is row["p80_us"] is None
        assert row["first_mismatch"].startswith("step 0 ")

    del planted["reference"]
    assert bench.main(argv) == 1
    rows = {row["backend"]: row for row in json.loads(results.read_text())["backends"]}
    assert rows["python"]["median_us"] is None
    assert rows["reference"]["median_us"] > 0, "a right backend keeps its time"
    del planted["python"]
    assert bench.main(argv) == 0
    capsys.readouterr()


def test_a_lost_device_ends_the_run(monkeypatch, capsys):
    """Not only the backend: with the CUDA context gone nothing else can be replayed."""
    monkeypatch.setattr(replay.Arena, "__init__", arena_on_the_cpu(replay.Arena.__init__))

    def lost(device: object) -> None:
        if calls:
            raise RuntimeError("an illegal memory access was encountered")

    calls: list[int] = []

    def fill(*arguments: object) -> int:
        calls.append(0)
        return fails_in_the_call(*arguments)

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    fills = {"lost": fill, "right": fill_draft_extend_metadata_python}
    outcome = replay.replay(FEW_STEPS, fills, torch.device("cuda", 0), topk=64)
    assert (
        outcome.stopped == "the device failed under lost: an illegal memory access was encountered"
    )
    assert [(result.steps, result.mismatches) for result in outcome.results] == [(1, 1), (0, 0)]
    assert outcome.results[1].percentiles_us() is None


def arena_on_the_cpu(init):
    return lambda self, max_bs, capacity, device: init(self, max_bs, capacity, CPU)


def test_the_cpu_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--steps", "2"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "device: CPU (torch sees no CUDA device), one thread; "
        "the Python forms are compared: python, reference"
    )


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), *argv], capture_output=True, text=True, timeout=120
    )


def test_as_a_program(tmp_path):
    done = run("--device", "cpu", "--steps", "5", "--json", str(tmp_path / "results.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "results.json").read_text())["mismatches"] == 0
    done = run("--trace", str(tmp_path / "missing.csv"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"bench.py: error: {tmp_path / 'missing.csv'}: expected a readable CSV file, "
        "got No such file or directory"
    ]


# ---- Progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_rich", [True, False])
def test_progress_on_a_terminal(has_rich, monkeypatch):
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress_bar(1200, "replay") as update:
        for done in range(1200):
            update(done + 1)
    assert ("1200/1200" if has_rich else "\rreplay: 1,200 of 1,200 (100%)\n") in terminal.getvalue()
    assert len(terminal.getvalue()) < 4000, "throttled"
