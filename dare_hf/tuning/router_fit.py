"""A router fitted to the rows, and what pruning each layer costs, where that is known in time."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from dare_hf.architectures.locate import locate
from dare_hf.calibration import Calibration, fit_router
from dare_hf.calibration.continuation import extended
from dare_hf.calibration.rates import TRIED_RATES
from dare_hf.config import DareConfig
from dare_hf.engine.attach import unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.tuning.candidates import LayerCosts
    from dare_hf.tuning.fidelity import Reference, References
    from dare_hf.tuning.prompts import Prompts

_COSTS_FILE = "layer_costs.json"
# Every layer is pruned alone at several rates; a model for which that takes longer goes without.
LONGEST_SECONDS = 240.0


def fitted(
    model: Any, references: References, fields: Mapping[str, Any], folder: Path
) -> LayerCosts | None:
    """Fit a router adapter to the rows and save it, unless the folder has one already.

    Args:
        model: The plain model; it is plain again afterwards.
        references: The rows, and the text that follows them.
        fields: Fields of DareConfig.
        folder: Where the adapter goes.

    Returns:
        What pruning each layer costs, by modality; None where it was not measured.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        _fit(model, references, fields, folder)
    return json.loads((folder / _COSTS_FILE).read_text(encoding="utf-8"))


def _fit(model: Any, references: References, fields: Mapping[str, Any], folder: Path) -> None:
    batches = [_batch(reference, references.prompts) for reference, _ in references]
    layers = len(locate(unwrap(model)).layers)
    forwards = layers * sum(map(len, TRIED_RATES.values())) + 3
    affordable = _seconds(model, batches) * forwards <= LONGEST_SECONDS
    named: dict[str, Any] = {
        **fields,
        "scorer": "router",
        "schedule": "learned" if affordable else "two_stage",
    }
    details: list[Calibration] = []
    with torch.enable_grad():  # gates are built as in training
        routed = fit_router(model, batches, DareConfig(**named), details=details.append)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        costs = details[0].costs
        found = None if costs is None else asdict(costs)["layers"]
        (folder / _COSTS_FILE).write_text(json.dumps(found), encoding="utf-8")
        routed.save_pretrained(str(folder))
    finally:
        routed.unload()


def _batch(reference: Reference, prompts: Prompts) -> dict[str, Any]:
    """The rows with what follows them, as a training forward takes them.

    What follows ends before an image placeholder, which a model can sample: it has no image.
    """
    inputs = dict(reference.inputs)
    ids = inputs["input_ids"]
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    placeholder = getattr(prompts.processor, "image_token_id", None)
    ended = (reference.tokens == (-1 if placeholder is None else placeholder)).cumsum(1) > 0
    tokens = reference.tokens.masked_fill(ended, prompts.pad_id)
    live = reference.live & ~ended
    return extended(inputs, tokens.to(ids.device), live.to(ids.device))


def _seconds(model: Any, batches: list[dict[str, Any]]) -> float:
    """Of one forward over all batches, told from the first."""
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs, use_cache=False)
    return (time.perf_counter() - start) * len(batches)
