"""One share of the rows as a place to measure configurations, each once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.evaluation.intervals import clustered_share, paired_difference
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.tuning.answers import scores
from dare_hf.tuning.candidates import candidate
from dare_hf.tuning.fidelity import References, fidelity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dare_hf.config import DareConfig
    from dare_hf.tuning.answers import Metric
    from dare_hf.tuning.journal import Journal
    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row


@dataclass(frozen=True)
class Measured:
    """What a configuration did on a share of the rows.

    Attributes:
        family: Its kind.
        config: The configuration.
        share: "fit" or "held-out".
        agreement: As `Fidelity` has it.
        kl: Likewise, mean over places, nats.
        flops_ratio: Likewise.
        kv_ratio: Likewise.
        drop: Points of task score lost to the unpruned model on the same rows; where no answers are
            scored, 100 x (1 - agreement).
        interval: Its 95 % interval.
    """

    family: str
    config: DareConfig
    share: str
    agreement: float
    kl: float
    flops_ratio: float
    kv_ratio: float
    drop: float
    interval: tuple[float, float]

    @property
    def cost(self) -> float:
        """What is cheap: the mean of the shares of FLOPs and of KV bytes."""
        return (self.flops_ratio + self.kv_ratio) / 2

    def to_dict(self) -> dict[str, Any]:
        """A line of the table, without the configuration."""
        return {
            "family": self.family,
            "share": self.share,
            "vision_retention": self.config.vision_retention,
            "text_retention": self.config.text_retention,
            "flops_ratio": self.flops_ratio,
            "kv_ratio": self.kv_ratio,
            "agreement": self.agreement,
            "kl": self.kl,
            "drop": self.drop,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Scoring:
    """How task scores are taken; `metric` None takes none."""

    metric: Metric | None
    max_new_tokens: int


class Bench:
    """Measures configurations on a share of the rows; what the journal knows is not measured again.

    Args:
        model: The plain model.
        prompts: Builds its inputs.
        rows: The share.
        share: Its name.
        scoring: How task scores are taken.
        journal: Keeps what was measured.
        batch_size: Most rows of a generate call.
        processes: Those that share the batches; each has a bench of its own, asked alike.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        rows: Sequence[Row],
        share: str,
        scoring: Scoring,
        journal: Journal,
        batch_size: int,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.prompts, self.rows, self.share = model, prompts, rows, share
        self.scoring, self.journal, self.batch_size = scoring, journal, batch_size
        self.processes = processes
        self.references = References(model, prompts, rows, batch_size, keep=True)
        self.by_score = scoring.metric is not None and any(self.full_scores())

    def full_scores(self) -> list[float]:
        """Of the unpruned model; empty where none are taken."""
        key = f"{self.share} full"
        if key not in self.journal:
            self.journal[key] = self._scores()
        return self.journal[key]

    def measure(self, family: str, config: DareConfig, router: Path | None) -> Measured:
        """Put a configuration on the model, measure it, take it off."""
        key = f"{self.share} {family} {json.dumps(config.to_dict(), sort_keys=True)}"
        if key not in self.journal:
            with candidate(self.model, config, router):
                found = fidelity(self.model, self.references, None, self.processes)
                scored = self._scores() if self.by_score else []
            names = ("hits", "sizes", "agreement", "mean_kl", "flops_ratio", "kv_ratio")
            value = {name: getattr(found, name) for name in names}
            self.journal[key] = value | {"scores": scored}
        return self._read(family, config, self.journal[key])

    def _scores(self) -> list[float]:
        metric, length = self.scoring.metric, self.scoring.max_new_tokens
        if metric is None:
            return []
        given = (self.model, self.prompts, self.rows, metric, length, self.batch_size)
        return scores(*given, self.processes)

    def _read(self, family: str, config: DareConfig, value: dict[str, Any]) -> Measured:
        if self.by_score:
            full, pruned = self.full_scores(), value["scores"]
            drop = (sum(full) - sum(pruned)) / len(full)
            low, high = paired_difference(full, pruned)
        else:
            drop = 1 - value["agreement"]
            high, low = (1 - end for end in clustered_share(value["hits"], value["sizes"]))
        return Measured(
            family=family,
            config=config,
            share=self.share,
            agreement=value["agreement"],
            kl=value["mean_kl"],
            flops_ratio=value["flops_ratio"],
            kv_ratio=value["kv_ratio"],
            drop=100 * drop,
            interval=(100 * low, 100 * high),
        )
