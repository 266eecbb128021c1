"""What a configuration means on one model: rates, scorer, token rules, checked together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from dare_hf.architectures.locate import attention_of, numbers_queries
from dare_hf.engine.masks import is_flash
from dare_hf.errors import DareConfigError, UnsupportedModelError
from dare_hf.forward.delimiters import resolve_delimiters
from dare_hf.forward.modality import audio_token_ids, check_ids, special_token_ids, vision_token_ids
from dare_hf.forward.token_rules import TokenRules
from dare_hf.report.flops import shapes_of
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import (
    NAMED,
    RetentionTable,
    build_table,
    learned_table,
    whole_layers,
)
from dare_hf.scoring.attended import AttendedScorer
from dare_hf.scoring.base import make_scorer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.config import DareConfig
    from dare_hf.report.flops import LayerShape
    from dare_hf.scoring.scorer import Scorer

logger = logging.get_logger("transformers.dare_hf")

# A mean this far above what was named is not what was named.
_MEAN_SLACK = 1e-4


@dataclass(frozen=True)
class Settings:
    """A configuration resolved for one model.

    Attributes:
        config: The configuration.
        table: Rates by hop, layer and modality; of a learned schedule those it starts from.
        scorer: Who scores tokens.
        rules: What the configuration says about single tokens.
        sources: For each layer the one whose keys it reads, and that it follows.
        first_whole: Of the layers that prune, how many first ones keep everything by rule.
        notes: Named rates that no table of this model can have, for reports.
    """

    config: DareConfig
    table: RetentionTable
    scorer: Scorer
    rules: TokenRules
    sources: tuple[int, ...]
    first_whole: int = 0
    notes: tuple[str, ...] = ()

    @property
    def observes(self) -> bool:
        """Whether attention functions must be watched."""
        observed = self.config.resolved_hop_score == "observed"
        trains = self.config.scorer == "router" or self.config.learns_rates  # gradients of gates
        # a cap cuts the prompt off from sampled tokens even where no hop ever closes
        hides = self.rules.closes_hops or self.config.max_kv_tokens is not None
        hides = hides or self.config.freezes
        return observed or trains or self.scorer.needs_attention or hides

    @property
    def spreads(self) -> bool:
        """Whether the named rates are spread over the layers; lists and adapters are literal."""
        return self.config.schedule in NAMED

    def layer_rates(self, layer: int) -> list[list[float]]:
        """[hops][text, vision] rates of one layer."""
        rates = self.table.rate
        hops = range(len(self.table.vision))
        return [[rates(hop, layer, kind) for kind in (TEXT, VISION)] for hop in hops]


def made_for(anatomy: Anatomy) -> dict[str, Any]:
    """What an adapter's configuration says of the model it was made for."""
    return {
        "num_layers": len(anatomy.layers),
        "hidden_size": anatomy.text_config.hidden_size,
        "model_type": anatomy.spec.model_type,
    }


