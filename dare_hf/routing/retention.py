"""Retention: which share of each modality every layer keeps at every hop."""

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dare_hf.errors import DareConfigError
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.stages import Stages, first_stage, listed_weights

# A rate is never 0: `budget` turns the smallest one into one token.
MIN_RATE = 1e-6
# Takes the float error of rate * count off before the ceiling (0.07 * 100 is 7.000000000000001).
CEIL_SLACK = 1e-4
SPREAD_SLACK = 1e-9
# What a layer behind the cut keeps of what one before it does, under two_stage.
LATE_SHARE = 0.25
# What the thirds of the depth keep of what the first does, under safe.
THIRDS = (1.0, 0.5, 0.25)
# What the last layer keeps at least of what the first one does, under ramp.
RAMP_END = 0.3
# The attention scorer looks at the layer before, and that layer must have run its own attention
# on every token once: these first layers have no score.
UNSCORED_LAYERS = 2
# What first_layers_whole="auto" keeps whole of a model of at least so many decoder layers.
WHOLE_LAYERS, LEAST_DEPTH = 2, 8
# The schedules that spread a target over the layers.
NAMED = ("safe", "two_stage", "ramp", "stages", "constant")

Row = tuple[float, ...]


@dataclass(frozen=True)
class RetentionTable:
    """The rates of one model: law, ``0 < rate <= 1`` for every hop, layer and modality.

    Attributes:
        vision: rates of vision tokens, ``[hops][layers]``; the last row serves all later hops.
        text: rates of text tokens, same shape.
        plan_layers: for each layer the layer whose selection it uses; itself where it selects.
        free_layers: False where a layer keeps everything by rule.

    Source: docs/method.md, section 3.
    """

    vision: tuple[Row, ...]
    text: tuple[Row, ...]
    plan_layers: tuple[int, ...]
    free_layers: tuple[bool, ...]

    def rate(self, hop: int, layer: int, modality: int) -> float:
        """Share of the modality's tokens `layer` keeps at `hop`; past the table, its last row."""
        rows = self.vision if modality == VISION else self.text
        return rows[min(hop, len(rows) - 1)][layer]

    def following(self, sources: Sequence[int]) -> "RetentionTable":
        """The table of a model whose last layers read the keys of others.

        Law: such a layer runs what its source runs, at its source's rates.

        Args:
            sources: for each layer of the model the one whose keys it reads, itself where it owns
                any; the layers of this table are those that do.
        """
        return RetentionTable(
            vision=tuple(tuple(row[source] for source in sources) for row in self.vision),
            text=tuple(tuple(row[source] for source in sources) for row in self.text),
            plan_layers=tuple(self.plan_layers[source] for source in sources),
            free_layers=tuple(self.free_layers[source] for source in sources),
        )

    def mean(self, modality: int, hop: int = 0) -> float:
        """Realised mean rate over all layers, after clamping."""
        rates = [self.rate(hop, layer, modality) for layer in range(len(self.plan_layers))]
        return sum(rates) / len(rates)


def budget(rate: float, count: int) -> int:
    """Tokens to keep of `count`: ``ceil(rate * count - 1e-4)``, at least 1 of any, at most all.

    Computed in float64 (Python's float).

    Source: docs/method.md, section 4.
    """
    wanted = math.ceil(rate * count - CEIL_SLACK)
    return min(max(wanted, 1), count)


