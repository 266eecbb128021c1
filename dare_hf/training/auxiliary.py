"""The auxiliary loss of a model's last training forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.engine.attach import state_of
from dare_hf.errors import DareStateError
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.losses import hard_loss, rate_loss
from dare_hf.routing.retention import held_mean, resolve_cut_layer

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.simulation import SimulationRecord


def auxiliary_loss(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What keeps rates near their targets and scores near their rates.

    ``loss = model(**batch).loss + auxiliary_loss(model)[0]`` trains routers in a loop of your own.
    Every part is a mean over the rows of the batch.

    Args:
        model: A model with an active router adapter, or the PeftModel around it.

    Returns:
        The sum of the parts (a scalar with gradients), and the parts, each times its lambda:
        "ratio_text", "soft_vision", "hard_vision".

    Raises:
        DareStateError: No training forward has run with routers in this thread.

    Source: docs/method.md, section 7.

    Examples:
        >>> from peft import get_peft_model
        >>> from dare_hf import DareConfig
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> from dare_hf.training import auxiliary_loss
        >>> model = tiny_model("llava")
        >>> batch = tiny_inputs(model)
        >>> routed = get_peft_model(model, DareConfig(scorer="router", schedule="learned"))
        >>> labels = batch["input_ids"].clone()
        >>> labels[:, :-5] = -100
        >>> loss = routed(**batch, labels=labels).loss
        >>> extra, parts = auxiliary_loss(routed)
        >>> (loss + extra).shape, extra.requires_grad
        (torch.Size([]), True)
    """
    controller = state_of(model).controller
    record: SimulationRecord | None = controller.record
    if record is None or not record.layers:
        raise DareStateError(
            "auxiliary_loss: expected a forward with labels, of a model with an active router "
            "adapter, before it in this thread; got none. Call model(**batch) with labels first; "
            "routers come from get_peft_model(model, DareConfig(scorer='router', ...))"
        )
    config = controller.config
    cut = resolve_cut_layer(config.cut_layer, len(set(controller.anatomy.sources)))
    # layers that are whole by rule have no rate to learn: the others hold the targets
    free = controller.table.free_layers
    mine = [place for place, index in enumerate(record.layers) if free[index]]
    layers = [record.layers[place] for place in mine]
    early = torch.tensor([index <= cut for index in layers], device=record.seen.device)
    rates, means, excess = (
        torch.stack([part[place] for place in mine])
        for part in (record.rates, record.means, record.excess)
    )
    text, vision = record.seen[..., TEXT], record.seen[..., VISION]
    asked = {TEXT: config.text_retention, VISION: config.vision_retention}
    held = {kind: held_mean(rate, free, [1] * len(free)) for kind, rate in asked.items()}
    targets = {kind: max(rate, 0.0) for kind, rate in held.items()}
    summed = config.loss_reduction == "sum"
    ratio = rate_loss(
        rates[..., TEXT],
        means[..., TEXT],
        record.present,
        text,
        targets[TEXT],
        per_rate=True,
        summed=summed,
    )
    soft = rate_loss(
        rates[..., VISION],
        means[..., VISION],
        record.present,
        vision,
        targets[VISION],
        per_rate=config.ratio == "per_rate",
        summed=summed,
    )
    hard = hard_loss(excess, vision, early, config.mu, summed)
    parts = {
        "ratio_text": config.lambda_ratio * ratio,
        "soft_vision": config.lambda_soft * soft,
        "hard_vision": config.lambda_hard * hard,
    }
    return torch.stack(list(parts.values())).sum(), parts
