"""Teacher-forced batches of the embedded models' tasks: the full solution, and which ids to learn.

What the environment puts between two hops (the crop of a box, the next look) is part of the
sequence but not of the labels, so that a training forward treats it as an injected span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError
from dare_hf.generation.boxes import crop_pixels
from dare_hf.tasks import render, scene
from dare_hf.tasks.frozen_lake import FrozenLakeItem
from dare_hf.tasks.ghost import GhostItem
from dare_hf.tasks.maze import MazeItem
from dare_hf.tasks.scene_render import scene_to_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    Item = MazeItem | FrozenLakeItem | GhostItem | scene.SceneItem

IGNORED = -100


def solution(item: Item) -> tuple[str, str, list[Image.Image]]:
    """Prompt, response and pictures of an item's right solution.

    Returns:
        The prompt and the response, each with `<image>` where a picture stands, and the pictures of
        both in order. The end of text is not part of the response.

    Raises:
        DareInputError: It is no item of a task.
    """
    if isinstance(item, scene.SceneItem):
        picture = scene_to_image(item)
        looks = [shape.box for shape in item.looks()]
        response = "".join(f"{scene.box_text(box)}<image>" for box in looks)
        crops = [crop_pixels(picture, box) for box in looks]
        return item.prompt, f"{response}The answer is {item.answer}.", [picture, *crops]
    if isinstance(item, GhostItem):
        steps = [f"{item.step_text(k)}<sep><image><sep>" for k in range(len(item.points))]
    elif isinstance(item, MazeItem | FrozenLakeItem):
        steps = [f"{item.step_text(k)}<image><sep>" for k in range(len(item.actions))]
    else:
        raise DareInputError(f"expected an item of a task; got {type(item).__name__}")
    pictures = [render.grid_to_image(grid) for grid in item.grids()]
    return item.prompt, f"{''.join(steps)}The answer is {item.answer}.", pictures


def batch(model: Any, processor: Any, items: Sequence[Item]) -> dict[str, Tensor]:
    """Solutions of items of one task as a training forward takes them.

    Args:
        model: dare-tiny-anole or dare-tiny-volcano, or a model of their kind.
        processor: Its processor.
        items: Items of MAZE, FrozenLake and Ghost Letters, or of SCENE.

    Returns:
        input_ids [B, S] padded on the left, attention_mask, labels (-100 on prompts, pads and what
        the environment puts in) and, where pictures are not ids of the vocabulary, pixel_values.
        A Chameleon-type model is run inside `allow_image_tokens(model)`.

    Raises:
        DareInputError: An item belongs to no task.
    """
    solved = [solution(item) for item in items]
    vocabulary = model.config.model_type == "chameleon"
    # Chameleon's processor ends every text with a separator: the prompt's own, later the end's.
    texts = [f"{prompt}{'<sep>' if vocabulary else ''}{reply}" for prompt, reply, _ in solved]
    if not vocabulary:
        texts = [text + processor.tokenizer.eos_token for text in texts]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    made = dict(processor(text=texts, images=[pictures for *_, pictures in solved], **settings))
    ids, mask = made["input_ids"], made["attention_mask"].bool()
    given = [_prompt_length(processor, prompt, pictures) for prompt, _, pictures in solved]
    rank = mask.long().cumsum(1) - 1
    learned = mask & (rank >= torch.tensor(given)[:, None])
    if vocabulary:
        ids = ids.clone()
        ids[:, -1] = processor.tokenizer.eos_token_id
        codes = model.get_image_tokens(made.pop("pixel_values").to(model.device, model.dtype))
        ids[ids == processor.image_token_id] = codes.to(ids).flatten()
        if isinstance(items[0], GhostItem):
            learned &= ~_looks(ids, processor)
    else:
        learned &= ids != processor.image_token_id
    made |= {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}
    return made


def _prompt_length(processor: Any, prompt: str, pictures: list[Any]) -> int:
    made = processor(text=[prompt], images=[pictures[:1]], return_tensors="pt")
    return made["input_ids"].shape[1]


def _looks(ids: Tensor, processor: Any) -> Tensor:
    """Bool[B, S]: pictures with their frame, and the separator behind each."""
    begin, end = processor.image_start_token_id, processor.image_end_token_id
    inside = ((ids == begin).long() - (ids == end).long()).cumsum(1) > 0
    inside |= ids == end
    behind = torch.nn.functional.pad((ids == end)[:, :-1], (1, 0))
    return inside | behind
