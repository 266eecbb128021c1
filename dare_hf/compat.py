"""What differs between the versions of transformers this package accepts: 5.19 and newer.

Nothing else in the package looks at a version. Older ones are not accepted: up to 5.18 generate
gives the beams of a row with several images those images in the wrong order, with or without DARE;
up to 5.17 it does not encode images before it begins, and needs huggingface_hub < 2.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

OLDEST = "5.19"
"""The oldest version of transformers that passes the tests; pyproject declares the same."""

_READ_BY_POSITION = {"gemma3": "token_type_ids", "shieldgemma2": "token_type_ids"}


def minor(version: str) -> tuple[int, int]:
    """Major and minor number of a version: "5.23.0.dev0" is (5, 23)."""
    first, second = version.split(".")[:2]
    return int(first), int(second)


VERSION = minor(transformers.__version__)
"""Major and minor number of the transformers that runs."""


def check_prefill_chunks(size: int | None) -> None:
    """Refuse a prefill in chunks where transformers computes something else than the prompt.

    Args:
        size: `prefill_chunk_size` of this generate, None for a prefill in one piece.

    Raises:
        DareInputError: transformers is older than 5.23: it leaves images out of every chunk, and
            (up to 5.20) begins a carried cache anew.
    """
    if size is None or VERSION >= (5, 23):
        return
    raise DareInputError(
        "prefill_chunk_size: expected transformers >= 5.23, whose chunks bring their images along; "
        f"got {size} with transformers {transformers.__version__}, which leaves the images out. "
        "Leave it out, or upgrade transformers"
    )


def span_inputs(model: Any, inputs: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward over new tokens behind a cache, with type ids the mask can read.

    Gemma 3 reads them by position, so that they must cover the whole sequence; up to 5.22
    `prepare_inputs_for_generation` cuts them to the new tokens.

    Args:
        model: The model.
        inputs: What `prepare_inputs_for_generation` made.
        carried: The model_kwargs of generate, which cover the whole sequence.
    """
    name = _READ_BY_POSITION.get(model.config.model_type)
    if VERSION >= (5, 23) or name is None or carried.get(name) is None:
        return inputs
    return inputs | {name: carried[name]}
