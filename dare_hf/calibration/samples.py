"""What plain forwards of a calibration show, summed up layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.calibration.observe import Tokens, watching
from dare_hf.calibration.ridge import CrossFitted
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.forward.modality import resolve_span
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.stale import mean_updates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dare_hf.calibration.observe import Seen
    from dare_hf.engine.controller import Controller
    from dare_hf.routers.router import Router

KINDS = {TEXT: "text", VISION: "vision"}
OWN, ABOVE = "own", "above"
"""What a router may be fitted to: attention in its own layer, or in the layers above it."""
# Added to importance before its logarithm: attention below this share of the mean counts the same.
_FLOOR = 0.01


@dataclass(frozen=True)
class Observed:
    """What plain forwards showed.

    Attributes:
        fits: By target, "own" or "above", and layer the regression of each modality.
        means: Per layer Float32[2, D] mean update; [] where none are asked for.
        shares: Per layer the share of its attention that text puts on vision.
        counts: Tokens by modality name, in the layer that saw most.
    """

    fits: dict[str, list[dict[int, CrossFitted]]]
    means: list[Tensor]
    shares: list[float]
    counts: dict[str, int]


def observe(
    model: Any,
    controller: Controller,
    batches: list[dict[str, Any]],
    prompt_weight: float,
    tell: Callable[[str, int, int], None],
) -> Observed:
    """Plain forwards over the complete sequences, summed up for the regressions.

    `tell` is called with ("observe", done, in all) after each.
    """
    anatomy, rules = controller.anatomy, controller.rules
    width = anatomy.text_config.hidden_size
    fits = {
        target: [
            {kind: CrossFitted.empty(width, _device(layer)) for kind in KINDS}
            for layer in anatomy.layers
        ]
        for target in (OWN, ABOVE)
    }
    shares = torch.zeros(len(anatomy.layers))
    measures = controller.config.mean_update is True
    updates: list[Any] = [[0.0, 0.0] for _ in anatomy.layers] if measures else []
    for done, batch in enumerate(batches, 1):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        length = batch["input_ids"].shape[1]
        real = batch["attention_mask"].bool()
        vision = resolve_span(inputs, rules.vision_ids, rules.type_ids, length) & real
        modality = torch.where(vision, VISION, TEXT).masked_fill(~real, PAD)
        later = (batch["labels"] != -100) & real
        with watching(anatomy, Tokens(modality, later, prompt_weight)) as seen:
            model(**inputs, use_cache=False)
        targets = {OWN: [(one.importance, one.known) for one in seen], ABOVE: _needed_above(seen)}
        prunable = _after_prefix(real, rules.prefix)
        for layer, one in enumerate(seen):
            normalize = routers_of(controller)[layer].normalize
            for target, wanted in targets.items():
                _add_samples(fits[target][layer], one.hidden, wanted[layer], modality, normalize)
            shares[layer] += one.vision_share / len(batches)
            if updates:
                found = mean_updates(one.output - one.hidden, prunable, modality)
                updates[layer] = [a + b for a, b in zip(updates[layer], found, strict=True)]
        tell("observe", done, len(batches))
    counts = {name: max(fit[kind].count for fit in fits[OWN]) for kind, name in KINDS.items()}
    if not any(counts.values()):
        raise DareInputError(
            "batches: expected prompts with tokens that their continuation attends to; got none"
        )
    means = [sums / count.clamp(min=1)[:, None] for sums, count in updates]
    return Observed(fits, means, shares.tolist(), counts)


def _after_prefix(real: Tensor, prefix: int) -> Tensor:
    """Bool[B, S]: real tokens but each row's first `prefix`, which are never pruned.

    The first ones take the layers' largest updates (attention sinks) and would be the mean.
    """
    return real & (real.cumsum(1) > prefix)


def _needed_above(seen: Sequence[Seen]) -> list[tuple[Tensor, Tensor]]:
    """For each layer what its tokens are needed for: their importance in the layers above it.

    A token that a layer passes by reaches later queries through the layers above, whose keys are
    made of its stale state.

    Returns:
        Per layer Float32[B, S], the mean over the layers above that judged the token (the last
        layer's is its own), and Bool[B, S] where there is one.
    """
    found = [(seen[-1].importance, seen[-1].known)]
    device = seen[-1].importance.device
    total, count = torch.zeros_like(found[0][0]), torch.zeros_like(found[0][0])
    for one in reversed(seen[1:]):
        known = one.known.to(device)
        total = total + one.importance.to(device) * known
        count = count + known
        found.append((total / count.clamp(min=1), count > 0))
    return found[::-1]


def _add_samples(
    fits: dict[int, CrossFitted],
    hidden: Tensor,
    target: tuple[Tensor, Tensor],
    modality: Tensor,
    normalize: bool,
) -> None:
    """The tokens of one forward, row by row."""
    x = hidden.float()
    importance, known = (tensor.to(x.device) for tensor in target)
    if normalize:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    wished = (importance + _FLOOR).log()
    for kind, fit in fits.items():
        wanted = known & (modality == kind).to(x.device)
        for row in range(x.shape[0]):
            if wanted[row].any():
                fit.add(x[row][wanted[row]], wished[row][wanted[row]])


def _device(layer: Any) -> torch.device:
    return next(parameter.device for parameter in layer.parameters())


def routers_of(controller: Controller) -> list[Router]:
    """The active adapter's router of each layer.

    Raises:
        DareStateError: No router adapter is active.
    """
    routers = controller.routers
    if routers is None:
        raise DareStateError(
            "fit_router: expected a router adapter that is active; got none. Call set_adapter(name)"
        )
    return routers
