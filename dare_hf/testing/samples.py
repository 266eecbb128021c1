"""Prompts with pictures for the tiny model of any architecture, in the form its processor gives.

A picture takes as many placeholder tokens as the model's own tower makes features of its pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf.testing.families import Family, family_of
from dare_hf.testing.models import (
    BOS_ID,
    FIRST_TEXT_ID,
    IMAGE_END_ID,
    IMAGE_ID,
    IMAGE_START_ID,
    PAD_ID,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dare_hf.testing.pictures import Picture

TEXT, VISION, PAD = 0, 1, -1
_LAST_TEXT_ID = 80
_GIVEN_FEATURES = 9  # tokens of a picture whose tower cannot be built here


@dataclass
class Sample:
    """One unpadded prompt.

    Attributes:
        ids: Token ids, placeholders included.
        vision: 1 for each placeholder, 0 for text.
        pictures: The pixels, one entry a picture.
    """

    ids: list[int]
    vision: list[int]
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class Batch:
    """A padded batch.

    Attributes:
        inputs: Keyword arguments of forward and generate.
        modality: Int8[B, S], 0 text, 1 vision, -1 pad; for the oracle only.
        suffix: Arguments that are 1 for what follows the prompt.
    """

    inputs: dict[str, Any]
    modality: Tensor
    suffix: tuple[str, ...] = ()

    @property
    def real(self) -> Tensor:
        """Bool[B, S]: what is no padding."""
        return self.modality >= 0


def encode(model: PreTrainedModel, picture: Picture) -> Any:
    """Pooler output of the model's own tower for one picture."""
    encoder = getattr(model.base_model, "get_image_features", None) or model.get_image_features
    with torch.no_grad():
        output = encoder(**picture, return_dict=True)
    found = output.pooler_output
    if found is None:
        found = output.last_hidden_state
    return output.deepstack_features[0][1] if found is None else found


def _rows_of_features(features: Any, hidden: int) -> Tensor:
    parts = features if isinstance(features, (list, tuple)) else [features]
    return torch.cat([part.reshape(-1, hidden) for part in parts])


def samples(
    model: PreTrainedModel, images: Sequence[int] = (1,), *, text: int = 12, seed: int = 0
) -> list[Sample]:
    """One prompt for each entry of `images`, which says how many pictures it has.

    A prompt is a start token, two words, its pictures (each in a frame and followed by a word) and
    the other words; it depends on the seed and its own place only.

    Args:
        model: A tiny model of :func:`dare_hf.testing.shrink.shrunk_model`.
        images: Pictures of each prompt.
        text: Words of each prompt; more for later ones where all have the same pictures.
        seed: Seed of words and pixels.
    """
    family = family_of(model.config.model_type)
    words = [text + (3 * i if len(set(images)) == 1 else 0) for i in range(len(images))]
    pairs = enumerate(zip(images, words, strict=True))
    return [_sample(model, family, index, n, length, seed) for index, (n, length) in pairs]


def _sample(
    model: PreTrainedModel, family: Family, index: int, count: int, text: int, seed: int
) -> Sample:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    words = torch.randint(FIRST_TEXT_ID, _LAST_TEXT_ID, (text,), generator=generator).tolist()
    made = Sample([BOS_ID, *words[:2]], [0, 0, 0])
    for number in range(count if family.sees else 0):
        picture, tokens = _picture(model, family, index + number, generator)
        made.pictures.append(picture)
        if not tokens:
            continue
        made.ids += [IMAGE_START_ID, *[IMAGE_ID] * tokens, IMAGE_END_ID, words[2 + number]]
        made.vision += [0, *[1] * tokens, 0, 0]
    rest = words[2 + count :]
    made.ids += rest
    made.vision += [0] * len(rest)
    return made


def _picture(
    model: PreTrainedModel, family: Family, number: int, generator: torch.Generator
) -> tuple[Picture, int]:
    hidden = model.config.get_text_config().hidden_size
    if family.picture is None:
        features = torch.randn(_GIVEN_FEATURES, hidden, generator=generator).to(model.dtype)
        return {"features": features}, _GIVEN_FEATURES
    picture = family.picture(model, number, generator)
    if family.tokens is not None:
        return picture, family.tokens
    features = _rows_of_features(encode(model, picture), hidden)
    if family.encoded:
        grids = {name: picture[name] for name in picture if name.endswith("_thw")}
        return {"features": features, **grids}, len(features)
    return picture, len(features)


def batch_of(model: PreTrainedModel, rows: Sequence[Sample], *, pad_to: int | None = None) -> Batch:
    """Left-padded prompts as one batch, as a processor would give them.

    Args:
        model: The model the prompts were made for.
        rows: The prompts, in any order and number.
        pad_to: Columns of the batch (default: those of the longest prompt).
    """
    family = family_of(model.config.model_type)
    width = max(pad_to or 0, *(len(row.ids) for row in rows))
    ids = torch.full((len(rows), width), PAD_ID)
    modality = torch.full((len(rows), width), PAD, dtype=torch.int8)
    for index, row in enumerate(rows):
        ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
        modality[index, width - len(row.ids) :] = torch.tensor(row.vision, dtype=torch.int8)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (modality >= 0).long()}
    names = inspect.signature(type(model).forward).parameters
    types = (modality == VISION).long()
    for name in family.type_ids:
        if name in names:
            inputs[name] = types
    for name, shape in family.watched.items():
        inputs[name] = torch.ones(*ids.shape, *shape, dtype=torch.long)
    for name in family.zeros:
        inputs[name] = torch.zeros_like(ids)
    return Batch(inputs | _pixels(model, family, rows), modality, family.zeros)


def _pixels(model: PreTrainedModel, family: Family, rows: Sequence[Sample]) -> dict[str, Any]:
    """The model inputs that carry the pictures."""
    pictures = [picture for row in rows for picture in row.pictures]
    if not pictures:
        return {}
    if "features" in pictures[0]:
        features = [picture["features"] for picture in pictures]
        joined: Any = torch.cat(features) if family.flat else features
        output = BaseModelOutputWithPooling(pooler_output=joined)
        grids = {
            name: torch.cat([picture[name] for picture in pictures])
            for name in pictures[0]
            if name != "features"
        }
        return {"mm_encoder_outputs": {"image": output}, **grids}
    if not family.per_row:
        return {
            name: torch.cat([picture[name] for picture in pictures], dim=family.joins.get(name, 0))
            for name in pictures[0]
        }
    most = max(len(row.pictures) for row in rows)
    joined = {}
    for name, like in pictures[0].items():
        blank = torch.zeros_like(like)
        stacks = [
            torch.cat([p[name] for p in row.pictures] + [blank] * (most - len(row.pictures)), 1)
            for row in rows
        ]
        joined[name] = torch.cat(stacks)
    return joined
