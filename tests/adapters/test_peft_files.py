"""What an adapter's folder holds, and that it loads only where it fits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from laws import forward, inputs_of
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft_runs import (
    LEARNED,
    MODELS,
    adapted,
    add_quietly,
    learn,
    load_quietly,
    lora,
    routers,
    saved,
    tokens,
)
from safetensors.torch import load_file, save_file
from snapshots import hold_same, snapshot
from transformers import AutoModelForImageTextToText

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.errors import AdapterMismatchError, DareConfigError
from dare_hf.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_router_tensors_only(name, folder):
    tensors = load_file(Path(saved(folder, name)) / "adapter_model.safetensors")
    assert all(key.count("dare_") == 1 for key in tensors)
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert kinds == {"weight", "bias", "rate_logits"}
    assert len(tensors) == 4 * 3
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_fixed_schedule_saves_no_rates(folder):
    tensors = load_file(Path(saved(folder, schedule="constant")) / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"weight", "bias"}


def test_saved_and_loaded_scores_are_bit_equal(folder):
    model = tiny_model("llava")
    adapted(model)
    other = tiny_model("llava")
    apply_dare(other, saved(folder))
    hidden = torch.randn(2, 7, 32)
    modality = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [-1, 0, 1, 1, 0, 0, 0]])
    for ours, theirs in zip(routers(model), routers(other), strict=True):
        assert torch.equal(ours.scores(hidden, modality), theirs.scores(hidden, modality))
        assert torch.equal(ours.rates(), theirs.rates())


def test_the_configuration_comes_back(folder):
    fields = {"cut_layer": 2, "hop_delimiters": (12, (13, 14)), "vision_retention": 0.3}
    path = saved(folder, **fields)
    assert (
        json.loads((Path(path) / "adapter_config.json").read_text())["peft_type"] == "DARE_ROUTER"
    )
    for kind in (PeftConfig, DareConfig):
        config = kind.from_pretrained(path)
        assert type(config) is DareConfig
        assert (config.num_layers, config.hidden_size, config.model_type) == (4, 32, "llava")
        assert {name: getattr(config, name) for name in fields} == fields
        assert (config.scorer, config.schedule) == ("router", "learned")


def test_the_callers_configuration_is_left_alone():
    config = DareConfig(**LEARNED)
    before = dataclasses.replace(config)
    get_peft_model(tiny_model("llava"), config)
    assert config == before, "a configuration could not be used for another model"


def test_the_model_card_says_what_it_is_and_how_to_load_it(tmp_path):
    model = tiny_model("llava")
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    peft_model = adapted(model, vision_retention=0.35)
    peft_model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data["base_model"] == str(tmp_path / "base")
    assert card.data["library_name"] == "peft"
    for text in (
        "import dare_hf",
        "vision 0.35, text 0.7",
        "drop and rescale",
        "schedule: learned",
    ):
        assert text in card.text
    assert "More Information Needed" not in card.text
    card.text = "# My own words\n\n" + card.text
    card.save(tmp_path / "adapter" / "README.md")
    peft_model.save_pretrained(tmp_path / "adapter")
    again = ModelCard.load(tmp_path / "adapter" / "README.md").text
    assert again.count("# My own words") == again.count("## How to load") == 1


@pytest.mark.parametrize("name", MODELS)
def test_auto_model_loads_an_adapters_folder(name, tmp_path):
    model = tiny_model(name)
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    peft_model = adapted(base)
    routed = tokens(peft_model, inputs)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert tokens(loaded, inputs) == routed
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()
    other = tiny_model(name)
    apply_dare(other, tmp_path / "again")
    assert tokens(other, inputs) == routed


LOADERS = {
    "apply_dare": apply_dare,
    "from_pretrained": PeftModel.from_pretrained,
    "load_adapter": lambda model, path: model.load_adapter(path, adapter_name="x"),
    "PeftModel.load_adapter": lambda model, path: model.load_adapter(path, "x"),
}


@pytest.mark.parametrize("way", LOADERS)
@pytest.mark.parametrize("other", ["depth", "width", "architecture"])
def test_a_model_it_was_not_made_for_is_refused(way, other, folder):
    kinds = {
        "depth": lambda: tiny_model("llava", layers=3),
        "width": lambda: tiny_model("llava", hidden_size=64),
        "architecture": lambda: tiny_model("chameleon"),
    }
    model = kinds[other]()
    wrapped = adapted(model) if way == "PeftModel.load_adapter" else model
    before = snapshot(model)
    match = {"depth": "num_layers", "width": "hidden_size", "architecture": "model_type"}[other]
    with pytest.raises(AdapterMismatchError, match=match):
        LOADERS[way](wrapped, saved(folder))
    hold_same(before, snapshot(model))


def broken(path: str, to: Path, change) -> str:
    """A copy of an adapter's folder whose tensors are not what its configuration says."""
    to.mkdir()
    config = (Path(path) / "adapter_config.json").read_text()
    (to / "adapter_config.json").write_text(config)
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    save_file(change(tensors), to / "adapter_model.safetensors")
    return str(to)


