"""Teacher-forced batches of the embedded models' tasks: the full solution, and which ids to learn.

What the environment puts between two hops (the crop of a box, the next look) is part of the
sequence but not of the labels, so that a training forward treats it as an injected span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import ChameleonProcessor

from dare_hf.errors import DareInputError
from dare_hf.generation.boxes import crop_pixels
from dare_hf.routing.selection import isin_ids
from dare_hf.tasks import board, board_render, render, scene
from dare_hf.tasks.frozen_lake import FrozenLakeItem
from dare_hf.tasks.ghost import GhostItem
from dare_hf.tasks.maze import MazeItem
from dare_hf.tasks.scene_render import scene_to_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image
    from torch import Tensor

    Item = MazeItem | FrozenLakeItem | GhostItem | scene.SceneItem | board.BoardItem

IGNORED = -100


def solution(item: Item) -> tuple[str, str, list[Image.Image]]:
    """Prompt, response and pictures of an item's right solution.

    Returns:
        The prompt and the response, each with `<image>` where a picture stands, and the pictures of
        both in order. The end of text is not part of the response.

    Raises:
        DareInputError: It is no item of a task.
    """
    if isinstance(item, board.BoardItem):
        return item.prompt, f" {item.response}", [board_render.item_to_image(item)]
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
        items: Items of MAZE, FrozenLake and Ghost Letters, mixed as you like, or of SCENE or BOARD.

    Returns:
        input_ids [B, S] padded on the left, attention_mask, labels (-100 on prompts, pads and what
        the environment puts in) and, where pictures are not ids of the vocabulary, pixel_values.
        A Chameleon-type model is run inside `allow_image_tokens(model)`.

    Raises:
        DareInputError: An item belongs to no task.
    """
    rows = [
        {"prompt": prompt, "response": response, "images": pictures}
        for prompt, response, pictures in map(solution, items)
    ]
    if model.config.model_type != "chameleon":
        return respond(processor, rows, (processor.image_token_id,))
    made = respond(processor, rows, ())
    ids = made["input_ids"]
    codes = model.get_image_tokens(made.pop("pixel_values").to(model.device, model.dtype))
    ids[ids == processor.image_token_id] = codes.to(ids).flatten()
    learned = made["labels"] != IGNORED
    given = torch.tensor([[isinstance(item, GhostItem)] for item in items])
    learned &= ~(given & _looks(ids, processor))
    return made | {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}


def respond(
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    vision_ids: Sequence[int],
) -> dict[str, Tensor]:
    """Prompts and responses of any processor as a training forward takes them.

    Args:
        processor: The model's processor.
        rows: Each with "prompt", "response" (text with the processor's image placeholder where a
            picture stands) and "images", the pictures of both in order.
        vision_ids: Ids that are given wherever they stand, never learned.

    Returns:
        What the processor makes, padded on the left, and labels [B, S].

    Raises:
        DareInputError: A prompt's tokens are not the first of the whole text's.
    """
    between, end = "", processor.tokenizer.eos_token
    if isinstance(processor, ChameleonProcessor):
        # It ends every text with a separator: here the prompt's own, then in the place of the end.
        between, end = processor.tokenizer.sep_token, ""
    texts = [f"{row['prompt']}{between}{row['response']}{end}" for row in rows]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    pictures = [list(row["images"]) for row in rows]
    shown = {"images": pictures} if any(pictures) else {}
    made = dict(processor(text=texts, **shown, **settings))
    ids, mask = made["input_ids"], made["attention_mask"].bool()
    if between:
        ids = ids.clone()
        ids[:, -1] = processor.tokenizer.eos_token_id
    learned = mask & ~isin_ids(ids, vision_ids)
    for k, row in enumerate(rows):
        prompt = _prompt_ids(processor, row["prompt"], pictures[k])
        first = int((~mask[k]).sum())
        if not torch.equal(ids[k, first : first + len(prompt)], prompt):
            raise DareInputError(
                f"prompt: expected one that ends where a token ends; got {row['prompt'][-40:]!r} "
                f"before {row['response'][:20]!r}. End it with a space or a new line"
            )
        learned[k, : first + len(prompt)] = False
    return made | {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}


def _prompt_ids(processor: Any, prompt: str, pictures: list[Any]) -> Tensor:
    placeholder = getattr(processor, "image_token", None)
    count = prompt.count(placeholder) if placeholder else len(pictures)
    shown = {"images": [pictures[:count]]} if count else {}
    return processor(text=[prompt], **shown, return_tensors="pt")["input_ids"][0]


def _looks(ids: Tensor, processor: Any) -> Tensor:
    """Bool[B, S]: pictures with their frame, and the separator behind each."""
    begin, end = processor.image_start_token_id, processor.image_end_token_id
    inside = ((ids == begin).long() - (ids == end).long()).cumsum(1) > 0
    inside |= ids == end
    behind = torch.nn.functional.pad((ids == end)[:, :-1], (1, 0))
    return inside | behind
