"""What tune found: the configuration, all that was measured, and what is promised."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from dare_hf.tuning.candidates import needs_adapter, router_scores
from dare_hf.tuning.page import card, page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dare_hf.config import DareConfig
    from dare_hf.tuning.bench import Measured
    from dare_hf.tuning.search import Target

RESULT, CARD, PAGE = "tune.json", "README.md", "report.html"


@dataclass(frozen=True)
class Bounds:
    """What was asked for."""

    max_drop: float
    target: Target | None


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        config: The cheapest configuration within the bound; None where there is none.
        adapter: The tensors of the fitted router, where `config` needs them; else None.
        table: Every measurement: family, share, rates, costs, agreement, KL, drop with interval.
        promise: What holds for rows like the held-out ones, in words and numbers: "drop",
            "interval" (95 %), "by" (score or agreement), "rows" (held out), "text"; and "beyond",
            False where nothing can be promised beyond these rows. None where nothing was chosen.
        chosen: The line `dare-hf tune --json` prints of it, or None.
        reason: Why it, or why none.
        machine: Seconds and bytes on this machine, with the configuration and without; or None.
        about: Model, rows and arguments.
    """

    config: DareConfig | None
    adapter: dict[str, Tensor] | None = field(repr=False)
    table: list[dict[str, Any]] = field(repr=False)
    promise: dict[str, Any] | None
    chosen: dict[str, Any] | None
    reason: str
    machine: dict[str, Any] | None = field(repr=False)
    about: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What `dare-hf tune --json` prints."""
        return {"chosen": self.chosen, "rows": self.about["rows"], "reason": self.reason}

    def save(self, folder: str | Path) -> None:
        """Write what `apply_dare(model, folder)` takes, a card, a page and all numbers.

        Where nothing was chosen, the folder holds no configuration, and apply_dare refuses it.

        Args:
            folder: Made where there is none; an earlier result in it is replaced.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (place / name).unlink(missing_ok=True)
        if self.config is not None:
            self.config.save_pretrained(str(place))
        if self.adapter is not None:
            save_file(self.adapter, place / SAFETENSORS_WEIGHTS_NAME)
        everything = self.to_dict() | {
            "promise": self.promise,
            "machine": self.machine,
            "about": self.about,
            "table": self.table,
        }
        (place / RESULT).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        (place / CARD).write_text(card(everything), encoding="utf-8")
        (place / PAGE).write_text(page(everything), encoding="utf-8")


def promised(
    best: Measured | None,
    measured: Sequence[Measured],
    bounds: Bounds,
    *,
    about: dict[str, Any],
    router: Path | None,
    machine: dict[str, Any] | None,
    by_score: bool,
    scored: bool,
    notes: list[str],
    untrained: bool,
) -> TuneResult:
    """Put what was found into words.

    Args:
        best: The choice, as measured on the held-out share.
        measured: Everything measured, on either share.
        bounds: What was asked for.
        about: Model, rows and arguments.
        router: Folder of the fitted router.
        machine: Seconds and bytes on this machine.
        by_score: Whether the drop is one of task score.
        scored: Whether answers were given to score.
        notes: What else has to be said.
        untrained: Whether the weights are as they were initialised.
    """
    if scored and not by_score:
        notes.append(
            "The unpruned model has no answer right on one of the two halves, so the drop is of "
            "agreement, not of task score."
        )
    if untrained:
        notes.append(
            "The weights look random (no norm was ever trained): nothing can be promised beyond "
            "these rows."
        )
    if machine is not None:
        notes += _times(machine)
    by = "score" if by_score else "agreement"
    promise = None if best is None else _promise(best, by, not untrained)
    first = _why_none(measured, bounds) if best is None else _why(best, measured, bounds)
    trained = best is not None and needs_adapter(best.config)
    return TuneResult(
        config=None if best is None else best.config,
        adapter=router_scores(router) if trained and router is not None else None,
        table=[one.to_dict() for one in measured],
        promise=promise,
        chosen=None if best is None else _chosen(best),
        reason=" ".join([first, *notes]),
        machine=machine,
        about=about,
    )


def _chosen(best: Measured) -> dict[str, Any]:
    line = best.to_dict()
    names = ("vision_retention", "text_retention", "flops_ratio", "kv_ratio")
    return {name: line[name] for name in (*names, "agreement", "kl", "drop", "interval")}


def _promise(best: Measured, by: str, beyond: bool) -> dict[str, Any]:
    low, high = best.interval
    what = "task score" if by == "score" else "agreement with the unpruned model"
    text = f"Loses {best.drop:.1f} points of {what}, 95 % interval {low:.1f} to {high:.1f}"
    text += ", on rows like these." if beyond else "; nothing beyond these rows."
    numbers = {"drop": best.drop, "interval": list(best.interval), "by": by}
    return numbers | {"beyond": beyond, "text": text}


def _why(best: Measured, measured: Sequence[Measured], bounds: Bounds) -> str:
    count = len({(one.family, str(one.config.to_dict())) for one in measured})
    text = (
        f"The cheapest of {count} configurations whose held-out drop is within "
        f"{bounds.max_drop:g} points: {best.family}."
    )
    if best.interval[1] > bounds.max_drop:
        text += (
            f" Its interval reaches to {best.interval[1]:.1f} points: more rows would narrow it."
        )
    return text


def _why_none(measured: Sequence[Measured], bounds: Bounds) -> str:
    held = [one for one in measured if one.share == "held-out"]
    near = min(held or measured, key=lambda one: one.drop)
    asked = f"within {bounds.max_drop:g} points"
    if bounds.target is not None:
        asked += f" and {bounds.target.what} <= {bounds.target.share:g}"
    return (
        f"Nothing pays on these rows: no configuration that saves anything is {asked}. The nearest "
        f"({near.family}, {near.flops_ratio:.2f} of FLOPs, {near.kv_ratio:.2f} of KV bytes) loses "
        f"{near.drop:.1f} points."
    )


def _times(machine: dict[str, Any]) -> list[str]:
    """What the saving is worth in seconds here, where it is worth none."""
    prefill, decode = machine["prefill_seconds"], machine["decode_seconds"]
    slower = [
        f"{name} {found['dare'] / found['full']:.2f}"
        for name, found in (("prefill", prefill), ("decode", decode))
        if found["full"] and found["dare"] >= found["full"]
    ]
    if not slower:
        return []
    return [
        f"No faster on this machine at these lengths ({machine['tokens']} tokens): "
        f"{' and '.join(slower)} times the unpruned model's seconds."
    ]
