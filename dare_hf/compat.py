"""What differs between the versions of transformers this package accepts: 5.19 and newer.

Nothing else in the package looks at a version. Older ones are not accepted: up to 5.18 generate
gives the beams of a row with several images those images in the wrong order, with or without DARE;
up to 5.17 it does not encode images before it begins, and needs huggingface_hub < 2.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

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


def check_new_images(
    model: nn.Module, past: int, ids: Tensor | None, vision_ids: tuple[int, ...]
) -> None:
    """Refuse images behind a carried cache where transformers does not place them.

    Args:
        model: The model generate is called on.
        past: Logical tokens in the cache.
        ids: Long[B, N] the ids it is given, of the whole sequence or of what is new.
        vision_ids: Ids that stand for images.

    Raises:
        DareInputError: transformers is older than 5.23 and the model has multimodal RoPE, whose
            positions it continues as text, or is a Gemma 3, whose two-way mask it misreads.
    """
    if VERSION >= (5, 23) or not past or ids is None or not misplaces(model):
        return
    new = ids[:, past:] if ids.shape[1] > past else ids
    if bool(torch.isin(new, torch.tensor(vision_ids, dtype=ids.dtype, device=ids.device)).any()):
        raise DareInputError(
            f"past_key_values: expected transformers >= 5.23 for new images behind a cache of "
            f"{past} tokens; got transformers {transformers.__version__}, which places the images "
            f"of a {model.config.model_type} wrongly there. Pass the whole conversation without "
            "past_key_values, or upgrade transformers"
        )


def misplaces(model: nn.Module) -> bool:
    """Whether this transformers misplaces the images of later turns of this model."""
    mrope = any("rope_deltas" in vars(module) for module in model.modules())
    return VERSION < (5, 23) and (mrope or model.config.model_type in _READ_BY_POSITION)


def check_checkpoints(layer: nn.Module) -> None:
    """Refuse gradient checkpoints that enclose the routed layer, whose router would run twice.

    Args:
        layer: A decoder layer in a training forward with hops or routers.

    Raises:
        DareInputError: Checkpointing is on and transformers is older than 5.23, where a layer's
            checkpoint lies around its `forward`, not inside.
    """
    if VERSION >= (5, 23) or not getattr(layer, "gradient_checkpointing", False):
        return
    if layer.training:
        raise DareInputError(
            "gradient_checkpointing: expected transformers >= 5.23 in a training forward with "
            f"routers or hops; got transformers {transformers.__version__}, whose checkpoints "
            "would run the router twice. Switch it off, or upgrade transformers"
        )


def processed(processor: Any, **kwargs: Any) -> Any:
    """What a Chameleon processor makes of texts that go on, without a separator behind them.

    Up to 5.22 it appends the separator whatever `return_for_text_completion` says.

    Args:
        processor: A ChameleonProcessor.
        kwargs: As it takes them; `return_tensors="pt"`, and `padding_side="left"` for several.
    """
    batch = processor(return_for_text_completion=True, **kwargs)
    if VERSION >= (5, 23):
        return batch
    ids = batch["input_ids"]
    if not (ids[:, -1] == processor.tokenizer.sep_token_id).all():
        return batch
    for name, value in batch.items():
        if value.shape[:2] == ids.shape and value.ndim == 2:
            batch[name] = value[:, :-1]
    return batch


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
