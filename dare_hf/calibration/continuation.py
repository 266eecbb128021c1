"""Complete sequences to learn from: prompts and the model's own continuation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Arguments with a value per token, and what sampled tokens have there.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "modality_mask")


def continued(
    model: Any, batch: Mapping[str, Any], max_new_tokens: int, generate_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A batch with the model's greedy continuation, as a teacher-forced forward takes it.

    Args:
        model: The model, plain.
        batch: Inputs of generate; returned as it is, but for a missing mask, where it has labels.
        max_new_tokens: Length of the continuation.
        generate_kwargs: Further arguments of generate.

    Returns:
        The inputs with `input_ids` [B, S + n], `attention_mask` and `labels`: -100 on the prompt
        and behind a row's end.

    Raises:
        DareInputError: The batch has no input_ids.
    """
    result = dict(batch)
    ids = result.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise DareInputError(
            "batches: expected dicts with input_ids [batch, tokens], as a processor gives them; "
            f"got keys {sorted(result)}"
        )
    mask = result.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    result["attention_mask"] = mask
    if result.get("labels") is not None:
        return result
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
    output = model.generate(**result, **settings)
    sequences = getattr(output, "sequences", output)
    new = sequences[:, ids.shape[1] :]
    return extended(result, new, until_end(model, new))


def extended(batch: Mapping[str, Any], new: Tensor, live: Tensor) -> dict[str, Any]:
    """A batch of prompts with what follows them.

    Args:
        batch: Inputs of generate, with their mask.
        new: Long[B, n] tokens behind the prompts.
        live: Bool[B, n] which of them are there; False only behind a row's end.

    Returns:
        The inputs with `input_ids` [B, S + n], `attention_mask` and `labels`: -100 on the prompt
        and where nothing is there.
    """
    result, ids, mask = dict(batch), batch["input_ids"], batch["attention_mask"]
    result["input_ids"] = torch.cat([ids, new], dim=1)
    result["attention_mask"] = torch.cat([mask, live.to(mask)], dim=1)
    result["labels"] = torch.cat([torch.full_like(ids, -100), new.masked_fill(~live, -100)], dim=1)
    for name in _PER_TOKEN:
        if (value := result.get(name)) is not None:
            result[name] = torch.cat([value, torch.zeros_like(new).to(value)], dim=1)
    result.pop("position_ids", None)
    return result


def until_end(model: Any, new: Tensor) -> Tensor:
    """Bool[B, n]: sampled tokens up to a row's end token, that one included."""
    end = model.generation_config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    is_end = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype))
    return (is_end.cumsum(1) - is_end.long()) == 0
