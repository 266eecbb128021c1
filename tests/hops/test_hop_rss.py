"""What the process really holds over thirteen hops agrees with what the cache says it holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rss_probe import HOPS, LAYERS, ROWS, TOKEN_BYTES, TOKENS, WINDOW

SLACK = 16 * 2**20
"""Bytes for all else of a run: masks, logits, tables, the allocator's own. A layer has 48 MiB."""

STATUS = Path("/proc/self/status")
RUN_SECONDS = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(RUN_SECONDS + 60),
    pytest.mark.skipif(
        not STATUS.exists() or "RssAnon:" not in STATUS.read_text(),
        reason="only Linux tells a process's anonymous memory in /proc/self/status",
    ),
]


def measured(mode: str) -> list[dict]:
    """Run the probe in a process whose allocator gives freed tensors back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "rss_probe.py"), mode],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def excess(found: dict) -> int:
    """Bytes beyond the slabs and the query ring that the cache knows of."""
    return found["rss"] - found["allocated"] - found["ring"]


def test_memory_is_what_the_cache_says_at_every_token():
    found = measured("pruned")
    assert len(found) == WINDOW * (HOPS - 1) + 2
    assert (found[0]["hop"], found[-1]["hop"]) == (1, HOPS)
    for step in found:
        assert step["allocated"] <= step["bound"], step
        assert excess(step) <= SLACK, step
        assert step["rss"] >= step["kv"] + step["ring"] - SLACK, "the measure sees the cache"
    whole = ROWS * TOKENS * LAYERS * TOKEN_BYTES
    assert found[0]["kv"] < 0.5 * whole, "the prompt was pruned"
    first, last = (step["rss"] - step["ring"] for step in (found[0], found[-1]))
    assert last < first - found[0]["kv"] / 4, "hops gave memory back"


def test_without_pruning_the_same_run_holds_all_of_it():
    found = measured("kept")[-1]
    whole = ROWS * found["columns"] * LAYERS * TOKEN_BYTES
    assert found["kv"] == whole
    assert whole - SLACK <= found["rss"] <= found["allocated"] + found["ring"] + SLACK


def test_a_leak_of_old_storage_would_be_seen():
    """The same run with somebody who keeps the storage that compactions let go."""
    found = measured("leaking")
    assert excess(found[0]) <= SLACK
    assert excess(found[-1]) > 10 * SLACK
