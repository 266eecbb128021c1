"""dare-tiny-volcano as shipped: loads offline, writes boxes, looks again, reads the mark there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from dare_hf.assets import model_path
from dare_hf.errors import DareInputError
from dare_hf.generation import crop_pixels
from dare_hf.tasks import scene, scene_render, vocot

SIZE_LIMIT = 8 * 2**20
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def path() -> Path:
    return model_path("dare-tiny-volcano")


@pytest.fixture(scope="module")
def model(path: Path) -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def processor(path: Path) -> LlavaProcessor:
    return AutoProcessor.from_pretrained(path)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the training script trains on."""
    if not SCRIPTS.is_dir():
        pytest.skip("the training scripts are not in this tree")
    monkeypatch.syspath_prepend(SCRIPTS)
    import volcano_lm

    return volcano_lm.Sampler(volcano_lm.Plan())


def test_it_is_small_and_loads_as_the_real_classes_in_float32(
    path: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    assert sum(file.stat().st_size for file in path.iterdir()) <= SIZE_LIMIT
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.text_config.num_hidden_layers >= 8


def test_the_tokenizer_gives_clean_text_and_marks_unknown_words(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    for item in scene.sample(20, "hard"):
        question = item.prompt.removesuffix(" <image>")
        for text in (
            question,
            scene.box_text(item.looks()[-1].box),
            f"The answer is {item.answer}.",
        ):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")


def test_its_first_look_cannot_tell_marks_apart_and_its_second_can(
    processor: LlavaProcessor,
) -> None:
    for item in scene.sample(10, "hard"):
        first, second = [], []
        for mark in range(len(scene.MARKS)):
            shapes = tuple(
                scene.Shape(s.row, s.column, s.colour, s.form, mark) for s in item.shapes
            )
            other = scene.SceneItem(shapes, item.reference, item.relations)
            first.append(vocot.build_inputs(processor, [other])["pixel_values"])
            crop = crop_pixels(scene_render.scene_to_image(other), other.looks()[-1].box)
            second.append(processor.image_processor(crop, return_tensors="pt")["pixel_values"])
        assert all(torch.equal(first[0], pixels) for pixels in first[1:])
        assert all(
            not torch.equal(second[a], second[b]) for a in range(len(second)) for b in range(a)
        )


def test_training_sees_what_the_processor_and_the_crop_give(
    sampler: Any, processor: LlavaProcessor
) -> None:
    for item in scene.sample(10, "train"):
        inputs = vocot.build_inputs(processor, [item])
        assert torch.equal(sampler.pixels.picture(item.shapes), inputs["pixel_values"][0])
        ids, _, _ = sampler.example(item, blind=False)
        assert ids[: inputs["input_ids"].shape[1]] == inputs["input_ids"][0].tolist()
        picture = scene_render.scene_to_image(item)
        for shape in item.shapes:
            crop = processor.image_processor(crop_pixels(picture, shape.box), return_tensors="pt")
            assert torch.equal(sampler.pixels.crop(shape), crop["pixel_values"][0])


def test_a_right_solution_is_token_for_token_what_was_trained(
    sampler: Any, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = scene.sample(4, "easy", seed=3)
    for refocus in (True, False):
        for solution in vocot.solve(model, processor, items, batch_size=1, refocus=refocus):
            ids, _, _ = sampler.example(solution.item, blind=not refocus)
            wanted = ids[solution.prompt_length :]
            answer = len(wanted) - 3  # before the dot and the end
            got = list(solution.ids)
            assert len(got) == len(wanted)
            assert got[:answer] == wanted[:answer]
            if refocus:
                assert got == wanted


def test_it_solves_held_out_scenes_alone_and_in_a_padded_batch(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = scene.sample(12, "easy", seed=1)
    seen: list[vocot.BatchOutput] = []
    together = vocot.solve(model, processor, items, batch_size=12, on_batch=seen.append)
    assert len(seen) == 1
    assert (seen[0].inputs["attention_mask"][:, 0] == 0).any(), "the batch has no padding"
    assert [s.item for s in together] == items
    assert sum(s.correct for s in together) >= 11
    assert "_dare" not in vars(model), "a plain model is left plain"
    alone = vocot.solve(model, processor, items[:3], batch_size=1)
    for one, other in zip(alone, together[:3], strict=True):
        assert (one.text, one.answer, one.box_correct) == (
            other.text,
            other.answer,
            other.box_correct,
        )


def test_without_the_second_look_it_names_the_box_and_guesses_the_mark(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = scene.sample(32, "easy", seed=1)
    result = vocot.score(vocot.solve(model, processor, items, refocus=False))
    assert result.unparsed == 0
    assert result.boxes_right >= 0.9
    # A guess among four: 32 trials give 22 or more once in ten million times.
    assert result.accuracy < 22 / 32


def test_keeping_everything_is_the_plain_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = scene.sample(3, "easy", seed=4)
    inputs = vocot.build_inputs(processor, items)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    kept: list[vocot.BatchOutput] = []
    vocot.solve(model, processor, items, refocus=False, on_batch=kept.append, max_new_tokens=16)
    assert torch.equal(kept[0].outputs, plain)


@pytest.mark.slow
def test_it_keeps_its_measured_quality(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = scene.sample(200, "easy", seed=2)
    seeing = vocot.score(vocot.solve(model, processor, items))
    blind = vocot.score(vocot.solve(model, processor, items, refocus=False))
    assert seeing.accuracy >= 0.95
    assert seeing.accuracy - blind.accuracy >= 0.2


def test_scores_count_unparsed_answers_and_surplus_boxes_as_wrong() -> None:
    item = scene.sample(1, "easy")[0]
    common = {"item": item, "text": "", "boxes": (), "ids": (), "prompt_length": 0}
    good = vocot.Solution(answer=item.answer, correct=True, box_correct=(True, True), **common)
    bad = vocot.Solution(answer=None, correct=False, box_correct=(True, False), **common)
    result = vocot.score([good, bad])
    assert (result.accuracy, result.unparsed, result.boxes_right) == (0.5, 0.5, 0.75)
    low, high = result.accuracy_interval
    assert 0 < low < 0.5 < high < 1
    with pytest.raises(DareInputError):
        vocot.score([])
