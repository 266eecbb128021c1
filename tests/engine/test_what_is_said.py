"""What a user says is what happens: rates, reports of other threads, warnings, checked configs."""

import copy
import logging
import threading

import pytest
import transformers
from laws import SCORER, dare, forward, generate, inputs_of
from peft_runs import LEARNED, adapted, learn
from transformers import GenerationConfig, TextIteratorStreamer

from dare_hf import (
    DareConfig,
    apply_dare,
    dare_disabled,
    last_report,
    remove_dare,
)
from dare_hf.engine.attach import state_of
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.testing import tiny_inputs, tiny_model

NAMES = ("llava", "qwen2_5_vl")


def ran(report, kind: str) -> float:
    """Return the mean over the layers of what the prompt's layers held."""
    shares = [layer[kind] for layer in report.retention[0]]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [4, 9])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vision_retention": 0.35, "scorer": "random"},
        {"vision_retention": 0.8},
        {"vision_retention": 0.6, "text_retention": 0.8, "scorer": SCORER},
        {"vision_retention": 0.3, "scorer": "key_norm", "plan_every": 2},
        {"schedule": "two_stage", "scorer": "key_norm", "text_retention": 1.0},
        {"schedule": "two_stage", "text_retention": 0.75, "cut_layer": 1, "scorer": SCORER},
        {"schedule": "constant", "vision_retention": 0.5, "pruned": "drop", "scorer": SCORER},
    ],
)
def test_the_rate_that_is_named_is_realised(name, layers, fields):
    model = tiny_model(name, layers=layers)
    config = DareConfig(**fields)
    inputs = inputs_of(model, (2,), text=(60,))
    with dare(model, config):
        generate(model, inputs)
        report = last_report(model)
    for kind in ("vision", "text"):
        asked = getattr(config, f"{kind}_retention")
        one = 1 / report.tokens[kind][0]
        assert asked - 1e-6 <= ran(report, kind) <= asked + one, f"{kind}: {report}"
    assert not any("asked for" in note for note in report.notes)


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_out_of_reach_is_the_nearest_and_said_once(name, told):
    model = tiny_model(name)  # of 4 layers the attention scorer leaves 2 whole
    inputs = inputs_of(model, (2,))
    config = DareConfig(vision_retention=0.2)
    for _ in range(2):
        with dare(model, config):
            generate(model, inputs)
            report = last_report(model)
        one = 1 / report.tokens["vision"][0]
        assert 0.5 <= ran(report, "vision") <= 0.5 + one
        (note,) = [note for note in report.notes if "vision_retention" in note]
        assert "0.2" in note
        assert "0.5" in note
    assert len([text for text in told if "vision_retention" in text]) == 1
    with dare(model, schedule=[(0.5, 1.0)] * 4, vision_retention=0.1):
        generate(model, inputs)
        assert not any("asked for" in note for note in last_report(model).notes), (
            "lists are literal"
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_protection_costs_is_said(name, told):
    model = tiny_model(name)
    inputs = inputs_of(model, (1,))
    fields = {"scorer": "random", "schedule": "constant", "vision_retention": 1.0}
    for _ in range(2):
        with dare(model, text_retention=0.3, prefix_tokens=8, **fields):
            generate(model, inputs)
            report = last_report(model)
        (note,) = [note for note in report.notes if "text_retention" in note]
        assert "0.3" in note
        assert f"{ran(report, 'text'):.4g}" in note
    assert len([text for text in told if "text_retention: asked" in text]) == 1


def test_the_temperature_is_the_active_adapters():
    model = adapted(tiny_model("llava"), name="one", tau_start=0.9)
    model.add_adapter("two", DareConfig(**LEARNED, tau_start=0.3))
    controller = state_of(model).controller
    controller.tau = 0.5
    assert controller.tau == 0.5, "one training step after the other"
    model.set_adapter("two")
    assert controller.tau == 0.3
    learn(model)
    assert controller.tau == 0.3
    model.set_adapter("one")
    assert controller.tau == 0.9


def test_the_default_is_the_default_config():
    runs = []
    for config in (None, DareConfig(), "preset"):
        model = tiny_model("llava", layers=6)
        config = DareConfig.preset("safe") if config == "preset" else config
        apply_dare(model, config)
        runs.append((forward(model, inputs_of(model)).logits, state_of(model).controller.table))
    for logits, table in runs[1:]:
        assert logits.equal(runs[0][0])
        assert table == runs[0][1]


def test_a_preset_takes_another_rate():
    model = tiny_model("llava", layers=9)
    inputs = inputs_of(model, (2,))
    held = []
    for rate in (7 / 12, 0.4):
        with dare(model, DareConfig.preset("safe", vision_retention=rate)):
            generate(model, inputs)
            held.append(last_report(model).kv_bytes)
    assert held[1] < held[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_checked_when_it_is_applied(name):
    model = tiny_model(name)
    config = DareConfig()
    config.vision_retention = 7
    with pytest.raises(DareConfigError, match=r"vision_retention .*got 7"):
        apply_dare(model, config)
    plain = generate(model, inputs_of(model)).sequences
    config.vision_retention = 0.6
    with dare(model, config):
        first = forward(model, inputs_of(model)).logits
        config.pruned, config.vision_retention = "drop", 7  # not what was applied
        assert forward(model, inputs_of(model)).logits.equal(first)
    assert generate(model, inputs_of(model)).sequences.equal(plain)


class Words:
    """What a streamer needs of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_of_a_generate_in_another_thread(name):
    model = tiny_model(name)
    with dare(model, scorer="random"):
        for images in (1, 2, 1):  # each report is that run's and no older one's
            inputs = inputs_of(model, (images,))
            streamer = TextIteratorStreamer(Words())
            gate = threading.Event()
            options = {"streamer": streamer, "max_new_tokens": 3, "eos_token_id": None}

            def run(inputs=inputs, options=options, gate=gate):
                model.generate(**copy.deepcopy(inputs), **options)
                gate.wait(30)

            thread = threading.Thread(target=run)
            thread.start()
            text = "".join(streamer)
            report = last_report(model)
            gate.set()
            thread.join()
            vision = report.tokens["vision"][0]
            assert vision == int((inputs["input_ids"] == _image_id(model)).sum())
            assert text.count(" ") >= 3
            assert report.seconds > 0
            assert report.kv_bytes == report.kv_bytes_predicted > 0
            assert last_report(model).flops == report.flops


def _image_id(model) -> int:
    return model.config.image_token_id


def test_a_streamer_that_ends_slowly_finds_its_report():
    """Generate ends the streamer before it returns; the report is there by then."""
    model, seen = tiny_model("llava"), []

    class Slow(TextIteratorStreamer):
        def end(self):
            seen.append(last_report(model))

    with dare(model, scorer="random"):
        generate(model, inputs_of(model, (0,), pixels=True), streamer=Slow(Words()))
        assert seen[0].flops == last_report(model).flops
        assert seen[0].tokens["vision"] == [0] * len(seen[0].tokens["vision"])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_dare_is_said(name):
    model = tiny_model(name)
    inputs = inputs_of(model)
    apply_dare(model, DareConfig(scorer="random"))
    with dare_disabled(model):
        model.generate(**copy.deepcopy(inputs), max_new_tokens=2)
        with pytest.raises(DareStateError, match="dare_disabled"):
            last_report(model)
    with pytest.raises(DareStateError, match="dare_disabled"):
        last_report(model)
    generate(model, inputs)
    assert not any("dare_disabled" in note for note in last_report(model).notes)
    with dare_disabled(model):
        forward(model, inputs)
    assert any("dare_disabled" in note for note in last_report(model).notes)
    with pytest.raises(DareStateError, match="nothing has run"):
        last_report(copy.deepcopy(model))
    remove_dare(model)


def test_warnings_come_once_and_keep_to_the_verbosity(told):
    model = tiny_model("llava")
    config = DareConfig(text_retention=0.7, vision_retention=1.0, scorer="random")
    transformers.logging.set_verbosity_error()
    with dare(model, config):
        pass
    assert told == []
    logging.Logger.warning_once.cache_clear()
    transformers.logging.set_verbosity_warning()
    for _ in range(3):
        with dare(model, config):
            pass
    assert len(told) == 1
    assert "pruning text without training" in told[0]


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_the_generation_config_may_be_given_or_not(name, told):
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    own = model.generation_config
    own.cache_implementation = "dynamic"
    with dare(model, scorer="random"):
        expected = model.generate(**copy.deepcopy(inputs), max_new_tokens=4)
        mine = copy.deepcopy(own)
        mine.max_new_tokens = 4
        for config, fields in ((own, {"max_new_tokens": 4}), (mine, {})):
            found = model.generate(**copy.deepcopy(inputs), generation_config=config, **fields)
            assert found.equal(expected)
            assert last_report(model).kv_bytes > 0
        assert own.cache_implementation == "dynamic"
        for kind in ("static", "offloaded"):
            other = GenerationConfig(cache_implementation=kind, max_new_tokens=2, pad_token_id=0)
            with pytest.raises(DareInputError, match=kind):
                model.generate(**copy.deepcopy(inputs), generation_config=other)
        with pytest.raises(DareInputError, match="dynamic"):
            model.generate(**copy.deepcopy(inputs), cache_implementation="dynamic")
