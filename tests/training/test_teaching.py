"""Teacher-forced batches: they are what generate would have seen and sampled."""

from __future__ import annotations

import copy

import pytest
import torch

from dare_hf.demo.embedded import load_embedded
from dare_hf.generation.interleaved import allow_image_tokens
from dare_hf.tasks import frozen_lake, ghost, maze, mvot, teaching


@pytest.fixture(scope="module")
def anole():
    return load_embedded("anole")


def _row(made, k):
    real = made["attention_mask"][k].bool()
    return made["input_ids"][k][real], made["labels"][k][real]


def test_a_maze_row_is_the_prompt_and_what_the_model_samples(anole):
    model, processor = anole
    items = maze.sample(3, "easy", seed=3)
    made = teaching.batch(model, processor, items)
    assert set(made) == {"input_ids", "attention_mask", "labels"}
    solved = mvot.solve(model, processor, items, batch_size=3)
    for k, item in enumerate(items):
        ids, labels = _row(made, k)
        supervised = ids[labels != -100]
        assert torch.equal(supervised, labels[labels != -100])
        assert solved[k].correct
        assert supervised.tolist() == list(solved[k].ids), item


@pytest.mark.parametrize("task", [maze, frozen_lake])
def test_prompts_are_those_of_the_processor(anole, task):
    model, processor = anole
    items = task.sample(2, "easy", seed=1)
    made = teaching.batch(model, processor, items)
    prompts = mvot.build_inputs(processor, items)
    codes = model.get_image_tokens(prompts["pixel_values"])
    for k in range(2):
        ids, labels = _row(made, k)
        real = prompts["input_ids"][k][prompts["attention_mask"][k].bool()].clone()
        real[real == processor.image_token_id] = codes[k].to(real)
        count = int((labels != -100).float().argmax())
        assert torch.equal(ids[:count], real)
        assert (labels[count:] == ids[count:]).all()


def test_the_looks_of_ghost_letters_are_given_not_learned(anole):
    model, processor = anole
    item = ghost.sample(1, "easy", seed=0)[0]
    ids, labels = _row(teaching.batch(model, processor, [item]), 0)
    learned = processor.decode(labels[labels != -100])
    looks = "".join(f"{item.step_text(k)}<sep>" for k in range(len(item.points)))
    squeezed = learned.replace(" ", "")
    assert squeezed == (looks + f"The answer is {item.answer}.</s>").replace(" ", "")
    begin, end = processor.image_start_token_id, processor.image_end_token_id
    assert int((ids == begin).sum()) == len(item.points) + 1
    assert (labels[(ids == begin) | (ids == end)] == -100).all()


@pytest.mark.parametrize("task", [maze, frozen_lake, ghost])
def test_the_model_predicts_its_labels(anole, task):
    """A batch built wrongly (a shifted answer, a missing separator) would surprise the model."""
    model, processor = anole
    model = copy.deepcopy(model)
    items = task.sample(8, "easy", seed=11)
    made = teaching.batch(model, processor, items)
    with torch.no_grad(), allow_image_tokens(model):
        logits = model(**{k: v for k, v in made.items() if k != "labels"}).logits
    wanted = made["labels"][:, 1:]
    right = logits[:, :-1].argmax(-1) == wanted
    assert right[wanted != -100].float().mean() > 0.99