def resolve_cut_layer(cut_layer: int | float | str, num_layers: int) -> int:
    """The last layer (0-based) of the first stage: "auto" is ``L // 2``, a fraction ``int(f * L)``.

    Raises:
        DareConfigError: the layer does not exist in a model of `num_layers` layers.

    Source: docs/method.md, section 3.
    """
    if cut_layer == "auto":
        return min(num_layers // 2, num_layers - 1)
    if isinstance(cut_layer, float) and 0 < cut_layer < 1:
        return int(cut_layer * num_layers)
    if (
        isinstance(cut_layer, int)
        and not isinstance(cut_layer, bool)
        and 0 <= cut_layer < num_layers
    ):
        return cut_layer
    raise DareConfigError(
        f'cut_layer must be "auto", a fraction in (0, 1) or a layer in [0, {num_layers - 1}] '
        f"of this model's {num_layers} layers, got {cut_layer!r}."
    )


def whole_layers(first_layers_whole: int | str, schedule: object, depth: int) -> int:
    """First decoder layers that keep everything, of a model of `depth` of them.

    Law: "auto" is 2 in a model of at least 8, but 0 under "constant", "stages" and lists, which are
    literal.

    Source: docs/method.md, section 3.
    """
    if isinstance(first_layers_whole, int):
        return first_layers_whole
    literal = schedule in ("constant", "stages") or not isinstance(schedule, str)
    return 0 if literal or depth < LEAST_DEPTH else WHOLE_LAYERS


def build_table(
    num_layers: int,
    *,
    schedule: str | Sequence[Sequence[float]],
    vision_retention: float,
    text_retention: float,
    cut_layer: int | float | str = "auto",
    stages: Stages = (),
    plan_every: int = 1,
    shares_rates: bool = False,
    max_hops: int = 1,
    hop_decay: float = 1.0,
    scorer_needs_history: bool = False,
    first_whole: int = 0,
    whole: Collection[int] = (),
    runs: Sequence[int] | None = None,
) -> RetentionTable:
    """The rates of every hop and layer: the schedule's, vision times ``decay^max(hop - 1, 0)``.

    Law: the mean over the layers is the target, or as near to it as rates in (0, 1] come beside
    layers that keep everything ("constant" leaves the others at the target beside `whole`). Text
    never decays, nor does a layer that keeps everything by rule.

    Args:
        num_layers: decoder layers L.
        schedule: "two_stage", "safe", "ramp", "stages", "constant", or L pairs (vision, text).
        vision_retention: target share of vision tokens in (0, 1]; a list does not read it.
        text_retention: target share of text tokens in (0, 1]; a list does not read it.
        cut_layer: last layer of the first stage of "two_stage"; see `resolve_cut_layer`.
        stages: of "stages", where each begins and its weight; see `stage_weights`.
        plan_every: a layer selects when its index is a multiple, or when its rates differ from the
            layer's before; the others reuse the last selection.
        shares_rates: of vision, layers take the weight of the last multiple of `plan_every` in
            the schedule's shape, as a learned table makes them run at that layer's rates.
        max_hops: rows of the table.
        hop_decay: factor in (0, 1] per hop after hop 1, on vision only.
        scorer_needs_history: the scorer has no score in layers 0 and 1, so that "two_stage" and
            "safe" keep everything there.
        first_whole: first layers that keep everything, under a list too.
        whole: layers that keep everything whatever the schedule; a list does not read it.
        runs: for each layer how many of the model's layers run at its rates; None: one each.

    Raises:
        DareConfigError: a list of another length than L, a cut layer outside the model, a schedule
            that only an adapter can fill ("learned") or an unknown one.

    Source: docs/method.md, section 3.
    """
    layers = range(num_layers)
    free = [layer >= first_whole for layer in layers]
    if isinstance(schedule, str) and schedule in NAMED:
        history = scorer_needs_history and schedule in ("safe", "two_stage")
        start = max(first_whole, UNSCORED_LAYERS if history else 0)
        if schedule == "stages":
            start = max(start, first_stage(stages, num_layers))
        free = [layer >= start and layer not in whole for layer in layers]
        runs = [1] * num_layers if runs is None else runs
        # "constant" is the target in every layer that can have it, whatever the others keep
        beside = [layer >= first_whole for layer in layers] if schedule == "constant" else free
        plans = [plan_of(layer, plan_every, start) for layer in layers]
        if schedule == "ramp":
            vision = ramp(vision_retention, plans, free, runs)
        else:
            weights = stage_weights(num_layers, schedule, cut_layer, stages)
            if shares_rates:
                weights = [weights[plan] for plan in plans]
            vision = spread(vision_retention, weights, beside, runs)
        if schedule in ("ramp", "safe"):
            text = ramp(text_retention, plans, free, runs)
        else:
            text = spread(text_retention, [1.0] * num_layers, beside, runs)
    else:
        vision, text = _listed_rows(schedule, num_layers)
    vision, text = (_kept_whole(row, free) for row in (vision, text))
    factors = [hop_decay ** max(hop - 1, 0) for hop in range(max_hops)]
    visions = tuple(_decayed(vision, free, factor) for factor in factors)
    return RetentionTable(
        vision=visions,
        text=(text,) * max_hops,
        plan_layers=_plan_layers((*visions, text), plan_every),
        free_layers=tuple(free),
    )


def learned_table(
    rates: Sequence[Sequence[Sequence[float]]], *, plan_every: int = 1, first_whole: int = 0
) -> RetentionTable:
    """The rates an adapter has learned, as a table.

    A layer selects when `plan_of` names itself; the others reuse that selection and its rates, so
    their own rates are not read, nor are those of the first layers that keep everything.

    Args:
        rates: ``[hops][layers][text, vision]`` in [0, 1]; the last row serves all later hops.
        plan_every: layers that share one selection.
        first_whole: first layers that keep everything.

    Source: docs/method.md, section 3.
    """
    plans = tuple(plan_of(layer, plan_every, first_whole) for layer in range(len(rates[0])))
    free = tuple(layer >= first_whole for layer in range(len(plans)))
    visions, texts = (
        tuple(_kept_whole(tuple(_clamp(row[plan][kind]) for plan in plans), free) for row in rates)
        for kind in (VISION, TEXT)
    )
    return RetentionTable(visions, texts, plans, free)


def plan_of(layer: int, plan_every: int, first_whole: int) -> int:
    """The layer whose selection a layer uses: every n-th selects, and the first after whole ones.

    Source: docs/method.md, section 3 (plan_every).
    """
    plan = layer - layer % plan_every
    return plan if layer < first_whole else max(plan, first_whole)


def held_mean(target: float, free: Sequence[bool], runs: Sequence[int]) -> float:
    """The mean that the free layers must have for the target over all; <= 0 where nothing is left.

    Args:
        target: mean rate over all layers, in (0, 1].
        free: [layers] False where a layer keeps everything; at least one is free.
        runs: [layers] how many layers of the model run at its rates.
    """
    mine = sum(n for n, is_free in zip(runs, free, strict=True) if is_free)
    return (target * sum(runs) - (sum(runs) - mine)) / mine


def ramp(target: float, plans: Sequence[int], free: Sequence[bool], runs: Sequence[int]) -> Row:
    """Rates that fall linearly with depth, of mean `target`, as steep as rates in (0, 1] allow.

    The first free layer has at most 1, the last one at least 0.3 of it (`RAMP_END`). Where nothing
    is left for the free layers they keep one token.

    Args:
        target: mean rate over all layers, in (0, 1].
        plans: [layers] the layer whose depth counts, so that layers of one plan have one rate.
        free: [layers] False where a layer keeps everything.
        runs: [layers] how many layers of the model run at its rates.

    Source: docs/method.md, section 3 (ramp).
    """
    rest = [layer for layer, is_free in enumerate(free) if is_free]
    if not rest:
        return (1.0,) * len(free)
    mean = held_mean(target, free, runs)
    first, last = plans[rest[0]], plans[rest[-1]]
    depth = [(plan - first) / max(last - first, 1) for plan in plans]
    middle = sum(runs[layer] * depth[layer] for layer in rest) / sum(runs[layer] for layer in rest)
    top = min(mean / (1 - (1 - RAMP_END) * middle), 1.0)
    slope = (top - mean) / middle if middle else 0.0
    top = top if middle else mean
    return tuple(
        _clamp(top - slope * depth[layer]) if is_free else 1.0 for layer, is_free in enumerate(free)
    )


def stage_weights(
    num_layers: int,
    schedule: str,
    cut_layer: int | float | str,
    stages: Stages = (),
) -> list[float]:
    """What each layer keeps of vision relative to the others, by the schedule's shape.

    Of "stages" see `listed_weights`.

    Raises:
        DareConfigError: the cut layer does not exist.

    Source: docs/method.md, section 3.
    """
    if schedule == "constant":
        return [1.0] * num_layers
    if schedule == "stages":
        return listed_weights(stages, num_layers)
    if schedule == "two_stage":
        cut = resolve_cut_layer(cut_layer, num_layers)
        return [1.0 if layer <= cut else LATE_SHARE for layer in range(num_layers)]
    ends = [math.ceil(third * num_layers / 3) for third in (1, 2, 3)]
    return [THIRDS[bisect_right(ends, layer)] for layer in range(num_layers)]


def spread(
    target: float, weights: Sequence[float], free: Sequence[bool], runs: Sequence[int]
) -> Row:
    """Rates in proportion to `weights` with mean `target` over all layers.

    Layers that are not free keep everything, and so does one whose share would exceed that; the
    others take what is left. Where nothing is left they keep one token.

    Args:
        target: mean rate, in (0, 1].
        weights: [layers] > 0.
        free: [layers] False where a layer keeps everything.
        runs: [layers] how many layers of the model run at its rates.

    Source: docs/method.md, section 3.
    """
    full = {layer for layer, is_free in enumerate(free) if not is_free}
    while True:
        rest = [layer for layer in range(len(weights)) if layer not in full]
        mass = max(sum(runs[layer] * weights[layer] for layer in rest), 1e-9)
        scale = target * (sum(runs) / mass) - sum(runs[layer] for layer in full) / mass
        # the slack takes float noise off: 7/12 of thirds is exactly 1, 1/2 and 1/4
        over = {layer for layer in rest if scale * weights[layer] > 1 - SPREAD_SLACK}
        if not over:
            break
        full |= over
    return tuple(
        1.0 if layer in full else _clamp(scale * weight) for layer, weight in enumerate(weights)
    )


def _kept_whole(row: Row, free: Sequence[bool]) -> Row:
    return tuple(rate if is_free else 1.0 for rate, is_free in zip(row, free, strict=True))


def _listed_rows(schedule: str | Sequence[Sequence[float]], num_layers: int) -> tuple[Row, Row]:
    if schedule == "learned":
        raise DareConfigError(
            'schedule "learned" takes its rates from a trained router adapter: expected an '
            "adapter, got none. Give apply_dare the adapter's path, or choose another schedule."
        )
    if isinstance(schedule, str):
        raise DareConfigError(
            'schedule must be "two_stage", "safe", "ramp", "stages", "constant", "learned" or '
            f"pairs, got {schedule!r}."
        )
    if len(schedule) != num_layers:
        raise DareConfigError(
            f"schedule must be one (vision, text) pair for each of this model's {num_layers} "
            f"layers, got {len(schedule)} pairs."
        )
    return tuple(float(pair[0]) for pair in schedule), tuple(float(pair[1]) for pair in schedule)


def _plan_layers(rows: Sequence[Row], plan_every: int) -> tuple[int, ...]:
    """For each layer the last one that selects: every n-th, and where any row of rates changes."""
    columns = list(zip(*rows, strict=True))
    plans: list[int] = []
    for layer, rates in enumerate(columns):
        selects = layer % plan_every == 0 or rates != columns[layer - 1]
        plans.append(layer if selects else plans[-1])
    return tuple(plans)


def _decayed(row: Row, free: Sequence[bool], factor: float) -> Row:
    return tuple(
        _clamp(rate * factor) if is_free else rate for rate, is_free in zip(row, free, strict=True)
    )


def _clamp(rate: float) -> float:
    return min(max(rate, MIN_RATE), 1.0)


__all__ = [
    "TEXT",
    "VISION",
    "RetentionTable",
    "budget",
    "build_table",
    "learned_table",
    "resolve_cut_layer",
]
