"""Models that accelerate dispatched: to the CPU and back, to the disk, by a device map."""

from __future__ import annotations

import accelerate
import pytest
import torch
from places import (
    FULL,
    MODELS,
    PRUNED,
    assert_same_trace,
    place_inputs,
    place_model,
    plain_trace,
    routed_trace,
    trace,
)
from transformers import AutoModelForImageTextToText

from dare_hf import apply_dare, remove_dare
from dare_hf.architectures.locate import locate

CPU = torch.device("cpu")


def to_the_cpu(model, folder):
    """Weights on the CPU, moved to the executing device for each module's forward."""
    accelerate.cpu_offload(model, execution_device=CPU)


def to_the_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def by_a_map(model, folder):
    """The tower stays, some decoder layers are on the disk: one layer whole, one in parts."""
    accelerate.dispatch_model(model, device_map(model), main_device="cpu", offload_dir=str(folder))


def device_map(model) -> dict[str, str]:
    path = locate(model).spec.layers
    disk = [f"{path}.1", *(f"{path}.2.{name}" for name in ("self_attn", "mlp"))]
    found: dict[str, str] = {}
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        place = next((part for part in disk if f"{owner}.".startswith(f"{part}.")), owner)
        found[place] = "disk" if place in disk else "cpu"
    return found


PLACES = {"cpu": to_the_cpu, "disk": to_the_disk, "map": by_a_map}
WAYS = [
    *(("llava", place) for place in PLACES),
    *(pytest.param(name, "map", marks=pytest.mark.slow) for name in MODELS[1:]),
]


@pytest.mark.parametrize(("name", "place"), WAYS)
def test_hooks_before_dare(name, place, tmp_path):
    model = place_model(name)
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    expected = {case: routed_trace(model, inputs, config) for case, config in PRUNED.items()}
    PLACES[place](model, tmp_path)
    assert_same_trace(routed_trace(model, inputs, FULL), plain, "retention 1.0")
    for case, config in PRUNED.items():
        found = routed_trace(model, inputs, config)
        assert_same_trace(found, expected[case], case, tolerance=0.0)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)


@pytest.mark.parametrize(("name", "place"), WAYS[:4])
def test_hooks_after_dare(name, place, tmp_path):
    model = place_model(name)
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    expected = routed_trace(model, inputs, PRUNED["attention"])
    apply_dare(model, PRUNED["attention"])
    PLACES[place](model, tmp_path)
    assert_same_trace(trace(model, inputs), expected, "with hooks", tolerance=0.0)
    remove_dare(model)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)
    assert_same_trace(routed_trace(model, inputs, FULL), plain, "retention 1.0")


def test_hooks_are_taken_off_under_dare(tmp_path):
    model = place_model("llava")
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    expected = routed_trace(model, inputs, PRUNED["attention"])
    apply_dare(model, PRUNED["attention"])
    by_a_map(model, tmp_path)
    trace(model, inputs)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same_trace(trace(model, inputs), expected, "hooks removed", tolerance=0.0)
    remove_dare(model)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)


@pytest.mark.parametrize("name", ["llava", pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_from_pretrained_with_a_device_map(name, tmp_path):
    model = place_model(name)
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    expected = {case: routed_trace(model, inputs, config) for case, config in PRUNED.items()}
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=device_map(model), offload_folder=tmp_path / "disk"
    )
    loaded.generation_config = model.generation_config
    assert any(p.device.type == "meta" for p in loaded.parameters()), "nothing is on the disk"
    assert_same_trace(routed_trace(loaded, inputs, FULL), plain, "retention 1.0")
    for case, config in PRUNED.items():
        found = routed_trace(loaded, inputs, config)
        assert_same_trace(found, expected[case], case, tolerance=0.0)
    assert_same_trace(plain_trace(loaded, inputs), plain, "after remove_dare", tolerance=0.0)
