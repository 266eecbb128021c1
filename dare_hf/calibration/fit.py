"""fit_router: linear routers and per-layer rates without a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from dare_hf.api import dare_disabled
from dare_hf.architectures.locate import locate
from dare_hf.calibration.budgets import measure_cut_layer
from dare_hf.calibration.continuation import continued
from dare_hf.calibration.observe import Tokens, watching
from dare_hf.calibration.rates import RateCosts, RateFit
from dare_hf.calibration.ridge import CrossFitted
from dare_hf.config import DareConfig
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.forward.modality import resolve_span
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.stale import mean_updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from dare_hf.calibration.observe import Seen
    from dare_hf.engine.controller import Controller
    from dare_hf.routers.router import Router

logger = logging.get_logger("transformers.dare_hf")

KINDS = {TEXT: "text", VISION: "vision"}
# Added to importance before its logarithm: attention below this share of the mean counts the same.
_FLOOR = 0.01
_SCORED = (0.05, 0.95)  # where mean scores are put


@dataclass(frozen=True)
class Calibration:
    """What `fit_router` has measured.

    Attributes:
        explained: Per layer (text, vision): share of the variance of log importance that the router
            explains on prompts it was not fitted to; 0 or less means nothing was learned.
        vision_shares: Per layer, share of its attention that text puts on vision.
        cut_layer: The first layer where that share falls under half its maximum; None where there
            is none with a layer behind it.
        costs: What pruning a layer, and a hop, costs; None where rates are not learned.
        rates: `[row][layer]` rates (vision, text), the rows of the rate table: one for DARE-L,
            else row 0 for hops 0 and 1 and row h for a later hop h; None where not learned.
        tokens: Tokens the routers were fitted to, by modality name, in the layer that saw most.
    """

    explained: list[tuple[float, float]]
    vision_shares: list[float]
    cut_layer: int | None
    costs: RateCosts | None
    rates: list[list[tuple[float, float]]] | None
    tokens: dict[str, int]


def fit_router(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    config: DareConfig | None = None,
    *,
    max_new_tokens: int = 32,
    prompt_weight: float = 0.1,
    generate_kwargs: Mapping[str, Any] | None = None,
    fit_rates: bool = True,
    details: Callable[[Calibration], None] | None = None,
) -> Any:
    """Give a model a router adapter fitted in closed form to what its own answers attend to.

    Each layer's router is a ridge regression from what enters the layer to the logarithm of a
    token's importance: the attention that later queries (the model's own continuation) pay to it
    in the layers above, times its value norm there. What a layer adds to tokens on average is
    measured beside it, for those that the layer will pass by (`mean_update`). Nothing is trained
    and no label is needed. Learned rates are set from what pruning each layer alone does to the
    model's predictions.

        batches = [processor(images=..., text=..., return_tensors="pt") for ...]   # 8 to 64 prompts
        model = fit_router(model, batches, DareConfig(scorer="router", schedule="learned"))
        model.generate(**inputs)
        model.save_pretrained("calibrated")

    Args:
        model: A supported model without DARE; or a PeftModel whose active adapter is a DARE router,
            or a model that got one by `model.add_adapter`.
        batches: Inputs of generate. A batch with `labels` [B, S] brings its own continuation: the
            tokens from the first label on that is not -100.
        config: What to prune; its scorer is "router", or another one and `mean_update` True, and
            then that alone is fitted. Default: learned rates at 0.4 / 0.7. Ignored where the model
            has an adapter already.
        max_new_tokens: Length of the continuations.
        prompt_weight: Share of the importance taken from the prompt's own text queries, in [0, 1].
        generate_kwargs: Further arguments of generate.
        fit_rates: Whether learned rates are fitted too; False leaves them, and puts mean scores at
            them.
        details: Receives what was measured.

    Returns:
        A PeftModel around `model` with the adapter, or `model` where it has one already; `model`
        itself is routed from now on.

    Raises:
        DareConfigError: The scorer is not the router, and no mean update is asked for.
        DareInputError: No batch, or no token to learn from.
        UnsupportedModelError: The architecture cannot be routed.

    Source: ours; docs/calibration.md.
    """
    given = list(batches)
    if not given:
        raise DareInputError("batches: expected at least one batch of prompts; got none")
    routed = _with_adapter(model, config)
    try:
        options = dict(generate_kwargs or {})
        found = _fit(routed, given, max_new_tokens, prompt_weight, options, fit_rates)
    except BaseException:
        if routed is not model:
            routed.unload()
        raise
    if details is not None:
        details(found)
    return routed


def _fit(
    routed: Any,
    batches: list[Mapping[str, Any]],
    max_new_tokens: int,
    prompt_weight: float,
    generate_kwargs: dict[str, Any],
    fit_rates: bool,
) -> Calibration:
    controller: Controller = _inner(routed)._dare.controller
    config = controller.config
    with dare_disabled(routed), torch.no_grad():
        complete = [continued(routed, b, max_new_tokens, generate_kwargs) for b in batches]
        fits, shares, counts = _observe(routed, controller, complete, prompt_weight)
    explained = _write_routers(controller, fits)
    cut = measure_cut_layer(shares)
    if cut is not None and config.cut_layer == "auto":
        config.cut_layer = cut
    costs, rates = None, None
    hop_shares = [1.0]
    if config.learns_rates and fit_rates:
        targets = {VISION: config.vision_retention, TEXT: config.text_retention}
        fit = RateFit(routed, controller, _routers(controller), complete, targets)
        costs, rates = fit.run()
        hop_shares = costs.weights
    _centre_scores(controller, fits, hop_shares)
    return Calibration(explained, shares, cut, costs, rates, counts)


def _with_adapter(model: Any, config: DareConfig | None) -> Any:
    from peft import PeftModel, get_peft_model

    if "_dare" in vars(_inner(model)):
        if _inner(model)._dare.controller.routers is None:
            raise DareStateError(
                "fit_router: expected a plain model, or one with a router adapter; got a model "
                "with training-free DARE. Call remove_dare(model) first"
            )
        if not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False):
            raise DareStateError(
                "fit_router: expected the PeftModel that holds the router adapter, or a model "
                "after model.add_adapter(config); got the model inside a PeftModel"
            )
        return model
    config = DareConfig(scorer="router", schedule="learned") if config is None else config
    if config.scorer != "router" and config.mean_update is not True:
        raise DareConfigError(
            "scorer: expected 'router' to fit one, or mean_update=True to fit that alone; got "
            f"{config.scorer!r}"
        )
    if config.mean_update == "auto" and not locate(_inner(model)).spec.streams:
        config = replace(config, mean_update=True)
    return get_peft_model(model, config)


def _inner(model: Any) -> Any:
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _observe(
    model: Any, controller: Controller, batches: list[dict[str, Any]], prompt_weight: float
) -> tuple[list[dict[int, CrossFitted]], list[float], dict[str, int]]:
    """Plain forwards over the complete sequences, summed up for the regressions."""
    anatomy, rules = controller.anatomy, controller.rules
    width = anatomy.text_config.hidden_size
    fits = [
        {kind: CrossFitted.empty(width, _device(layer)) for kind in KINDS}
        for layer in anatomy.layers
    ]
    shares = torch.zeros(len(anatomy.layers))
    measures = controller.config.mean_update is True
    updates: list[Any] = [[0.0, 0.0] for _ in fits] if measures else []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        length = batch["input_ids"].shape[1]
        real = batch["attention_mask"].bool()
        vision = resolve_span(inputs, rules.vision_ids, rules.type_ids, length) & real
        modality = torch.where(vision, VISION, TEXT).masked_fill(~real, PAD)
        later = (batch["labels"] != -100) & real
        with watching(anatomy, Tokens(modality, later, prompt_weight)) as seen:
            model(**inputs, use_cache=False)
        prunable = _after_prefix(real, rules.prefix)
        targets = _needed_above(seen)
        for layer, one in enumerate(seen):
            normalize = _routers(controller)[layer].normalize
            _add_samples(fits[layer], one.hidden, targets[layer], modality, normalize)
            if updates:
                found = mean_updates(one.change, prunable, modality)
                updates[layer] = [a + b for a, b in zip(updates[layer], found, strict=True)]
            shares[layer] += one.vision_share / len(batches)
    counts = {name: max(fit[kind].count for fit in fits) for kind, name in KINDS.items()}
    if not any(counts.values()):
        raise DareInputError(
            "batches: expected prompts with tokens that their continuation attends to; got none"
        )
    for router, (sums, count) in zip(_routers(controller), updates, strict=False):
        mean, vectors = sums / count.clamp(min=1)[:, None], router.mean_update
        assert vectors is not None
        # a modality that no prompt has keeps what it had
        vectors.copy_(torch.where((count > 0)[:, None], mean.to(vectors), vectors))
    return fits, shares.tolist(), counts


def _after_prefix(real: Tensor, prefix: int) -> Tensor:
    """Bool[B, S]: real tokens but each row's first `prefix`, which are never pruned.

    The first ones take the layers' largest updates (attention sinks) and would be the mean.
    """
    return real & (real.cumsum(1) > prefix)


def _routers(controller: Controller) -> list[Router]:
    routers = controller.routers
    if routers is None:
        raise DareStateError(
            "fit_router: expected a router adapter that is active; got none. Call set_adapter(name)"
        )
    return routers


def _device(layer: Any) -> torch.device:
    return next(parameter.device for parameter in layer.parameters())


def _needed_above(seen: Sequence[Seen]) -> list[tuple[Tensor, Tensor]]:
    """For each layer what its tokens are needed for: their importance in the layers above it.

    A token that a layer passes by reaches all later queries through the layers above, whose keys
    are made of its stale state; what the layer's own attention asks is the smaller part.

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


