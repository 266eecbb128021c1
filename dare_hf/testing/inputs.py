"""Inputs of the tiny models, in the form the real processors give them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf.testing.models import (
    BOS_ID,
    CHAMELEON_CODES,
    CHAMELEON_TEXT_IDS,
    FIRST_TEXT_ID,
    IMAGE_END_ID,
    IMAGE_ID,
    IMAGE_START_ID,
    PAD_ID,
)

TINY_TEXT_TOKENS = 12
"""Text tokens of a row by default, besides the ones that frame images."""

_LAST_TEXT_ID = 100
_QWEN_GRIDS = ((1, 6, 6), (1, 4, 8), (1, 8, 6))
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def _random(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _image(model: PreTrainedModel, number: int, generator: torch.Generator) -> dict[str, Any]:
    """Return one image: how many tokens it takes, its pixels, and its grid where there is one."""
    kind, dtype = model.config.model_type, model.dtype
    if kind == "qwen2_5_vl":
        vision = model.config.vision_config
        frames, height, width = _QWEN_GRIDS[number % len(_QWEN_GRIDS)]
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = _random((frames * height * width, patch), generator, dtype)
        tokens = frames * height * width // vision.spatial_merge_size**2
        return {"tokens": tokens, "pixels": pixels, "grid": [frames, height, width]}
    if kind == "chameleon":
        size = model.config.vq_config.resolution
        side = size // 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
        return {"tokens": side * side, "pixels": _random((1, 3, size, size), generator, dtype)}
    size = model.config.vision_config.image_size
    tokens = {"llava": "image_seq_length", "gemma3": "mm_tokens_per_image"}[kind]
    pixels = _random((1, 3, size, size), generator, dtype)
    return {"tokens": getattr(model.config, tokens), "pixels": pixels}


def _image_ids(
    kind: str, tokens: int, pixels: bool, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return the ids of one image with its frame, and which of them are the image."""
    body = [IMAGE_ID] * tokens
    if kind == "chameleon" and not pixels:  # an image as the model itself would have written it
        codes = torch.randint(CHAMELEON_CODES, (tokens,), generator=generator)
        body = (CHAMELEON_TEXT_IDS + codes).tolist()
    if kind == "llava":
        return body, [1] * tokens
    return [IMAGE_START_ID, *body, IMAGE_END_ID], [0, *[1] * tokens, 0]


def tiny_rows(
    model: PreTrainedModel,
    *,
    images: Sequence[int] = (1,),
    text: int | Sequence[int] = TINY_TEXT_TOKENS,
    seed: int = 0,
    pixels: bool = False,
) -> list[dict[str, Any]]:
    """Return one unpadded row for each entry of ``images``; see :func:`tiny_inputs`.

    A row depends on the seed and on its own index only, so that :func:`collate` of any of them
    gives the same row in another batch.
    """
    kind = model.config.model_type
    lengths = [text] * len(images) if isinstance(text, int) else list(text)
    rows = []
    for index, (count, length) in enumerate(zip(images, lengths, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        words = torch.randint(FIRST_TEXT_ID, _LAST_TEXT_ID, (length,), generator=generator).tolist()
        ids, types, pictures = [BOS_ID, *words[:2]], [0] * (1 + len(words[:2])), []
        for number in range(count):
            picture = _image(model, index + number, generator)
            if not pixels:
                shape = (picture["tokens"], model.config.get_text_config().hidden_size)
                picture["features"] = _random(shape, generator, model.dtype)
            pictures.append(picture)
            body, body_types = _image_ids(kind, picture["tokens"], pixels, generator)
            word = words[2 + number : 3 + number]
            ids, types = ids + body + word, types + body_types + [0] * len(word)
        rest = words[2 + count :]
        rows.append({"ids": ids + rest, "types": types + [0] * len(rest), "images": pictures})
    return rows


def collate(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    *,
    left_pad: bool = True,
    pad_to: int | None = None,
) -> dict[str, Any]:
    """Pad rows of :func:`tiny_rows` to one batch, as a processor would.

    Args:
        model: The model the rows were made for.
        rows: The rows, in any order and number.
        left_pad: On which side the pads go.
        pad_to: Columns of the batch (default: those of the longest row).

    Examples:
        >>> from dare_hf.testing import collate, tiny_model, tiny_rows
        >>> model = tiny_model("llava")
        >>> len(collate(model, tiny_rows(model, images=(0, 2)))["input_ids"])
        2
    """
    kind = model.config.model_type
    width = max(pad_to or 0, *(len(row["ids"]) for row in rows))
    ids = torch.full((len(rows), width), PAD_ID)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        size = len(row["ids"])
        columns = slice(width - size, width) if left_pad else slice(0, size)
        ids[index, columns] = torch.tensor(row["ids"])
        types[index, columns] = torch.tensor(row["types"])
        mask[index, columns] = 1
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind in {"qwen2_5_vl", "gemma3"}:
        batch["mm_token_type_ids" if kind == "qwen2_5_vl" else "token_type_ids"] = types
    batch.update(_pictures(kind, [picture for row in rows for picture in row["images"]]))
    return batch


def _pictures(kind: str, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model inputs that carry the images themselves."""
    if not pictures:
        return {}
    batch: dict[str, Any] = {}
    if kind == "qwen2_5_vl":
        batch["image_grid_thw"] = torch.tensor([picture["grid"] for picture in pictures])
    if "features" not in pictures[0]:
        batch["pixel_values"] = torch.cat([picture["pixels"] for picture in pictures])
    elif kind != "chameleon":  # there the ids are the image
        features: Any = [picture["features"] for picture in pictures]
        features = torch.stack(features) if kind == "gemma3" else features
        output = BaseModelOutputWithPooling(pooler_output=features)
        batch["mm_encoder_outputs"] = {"image": output}
    return batch


def tiny_inputs(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    images: Sequence[int] = (1,),
    text: int | Sequence[int] = TINY_TEXT_TOKENS,
    seed: int = 0,
    left_pad: bool = True,
    pixels: bool = False,
) -> dict[str, Any]:
    """Return keyword arguments for ``forward`` and ``generate`` of a tiny model.

    Every row is a start token, two words, its images (each in its frame and followed by one word)
    and the other words.

    Args:
        model: A model of :func:`dare_hf.testing.tiny_model`.
        batch: Rows; with one entry in ``images`` each row has that many.
        images: Images of each row.
        text: Words of each row, or of all rows.
        seed: Seed of ids and images; torch's global generator is left alone.
        left_pad: On which side shorter rows are padded.
        pixels: Give pixels to the model's own tower, else features in ``mm_encoder_outputs``
            (Chameleon: ids of the image vocabulary in the prompt).

    Examples:
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> sorted(tiny_inputs(tiny_model("llava"), pixels=True))
        ['attention_mask', 'input_ids', 'pixel_values']
    """
    counts = list(images) * batch if len(images) == 1 else list(images)
    if len(counts) != batch and batch != 1:
        raise ValueError(f"images must have 1 or batch={batch} entries, got {len(counts)}")
    rows = tiny_rows(model, images=counts, text=text, seed=seed, pixels=pixels)
    return collate(model, rows, left_pad=left_pad)
