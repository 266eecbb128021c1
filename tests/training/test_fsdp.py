"""FSDP2 trains routers and a LoRA as one process does; its checkpoints, whole or in parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import inputs_of
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from trainer_runs import Items, routed_model, together, trainer_of

from dare_hf import last_report
from dare_hf.errors import DareStateError
from dare_hf.routers.sharded import in_parts
from dare_hf.training import auxiliary_loss
from dare_hf.training.fsdp import fsdp_kind, take_buffers_of_first

SCRIPT = Path(__file__).parents[1] / "support" / "fsdp_two.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Sums over rows in two parts, through ten steps of Adam.
NEAR = 1e-4
WHOLE, PARTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


@pytest.fixture
def alone():
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model):
    for layer in model.get_base_model().model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_a_sharded_model_trains_and_follows_its_rates(alone):
    found = []
    for shard in (lambda model: model, sharded):
        model = shard(routed_model())
        rows = Items(model.get_base_model(), (1, 0, 2, 1)).rows
        batch = together(model.get_base_model(), rows)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for _ in range(3):
            loss = model.train()(**batch).loss + auxiliary_loss(model)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        inputs = inputs_of(model.get_base_model(), (1, 0, 2))
        if shard is sharded:
            distributed.fsdp.register_fsdp_forward_method(model, "generate")
            assert all(map(in_parts, model.parameters()))
        ids = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)
        found.append((losses, ids.tolist(), last_report(model).to_dict() | {"seconds": 0}))
    (losses, *rest), (sharded_losses, *sharded_rest) = found
    assert sharded_losses == pytest.approx(losses, abs=1e-6)
    assert losses[0] > losses[2]
    assert sharded_rest == rest


def test_rates_that_other_layers_read_are_refused(alone):
    model = sharded(routed_model(plan_every=2))
    batch = together(model.get_base_model(), Items(model.get_base_model(), (1, 0)).rows)
    with pytest.raises(DareStateError, match="plan_every=1"):
        model.train()(**batch)


def test_buffers_are_those_of_the_first_process(alone, monkeypatch):
    routers = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2)]
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: tensor.add_(src + 7))
    take_buffers_of_first([torch.nn.Linear(1, 1)])  # nothing to send
    take_buffers_of_first(routers)
    assert routers[1].running_mean.tolist() == [7, 7]
    assert routers[0].running_var.tolist() == [8, 8, 8]


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model_fsdp_0"])
def test_a_checkpoint_of_fsdp_is_refused_without_fsdp(tmp_path, name):
    assert fsdp_kind(tmp_path) is None
    (tmp_path / name).mkdir()
    assert fsdp_kind(tmp_path) == (WHOLE if name.endswith("bin") else PARTS)
    trainer = trainer_of(tmp_path / "out", routed_model())
    with pytest.raises(DareStateError, match="without FSDP"):
        trainer._load_from_checkpoint(str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs of the script, each once: parameters, buffers, losses and rates."""
    folder, made = tmp_path_factory.mktemp("fsdp"), {}

    def once(name, *words, two=True):
        if name not in made:
            out = folder / f"{name}.safetensors"
            command = [*(TWO if two else []), str(SCRIPT), str(out), *words]
            done = subprocess.run(
                [sys.executable, *command],
                env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            parts = "wrap=ddp" not in words and two
            assert ("sharded: 0" not in done.stdout) == parts, "FSDP did not shard"
            made[name] = load_file(out), folder / name
        return made[name]

    return once


def assert_same(found, expected, steps=range(1, 11)):
    wanted = {k: v for k, v in expected.items() if not k[0].isdigit() or int(k.split()[0]) in steps}
    assert found.keys() == wanted.keys()
    assert {f"{step} loss" for step in steps} < wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=NEAR, atol=NEAR, msg=key)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["attached", "wrapped"])
@pytest.mark.parametrize("state", [WHOLE, PARTS])
def test_two_sharded_processes_are_one(run, kind, state):
    one, _ = run(f"{kind}-one", f"kind={kind}", two=False)
    two, folder = run(f"{kind}-{state}", f"kind={kind}", f"state={state}", "save=5")
    assert_same(two, one)
    assert fsdp_kind(folder / "checkpoint-5") == state
    if kind == "attached" and state == WHOLE:
        saved = load_file(folder / "checkpoint-10" / "dare" / "adapter_model.safetensors")
        rates = [key for key in saved if key.endswith("rate_logits")]
        assert len(rates) == 4
        for key in rates:
            name = key.removeprefix("base_model.model.").replace("dare_router", "dare_router.dare")
            assert torch.equal(saved[key], two[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["attached", "wrapped"])
@pytest.mark.parametrize(("state", "resumed"), [(WHOLE, PARTS), (PARTS, WHOLE)])
def test_a_checkpoint_of_either_form_is_resumed_by_runs_of_the_other(run, kind, state, resumed):
    whole, folder = run(f"{kind}-{state}", f"kind={kind}", f"state={state}", "save=5")
    words = (f"kind={kind}", f"state={resumed}", f"resume={folder / 'checkpoint-5'}")
    again, _ = run(f"{kind}-{state}-again", *words)
    # the log of the first five steps comes with the checkpoint
    assert_same(again, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_running_statistics_are_those_of_ddp(run):
    fsdp, _ = run("means-fsdp", "kind=means", "steps=4")
    ddp, _ = run("means-ddp", "kind=means", "steps=4", "wrap=ddp")
    assert any(key.endswith("mean_update") and tensor.any() for key, tensor in ddp.items())
    assert any(key.endswith("thresholds") for key in ddp)
    assert_same(fsdp, ddp, range(1, 5))
