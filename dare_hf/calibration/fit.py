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
from dare_hf.calibration.rates import Divergence, RateCosts, RateFit
from dare_hf.calibration.samples import KINDS, OWN, observe, routers_of
from dare_hf.calibration.thresholds import follow_scores
from dare_hf.config import DareConfig
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from dare_hf.calibration.ridge import CrossFitted
    from dare_hf.calibration.samples import Observed
    from dare_hf.engine.controller import Controller

logger = logging.get_logger("transformers.dare_hf")

_SCORED = (0.05, 0.95)  # where mean scores are put


@dataclass(frozen=True)
class Calibration:
    """What `fit_router` has measured.

    Attributes:
        explained: Per layer (text, vision): share of the variance of log importance that the router
            explains on prompts it was not fitted to; 0 or less means nothing was learned. Empty
            where another scorer decides.
        vision_shares: Per layer, share of its attention that text puts on vision.
        cut_layer: The first layer where that share falls under half its maximum; None where there
            is none with a layer behind it.
        costs: What pruning a layer, and a hop, costs; None where rates are not learned.
        rates: `[row][layer]` rates (vision, text), the rows of the rate table: one for DARE-L,
            else row 0 for hops 0 and 1 and row h for a later hop h; None where not learned.
        tokens: Tokens the routers were fitted to, by modality name, in the layer that saw most.
        tried: KL (nats per token) on the prompts' continuations, at the rates at the start, of
            routers fitted to the attention in their "own" layer or in those "above", with and
            without mean updates; the lowest was taken. Empty where another scorer decides.
    """

    explained: list[tuple[float, float]]
    vision_shares: list[float]
    cut_layer: int | None
    costs: RateCosts | None
    rates: list[list[tuple[float, float]]] | None
    tokens: dict[str, int]
    tried: dict[str, float]


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
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Give a model a router adapter fitted in closed form to what its own answers attend to.

    Each layer's router is a ridge regression from what enters the layer to the logarithm of a
    token's importance: the attention that later queries (the model's own continuation) pay to it,
    times its value norm, in the layer itself or in those above, whichever keeps the predictions
    better. What a layer adds to tokens on average is
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
        progress: Called with ("observe", batches done, in all), then, where rates are fitted,
            ("layers", measured, in all).

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
        tell = progress or (lambda stage, done, total: None)
        found = _fit(routed, given, max_new_tokens, prompt_weight, options, fit_rates, tell)
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
    tell: Callable[[str, int, int], None],
) -> Calibration:
    controller: Controller = _inner(routed)._dare.controller
    config = controller.config
    with dare_disabled(routed), torch.no_grad():
        complete = [continued(routed, b, max_new_tokens, generate_kwargs) for b in batches]
        seen = observe(routed, controller, complete, prompt_weight, tell)
    _write_means(controller, seen.means)
    shares, divergence, tried = seen.shares, None, {}
    if config.scorer == "router":
        divergence = Divergence(routed, controller, complete)
        tried = _choose(controller, seen, divergence)
    fits, explained = seen.fits[OWN], []
    if tried:
        fits = seen.fits[min(tried, key=tried.__getitem__).split()[0]]
        explained = _write_routers(controller, fits)
        _warn_unseen(fits)
    cut = measure_cut_layer(shares)
    if cut is not None and config.cut_layer == "auto":
        config.cut_layer = cut
    costs, rates = None, None
    hop_shares = [1.0]
    if config.learns_rates and fit_rates and divergence is not None:
        targets = {VISION: config.vision_retention, TEXT: config.text_retention}
        fit = RateFit(divergence, controller, routers_of(controller), targets)
        costs, rates = fit.run(tell)
        hop_shares = costs.weights
    if tried:
        _centre_scores(controller, fits, hop_shares)
    if config.decode == "routed":
        follow_scores(routed, controller, complete)
    return Calibration(explained, shares, cut, costs, rates, seen.counts, tried)


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


def _write_means(controller: Controller, means: Sequence[Tensor]) -> None:
    """Put mean updates into the routers, where these have a place for them."""
    for router, mean in zip(routers_of(controller), means, strict=False):
        assert router.mean_update is not None
        router.mean_update.copy_(mean)


def _choose(controller: Controller, seen: Observed, divergence: Divergence) -> dict[str, float]:
    """Try what routers can be fitted to, with and without mean updates; the best ones stay.

    What a layer's own attention asks and what the layers above need differ from model to model in
    which of them keeps the predictions; a forward per batch tells.
    """
    zeros = [torch.zeros_like(mean) for mean in seen.means]
    means = {"with mean updates": seen.means, "without": zeros} if zeros else {"without": []}
    tried: dict[str, float] = {}
    for target, fits in seen.fits.items():
        _write_routers(controller, fits)
        for name, vectors in means.items():
            _write_means(controller, vectors)
            tried[f"{target} {name}"] = divergence.measured()
    best = min(tried, key=tried.__getitem__)
    _write_means(controller, means[best.partition(" ")[2]])
    logger.info("fit_router: KL by target %s", tried)
    return tried


def _write_routers(
    controller: Controller, fits: list[dict[int, CrossFitted]]
) -> list[tuple[float, float]]:
    """Put the regressions into the routers; a modality without tokens keeps what it had."""
    explained = []
    for router, by_kind in zip(routers_of(controller), fits, strict=True):
        found = dict.fromkeys(KINDS, 0.0)
        for kind, fit in by_kind.items():
            if not fit.count:
                continue
            weight, bias, found[kind] = fit.solve()
            with torch.no_grad():
                router.weight[kind] = weight.to(router.weight)
                router.bias[kind] = bias.to(router.bias)
        explained.append((found[TEXT], found[VISION]))
    return explained


def _warn_unseen(fits: list[dict[int, CrossFitted]]) -> None:
    """Say which layers rank a modality as before: no later query saw a token of it there."""
    for kind, name in KINDS.items():
        layers = [layer for layer, fit in enumerate(fits) if not fit[kind].count]
        if layers:
            logger.warning(
                "fit_router: no later query saw a %s token in layers %s, so their routers rank "
                "them as they did before. Use longer continuations, or prompts that have some",
                name,
                layers,
            )


def _centre_scores(
    controller: Controller, fits: list[dict[int, CrossFitted]], hop_shares: list[float]
) -> None:
    """Shift each layer's scores so that their mean is its rate; no token changes its rank.

    `hop_shares` weighs the rows of the rate table.

    The losses of a training hold them there, and soft gates tell scores apart that are spread over
    (0, 1), not pressed against 0. The mean of a sigmoid over normal logits is the probit
    approximation's.
    """
    for router, by_kind in zip(routers_of(controller), fits, strict=True):
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
