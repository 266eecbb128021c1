"""The configurations a search may try: families that differ in kind, each at any budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from dare_hf.api import dare_applied
from dare_hf.calibration.budgets import spread_budget
from dare_hf.calibration.rates import TRIED_RATES
from dare_hf.config import DareConfig
from dare_hf.config.fields import Schedule
from dare_hf.errors import DareError
from dare_hf.routers.files import read_adapter, tensors_file
from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

LayerCosts = Mapping[str, Sequence[Sequence[float]]]
BY_COST = "by cost"
_MADE_FOR = (
    "num_layers",
    "hidden_size",
    "model_type",
    "base_model_name_or_path",
    "cut_layer",
    "mean_update",
)


@dataclass(frozen=True)
class Family:
    """One way to prune: everything but how much.

    Attributes:
        scorer: Who ranks tokens.
        schedule: How a budget spreads over layers: one of DareConfig's, or "by cost".
        fields: Further fields of DareConfig.
        costs: What pruning each layer costs, by modality; of "by cost" only.
    """

    scorer: str
    schedule: str
    fields: Mapping[str, Any]
    costs: LayerCosts | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        adds = self.scorer != "router" and self.fields.get("mean_update") is True
        frozen = ", frozen" if self.fields.get("pruned") == "freeze" else ""
        return f"{self.scorer}{' with mean updates' if adds else ''}, {self.schedule}{frozen}"

    def frozen(self) -> Family | None:
        """It with pruned="freeze"; None without mean updates, where that gains nothing."""
        if self.fields.get("mean_update") is not True or "pruned" in self.fields:
            return None
        return replace(self, fields={**self.fields, "pruned": "freeze"})

    def config(self, vision: float, text: float) -> DareConfig | None:
        """The family's configuration at mean rates; None where it has none so low."""
        fields: dict[str, Any] = {"vision_retention": vision, "text_retention": text}
        schedule: Any = self.schedule
        if self.costs is not None:
            wanted = {VISION: vision, TEXT: text}
            if any(rate < TRIED_RATES[kind][-1] for kind, rate in wanted.items()):
                return None
            spread = [
                spread_budget(TRIED_RATES[kind], self.costs[name], wanted[kind])
                for kind, name in ((VISION, "vision"), (TEXT, "text"))
            ]
            schedule = tuple(zip(*spread, strict=True))
        fields |= {"scorer": self.scorer, "schedule": schedule, **self.fields}
        return DareConfig(**fields)


def families(
    fields: Mapping[str, Any], router: Path | None, costs: LayerCosts | None
) -> list[Family]:
    """All kinds there are to try.

    Args:
        fields: Fields of DareConfig that every one has; what they name is not varied.
        router: Folder of a fitted router adapter; None leaves the trained scorer out.
        costs: What pruning each layer costs; None leaves "by cost" out.
    """
    rest = {k: v for k, v in fields.items() if k not in ("scorer", "schedule")}
    ranked = [(fields.get("scorer", "attention"), rest)]
    if router is not None and "scorer" not in fields:
        fitted, _ = read_adapter(str(router))
        made_for = {name: getattr(fitted, name) for name in _MADE_FOR}
        ranked.append(("router", made_for | rest))
        if _has_mean_updates(router):  # they serve any scorer
            ranked.append(("attention", made_for | rest))
    missing = {"learned"} if fields.get("stages") else {"learned", "stages"}  # which name no rates
    named = [name for name in _schedules() if name not in missing]
    schedules = [fields["schedule"]] if "schedule" in fields else named
    found = []
    for scorer, own in ranked:
        found += [Family(scorer, schedule, own) for schedule in schedules]
        if costs is not None and "schedule" not in fields:
            found.append(Family(scorer, BY_COST, own, costs))
    return found


@contextmanager
def candidate(model: Any, config: DareConfig, router: Path | None) -> Iterator[Any]:
    """The model with a candidate on it, and exactly off behind the block."""
    with TemporaryDirectory() as folder:
        source: Any = config
        if needs_adapter(config):
            source = write(config, router, Path(folder))
        with dare_applied(model, source):
            yield model


def takes(model: Any, config: DareConfig, router: Path | None) -> bool:
    """Whether a model can run a candidate, or refuses it."""
    try:
        with candidate(model, config, router):
            return True
    except DareError:
        return False


def write(config: DareConfig, router: Path | None, folder: Path) -> Path:
    """A folder that apply_dare takes: the configuration, and the router's tensors if it needs them.

    Args:
        config: The configuration.
        router: Folder of the fitted router adapter.
        folder: Where to.
    """
    config.save_pretrained(str(folder))
    if needs_adapter(config) and router is not None:
        save_file(router_scores(router), folder / SAFETENSORS_WEIGHTS_NAME)
    return folder


def needs_adapter(config: DareConfig) -> bool:
    """Whether a configuration reads tensors of the fitted router."""
    return config.scorer == "router" or config.mean_update is True


def _has_mean_updates(router: Path) -> bool:
    """Whether an adapter's vectors are other than zeros, which do nothing."""
    tensors = load_file(tensors_file(str(router)))
    return any(bool(t.any()) for key, t in tensors.items() if key.endswith(".mean_update"))


def router_scores(router: Path) -> dict[str, Tensor]:
    """The tensors of a fitted router; its rates stay behind, a schedule gives them."""
    tensors = load_file(tensors_file(str(router)))
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".rate_logits")}


def _schedules() -> tuple[str, ...]:
    """The names a schedule can have."""
    return tuple(get_args(Schedule))