def without_a_layer(tensors):
    return {key: value for key, value in tensors.items() if ".3.dare_router" not in key}


def wider(tensors):
    return {k: torch.zeros(2, 40) if k.endswith("weight") else v for k, v in tensors.items()}


@pytest.mark.parametrize("change", [without_a_layer, wider])
def test_a_file_that_does_not_keep_its_promise_is_refused(change, folder, tmp_path):
    path = broken(saved(folder), tmp_path / "broken", change)
    model = tiny_model("llava")
    before = snapshot(model)
    for way in ("apply_dare", "from_pretrained"):
        with pytest.raises(AdapterMismatchError):
            LOADERS[way](model, path)
        hold_same(before, snapshot(model))
    peft_model = adapted(model)
    inputs = inputs_of(model)
    routed = tokens(peft_model, inputs)
    for name in ("default", "another"):
        with pytest.raises(AdapterMismatchError):
            peft_model.load_adapter(path, name)
        assert list(peft_model.peft_config) == ["default"]
        assert tokens(peft_model, inputs) == routed


def renamed(tensors):
    return {f"x.{key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_whose_names_fit_nothing_is_refused(name, folder, tmp_path):
    # transformers only logs them (5.24; happens to deepseek_ocr2, LoRA as well)
    path = broken(saved(folder, name), tmp_path / "renamed", renamed)
    model = tiny_model(name)
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match="layers \\[0, 1, 2, 3\\]"):
        model.load_adapter(path, adapter_name="x")
    assert not model._hf_peft_config_loaded
    hold_same(without_notes(before), without_notes(snapshot(model)))
    model.load_adapter(saved(folder, name), adapter_name="x")


def test_fresh_routers_that_wait_for_a_file_are_refused_at_their_first_use():
    model = tiny_model("llava")
    peft_model = get_peft_model(model, DareConfig(**LEARNED, inference_mode=True))
    for call in (forward, tokens):
        with pytest.raises(AdapterMismatchError, match="layers \\[0, 1, 2, 3\\]"):
            call(peft_model, inputs_of(model))


def without_notes(taken):
    """A snapshot without how transformers named weights, and that there is no adapter."""
    notes = {"_weight_conversions", "_hf_peft_config_loaded"}
    own = {key: value for key, value in taken["modules"][""].items() if key not in notes}
    return {**taken, "modules": {**taken["modules"], "": own}}


def changed(value):
    def change(tensors):
        key = sorted(tensors)[0]
        return tensors | {key: value(tensors[key])}

    return change


CHANGES = {
    "nan": changed(lambda t: t * float("nan")),
    "infinite": changed(lambda t: t * float("inf")),
    "beyond float32": changed(lambda t: t.double() + 1e300),
    "bool": changed(lambda t: t > 0),
    "integer": changed(lambda t: t.int()),
    "complex": changed(lambda t: t.cfloat()),
    "missing": lambda t: {k: v for k, v in t.items() if k != sorted(t)[0]},
    "nothing": lambda t: {},
    "extra": lambda t: t | {"base_model.model.dare_x": torch.zeros(1)},
    "of the base": lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(1)},
    "twice": lambda t: t | {"x." + sorted(t)[0]: torch.zeros(2)},
}
CUTS = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "header": lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "a pickle": lambda file: (torch.save({}, file.with_suffix(".bin")), file.unlink()),
}


