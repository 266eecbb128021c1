"""The scorers by name: the built-in ones and the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dare_hf.config.scorer_names import BUILT_IN, REGISTERED, unknown_scorer
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.report.flops import router_flops
from dare_hf.scoring.attended import AttendedScorer, TextRatersScorer
from dare_hf.scoring.attention import AttentionScorer
from dare_hf.scoring.baselines import PositionScorer, RandomScorer, RecentScorer
from dare_hf.scoring.diverse import DiverseScorer
from dare_hf.scoring.key_norm import KeyNormScorer
from dare_hf.scoring.own_attention import OwnAttentionScorer
from dare_hf.scoring.router import RouterScorer
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.config import DareConfig
    from dare_hf.forward.run import Run
    from dare_hf.scoring.scorer import Scoring

    ScoreFunction = Callable[..., Tensor]


def register_scorer(name: str, fn: ScoreFunction) -> None:
    """Make `fn` available as `DareConfig(scorer=name)`.

    Args:
        name: A new name; a name registered before is replaced, a built-in one is refused.
        fn: `fn(hidden [B, S, D], modality [B, S] (0 text, 1 vision, -1 pad), *, layer: int,
            hop [B, S], positions [B, S]) -> scores [B, S] in [0, 1]`, higher is kept first.
            positions are 0-based columns of the full sequence, pads included.

    Raises:
        DareConfigError: The name belongs to a built-in scorer, or fn is not callable.
    """
    if name in BUILT_IN or not isinstance(name, str) or not name:
        raise DareConfigError(
            f"register_scorer: expected a new name, none of {', '.join(BUILT_IN)}; got {name!r}"
        )
    if not callable(fn):
        raise DareConfigError(f"register_scorer: expected a function; got {type(fn).__name__}")
    REGISTERED[name] = fn


def make_scorer(config: DareConfig, key_path: tuple[str | None, str]) -> Scorer:
    """The scorer a configuration names.

    Args:
        config: The configuration.
        key_path: The architecture's pre-attention norm and key projection.

    Raises:
        DareConfigError: The name is unknown.
    """
    made: dict[str, Callable[[], Scorer]] = {
        "attention": lambda: AttentionScorer(key_path),
        "random": lambda: RandomScorer(config.seed),
        "key_norm": lambda: KeyNormScorer(key_path),
        "position": PositionScorer,
        "recent": RecentScorer,
        "router": RouterScorer,
        "last_query": AttendedScorer,
        "text_raters": TextRatersScorer,
        "own_attention": lambda: OwnAttentionScorer(key_path),
        "diverse": DiverseScorer,
    }
    return made[config.scorer]() if config.scorer in made else _registered(config.scorer)


def _registered(name: str) -> FunctionScorer:
    if name in REGISTERED:
        return FunctionScorer(name, REGISTERED[name])
    raise unknown_scorer("scorer", name)


@dataclass(frozen=True)
class FunctionScorer(Scorer):
    """A scorer the user registered; its function reads what `register_scorer` says."""

    name: str
    fn: ScoreFunction
    untrained: ClassVar[bool] = False
    yields_text: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (self.name,)  # another process has registered it too

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S], checked for shape.

        Raises:
            DareInputError: The function returned something else.
        """
        context = run.context
        scores = self.fn(
            hidden,
            context.modality,
            layer=index,
            hop=context.token_hop.long(),
            positions=context.positions(),
        )
        if not isinstance(scores, torch.Tensor) or scores.shape != hidden.shape[:2]:
            got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise DareInputError(
                f"scorer {self.name!r}: expected scores of shape {list(hidden.shape[:2])} "
                f"[batch, tokens]; got {got}"
            )
        return scores.float()

    def flops(self, work: Scoring) -> int:
        """Nobody knows: it is counted as a router is."""
        return router_flops(work.hidden, work.tokens)
