"""DARE for one block or one call; presets and configurations by name."""

import copy
import threading

import pytest
import torch
from laws import SCORER, assert_same_run, dare, generate, inputs_of, shared_model
from peft import PeftModel
from peft_runs import saved
from transformers import LogitsProcessor
from transformers.generation import LogitsProcessorList

import dare_hf
from dare_hf import DareConfig, apply_dare, dare_applied, dare_disabled, last_report, remove_dare
from dare_hf.engine.attach import state_of
from dare_hf.errors import DareConfigError, DareStateError
from dare_hf.testing import tiny_model

NAMES = ("llava", "gemma3", "chameleon")
PRUNED = {"vision_retention": 0.4, "text_retention": 0.6}
BASE = DareConfig(scorer="random", schedule="constant", seed=3, **PRUNED)
OTHERS = {
    "attention": DareConfig(schedule="constant", decode_window=2, max_kv_tokens=14, **PRUNED),
    "function": DareConfig(
        scorer=SCORER, schedule="constant", pruned="drop", hop_delimiters=tuple(range(10, 60)),
        hop_decay=0.5, **PRUNED,
    ),
    "everything": DareConfig(vision_retention=1.0, text_retention=1.0),
}  # fmt: skip


def told(model):
    report = last_report(model).to_dict()
    report.pop("seconds")
    return report


def marks(model):
    """Every attribute DARE could have left."""
    return [name for m in model.modules() for name in vars(m) if "dare" in name]


@pytest.mark.parametrize("name", NAMES)
def test_on_and_exactly_off(name):
    model = shared_model(name)
    inputs = inputs_of(model)
    plain = generate(model, inputs)
    with dare(model, BASE):
        expected, report = generate(model, inputs), told(model)
    with dare_applied(model, BASE) as patched:
        assert patched is model
        assert_same_run(generate(model, inputs), expected, tolerance=0, what=name)
        assert told(model) == report
        with pytest.raises(DareStateError), dare_applied(model):
            pass
        assert_same_run(generate(model, inputs), expected, tolerance=0, what=f"{name}, still on")
    with pytest.raises(KeyError), dare_applied(model, "safe"):
        raise KeyError
    with dare_applied(model):
        remove_dare(model)
    with pytest.raises(DareConfigError), dare_applied(model, DareConfig(scorer="router")):
        pass
    assert marks(model) == []
    assert_same_run(generate(model, inputs), plain, tolerance=0, what=f"{name}, off")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", OTHERS)
def test_settings_of_one_call(name, other):
    model, config = shared_model(name), OTHERS[other]
    inputs = inputs_of(model, (0, 1, 2))
    plain = generate(model, inputs)
    with dare(model, config):
        wanted, report = generate(model, inputs), told(model)
    with dare(model, BASE):
        own, own_report = generate(model, inputs), told(model)
        found = generate(model, inputs, dare_config=config)
        assert_same_run(found, wanted, tolerance=0, what=f"{name}, {other}")
        assert told(model) == report
        assert_same_run(generate(model, inputs), own, tolerance=0, what=f"{name}, its own again")
        assert told(model) == own_report
        assert state_of(model).controller.config is BASE or (
            state_of(model).controller.config == BASE.checked()
        )
    assert marks(model) == []
    assert_same_run(generate(model, inputs), plain, tolerance=0, what=f"{name}, off")


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise KeyError("broken")


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_a_call_cannot_have(name, tmp_path):
    model = tiny_model(name)
    inputs = inputs_of(model)
    with dare(model, BASE):
        own = generate(model, inputs)
        refused = [
            (DareConfigError, DareConfig(scorer="router")),
            (DareConfigError, DareConfig(schedule="learned")),
            (DareConfigError, DareConfig(schedule=[(0.5, 0.5)])),
            (DareConfigError, DareConfig(hop_delimiters=("</s>",))),
            (DareConfigError, "safe"),
            (DareConfigError, {"vision_retention": 0.5}),
        ]
        for error, config in refused:
            with pytest.raises(error):
                generate(model, inputs, dare_config=config)
            assert generate(model, inputs).sequences.equal(own.sequences)
        with dare_disabled(model), pytest.raises(DareStateError, match="dare_config"):
            generate(model, inputs, dare_config=OTHERS["function"])
        broken = LogitsProcessorList([Broken()])
        with pytest.raises(KeyError, match="broken"):
            generate(model, inputs, dare_config=OTHERS["attention"], logits_processor=broken)
        assert_same_run(generate(model, inputs), own, tolerance=0, what=f"{name}, after a fault")
    folder = saved(tmp_path, name)
    routed = apply_dare(model, folder)
    wrapped = PeftModel.from_pretrained(tiny_model(name), folder).eval()
    for adapted in (routed, wrapped):
        expected = generate(adapted, inputs)
        with pytest.raises(DareStateError, match="adapter 'default'"):
            generate(adapted, inputs, dare_config=OTHERS["function"])
        assert_same_run(generate(adapted, inputs), expected, tolerance=0, what=f"{name}, routed")


class Waiting(LogitsProcessor):
    """Holds a generate in the middle until another thread has run."""

    def __init__(self, begun, go):
        self.begun, self.go = begun, go

    def __call__(self, input_ids, scores):
        self.begun.set()
        assert self.go.wait(60)
        return scores


@pytest.mark.parametrize("name", NAMES[:2])
def test_another_thread_keeps_its_settings(name):
    model = shared_model(name)
    inputs = inputs_of(model)
    with dare(model, BASE):
        own = generate(model, inputs)
        wanted = generate(model, inputs, dare_config=OTHERS["function"])
        begun, go, found = threading.Event(), threading.Event(), []

        def run():
            wait = LogitsProcessorList([Waiting(begun, go)])
            config = OTHERS["function"]
            found.append(generate(model, inputs, dare_config=config, logits_processor=wait))

        thread = threading.Thread(target=run)
        thread.start()
        assert begun.wait(60)
        assert_same_run(generate(model, inputs), own, tolerance=0, what=f"{name}, meanwhile")
        go.set()
        thread.join()
        assert_same_run(found[0], wanted, tolerance=0, what=f"{name}, the other thread")


@pytest.mark.parametrize("name", NAMES[:2])
def test_by_name(name, tmp_path):
    model = shared_model(name)
    inputs = inputs_of(model, (2,), text=40)
    with dare(model, DareConfig.preset("safe")):
        safe = generate(model, inputs)
    BASE.save_pretrained(tmp_path)
    with dare(model, BASE):
        base = generate(model, inputs)
    for given, expected in (("safe", safe), (str(tmp_path), base), (tmp_path, base)):
        with dare_applied(model, given):
            assert_same_run(generate(model, inputs), expected, tolerance=0, what=f"{given}")
    DareConfig(scorer="router").save_pretrained(tmp_path)
    for given in (tmp_path, "paper", "no-such-preset", torch.zeros(1)):
        with pytest.raises(DareConfigError):
            apply_dare(model, given)
    assert marks(model) == []


def test_it_is_public():
    assert "dare_applied" in dare_hf.__all__
    assert copy.copy(dare_hf.dare_applied) is dare_applied
