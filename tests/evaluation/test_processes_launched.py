"""`dare-hf eval`, `check` and `tune` under torchrun and accelerate: two processes print as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from row_models import llava_folder, written_rows
from test_processes import timeless, timeless_bytes

from dare_hf.tuning import evaluate_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
MORE = ["--config", "safe", "--max-new-tokens", "4"]


def command(launcher, *words):
    module = ["-m", "dare_hf.cli", *map(str, words)]
    return [sys.executable, "-m", *LAUNCHERS[launcher], *module]


def launched(launcher, *words):
    return subprocess.run(
        command(launcher, *words), env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    model = str(llava_folder(folder / "model"))
    rows = written_rows(folder, 8, answer="a cat")
    more = {"config": "safe", "max_new_tokens": 4, "out": folder / "one.jsonl"}
    found = evaluate_rows(model, rows, "exact", **more)
    return model, rows, found, timeless_bytes(folder / "one.jsonl")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_eval_prints_and_writes_once(seen, tmp_path, launcher):
    model, rows, one, file = seen
    out = tmp_path / "out.jsonl"
    done = launched(
        launcher, "eval", "--model", model, "--data", rows, "--out", out, "--json", *MORE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert timeless(json.loads(done.stdout)) == timeless(one)  # one object, of one process
    assert timeless_bytes(out) == file
    assert done.stderr.count("FLOPs") == 1


def test_a_run_whose_processes_were_killed_goes_on_in_one(seen, tmp_path):
    model, rows, one, file = seen
    out = tmp_path / "out.jsonl"
    words = ("eval", "--model", model, "--data", rows, "--out", out, *MORE)
    script = Path(__file__).parents[1] / "support" / "eval_slowly.py"
    line = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(script), *map(str, words)]
    running = subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while not out.exists() or len(out.read_text().splitlines()) < 4:
            assert running.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert len(out.read_text().splitlines()) < 9, "it was killed too late"
    found = evaluate_rows(model, rows, "exact", config="safe", max_new_tokens=4, out=out)
    assert timeless(found) == timeless(one)
    assert timeless_bytes(out) == file


def test_a_refusal_is_told_once_and_ends_both(seen, tmp_path):
    model = seen[0]
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"prompt": 3}\n')
    done = launched("torchrun", "eval", "--model", model, "--data", bad)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("dare-hf: data: line 1: prompt") == 1


def test_tune_and_check_print_once(seen, tmp_path):
    model, rows, _, _ = seen
    out = tmp_path / "out"
    words = ["--data", rows, "--batch-size", "2"]
    field = ["--field", 'scorer="attention"', "--field", 'schedule="constant"']
    more = ["--max-drop", "100", "--json", *field]
    done = launched("torchrun", "tune", model, "--out", out, *words, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["chosen"] is not None
    assert {file.name for file in out.iterdir()} >= {"adapter_config.json", "tune.json"}
    done = launched("torchrun", "check", model, *words, "--config", out, "--floor", "0.01")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed: agreement") == 1
