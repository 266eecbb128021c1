"""fit_thresholds: let sampled tokens of a trained adapter skip layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.api import dare_disabled
from dare_hf.calibration.continuation import continued
from dare_hf.calibration.samples import routers_of
from dare_hf.engine.attach import state_of, unwrap
from dare_hf.engine.settings import check_adapter, resolve
from dare_hf.errors import DareInputError, DareStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dare_hf.engine.controller import Controller


def fit_thresholds(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int = 32,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Give the active router adapter thresholds under which sampled tokens skip a layer.

    Its routers and rates stay as they are; `decode` becomes "routed", in what is saved too.

        model = PeftModel.from_pretrained(base, "router")
        fit_thresholds(model, batches)
        model.save_pretrained("router-routed")

    Args:
        model: A PeftModel whose active adapter is a DARE router, or a model that got one by
            `load_adapter` or `add_adapter`.
        batches: Inputs of generate, as `fit_router` takes them; those with `labels` bring their own
            continuation.
        max_new_tokens: Length of the continuations.
        generate_kwargs: Further arguments of generate.

    Returns:
        `model`.

    Raises:
        DareConfigError: The adapter's configuration, or the model, rules routed decode out.
        DareInputError: No batch.
        DareStateError: No router adapter of peft is active.

    Source: ours; docs/method.md, section 6.
    """
    given, inner = list(batches), unwrap(model)
    if not given:
        raise DareInputError("batches: expected at least one batch of prompts; got none")
    state = state_of(model)
    controller: Controller = state.controller
    if state.owner != "peft" or controller.adapter is None or controller.adapter.name is None:
        raise DareStateError(
            "fit_thresholds: expected a PeftModel, or a model after model.load_adapter(folder), "
            "with an active router adapter; got one that peft does not manage. Load it so"
        )
    routers, adapter, name = routers_of(controller), controller.adapter, controller.adapter.name
    before = adapter.settings[name]
    config = before.config.checked(decode="routed")
    check_adapter(config, present=True)
    settings = resolve(inner, config, controller.anatomy)
    options = dict(generate_kwargs or {})
    with dare_disabled(model), torch.no_grad():
        complete = [continued(model, batch, max_new_tokens, options) for batch in given]
    old = [router.thresholds for router in routers]
    try:
        for router in routers:
            router.thresholds = torch.zeros_like(router.rate_logits.detach())
        adapter.settings[name] = settings
        follow_scores(model, controller, complete)
    except BaseException:
        adapter.settings[name] = before
        for router, thresholds in zip(routers, old, strict=True):
            router.thresholds = thresholds
        raise
    inner.peft_config[name] = config
    if model is not inner:
        model.peft_config[name] = config
    return model


@torch.no_grad()
def follow_scores(model: Any, controller: Controller, batches: list[dict[str, Any]]) -> None:
    """Put the thresholds of routed decode where the scores of sampled tokens have their rates.

    Each forward is the training's, with the tokens skipped below a layer that its thresholds say,
    so that a layer's scores are those it will see; the mean over the batches' quantiles, and a
    second time from there.

    Args:
        model: The routed model.
        controller: Its controller.
        batches: Complete sequences with labels, as `continued` returns them.
    """
    try:
        for done in range(2 * len(batches)):
            controller.threshold_step = 1 / (done % len(batches) + 1)
            model(**batches[done % len(batches)])
    finally:
        controller.threshold_step = None
