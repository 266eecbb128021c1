"""The check of each field of a configuration: its type, its range, its one form."""

from collections.abc import Callable
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, get_args

from peft.utils import TaskType

from dare_hf.config.checks import (
    at_most,
    choice,
    flag,
    instance,
    integer,
    number,
    optional,
    refuse,
    text,
)
from dare_hf.config.scorer_names import scorer_name


class DarePeftType(str, Enum):  # noqa: UP042 - as peft's own PeftType, whose str() it copies
    """The PEFT method's name, a key of peft's tables; equal to and hashed as the plain string."""

    DARE_ROUTER = "DARE_ROUTER"


PEFT_TYPE = DarePeftType.DARE_ROUTER

Schedule = Literal["safe", "two_stage", "ramp", "stages", "constant", "learned"]
BatchBudget = Literal["row", "equal"]
Pruned = Literal["bypass", "drop", "freeze"]
HopScore = Literal["stored", "observed"]
HopBudget = Literal["pooled", "per_hop"]
Decode = Literal["full", "routed"]
ScoreScaling = Literal["straight_through", "multiply", "multiply_training"]
Selector = Literal["soft_topk", "gumbel"]
Ratio = Literal["mean", "per_rate"]
LossReduction = Literal["mean", "sum"]

MOST_HOPS, MOST_LAYERS, MOST_DELIMITERS, MOST_IDS = 1024, 1024, 1024, 65536
"""Bounds of what takes memory or time: hops with rates, pairs of a schedule, delimiters and the
tokens of one, token ids of a list. docs/configuration.md names them."""


def peft_type_of(name: str, value: Any) -> str:
    """The check of `peft_type`: it is this method's."""
    if value != PEFT_TYPE:
        raise refuse(name, f"{PEFT_TYPE.value!r}", value)
    return PEFT_TYPE


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | range):
        raise refuse(name, "a tuple of token ids >= 0", value)
    at_most(name, MOST_IDS, "token ids", value)
    return tuple(_token_id(name, item) for item in value)


def _schedule(name: str, value: Any) -> str | tuple[tuple[float, float], ...]:
    if isinstance(value, str) and value in get_args(Schedule):
        return value
    is_pairs = isinstance(value, list | tuple) and len(value) > 0
    if not is_pairs or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        names = ", ".join(repr(choice) for choice in get_args(Schedule))
        raise refuse(name, f"one of {names} or one (vision, text) pair per layer", value)
    at_most(name, MOST_LAYERS, "layers", value)
    return tuple(
        (_rate(f"{name}[{layer}] vision", vision), _rate(f"{name}[{layer}] text", text))
        for layer, (vision, text) in enumerate(value)
    )


def _cut_layer(name: str, value: Any) -> int | float | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value <= MOST_LAYERS:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < value < 1:
        return float(value)
    raise refuse(name, '"auto", a layer index >= 0 or a fraction of the depth in (0, 1)', value)


def _stages(name: str, value: Any) -> tuple[tuple[int | float, float], ...]:
    expected = "pairs (where a stage begins: a layer >= 0 or a fraction in (0, 1); its weight > 0)"
    if not isinstance(value, list | tuple):
        raise refuse(name, expected, value)
    at_most(name, MOST_LAYERS, "stages", value)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise refuse(name, expected, value)
    return tuple(
        (
            _stage_start(f"{name}[{index}] start", start),
            _positive(f"{name}[{index}] weight", weight),
        )
        for index, (start, weight) in enumerate(value)
    )


def _stage_start(name: str, value: Any) -> int | float:
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value <= MOST_LAYERS:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < value < 1:
        return float(value)
    raise refuse(name, "a layer index >= 0 or a fraction of the depth in (0, 1)", value)


def _first_layers_whole(name: str, value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value <= MOST_LAYERS:
        return int(value)
    raise refuse(name, f'"auto" or an integer from 0 to {MOST_LAYERS}', value)


def _mean_update(name: str, value: Any) -> bool | str:
    if isinstance(value, str) and value == "auto":
        return value
    if not isinstance(value, bool):
        raise refuse(name, '"auto", True or False', value)
    return value


def _delimiters(name: str, value: Any) -> tuple[int | tuple[int, ...] | str, ...]:
    if not isinstance(value, list | tuple):
        raise refuse(name, "a tuple of token ids, token-id sequences or strings", value)
    at_most(name, MOST_DELIMITERS, "delimiters", value)
    return tuple(_delimiter(f"{name}[{index}]", item) for index, item in enumerate(value))


def _delimiter(name: str, value: Any) -> int | tuple[int, ...] | str:
    if isinstance(value, list | tuple | str):
        if len(value) == 0:
            raise refuse(name, "a token id >= 0, a sequence of them or a string, not empty", value)
        at_most(name, MOST_DELIMITERS, "token ids or characters", value)
        return value if isinstance(value, str) else _token_ids(name, value)
    return _token_id(name, value)


def _task_type(name: str, value: Any) -> str:
    known = [str(one.value) for one in TaskType]
    if not isinstance(value, str) or value not in known:
        raise refuse(name, "one of " + ", ".join(map(repr, known)), value)
    return value


_rate = number("a number in (0, 1]", above=0, most=1)
_share = number("a number in [0, 1]", least=0, most=1)
_positive = number("a finite number > 0", above=0)
_weight = number("a finite number >= 0", least=0)
_count = integer("an integer >= 1", 1)
_token_id = integer("a token id (an integer >= 0)", 0)

CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "vision_retention": _rate,
    "text_retention": _rate,
    "schedule": _schedule,
    "plan_every": _count,
    "batch_budget": choice(BatchBudget),
    "uniform_share": _share,
    "recent_tokens": integer("an integer >= 0", 0),
    "recent_share": _share,
    "cut_layer": _cut_layer,
    "stages": _stages,
    "first_layers_whole": _first_layers_whole,
    "prefix_tokens": integer("an integer >= 0", 0),
    "pruned": choice(Pruned),
    "mean_update": _mean_update,
    "recycle": flag,
    "scorer": scorer_name,
    "hop_delimiters": _delimiters,
    "hop_aware": flag,
    "max_hops": integer("an integer >= 1", 1, MOST_HOPS),
    "hop_decay": _rate,
    "hop_summary": optional(_count),
    "hop_score": optional(choice(HopScore)),
    "hop_budget": optional(choice(HopBudget)),
    "max_kv_tokens": optional(_count),
    "decode": choice(Decode),
    "decode_window": optional(_count),
    "always_keep_token_ids": _token_ids,
    "image_token_ids": optional(_token_ids),
    "normalize_input": flag,
    "score_scaling": choice(ScoreScaling),
    "selector": choice(Selector),
    "tau_start": _positive,
    "tau_end": _positive,
    "soft_temperature": _positive,
    "ratio": choice(Ratio),
    "loss_reduction": choice(LossReduction),
    "lambda_ratio": _weight,
    "lambda_soft": _weight,
    "lambda_hard": _weight,
    "mu": _weight,
    "epsilon": _weight,
    "seed": integer("an integer >= -2**63", -(2**63), 2**63 - 1),
    "num_layers": optional(_count),
    "hidden_size": optional(_count),
    "model_type": optional(text("the model_type of a transformers config")),
    "peft_type": peft_type_of,
    # peft's own, which it does not check
    "task_type": optional(_task_type),
    "inference_mode": flag,
    "auto_mapping": optional(instance("a dict", dict)),
    "base_model_name_or_path": optional(instance("a string", str)),
    "revision": optional(instance("a string", str)),
    "peft_version": optional(instance("a string", str)),
}
