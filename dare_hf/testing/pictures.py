"""Pixels of one image, in the form each architecture's vision tower takes them.

Forms differ in shapes only; which one an architecture takes stands in `families`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Picture = dict[str, "Tensor"]
"""Keyword arguments of `get_image_features`; those of several images are joined at dimension 0."""

Draw = Callable[["PreTrainedModel", int, torch.Generator], Picture]

FILM = -1
"""The number of a picture that is a video of two frames."""
_GRIDS = ((1, 6, 6), (1, 4, 8), (1, 8, 6))
_FILM_GRID = (2, 4, 4)


def _noise(model: PreTrainedModel, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(model.dtype)


def _vision(model: PreTrainedModel) -> Any:
    return model.config.vision_config


def _side(model: PreTrainedModel) -> int:
    size = getattr(_vision(model), "image_size", 24)
    return size[0] if isinstance(size, (list, tuple)) else size


def square(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """One image of the tower's own size, [1, 3, side, side]."""
    side = _side(model)
    return {"pixel_values": _noise(model, generator, 1, 3, side, side)}


def fixed(side: int, **more: Any) -> Draw:
    """One image of the given size, and further tensors of every image."""

    def draw(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        return {"pixel_values": _noise(model, generator, 1, 3, side, side), **more}

    return draw


def patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """Flat patches [t h w, 3 frames side side] and their grid; its shape varies by number."""
    vision = _vision(model)
    depth = getattr(vision, "temporal_patch_size", None) or 1
    return _patches(model, number, generator, depth)


def even_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `patches`, all of one shape."""
    return patches(model, min(number, 0), generator)


def deep_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `patches`, the frames of a patch under another name."""
    return _patches(model, number, generator, _vision(model).patch_temporal)


def _patches(
    model: PreTrainedModel, number: int, generator: torch.Generator, depth: int
) -> Picture:
    frames, height, width = _FILM_GRID if number == FILM else _GRIDS[number % len(_GRIDS)]
    vision = _vision(model)
    flat = 3 * depth * vision.patch_size**2
    pixels = _noise(model, generator, frames * height * width, flat)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[frames, height, width]])}


def flat_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `patches`, of one frame."""
    made = patches(model, number, generator)
    return {**made, "pixel_values": made["pixel_values"][:, : 3 * _vision(model).patch_size ** 2]}


def square_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `patches`, each patch [3, side, side]."""
    made, side = flat_patches(model, number, generator), _vision(model).patch_size
    return {**made, "pixel_values": made["pixel_values"].unflatten(1, (3, side, side))}


def merged_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `flat_patches`, with the merge factor of each image."""
    made = flat_patches(model, number, generator)
    return {**made, "image_merge_sizes": torch.tensor([2])}


def tiles(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """The whole image and two tiles, [1, 3, 3, side, side], and its size before tiling."""
    side = _side(model)
    return {
        "pixel_values": _noise(model, generator, 1, 3, 3, side, side),
        "image_sizes": torch.tensor([[side, 2 * side]]),
    }


def sized(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """[1, 3, side, side] of which the upper part is the image, and its size."""
    side = _side(model)
    return {
        "pixel_values": _noise(model, generator, 1, 3, side, side),
        "image_sizes": torch.tensor([[side - 8 * (number % 2), side]]),
    }


def pair(side: int) -> Draw:
    """Two views of one image: the tower's own size, and [1, 3, side, side]."""

    def draw(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        fine = _noise(model, generator, 1, 3, side, side)
        return {**square(model, number, generator), "high_res_pixel_values": fine}

    return draw


def strip(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """Patches side by side, [1, 3, side, patches side], and their grid (in patches)."""
    _, height, width = ((1, 8, 4), (1, 4, 8), (1, 4, 4))[number % 3]
    side = _vision(model).patch_size
    return {
        "pixel_values": _noise(model, generator, 1, 3, side, height * width * side),
        "target_sizes": torch.tensor([[height, width]], dtype=torch.int32),
    }


def placed(side: int) -> Draw:
    """Flat patches [1, 36, 3 side side] and the column and row of each."""

    def draw(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        width = (6, 12, 3)[number % 3]
        place = torch.arange(36)
        at = torch.stack([place % width, place // width], dim=-1)[None]
        return {
            "pixel_values": _noise(model, generator, 1, 36, 3 * side**2),
            "image_position_ids": at,
        }

    return draw


def cut_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `flat_patches`, with a grid of height and width only."""
    made = flat_patches(model, number, generator)
    return {"pixel_values": made["pixel_values"], "image_grid_hw": made["image_grid_thw"][:, 1:]}


def pooled(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """One crop of 36 flat patches and which four of them each of 9 tokens pools."""
    side = _vision(model).patch_size
    return {
        "pixel_values": _noise(model, generator, 1, 36, 3 * side**2),
        "image_token_pooling": torch.arange(36).view(9, 4),
        "image_grids": torch.tensor([[3, 3, 0, 0]]),
    }


def asked(frames: tuple[int, ...]) -> Draw:
    """[1, *frames, 3, side, side] and the ids of a question for the query former."""

    def draw(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        side = _side(model)
        return {
            "pixel_values": _noise(model, generator, 1, *frames, 3, side, side),
            "qformer_input_ids": torch.randint(10, 80, (1, 4), generator=generator),
            "qformer_attention_mask": torch.ones(1, 4, dtype=torch.long),
        }

    return draw


def ratio_tiles(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """One image of up to four tiles, [1, 1, 4, 3, side, side], and its aspect ratio."""
    side = _side(model)
    return {
        "pixel_values": _noise(model, generator, 1, 1, 4, 3, side, side),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }


def marked_patches(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """[1, 36, 2 + 3 side side]: each patch with its row and column, counted from 1."""
    place = torch.arange(36)
    at = torch.stack([place // 6 + 1, place % 6 + 1], dim=-1)[None].to(model.dtype)
    flat = _noise(model, generator, 1, 36, _vision(model).patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([at, flat], dim=-1)}


def line(tokens: int, flat: int) -> Draw:
    """Flat patches [1, tokens, flat] of an image that is no grid."""

    def draw(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        return {"pixel_values": _noise(model, generator, 1, tokens, flat)}

    return draw


def stack(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """A row's stack of one tile, [1, 1, 3, side, side]; see `Family.per_row`."""
    side = _side(model)
    return {"pixel_values": _noise(model, generator, 1, 1, 3, side, side)}


def masked_stack(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `stack`, with a mask of real tiles."""
    made = stack(model, number, generator)
    return {**made, "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def ragged(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """Flat patches padded to 40, [1, 40, 3 side side], their grid, and which are real."""
    height, width = ((6, 6), (4, 8), (8, 4))[number % 3]
    flat = 3 * _vision(model).patch_size ** 2
    real = (torch.arange(40) < height * width).long()[None]
    return {
        "pixel_values": _noise(model, generator, 1, 40, flat),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": real,
    }
