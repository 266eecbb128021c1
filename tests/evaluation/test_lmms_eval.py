"""The model of lmms-eval: found by entry point, asked by its six arguments, pruned as told.

Runs against the package where it can be imported, else against the names it needs of it.
"""

import importlib
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import lmms_eval_names
import pytest
import torch

from dare_hf.assets import model_path
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.tasks import scene, scene_render

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
VOLCANO = str(model_path("dare-tiny-volcano"))
ITEMS = scene.sample(4, "easy", seed=3)
DOCS = [
    {"image": scene_render.scene_to_image(item), "question": item.prompt.replace("<image>", "")}
    for item in ITEMS
]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "top_p": None, "do_sample": False}


@pytest.fixture(scope="module")
def harness():
    """The class, by the path that the entry point tells."""
    with pytest.MonkeyPatch.context() as patch:
        lmms_eval_names.provide(patch)
        for name in ("dare_hf.integrations.lmms_eval_model",):
            patch.delitem(sys.modules, name, raising=False)
        entry = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
        module, function = entry["lmms_eval.models"]["dare_hf"].split(":")
        manifest = getattr(importlib.import_module(module), function)()
        assert manifest.model_id == "dare_hf"
        path, name = manifest.chat_class_path.rsplit(".", 1)
        yield getattr(importlib.import_module(path), name)
        sys.modules.pop(path, None)


def to_messages(doc, **rounds):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def request(number, settings=None, messages=to_messages):
    """A request as lmms-eval makes one for chat models: six arguments."""
    settings = dict(GREEDY) if settings is None else settings
    return SimpleNamespace(args=(f"ctx {number}", messages, settings, number, "scene", "test"))


def made(harness, arguments="", **more):
    lm = harness.create_from_arg_string(f"pretrained={VOLCANO}{arguments}", {"device": None} | more)
    lm.task_dict["scene"] = {"test": DOCS}
    return lm


def alone(lm, number, length=12):
    """The model's own answer, by transformers alone."""
    processor = lm.prompts.processor
    inputs = processor(
        text=["<image>" + DOCS[number]["question"]],
        images=[DOCS[number]["image"]],
        return_tensors="pt",
    )
    out = lm.model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_it_is_a_chat_model_of_the_harness(harness):
    from lmms_eval.api.model import lmms

    assert issubclass(harness, lmms)
    assert harness.is_simple is False


def test_answers_come_in_the_order_of_the_requests(harness):
    lm = made(harness, ",config=full", batch_size=2)
    short = GREEDY | {"max_new_tokens": 3}
    requests = [request(0), request(1, short), request(2), request(3, short), request(1)]
    answers = lm.generate_until(requests)
    expected = [alone(lm, n, length) for n, length in ((0, 12), (1, 3), (2, 12), (3, 3), (1, 12))]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > 2
    assert answers[1].token_counts.output_tokens <= 3
    assert answers[0].token_counts.input_tokens > 16


def test_it_prunes_and_counts(harness):
    lm = made(harness, ",config=safe,vision_retention=0.4", batch_size=4)
    answers = lm.generate_until([request(n) for n in range(4)])
    assert all(answer.text for answer in answers)
    assert lm.totals.kv_ratio < 0.95
    assert lm.totals.flops_ratio < 1
    assert lm.model._dare.controller.settings.config.vision_retention == 0.4


def test_answers_end_at_the_tasks_stop_strings(harness):
    lm = made(harness, ",config=full")
    (whole,) = lm.generate_until([request(0)])
    stop = whole.text[4]
    (cut,) = lm.generate_until([request(0, GREEDY | {"until": ["", stop]})])
    assert cut.text == whole.text.split(stop)[0] != whole.text


def test_rounds_go_on_until_the_task_ends_them(harness):
    lm = made(harness, ",config=full")
    heard = []

    def rounds(doc, round_idx, previous_output, previous_round_info):
        heard.append((round_idx, list(previous_output or []), previous_round_info))
        return to_messages(doc), round_idx == 2, previous_output, f"after {round_idx}"

    assert lm.generate_until_multi_round([request(0, messages=rounds)]) == [[alone(lm, 0)] * 2]
    said = alone(lm, 0)
    assert heard == [(0, [], None), (1, [said], "after 0"), (2, [said] * 2, "after 1")]


@torch.no_grad()
def test_likelihoods_are_those_of_one_forward(harness):
    lm = made(harness, ",config=full")
    processor = lm.prompts.processor
    text = alone(lm, 0, 4)
    other = alone(lm, 1, 12)[-6:]

    def asked(continuation):
        arguments = (DOCS[0]["question"], continuation, lambda doc: [doc["image"]], 0, "scene")
        return SimpleNamespace(args=(*arguments, "test"))

    found = lm.loglikelihood([asked(text), asked(lambda doc: other)])
    for (total, greedy), continuation in zip(found, (text, other), strict=True):
        inputs = processor(
            text=["<image>" + DOCS[0]["question"]], images=[DOCS[0]["image"]], return_tensors="pt"
        )
        ids = torch.tensor([processor.tokenizer.encode(continuation, add_special_tokens=False)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        steps = lm.model(**inputs).logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)
        assert total == pytest.approx(float(steps.gather(-1, ids[0][:, None]).sum()), abs=1e-3)
        assert greedy == bool((steps.argmax(-1) == ids[0]).all())
    assert found[0][0] > found[1][0]


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (",vision_retention=2", {}, "vision_retention"),
        (",config=full,vision_retention=0.4", {}, "full"),
        ("", {"batch_size": "auto"}, "batch_size"),
        (",compression_ratio=0.5", {}, "retention"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(harness, arguments, more, message):
    with pytest.raises((DareInputError, DareConfigError), match=message):
        made(harness, arguments, **more)


def test_several_processes_are_refused(harness, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DareInputError, match="WORLD_SIZE=2"):
        made(harness)


def test_what_generate_does_not_know_and_videos_are_refused(harness):
    lm = made(harness, ",config=full")
    with pytest.raises(DareInputError, match="max_newtokens"):
        lm.generate_until([request(0, {"max_newtokens": 4})])

    def video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(DareInputError, match="video"):
        lm.generate_until([request(0, messages=video)])
