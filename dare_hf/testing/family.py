"""How to build and feed the tiny model of one architecture: the fields of `families`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dare_hf.testing import pictures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.testing.pictures import Draw


@dataclass(frozen=True)
class Family:
    """How to build and feed the tiny model of one architecture.

    Attributes:
        picture: Draws the pixels of one picture; None where the tower cannot be built here, so that
            random features take the place of its output.
        config: Fields of the config that names do not tell, laid over the shrunk ones.
        sees: Whether prompts have pictures at all.
        images: Pictures of each row of the batch.
        separate: Pictures of rows that have nothing to do with each other, where transformers
            itself lets the rows of `images` reach each other.
        even: Rows of one batch are equally long, since transformers itself gives the written tokens
            of a padded row other positions than those of the row alone.
        needs_picture: Its generate takes no prompts without any picture beside them.
        tokens: Placeholders of a picture, where the model has no function that encodes one.
        positions: Whether forward takes the position ids that generate counts.
        encoded: Run the tower picture by picture, and give the model its features.
        flat: The features of a batch are one tensor, not one a picture.
        per_row: Pictures are stacked by row, and rows with fewer are filled with zeros.
        blank: A batch without pictures has a blank one in each row.
        joins: At which dimension a tensor of several pictures is joined, where it is not 0.
        type_ids: Arguments that take 1 for image tokens, where the model's forward knows them.
        watched: Masks [B, S, pictures, *shape] of the pictures that each token may attend to beside
            the text.
        zeros: Further arguments that are zero for every token.
        std: Standard deviation of the weights; smaller ones print one token for ever.
    """

    picture: Draw | None = pictures.patches
    config: Mapping[str, Any] = field(default_factory=dict)
    sees: bool = True
    images: tuple[int, ...] = (0, 1, 3)
    separate: tuple[int, ...] | None = None
    even: bool = False
    needs_picture: bool = False
    tokens: int | None = None
    positions: bool = True
    encoded: bool = False
    flat: bool = False
    per_row: bool = False
    blank: bool = False
    joins: Mapping[str, int] = field(default_factory=dict)
    type_ids: tuple[str, ...] = ("mm_token_type_ids", "token_type_ids")
    watched: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    std: float = 0.24
