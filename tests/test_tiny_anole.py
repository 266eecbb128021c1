"""dare-tiny-anole as shipped: loads offline, reads pixels, draws whole images, solves mazes."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
)

from dare_hf.assets import model_path
from dare_hf.errors import DareInputError
from dare_hf.generation.interleaved import decode_images, load_decoder
from dare_hf.tasks import maze, mvot, render

SIZE_LIMIT = 8 * 2**20


@pytest.fixture(scope="module")
def path() -> Path:
    return model_path("dare-tiny-anole")


@pytest.fixture(scope="module")
def model(path: Path) -> ChameleonForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def processor(path: Path) -> ChameleonProcessor:
    return AutoProcessor.from_pretrained(path)


def test_an_unknown_name_lists_the_embedded_models() -> None:
    with pytest.raises(DareInputError, match="dare-tiny-anole"):
        model_path("dare-huge-anole")


def test_it_is_small_and_loads_as_the_real_classes_in_float32(
    path: Path, model: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    assert sum(file.stat().st_size for file in path.iterdir()) <= SIZE_LIMIT
    assert type(model) is ChameleonForConditionalGeneration
    assert type(processor) is ChameleonProcessor
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.num_hidden_layers >= 12


def test_the_tokenizer_gives_clean_text_and_marks_unknown_words(
    processor: ChameleonProcessor,
) -> None:
    tokenizer = processor.tokenizer
    for text in ("The answer is A.", "2. Go left.", maze.PROMPT.split("{")[0].strip()):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")


def test_pictures_survive_their_tokens_exactly(
    model: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    items = [*maze.sample(12, "easy", seed=5), *maze.sample(4, "hard", seed=5)]
    grids = [item.grids()[-1] for item in items]
    pictures = [render.grid_to_image(grid) for grid in grids]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    tokens = model.model.get_image_tokens(pixels).tolist()
    decoded = decode_images(model, processor, tokens, load_decoder(model))
    for picture, grid in zip(decoded, grids, strict=True):
        assert (render.image_to_grid(picture) == grid).all()


def test_it_solves_held_out_mazes_alone_and_in_a_padded_batch(
    model: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    items = maze.sample(6, "easy", seed=1)
    seen: list[mvot.BatchOutput] = []
    together = mvot.solve(model, processor, items, batch_size=6, on_batch=seen.append)
    assert len(seen) == 1
    assert (seen[0].inputs["attention_mask"][:, 0] == 0).any(), "the batch has no padding"
    assert [s.item for s in together] == items
    assert sum(s.correct for s in together) >= 5
    alone = mvot.solve(model, processor, items[:2], batch_size=1)
    for one, other in zip(alone, together[:2], strict=True):
        assert one.ids == other.ids
        assert one.image_correct == other.image_correct


@pytest.mark.slow
def test_it_keeps_its_measured_quality(
    model: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    result = mvot.score(mvot.solve(model, processor, maze.sample(200, "easy", seed=2)))
    assert result.accuracy >= 0.95
    assert result.images_right >= 0.97


def test_scores_count_unparsed_answers_and_surplus_images_as_wrong() -> None:
    item = maze.sample(1, "easy")[0]
    common = {"item": item, "text": "", "images": (), "ids": (), "prompt_length": 0}
    good = mvot.Solution(answer=item.answer, correct=True, image_correct=(True, True), **common)
    bad = mvot.Solution(answer=None, correct=False, image_correct=(True, False), **common)
    result = mvot.score([good, bad])
    assert (result.accuracy, result.unparsed, result.images_right) == (0.5, 0.5, 0.75)
    low, high = result.accuracy_interval
    assert 0 < low < 0.5 < high < 1
    with pytest.raises(DareInputError):
        mvot.score([])