def resolve(model: Any, config: DareConfig, anatomy: Anatomy, processor: Any = None) -> Settings:
    """Check a configuration against a model, and resolve what depends on it.

    Args:
        model: The model that has generate.
        config: The configuration; whether there is an adapter where it needs one is not asked.
        anatomy: Where the model's layers are.
        processor: Encodes `hop_delimiters` that are strings.

    Raises:
        DareConfigError: The configuration does not fit this model.
        UnsupportedModelError: The model cannot generate.
    """
    config = config.checked()
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            "expected a model with generate (…ForConditionalGeneration, …ForCausalLM); got "
            f"{type(model).__name__}"
        )
    spec, model_config = anatomy.spec, model.config
    rows = model.get_input_embeddings().weight.shape[0]
    delimiters = resolve_delimiters(config.hop_delimiters, processor)
    check_ids("image_token_ids", config.image_token_ids, model_config, rows)
    check_ids("always_keep_token_ids", config.always_keep_token_ids, model_config, rows)
    for sequence in delimiters:
        check_ids("hop_delimiters", sequence, model_config, rows)
    scorer = make_scorer(config, (spec.pre_attention_norm, spec.key_projection))
    whole = [i for i, least in exempt_layers(anatomy).items() if not least]
    first_whole = _first_whole(config, anatomy)
    table = rates_of(config, anatomy.sources, scorer, whole, first_whole)
    # what a learned table starts from says nothing of what it becomes
    prunes_text = config.learns_rates or min(min(row) for row in table.text) < 1.0
    if prunes_text and scorer.untrained:
        _warn_text(config)
    vision = vision_token_ids(model_config, config.image_token_ids)
    audio = audio_token_ids(model_config, vision)
    rules = TokenRules(
        vision_ids=vision,
        keep_ids=tuple(sorted({*config.always_keep_token_ids, *audio})),
        protected_ids=special_token_ids(model_config, getattr(model, "generation_config", None)),
        protect_text=prunes_text and _protects(scorer, config),
        recent_tokens=config.recent_tokens,
        prefix=config.prefix_tokens,
        delimiters=delimiters,
        window=config.decode_window,
        # without image ids no token is vision, whatever a processor says
        type_ids=() if config.image_token_ids == () else spec.type_ids,
    )
    if config.decode == "routed" and (
        spec.streams or len(set(anatomy.sources)) < len(table.text[0])
    ):
        raise DareConfigError(
            "decode: expected a model whose layers each store keys of their own and have one "
            f"hidden state a token; got {spec.model_type!r}. Leave decode at its default"
        )
    _check_freeze(config, anatomy, scorer)
    for name in ("recycle", "mean_update"):
        if getattr(config, name) is True and spec.streams:
            raise DareConfigError(
                f"{name}: expected a model with one hidden state a token, into which vectors are "
                f"written; got {spec.model_type!r}, which has several. Set {name}=False"
            )
    _check_together(config, table, scorer)
    notes = _missed(config, table)
    return Settings(config, table, scorer, rules, anatomy.sources, first_whole, notes)


def _check_freeze(config: DareConfig, anatomy: Anatomy, scorer: Scorer) -> None:
    """Refuse to store keys of tokens that do not run where that is not what a layer does.

    Raises:
        DareConfigError: It is so.
    """
    if not config.freezes:
        return
    implementation = anatomy.text_config._attn_implementation
    if not implementation.endswith(("sdpa", "eager")):
        raise DareConfigError(
            "pruned: expected attn_implementation 'sdpa' or 'eager' for 'freeze', whose queries "
            f"are fewer than its keys; got {implementation!r}. Load the model so, or choose "
            "'bypass'"
        )
    shapes = shapes_of(anatomy.layers, anatomy.text_config)
    several = any(shape.latent is not None for shape in shapes)
    if anatomy.spec.streams or several or len(set(anatomy.sources)) < len(anatomy.layers):
        raise DareConfigError(
            "pruned: expected a model whose layers each store keys and values of their own for "
            f"'freeze'; got {anatomy.spec.model_type!r}. Choose 'bypass' or 'drop'"
        )
    if isinstance(scorer, AttendedScorer):
        raise DareConfigError(
            f"pruned: expected another scorer than {config.scorer!r} for 'freeze', which reads the "
            "attention of tokens that ran. Choose scorer='attention', or pruned='drop'"
        )


