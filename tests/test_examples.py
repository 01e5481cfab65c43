"""The examples run as their headers say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "data_parallel.py"


def torchrun(ranks: int, *arguments: str, program: Path = PROGRAM, **environment: str):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(program), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_data_parallel_on_the_cpu(ranks):
    done = torchrun(ranks, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        rf"{ranks} ranks on cpu, 3 steps, (\d+) rows \((\d+) padded\): equal to one process\n",
        done.stdout,
    )
    assert found, done.stdout
    assert 10_000 < int(found[1]) < int(found[2])


def test_a_wrong_result_of_a_rank_is_seen(tmp_path):
    """Without the padding to the largest total the shapes differ; with wrong rows the check fails."""
    text = PROGRAM.read_text()
    wrong = text.replace('own["dsa_cache_seqlens"])\n', 'own["dsa_cache_seqlens"] + (rank == 1))\n')
    assert wrong != text
    program = tmp_path / "data_parallel.py"
    program.write_text(wrong)
    done = torchrun(2, program=program, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "rows of rank 1: expected" in done.stderr + done.stdout


@pytest.mark.gpu
def test_data_parallel_with_nccl():
    ranks = min(torch.cuda.device_count(), 2)
    done = torchrun(ranks, "--requests", "300", "--steps", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ranks} ranks on cuda, 20 steps, "), done.stdout
    assert done.stdout.endswith("equal to one process\n")