def _write_routers(
    controller: Controller, fits: list[dict[int, CrossFitted]]
) -> list[tuple[float, float]]:
    """Put the regressions into the routers; a modality without tokens keeps what it had."""
    explained = []
    for layer, (router, by_kind) in enumerate(zip(_routers(controller), fits, strict=True)):
        found = dict.fromkeys(KINDS, 0.0)
        for kind, fit in by_kind.items():
            if not fit.count:
                logger.warning(
                    "fit_router: no later query saw a %s token in layer %s, so its router ranks "
                    "them as it did before. Use longer continuations, or prompts that have some",
                    KINDS[kind],
                    layer,
                )
                continue
            weight, bias, found[kind] = fit.solve()
            with torch.no_grad():
                router.weight[kind] = weight.to(router.weight)
                router.bias[kind] = bias.to(router.bias)
        explained.append((found[TEXT], found[VISION]))
    return explained


def _centre_scores(
    controller: Controller, fits: list[dict[int, CrossFitted]], hop_shares: list[float]
) -> None:
    """Shift each layer's scores so that their mean is its rate; no token changes its rank.

    `hop_shares` weighs the rows of the rate table.

    The losses of a training hold them there, and soft gates tell scores apart that are spread over
    (0, 1), not pressed against 0. The mean of a sigmoid over normal logits is the probit
    approximation's.
    """
    for router, by_kind in zip(_routers(controller), fits, strict=True):
        rows = router.rates().double()[: len(hop_shares)]
        rates = sum(share * row for share, row in zip(hop_shares, rows, strict=True))
        for kind, fit in by_kind.items():
            if not fit.count:
                continue
            weight, bias = router.weight[kind].double(), router.bias[kind].double()
            mean, variance = fit.predicted(weight.detach(), bias.detach())
            rate = rates[kind].clamp(*_SCORED)
            wanted = rate.logit() * math.sqrt(1 + math.pi * variance / 8)
            with torch.no_grad():
                router.bias[kind] += (wanted - mean).to(router.bias)
