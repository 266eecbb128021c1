"""Tensor parallelism of transformers over two processes (gloo): one run, and one bookkeeping."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import places_two
import pytest
import torch
from peft_runs import adapted
from places import PRUNED, assert_same_trace, place_model

SCRIPT = Path(__file__).parents[1] / "support" / "places_two.py"
PROCESSES = 2
LOGITS = 5e-5
"""The sums over heads and over the MLP are made of two parts: 1e-5 on logits of 10."""

FURTHER = ("adapter", "loop", "speculative")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process got, and what each of two."""
    folder = tmp_path_factory.mktemp("shared")
    for name in places_two.SHARED:
        place_model(name).save_pretrained(folder / name)
    adapted(place_model("llava")).save_pretrained(folder / places_two.ADAPTER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    for command in ([], launch):
        done = subprocess.run(
            [sys.executable, *command, str(SCRIPT), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = ["1-0", *(f"{PROCESSES}-{rank}" for rank in range(PROCESSES))]
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


def assert_shares(report, alone) -> None:
    """Hold a process's report to that of the whole: its share of the bytes, the same else."""
    assert any("tensor parallelism over 2 processes" in note for note in report["notes"])
    assert report["kv_bytes"] == report["kv_bytes_predicted"]
    for name, value in alone.items():
        if name.startswith("kv_bytes"):
            assert PROCESSES * report[name] == value, name
        elif name != "notes":
            assert report[name] == value, name


@pytest.mark.parametrize("case", ["plain", "full", *PRUNED, "removed"])
@pytest.mark.parametrize("name", places_two.SHARED)
def test_a_run_is_that_of_one_process_on_every_rank(runs, name, case):
    alone, first, second = (run[name][case] for run in runs)
    assert_same_trace(first, second, "the ranks", tolerance=0.0)
    if alone.report is not None:
        assert_shares(first.report, alone.report)
        assert alone.report["hops"] == (2 if case == "full" else 4)
    assert_same_trace(replace(first, report=None), alone, "two processes", tolerance=LOGITS)


@pytest.mark.parametrize("name", places_two.SHARED)
def test_tokens_at_retention_1_are_the_plain_ones(runs, name):
    for run in runs:
        plain = run[name]["plain"].sequences.tolist()
        assert run[name]["full"].sequences.tolist() == plain
        assert run[name]["removed"].sequences.tolist() == plain
        for case in PRUNED:
            assert run[name][case].sequences.tolist() != plain, "pruning changes something"


@pytest.mark.parametrize("case", FURTHER)
def test_adapters_loops_and_speculation(runs, case):
    alone, first, second = (run[case] for run in runs)
    assert_same_trace(first, second, "the ranks", tolerance=0.0)
    assert_shares(first.report, alone.report)
    assert case == "adapter" or alone.report["hops"] >= 3
    assert_same_trace(replace(first, report=None), alone, "two processes", tolerance=LOGITS)


def test_sharded_weights_are_no_shared_heads(runs):
    """FSDP2 gives each process rows of its own and all heads: nothing is summed over processes."""
    alone, *ranks = (run["fsdp"] for run in runs)
    for rank, found in enumerate(ranks):
        assert_same_trace(found[rank], alone[rank], f"rank {rank}", tolerance=0.0)
