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

from dare_hf.testing.clips import FRAMES, clip_of
from dare_hf.testing.families import family_of
from dare_hf.testing.family import Family
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

PAD = -1
_ENCODED = "mm_encoder_outputs"
_LAST_TEXT_ID = 80
_GIVEN_FEATURES = 9  # tokens of a picture whose tower cannot be built here


@dataclass
class Sample:
    """One unpadded prompt.

    Attributes:
        ids: Token ids, placeholders included.
        types: 1 for each placeholder of a picture, 2 for one of a video, 0 for text.
        pictures: The pixels, one entry a picture.
        clips: The frames, one entry a video.
    """

    ids: list[int]
    types: list[int]
    pictures: list[Picture] = field(default_factory=list)
    clips: list[Picture] = field(default_factory=list)

    def text(self, ids: Sequence[int]) -> None:
        """Add words."""
        self.ids += ids
        self.types += [0] * len(ids)

    def content(self, placeholder: int, kind: int, tokens: int) -> None:
        """Add the placeholders of one picture or video, in a frame."""
        self.ids += [IMAGE_START_ID, *[placeholder] * tokens, IMAGE_END_ID]
        self.types += [0, *[kind] * tokens, 0]


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


def encode(model: PreTrainedModel, picture: Picture, modality: str = "image") -> Any:
    """Pooler output of the model's own tower for one picture or video."""
    name = f"get_{modality}_features"
    encoder = getattr(model.base_model, name, None) or getattr(model, name)
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
    model: PreTrainedModel,
    images: Sequence[int] = (1,),
    *,
    videos: Sequence[int] = (),
    text: int = 12,
    seed: int = 0,
) -> list[Sample]:
    """One prompt for each entry of `images`, which says how many pictures it has.

    A prompt is a start token, two words, its pictures and videos (each in a frame and followed by a
    word) and the other words; it depends on the seed and its own place only.

    Args:
        model: A tiny model of :func:`dare_hf.testing.shrink.shrunk_model`.
        images: Pictures of each prompt.
        videos: Videos of each prompt (default: none).
        text: Words of each prompt; more for later ones where all have the same pictures.
        seed: Seed of words and pixels.
    """
    family = family_of(model.config.model_type)
    words = [text + (3 * i if len(set(images)) == 1 else 0) for i in range(len(images))]
    if family.even:
        each = (family.tokens or 0) + 2
        words = [text + (max(images) - count) * each for count in images]
    clips = videos or [0] * len(images)
    rows = enumerate(zip(images, clips, words, strict=True))
    return [_sample(model, family, index, counts, 1000 * seed + index) for index, counts in rows]


def _sample(
    model: PreTrainedModel, family: Family, index: int, counts: tuple[int, int, int], seed: int
) -> Sample:
    pictures, clips, text = counts
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_TEXT_ID, _LAST_TEXT_ID, (text,), generator=generator).tolist()
    made = Sample([BOS_ID], [0])
    made.text(words[:2])
    rest = words[2:]
    for number in range(pictures if family.sees else 0):
        picture, tokens = _picture(model, family, index + number, generator)
        made.pictures.append(picture)
        if tokens:
            made.content(IMAGE_ID, 1, tokens)
            made.text(rest[:1])
        rest = rest[1:]
    for _ in range(clips):
        _add_clip(model, made, rest[0], generator)
        rest = rest[1:]
    made.text(rest)
    return made


def _add_clip(model: PreTrainedModel, made: Sample, word: int, generator: torch.Generator) -> None:
    """A video and a word after it; each frame after the other where they stand apart."""
    clip = clip_of(model.config.model_type)
    assert clip is not None
    hidden = model.config.get_text_config().hidden_size
    if clip.draw is None:
        frames = _given(model, generator)
        features = frames["features"]
    else:
        frames = clip.draw(model, 0, generator)
        features = _rows_of_features(encode(model, frames, "video"), hidden)
        frames = {"features": features} if clip.encoded else frames
    tokens = len(features)
    made.clips.append(frames)
    parts = FRAMES if clip.apart else 1
    for _ in range(parts):
        made.content(clip.placeholder, clip.kind, tokens // parts)
        made.text([word])


def _given(model: PreTrainedModel, generator: torch.Generator) -> Picture:
    """Random features in place of a tower's."""
    hidden = model.config.get_text_config().hidden_size
    return {"features": torch.randn(_GIVEN_FEATURES, hidden, generator=generator).to(model.dtype)}


def _picture(
    model: PreTrainedModel, family: Family, number: int, generator: torch.Generator
) -> tuple[Picture, int]:
    hidden = model.config.get_text_config().hidden_size
    if family.picture is None:
        return _given(model, generator), _GIVEN_FEATURES
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
    types = torch.zeros_like(ids)
    modality = torch.full((len(rows), width), PAD, dtype=torch.int8)
    for index, row in enumerate(rows):
        ids[index, width - len(row.ids) :] = torch.tensor(row.ids)
        types[index, width - len(row.ids) :] = torch.tensor(row.types)
        modality[index, width - len(row.ids) :] = torch.tensor(row.types).clamp(max=1).char()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (modality >= 0).long()}
    names = inspect.signature(type(model).forward).parameters
    for name in family.type_ids:
        if name in names:
            inputs[name] = types
    most = max(max(len(row.pictures) for row in rows), int(family.blank))
    for name, shape in family.watched.items() if most else ():
        inputs[name] = torch.zeros(*ids.shape, most, *shape, dtype=torch.long)
        for index, row in enumerate(rows):
            inputs[name][index, :, : len(row.pictures)] = 1
    for name in family.zeros:
        inputs[name] = torch.zeros_like(ids)
    seen = [_pixels(model, family, rows), _frames(model, family, rows)]
    inputs |= seen[0] | seen[1]
    encoded = [part[_ENCODED] for part in seen if _ENCODED in part]
    if encoded:
        inputs[_ENCODED] = {kind: output for part in encoded for kind, output in part.items()}
    return Batch(inputs, modality, family.zeros)


def _frames(model: PreTrainedModel, family: Family, rows: Sequence[Sample]) -> dict[str, Any]:
    """The model inputs that carry the videos."""
    clips = [clip for row in rows for clip in row.clips]
    if not clips:
        return {}
    if "features" in clips[0]:
        clip = clip_of(model.config.model_type)
        flat = clip is not None and clip.flat
        return _encoded("video", [frames["features"] for frames in clips], flat)
    return {
        name: torch.cat([frames[name] for frames in clips], dim=family.joins.get(name, 0))
        for name in clips[0]
    }


def _encoded(modality: str, features: list[Tensor], flat: bool) -> dict[str, Any]:
    """What generate makes of pixels before it begins."""
    given: Any = torch.cat(features) if flat else features
    return {_ENCODED: {modality: BaseModelOutputWithPooling(pooler_output=given)}}


def _pixels(model: PreTrainedModel, family: Family, rows: Sequence[Sample]) -> dict[str, Any]:
    """The model inputs that carry the pictures."""
    pictures = [picture for row in rows for picture in row.pictures]
    if not pictures and family.blank and family.picture is not None:
        drawn = family.picture(model, 0, torch.Generator())
        return {
            name: torch.zeros(len(rows), *like.shape[1:]).to(like) for name, like in drawn.items()
        }
    if not pictures:
        return {}
    if "features" in pictures[0]:
        grids = {
            name: torch.cat([picture[name] for picture in pictures])
            for name in pictures[0]
            if name != "features"
        }
        features = [picture["features"] for picture in pictures]
        return {**_encoded("image", features, family.flat), **grids}
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
