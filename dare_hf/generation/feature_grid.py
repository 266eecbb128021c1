"""The projected image features of a batch, each picture's as the grid it is."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from dare_hf.generation.hop_types import HopPrompt

Size = tuple[int, int, int]
"""Frames, height and width of a grid of vectors."""

SQUARE = "square"
GRIDS: dict[str, tuple[str, ...]] = {
    "gemma3": (SQUARE,),
    "llava": ("image_sizes", SQUARE),  # Pixtral towers; CLIP towers
    "mistral3": ("image_sizes",),
    "qwen2_5_vl": ("image_grid_thw",),
    "qwen2_vl": ("image_grid_thw",),
    "vipllava": (SQUARE,),
}
"""model_type -> what tells a picture's size: an output of its processor, or that it is a square.

In each of these an entry of get_image_features is one picture, its vectors row by row.
"""


def feature_grids(prompt: HopPrompt, token: int) -> list[list[Tensor]]:
    """The features of each picture of each prompt, in the order of its placeholders.

    What generate has encoded is used; the vision tower runs only where it has not.

    Args:
        prompt: The start of a generate.
        token: The id that stands for one image vector.

    Returns:
        Per prompt (before num_return_sequences) the features [height, width, D] of the pictures
        this call brings.

    Raises:
        UnsupportedModelError: The features of this model are no grid (tiles, newline vectors,
            resamplers), or nobody has checked how they lie.
        DareInputError: Features and placeholders do not belong together, a picture has several
            frames, or its features are no grid.
    """
    check_grid(prompt.model.config)
    holes = prompt.ids == token
    new = holes[:, prompt.start :].sum(1).tolist()
    if (outputs := prompt.encoded) is not None:
        rows = _deal(_vectors(outputs), new)[:: prompt.samples]
    else:
        rows = _deal(_vectors(_encode(prompt)), new[:: prompt.samples])
    rows = [[vectors.reshape(-1, vectors.shape[-1]) for vectors in row] for row in rows]
    sizes = _sizes(prompt, rows, holes[:: prompt.samples].sum(1).tolist())
    return [
        [vectors.reshape(*size[1:], -1) for vectors, size in zip(*pair, strict=True)]
        for pair in zip(rows, sizes, strict=True)
    ]


def picture_grids(
    config: Any, inputs: Mapping[str, Any], pictures: int, tokens: int
) -> list[tuple[int, int]] | None:
    """Patches down and across of each picture of one prompt, from what its processor made.

    Args:
        config: The model's.
        inputs: The processor's outputs.
        pictures: How many there are.
        tokens: Vision tokens of all of them.

    Returns:
        None where nothing tells how the tokens lie: tiles, resamplers, several frames.
    """
    for kind in GRIDS.get(config.model_type, ()):
        given = inputs.get(kind)
        if given is not None:
            sizes = [_told(config, [int(n) for n in size]) for size in given.tolist()]
        elif kind == SQUARE and pictures and tokens % pictures == 0:
            pixels = inputs["pixel_values"]
            square = pixels.shape[-1] == pixels.shape[-2]
            sizes = [_square(tokens // pictures) if square else (0, 0, 0)] * pictures
        else:
            continue
        whole = len(sizes) == pictures and sum(map(math.prod, sizes)) == tokens
        if whole and all(size[0] == 1 for size in sizes):
            return [size[1:] for size in sizes]
    return None


def check_grid(config: Any) -> None:
    """Refuse a model whose features are not known to be one grid a picture.

    Raises:
        UnsupportedModelError: It is not in `GRIDS`.
    """
    if config.model_type not in GRIDS:
        raise UnsupportedModelError(
            "BoxRefocus: expected a model whose image features are one grid a picture: "
            f"{', '.join(sorted(GRIDS))}; got {config.model_type!r}, whose features are tiles, "
            'resampled or unchecked. Use BoxRefocus("pixels", images=...), which cuts the box out '
            "of the picture itself"
        )


def _encode(prompt: HopPrompt) -> Any:
    """Run the vision tower on the pictures of a call; None without any."""
    if prompt.inputs.get("pixel_values") is None:
        return None
    encoder = prompt.model.base_model.get_image_features
    names = inspect.signature(encoder).parameters
    known = {name: value for name, value in prompt.inputs.items() if name in names}
    return encoder(**known, return_dict=True)


def _vectors(outputs: Any) -> list[Tensor]:
    """The vectors [n, D] of each picture out of what get_image_features returns."""
    return [] if outputs is None else list(outputs.pooler_output)


def _deal(items: Sequence[Any], holes: Sequence[int], length: Any = len) -> list[list[Any]]:
    """Deal pictures out to the rows, each as many as fill its placeholders."""
    rest, rows = list(items), []
    for wanted in holes:
        sums = [0, *itertools.accumulate(length(item) for item in rest)]
        if wanted not in sums:
            break
        count = sums.index(wanted)
        rows.append(rest[:count])
        rest = rest[count:]
    if len(rows) != len(holes) or rest:
        raise DareInputError(
            "BoxRefocus: expected image features that fill each row's image tokens, picture by "
            f"picture; got rows of {list(holes)} image tokens and pictures of "
            f"{[length(item) for item in items]} features. Give generate what the processor made"
        )
    return rows


def _sizes(prompt: HopPrompt, rows: list[list[Tensor]], holes: list[int]) -> list[list[Size]]:
    """The grid of each picture, checked against its number of vectors.

    Args:
        prompt: The start of a generate.
        rows: Per prompt the vectors of its pictures.
        holes: Per prompt its placeholders, those of earlier chat turns included.
    """
    config = prompt.model.config
    kinds = GRIDS[config.model_type]
    given = prompt.inputs.get(kinds[0])
    if given is None and SQUARE in kinds:
        _check_square(prompt.inputs.get("pixel_values"))
        sizes = [[_square(len(vectors)) for vectors in row] for row in rows]
    elif given is None and any(rows):
        raise DareInputError(
            f"BoxRefocus: expected {kinds[0]} beside the pictures, as the processor gives it; got "
            "none. Pass it to generate"
        )
    elif given is None:
        sizes = [[] for _ in rows]
    else:
        told = [_told(config, [int(n) for n in size]) for size in torch.as_tensor(given).tolist()]
        if len(told) == sum(map(len, rows)):
            left = iter(told)
            sizes = [[next(left) for _ in row] for row in rows]
        else:  # a later chat turn tells the grids of the whole conversation
            dealt = _deal(told, holes, math.prod)
            sizes = [all_[len(all_) - len(row) :] for all_, row in zip(dealt, rows, strict=True)]
    flat = list(itertools.chain.from_iterable(sizes))
    counts = [len(vectors) for row in rows for vectors in row]
    if any(size[0] != 1 for size in flat) or [math.prod(size) for size in flat] != counts:
        raise DareInputError(
            "BoxRefocus: expected a grid of one frame for each picture; got grids (frames, height, "
            f"width) {flat} for pictures of {counts} features. "
            'Use BoxRefocus("pixels", images=...)'
        )
    return sizes


def _check_square(pixels: Any) -> None:
    """Refuse pictures [..., h, w] whose features only happen to be a square number."""
    if isinstance(pixels, torch.Tensor) and pixels.shape[-1] != pixels.shape[-2]:
        raise DareInputError(
            "BoxRefocus: expected pixel_values of square pictures, since nothing tells the grid of "
            f'others; got shape {list(pixels.shape)}. Use BoxRefocus("pixels", images=...)'
        )


def _square(count: int) -> Size:
    return 1, math.isqrt(count), math.isqrt(count)


def _told(config: Any, size: list[int]) -> Size:
    """The grid of image_grid_thw [t, h, w] in patches, or of image_sizes [h, w] in pixels."""
    merge = getattr(config, "spatial_merge_size", None)
    merge = merge or getattr(config.vision_config, "spatial_merge_size", 1)
    side = merge if len(size) == 3 else merge * config.vision_config.patch_size
    return size[0] if len(size) == 3 else 1, size[-2] // side, size[-1] // side
