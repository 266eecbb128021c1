"""A decoder layer inside a training forward: HF's own layer, a mask of gates, a gated update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from dare_hf.compat import check_checkpoints
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.routers.holder import mean_update_of
from dare_hf.routing import gates
from dare_hf.routing.stale import stale
from dare_hf.simulation.damping import mark_closed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.simulation.simulation import Route, Simulation

# Log gates are 0 or the floor's; what is under this is closed.
_CLOSED = -1.0


class Place(Protocol):
    """What is known of a decoder layer: its index, what a None mask means, its own forward."""

    index: int
    causal: bool
    inner: Callable[..., Any]


def simulated_forward(
    layer: nn.Module, place: Place, simulation: Simulation, hidden: Tensor, kwargs: Any
) -> Any:
    """The layer at full length: keys seen by hop through the mask, updates by the route's gate.

    Args:
        layer: The decoder layer.
        place: What DARE knows of it.
        simulation: The training forward.
        hidden: [B, S, D] hidden states that enter the layer, or streams of them.
        kwargs: The layer's keyword arguments.

    Returns:
        What the layer returns; a token that does not run keeps its input exactly.

    Raises:
        DareInputError: The dtype, the mask or this transformers' checkpoints cannot carry gates.
        DareStateError: The layer is repeated after its forward has ended.

    Source: docs/method.md, section 7.
    """
    context, setup, index = simulation.context, simulation.setup, place.index
    check_checkpoints(layer)
    if simulation.closed:
        raise DareStateError(
            "expected checkpointing by model.activation_checkpointing_enable(); got a "
            "decoder layer that is run again as a whole, after its forward. Take off the outer "
            "checkpoint wrapper and enable it on the model"
        )
    _check_dtype(hidden)
    route = simulation.route(layer, index, setup.anatomy.scored(hidden))
    table = simulation.key_gates(index, route)
    learns = simulation.learns(index)
    if table is not None:
        _check_checkpointing(layer)
        mask = _full_mask(simulation, place.causal, kwargs.get("attention_mask"), hidden)
        seen = _by_query(table, context.token_hop)[:, None].to(hidden.device)
        mask = mask + seen.to(hidden.dtype)
        if learns:
            mark_closed(mask, seen < _CLOSED)
        kwargs = kwargs | {"attention_mask": mask}
    output = place.inner(hidden, **kwargs)
    vectors = mean_update_of(layer) if setup.config.mean_update is True else None
    passed = stale(hidden, vectors, context.modality)
    new = output[0] if isinstance(output, tuple) else output
    if vectors is not None:
        simulation.note_update(vectors, new - hidden, learns)
    new = _update(simulation, route, hidden, passed, new, learns)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _update(
    simulation: Simulation,
    route: Route,
    hidden: Tensor,
    passed: Tensor,
    output: Tensor,
    learns: bool,
) -> Tensor:
    """The gated update: exactly the layer's output, or what it leaves of a token that passes by.

    With the gates' gradient, which is that of a mixture of both.
    """
    device, dtype = hidden.device, hidden.dtype
    run = route.run.to(device)[..., None]
    scores = route.scores.to(device)[..., None]
    change = output - hidden
    if simulation.multiplies:
        scaled = scores * change
        kept = torch.where(run, hidden + scaled.to(dtype), passed)
    else:
        scaled, kept = change, torch.where(run, output, passed)
    if not learns:
        return kept
    pull = gates.passed(route.gate).to(device)[..., None]
    pulled = pull * (scaled if passed is hidden else scaled - (passed - hidden))
    if not simulation.multiplies:
        pulled = pulled + run * gates.passed(scores) * scaled
    return kept + pulled.to(dtype)


def _by_query(table: Tensor, hop: Tensor) -> Tensor:
    """Float[B, S, S]: log gate of each key for each query; every query sees itself.

    Args:
        table: Float[B, H, S] gate of each key by the query's hop.
        hop: Int[B, S] hop of each query.
    """
    size = hop.shape[1]
    index = hop.long()[:, :, None].expand(-1, -1, size)
    seen = gates.log_gates(table).gather(1, index)
    itself = torch.eye(size, dtype=torch.bool, device=seen.device)
    return seen.masked_fill(itself, 0.0)


def _full_mask(simulation: Simulation, causal: bool, mask: Any, hidden: Tensor) -> Tensor:
    """HF's mask in additive form [B|1, H|1, S, S]; one for all layers that get the same."""
    key = (id(mask), causal, hidden.device)
    if key not in simulation.masks:
        simulation.masks[key] = (mask, _additive(mask, causal, hidden))
    return simulation.masks[key][1]


def _additive(mask: Any, causal: bool, hidden: Tensor) -> Tensor:
    size, low = hidden.shape[-2], torch.finfo(hidden.dtype).min
    if mask is None:
        mask = torch.ones(size, size, dtype=torch.bool, device=hidden.device)
        mask = (mask.tril() if causal else mask)[None, None]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise DareInputError(
            "attention_mask: expected a mask [batch, 1, tokens, tokens] (sdpa or eager), to which "
            f"gates can be added; the layer got {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa'"
        )
    if mask.dtype != torch.bool:
        return mask.to(hidden.dtype)
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, low)


def _check_dtype(hidden: Tensor) -> None:
    kind = hidden.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if hidden.dtype == torch.float16 or half:
        raise DareInputError(
            "expected float32 or bfloat16 in training: the gradient of a closed gate leaves "
            "float16's range; got float16. Load the model in bfloat16, or train with bf16=True"
        )


def _check_checkpointing(layer: nn.Module) -> None:
    """Refuse reentrant checkpoints, through which no gradient reaches a mask."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise DareInputError(
            "use_reentrant: expected False for the checkpoints of layers, so that gradients reach "
            "the routers through the attention mask; got True. Pass use_reentrant=False "
            "(TrainingArguments: gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
