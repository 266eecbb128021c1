"""Two processes (gloo) train as one on the same global batch, also where one sees no image."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dare_hf.testing import tiny_model
from dare_hf.training import end_processes

SCRIPT = Path(__file__).parents[1] / "support" / "train_two.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RECIPE = """
model: volcano
out: run
task: scene
steps: 2
batch_size: 2
calibrate: 2
save_every: 1
dare: {vision_retention: 0.4, text_retention: 0.7, max_hops: 4}
lora: {r: 4}
"""


def run_in(folder: Path, *command: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_ddp_ends_before_its_group():
    """DDP in a cycle, as a Trainer leaves it: a group that ends before it hangs now and then."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    wrapped = DistributedDataParallel(torch.nn.Linear(2, 2))
    wrapped.own = [wrapped]
    open_when_it_ended = []
    weakref.finalize(wrapped, lambda: open_when_it_ended.append(distributed.is_initialized()))
    del wrapped
    end_processes()
    assert open_when_it_ended == [True]
    assert not distributed.is_initialized()
    end_processes()  # nothing to end


@pytest.mark.parametrize(
    "bits", [pytest.param(32, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.extras)]
)
def test_two_processes_are_one(tmp_path, bits):
    backbone = []
    if bits == 4:
        pytest.importorskip("bitsandbytes")
        backbone = [str(tmp_path / "llava")]
        tiny_model("llava").save_pretrained(backbone[0])
    found = {}
    for count, name, launch in ((1, "one", []), (2, "two", TWO)):
        out = tmp_path / f"{name}.safetensors"
        said = run_in(tmp_path, *launch, str(SCRIPT), str(out), *backbone)
        assert f"processes: {count}" in said
        found[name] = load_file(out)
    assert found["one"].keys() == found["two"].keys()
    assert len(found["one"]) > 12
    for key, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][key], tensor, rtol=5e-4, atol=5e-5, msg=key)


@pytest.mark.slow
def test_a_recipe_runs_in_two_processes_and_one_of_them_writes(tmp_path):
    (tmp_path / "run.yaml").write_text(RECIPE)
    printed = run_in(tmp_path, *TWO, "-m", "dare_hf.cli", "train", "--config", "run.yaml")
    assert [printed.count(f"{name}: run/{name}") for name in ("lora", "dare")] == [1, 1]
    assert (tmp_path / "run" / "training_log.jsonl").read_text().count("train_runtime") == 1
    for name in ("lora", "dare"):
        first, last, saved = (
            load_file(tmp_path / "run" / place / name / "adapter_model.safetensors")
            for place in ("checkpoint-1", "checkpoint-2", ".")
        )
        assert saved.keys() == last.keys() == first.keys()
        assert all(tensor.isfinite().all() for tensor in saved.values())
        assert all(torch.equal(tensor, last[key]) for key, tensor in saved.items())
        assert any(not torch.equal(tensor, first[key]) for key, tensor in saved.items())


@pytest.mark.slow
def test_rows_held_out_are_judged_alike_in_two_processes(tmp_path):
    found = []
    for count, launch in ((1, []), (2, TWO)):
        held = {"save_every": 1, "validate": 4, "steps": 1, "warmup": 5}  # no step at rate 0
        held |= {"batch_size": 4 // count, "out": f"run{count}"}
        recipe = yaml.safe_load(RECIPE) | held
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
        run_in(tmp_path, *launch, "-m", "dare_hf.cli", "train", "--config", "run.yaml")
        lines = (tmp_path / f"run{count}" / "training_log.jsonl").read_text().splitlines()
        found += [
            entry["eval_loss"] for line in lines if "eval_loss" in (entry := json.loads(line))
        ]
    assert len(found) == 2
    assert found[0] == pytest.approx(found[1], abs=1e-4)