def _check_together(config: DareConfig, table: RetentionTable, scorer: Scorer) -> None:
    """Refuse fields that do nothing, or something else, without others.

    Raises:
        DareConfigError: There are such.
    """
    if config.recycle and (config.pruned, config.scorer) != ("drop", "text_raters"):
        raise DareConfigError(
            "recycle: expected pruned='drop' and scorer='text_raters' beside it; got pruned="
            f"{config.pruned!r} and scorer={config.scorer!r}. Set those, or leave recycle out"
        )
    if config.decode == "routed" and (
        (config.pruned, config.plan_every, config.resolved_hop_score) != ("bypass", 1, "stored")
    ):
        raise DareConfigError(
            "decode: expected pruned='bypass', plan_every=1 and hop_score='stored' beside "
            "'routed', under which each layer decides by scores of its own; got "
            f"{config.pruned!r}, {config.plan_every} and {config.resolved_hop_score!r}. Set those"
        )
    if config.hop_summary is not None and (config.learns_rates or config.scorer == "router"):
        raise DareConfigError(
            "hop_summary: expected an untrained scorer and a schedule that is not learned, since "
            "training deals out the budgets of rates alone; got "
            f"scorer={config.scorer!r}, schedule={config.schedule!r}. Leave hop_summary out"
        )
    if config.hop_summary is not None and config.resolved_hop_budget != "per_hop":
        raise DareConfigError(
            "hop_summary: expected hop_budget='per_hop' beside it; got "
            f"{config.resolved_hop_budget!r}, under which all closed hops are one. Set it"
        )
    first = min(row[0] for row in (*table.vision, *table.text))
    if isinstance(scorer, AttendedScorer) and first < 1.0:
        raise DareConfigError(
            f"scorer: expected a first layer that keeps everything under {config.scorer!r}, which "
            f"scores by the attention of the layer before; got a rate of {first:.4g} in layer 0. "
            "Set first_layers_whole=1 or more, or stages that begin later"
        )


def _protects(scorer: Scorer, config: DareConfig) -> bool:
    """Whether special tokens, image delimiters and recent text are kept whatever the scores say.

    A router with recent_tokens=0 prunes them too: so it was trained before there was protection.
    """
    return scorer.yields_text and (scorer.untrained or config.recent_tokens > 0)


def _first_whole(config: DareConfig, anatomy: Anatomy) -> int:
    """Of the layers that prune, those among the model's first that keep everything.

    Raises:
        DareConfigError: No layer is left that prunes.
    """
    depth = getattr(anatomy.text_config, "num_hidden_layers", len(anatomy.layers))
    wanted = whole_layers(config.first_layers_whole, config.schedule, depth)
    found = sum(slot < wanted for slot in anatomy.slots)
    owners = len(set(anatomy.sources))
    if found >= owners:
        raise DareConfigError(
            f'first_layers_whole: expected "auto" or an integer >= 0 that leaves a layer to prune; '
            f"this model prunes its decoder layers {list(anatomy.slots[:owners])}; got {wanted}"
        )
    return found


def exempt_layers(anatomy: Anatomy) -> dict[int, int]:
    """Layers that keep everything, and from how many logical tokens on.

    Sliding layers under flash attention, whose window counts stored tokens; and those that number
    their queries themselves (llama4 without RoPE), from where that makes a difference.
    """
    attentions = [attention_of(layer) for layer in anatomy.layers]
    found = {i: least for i, a in enumerate(attentions) if (least := numbers_queries(a))}
    if is_flash(anatomy.text_config._attn_implementation):
        windows = (getattr(attention, "sliding_window", None) for attention in attentions)
        found |= {i: 0 for i, window in enumerate(windows) if window is not None}
    return found


def stored_shapes(anatomy: Anatomy, shares: Sequence[int]) -> list[LayerShape]:
    """What each layer costs with a DareCache, which keeps to no window.

    Args:
        anatomy: Where the layers are.
        shares: Per layer the processes that store its heads between them.
    """
    pairs = zip(shapes_of(anatomy.layers, anatomy.text_config), shares, strict=True)
    return [replace(shape, window=None, kv_shares=n) for shape, n in pairs]