def spoiled(path: str, to: Path, kind: str) -> str:
    """A copy of an adapter's folder with other tensors, or a file that cannot be read."""
    copy = broken(path, to, CHANGES.get(kind, lambda tensors: tensors))
    if kind in CUTS:
        CUTS[kind](to / "adapter_model.safetensors")
    return copy


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", LOADERS)
def test_a_load_that_fails_leaves_the_model_as_it_was(way, name, folder, tmp_path):
    model = tiny_model(name)
    wrapped = adapted(model) if way == "PeftModel.load_adapter" else model
    before = without_notes(snapshot(model))
    for kind in [*CHANGES, *CUTS]:
        path = spoiled(saved(folder, name), tmp_path / kind, kind)
        with pytest.raises((AdapterMismatchError, DareConfigError)):
            LOADERS[way](wrapped, path)
        hold_same(before, without_notes(snapshot(model)))
        assert getattr(model, "_hf_peft_config_loaded", False) is False
    LOADERS[way](wrapped, saved(folder, name))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_load_that_fails_beside_a_lora_leaves_the_lora(folder, tmp_path):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    add_quietly(model, lora(), "lora")
    tuned, before = tokens(model, inputs), without_notes(snapshot(model))
    for kind in ("gone", "nan", "missing"):
        with pytest.raises((AdapterMismatchError, DareConfigError)):
            model.load_adapter(spoiled(saved(folder), tmp_path / kind, kind), adapter_name="x")
        hold_same(before, without_notes(snapshot(model)))
        assert list(model.peft_config) == ["lora"]
        assert tokens(model, inputs) == tuned


def test_a_trainable_load_and_a_given_config_are_checked_too(folder, tmp_path):
    path = spoiled(saved(folder), tmp_path / "gone", "gone")
    model = tiny_model("llava")
    before = snapshot(model)
    config = DareConfig.from_pretrained(saved(folder))
    for given in ({"is_trainable": True}, {"config": config}, {"low_cpu_mem_usage": True}):
        with pytest.raises(DareConfigError, match=r"adapter_model\.safetensors"):
            PeftModel.from_pretrained(model, path, **given)
        hold_same(before, snapshot(model))
    with pytest.raises(AdapterMismatchError):
        model.load_adapter(peft_config=config, adapter_state_dict={"x": torch.zeros(1)})
    hold_same(before, snapshot(model))


def test_a_bad_file_for_an_adapter_that_is_there_leaves_it_there(folder, tmp_path):
    model = adapted(tiny_model("llava"), seed=None)
    weights = [router.weight.clone() for router in routers(model)]
    for kind in ("missing", "nan"):
        path = spoiled(saved(folder), tmp_path / kind, kind)
        with pytest.raises(AdapterMismatchError):
            model.load_adapter(path, "default")
        kept = [router.weight for router in routers(model)]
        assert all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))


def test_what_is_no_adapter_is_refused(tmp_path, folder):
    model = tiny_model("llava")
    before = snapshot(model)
    lora(base_model_name_or_path="x").save_pretrained(tmp_path / "lora")
    for source in (tmp_path / "nothing", tmp_path / "lora", "no/such-adapter"):
        with pytest.raises(DareConfigError):
            apply_dare(model, source)
    foreign = broken(
        saved(folder), tmp_path / "foreign", lambda t: {**t, "lm_head.weight": torch.zeros(1)}
    )
    with pytest.raises(AdapterMismatchError, match="lm_head"):
        apply_dare(model, foreign)
    hold_same(before, snapshot(model))


def test_apply_dare_puts_a_frozen_adapter_on_and_takes_it_off(folder):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    plain = tokens(model, inputs)
    before = snapshot(model)
    apply_dare(model, saved(folder, hop_delimiters=(12,)))
    assert tokens(model, inputs) != plain
    assert not any(p.requires_grad for r in routers(model) for p in r.parameters())
    assert model.lm_head.weight.requires_grad, "the base model's own flags are its own"
    remove_dare(model)
    hold_same(before, snapshot(model))


def test_one_of_two_adapters_is_saved_alone(tmp_path):
    peft_model = adapted(tiny_model("llava"), name="one")
    peft_model.add_adapter("two", DareConfig(**LEARNED))
    peft_model.set_adapter("two")
    learn(peft_model, seed=3)
    state = get_peft_model_state_dict(peft_model, adapter_name="two")
    assert len(state) == 4 * 3
    weight = state["base_model.model.model.language_model.layers.0.dare_router.weight"]
    assert torch.equal(weight, routers(peft_model)[0].weight)
    peft_model.save_pretrained(tmp_path, selected_adapters=["two"])
    other = tiny_model("llava")
    load_quietly(other, str(tmp_path / "two"), "two")
    assert torch.equal(routers(other)[0].weight, weight)
