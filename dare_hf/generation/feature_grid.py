"""The projected image features of a batch, each picture's as the grid it is."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dare_hf.generation.hop_types import HopPrompt

SQUARE = "square"
"""Each entry of get_image_features is one picture: s x s vectors, row by row."""
THW = "image_grid_thw"
"""The processor says the patches of each picture; a vector stands for merge x merge of them."""

GRIDS: dict[str, str] = {
    "chameleon": SQUARE,
    "gemma3": SQUARE,
    "llava": SQUARE,
    "qwen2_5_vl": THW,
}
"""model_type -> how its features lie in the picture; others are refused."""


def check_grid(config: Any) -> None:
    """Refuse a model whose features are not known to be one grid a picture.

    Raises:
        UnsupportedModelError: Its features are no grid (tiles, newline vectors, resamplers), or
            nobody has checked how they lie.
    """
    if config.model_type not in GRIDS:
        raise UnsupportedModelError(
            "BoxRefocus: expected a model whose image features are one grid a picture: "
            f"{', '.join(sorted(GRIDS))}; got {config.model_type!r}, whose features are tiles, "
            'resampled, or unchecked. Use BoxRefocus("pixels", images=...), which cuts the box out '
            "of the picture itself"
        )


def feature_grids(prompt: HopPrompt, token: int) -> list[list[Tensor]]:
    """The features of each picture of each prompt, in the order of its placeholders.

    What generate has encoded is used; the vision tower runs only where it has not.

    Args:
        prompt: The start of a generate.
        token: The id that stands for one image vector.

    Returns:
        Per prompt (before num_return_sequences) its pictures' features [height, width, D].

    Raises:
        UnsupportedModelError: The model has no grids.
        DareInputError: Features and placeholders do not belong together, a picture has several
            frames, or its features are no grid.
    """
    check_grid(prompt.model.config)
    holes = (prompt.ids == token).sum(1).tolist()
    outputs, repeats = prompt.encoded, prompt.samples
    if outputs is None:
        outputs, repeats, holes = _encode(prompt), 1, holes[:: prompt.samples]
    rows = _deal(_vectors(outputs), holes)[::repeats]
    sizes = _sizes(prompt, [len(v) for row in rows for v in row])
    sized = iter(sizes)
    return [[v.reshape(*next(sized), v.shape[-1]) for v in row] for row in rows]


def _vectors(outputs: Any) -> list[Tensor]:
    """The vectors of each picture out of what get_image_features returns."""
    if outputs is None:
        return []
    if getattr(outputs, "deepstack_features", None) is not None:
        raise DareInputError(
            "BoxRefocus: expected a model whose images enter at the embeddings only; this one also "
            'adds them to deeper layers (deepstack). Use source="pixels" with a model of the '
            "other kind"
        )
    return list(outputs.pooler_output)


def _encode(prompt: HopPrompt) -> Any:
    """Run the vision tower on the pictures of a call; None without any."""
    if prompt.inputs.get("pixel_values") is None:
        return None
    encoder = prompt.model.base_model.get_image_features
    names = inspect.signature(encoder).parameters
    known = {name: value for name, value in prompt.inputs.items() if name in names}
    return encoder(**known, return_dict=True)


def _deal(vectors: Sequence[Tensor], holes: Sequence[int]) -> list[list[Tensor]]:
    """Deal pictures out to the rows, each as many as fill its placeholders."""
    rows: list[list[Tensor]] = []
    at = 0
    for wanted in holes:
        begin, found = at, 0
        while found < wanted and at < len(vectors):
            found, at = found + len(vectors[at]), at + 1
        if found != wanted:
            break
        rows.append([v.reshape(-1, v.shape[-1]) for v in vectors[begin:at]])
    if len(rows) != len(holes) or at != len(vectors):
        raise DareInputError(
            "BoxRefocus: expected image features that fill each row's image tokens, picture by "
            f"picture; got rows of {list(holes)} image tokens and pictures of "
            f"{[len(v) for v in vectors]} features. Give generate the inputs the processor made"
        )
    return rows


def _sizes(prompt: HopPrompt, counts: list[int]) -> list[tuple[int, int]]:
    """Height and width of each picture's grid, checked against its number of vectors."""
    config = prompt.model.config
    kind = GRIDS[config.model_type]
    given = prompt.inputs.get(THW if kind == THW else "image_sizes")
    if given is None and kind == SQUARE:
        sizes = [(1, math.isqrt(count), math.isqrt(count)) for count in counts]
    else:
        sizes = _given_sizes(config, given, kind)
    if len(sizes) != len(counts) or any(
        math.prod(size) != count or size[0] != 1 for size, count in zip(sizes, counts, strict=True)
    ):
        raise DareInputError(
            "BoxRefocus: expected one grid of one frame for each picture; got grids (frames, "
            f"height, width) {sizes} for pictures of {counts} features. "
            'Use BoxRefocus("pixels", images=...)'
        )
    return [size[1:] for size in sizes]


def _given_sizes(config: Any, given: Tensor | None, kind: str) -> list[tuple[int, int, int]]:
    """Grids the processor tells: image_grid_thw in patches, image_sizes [h, w] in pixels."""
    vision = config.vision_config
    if given is None:
        return []
    merge = getattr(vision, "spatial_merge_size", 1)
    side = merge if kind == THW else merge * vision.patch_size
    sizes = [[int(n) for n in size] for size in torch.as_tensor(given).tolist()]
    return [(size[0] if kind == THW else 1, size[-2] // side, size[-1] // side) for size in sizes]