def _missed(config: DareConfig, table: RetentionTable) -> tuple[str, ...]:
    """What to say of named rates whose mean layers that keep everything put out of reach."""
    if config.schedule not in NAMED:
        return ()
    notes = []
    for kind, name in ((VISION, "vision_retention"), (TEXT, "text_retention")):
        asked, got = getattr(config, name), table.mean(kind)
        if got > asked + _MEAN_SLACK:
            whole = [i for i, is_free in enumerate(table.free_layers) if not is_free]
            notes.append(
                f"{name}: asked for a mean of {asked:.4g} over the layers; the nearest is "
                f"{got:.4g}, since layers {whole} keep everything under {config.schedule!r}"
            )
    for note in notes:
        logger.warning_once(note)
    return tuple(notes)


def rates_of(
    config: DareConfig,
    sources: tuple[int, ...],
    scorer: Scorer,
    whole: Collection[int] = (),
    first_whole: int | None = None,
) -> RetentionTable:
    """The rates of a schedule; of "learned" those it starts from.

    A schedule is laid over the layers that own keys; the others follow their source. A list has
    a pair for every layer, of which those of followers are not read.

    Args:
        config: The configuration.
        sources: For each layer the one whose keys it reads.
        scorer: Who scores tokens.
        whole: Layers that keep everything whatever the schedule.
        first_whole: How many first ones keep everything by `first_layers_whole`; None where these
            are all decoder layers the model has.
    """
    layers, owners = len(sources), len(set(sources))
    if first_whole is None:
        first_whole = whole_layers(config.first_layers_whole, config.schedule, layers)
    learns = config.learns_rates
    schedule = "two_stage" if learns else config.schedule
    if not isinstance(schedule, str) and len(schedule) == layers:
        schedule = schedule[:owners]
    elif not isinstance(schedule, str):
        owners = layers  # refused, with the number of layers that was expected
    table = build_table(
        owners,
        schedule=schedule,
        vision_retention=config.vision_retention,
        text_retention=config.text_retention,
        cut_layer=config.cut_layer,
        stages=config.stages,
        plan_every=config.plan_every,
        shares_rates=learns,
        max_hops=config.max_hops if config.hop_aware else 1,
        hop_decay=config.hop_decay if config.hop_aware else 1.0,
        scorer_needs_history=scorer.needs_attention and not learns,
        first_whole=first_whole,
        whole=() if learns else whole,
        runs=[sources.count(layer) for layer in range(owners)],
    )
    if learns:
        hops = zip(table.text, table.vision, strict=True)
        pairs = [list(zip(*rows, strict=True)) for rows in hops]
        table = learned_table(pairs, plan_every=config.plan_every, first_whole=first_whole)
    return table.following(sources)


def check_adapter(config: DareConfig, *, present: bool) -> None:
    """Refuse what only an adapter can serve where there is none.

    Raises:
        DareConfigError: A field asks for a trained adapter.
    """
    asked: dict[str, Any] = {"scorer": "router", "schedule": "learned"}
    asked |= {"score_scaling": "multiply", "mean_update": True}
    for name, value in asked.items():
        if not present and getattr(config, name) == value:
            raise DareConfigError(
                f"{name}: expected a trained router adapter for {value!r}; got a configuration "
                "without one. Load an adapter (apply_dare(model, 'folder')), train one "
                f"(peft.get_peft_model(model, config)), or choose another {name}"
            )
    if config.decode == "routed" and not (present and config.scorer == "router"):
        raise DareConfigError(
            "decode: expected a trained router adapter that holds thresholds for 'routed'; got a "
            f"configuration {'with' if present else 'without'} one, scorer={config.scorer!r}. Fit "
            "one (fit_router with decode='routed'), or leave decode at its default"
        )
    if config.score_scaling != "straight_through" and config.scorer != "router":
        raise DareConfigError(
            f"score_scaling: expected scorer='router' for {config.score_scaling!r}; got scorer="
            f"{config.scorer!r}. Choose that scorer, or leave score_scaling at its default"
        )


def _warn_text(config: DareConfig) -> None:
    logger.warning_once(
        "text_retention=%s with the untrained scorer %r: pruning text without training changes "
        "answers. Set text_retention=1.0, or train a router",
        config.text_retention,
        config.scorer,
    )
