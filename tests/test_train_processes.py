"""Two processes (gloo) train as one on the same global batch, also where one sees no image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "train_two.py"


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    found = {}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for count, name, command in ((1, "one", []), (2, "two", launch)):
        out = tmp_path / f"{name}.safetensors"
        done = subprocess.run(
            [sys.executable, *command, str(SCRIPT), str(out)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"processes: {count}" in done.stdout
        found[name] = load_file(out)
    assert found["one"].keys() == found["two"].keys()
    assert len(found["one"]) > 12
    for key, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][key], tensor, rtol=5e-4, atol=5e-5, msg=key)
