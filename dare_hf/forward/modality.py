"""Which token is what: text, vision or padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.routing.selection import isin_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_CONFIG_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_AUDIO_ID_NAMES = ("audio_token_id", "audio_token_index")
_IMAGE_NAMES = ("IMGIMG", "<|visual token")  # Chameleon, Emu3
_VISION_TYPES = (1, 2)  # image, video; 3 is audio


def vision_token_ids(config: Any, extra: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Ids that stand for image or video content, from the model's config or the user.

    Args:
        config: The top-level model config.
        extra: `DareConfig.image_token_ids`; when given it replaces what the config says.
    """
    if extra is not None:
        return tuple(sorted(set(extra)))
    found = {getattr(config, name, None) for name in _CONFIG_ID_NAMES}
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    found.update(i for name, i in vocabulary.items() if name.startswith(_IMAGE_NAMES))
    found.add(vocabulary.get("<image>"))
    return tuple(sorted(int(i) for i in found if i is not None))


def audio_token_ids(config: Any, vision_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids that stand for audio: a third kind, never pruned unless the user calls it vision.

    Args:
        config: The top-level model config.
        vision_ids: Ids of vision tokens.
    """
    found = {getattr(config, name, None) for name in _AUDIO_ID_NAMES}
    return tuple(sorted(int(i) for i in found if i is not None and i not in vision_ids))


def special_token_ids(config: Any, generation_config: Any) -> tuple[int, ...]:
    """Every special id a config names: begin and end of sequence or image, padding."""
    found: set[int] = set()
    for source in (config, config.get_text_config(), generation_config):
        for name, value in vars(source).items() if source is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                values = value if isinstance(value, (list, tuple)) else (value,)
                found.update(v for v in values if isinstance(v, int) and v >= 0)
    return tuple(sorted(found - set(vision_token_ids(config))))


def check_ids(field: str, ids: tuple[int, ...] | None, config: Any, rows: int) -> None:
    """Refuse token ids that the model's vocabulary does not have.

    Args:
        field: The DareConfig field, for the message.
        ids: The ids to check.
        config: The model config: placeholder ids it names itself may lie outside.
        rows: Rows of the token embedding.

    Raises:
        DareConfigError: An id is not in the vocabulary.
    """
    known = set(vision_token_ids(config))
    for token in ids or ():
        if not 0 <= token < rows and token not in known:
            raise DareConfigError(
                f"{field}: expected token ids of the model's vocabulary, 0 to {rows - 1}; "
                f"got {token}"
            )


def check_mask(mask: Tensor, batch: int, length: int, past: int = 0) -> None:
    """Refuse a modality mask that does not say which column each of its entries is.

    Args:
        mask: [B, S] over the new columns, or [B, N] over all of them, with 1 / True for vision.
        batch: B, the caller's rows.
        length: S, new columns.
        past: N - S, columns that came before them.

    Raises:
        DareInputError: The shape is another.
    """
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise DareInputError(
            f"modality_mask: expected shape [batch, tokens] = [{batch}, {length}], 1 for vision "
            f"and 0 for text; got {list(mask.shape)}"
        )


def resolve_span(
    arguments: Mapping[str, Any],
    vision_ids: Sequence[int],
    type_names: Sequence[str],
    length: int,
    past: int = 0,
) -> Tensor:
    """Bool[B, S]: the vision tokens of a span, by the first source that is there.

    An explicit `modality_mask`, then the processor's type ids (arguments called `type_names`), then
    the token ids.

    Raises:
        DareInputError: Only embeddings are given, so nothing tells which token is vision.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    batch = (ids if ids is not None else embeds).shape[0]
    if (mask := arguments.get("modality_mask")) is not None:
        check_mask(mask, batch, length, past)
        return mask[:, mask.shape[1] - length :] > 0
    for name in type_names:
        if (types := arguments.get(name)) is not None and types.shape[1] >= length:
            return isin_ids(types[:, types.shape[1] - length :], _VISION_TYPES)
    if ids is None:
        raise DareInputError(
            "expected input_ids or a modality_mask [batch, tokens] (1 for vision, 0 for text) "
            "beside inputs_embeds; got inputs_embeds alone, from which no modality can be told. "
            "Pass modality_mask=… to the same call"
        )
    return isin_ids(ids, vision_ids)
