"""DareConfig: defaults, presets, refusals, and the way through adapter_config.json."""

import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import peft
import pytest

from dare_hf.config import DareConfig
from dare_hf.errors import DareConfigError, DareError
from dare_hf.scoring.base import register_scorer

NAN = float("nan")
INFINITY = float("inf")

NOT_A_RATE = [0, 0.0, -0.1, 1.0001, 2, NAN, INFINITY, True, "0.5", None, [0.5], 1j]
NOT_POSITIVE = [0, -1.0, NAN, INFINITY, True, "1", None]
NOT_A_WEIGHT = [-0.1, NAN, INFINITY, -INFINITY, False, "1", None]
NOT_A_COUNT = [0, -1, 1.0, 2.5, NAN, True, "2"]
NOT_IDS = [(-1,), (1.0,), (True,), ("a",), 7, "7", {7}, (None,), ((1, 2),)]

for own in ("a user's own", "mine"):
    register_scorer(own, lambda hidden, modality, *, layer, hop, positions: modality * 0.0)

REFUSED = {
    "vision_retention": NOT_A_RATE,
    "text_retention": NOT_A_RATE,
    "hop_decay": NOT_A_RATE,
    "schedule": [
        "two-stage",
        "",
        (),
        [],
        None,
        0.4,
        [0.4, 0.7],
        [(0.4,)],
        [(0.4, 0.7, 1.0)],
        [(0.4, 0.0)],
        [(NAN, 0.7)],
        [(True, 0.7)],
        [("0.4", 0.7)],
        ["ab"],
    ],
    "plan_every": [*NOT_A_COUNT, None],
    "max_hops": [*NOT_A_COUNT, None],
    "max_kv_tokens": NOT_A_COUNT,
    "decode_window": NOT_A_COUNT,
    "prefix_tokens": [-1, 2.0, True, "2", None, NAN],
    "batch_budget": ["rows", "", None, 1, ["row"]],
    "pruned": ["skip", None, True],
    "decode": ["fast", None],
    "score_scaling": ["none", None],
    "selector": ["topk", None],
    "ratio": ["each", None],
    "loss_reduction": ["none", None],
    "hop_score": ["seen", "", 0],
    "hop_budget": ["row", "", 0],
    "uniform_share": [-0.1, 1.1, NAN, True, "0.25", None],
    "recent_share": [-0.1, 1.1, NAN, True, "0.25", None],
    "recent_tokens": [-1, 2.0, True, "2", None, NAN],
    "first_layers_whole": ["two", -1, 0.5, 1.0, NAN, True, None, (3,), 1025],
    "cut_layer": ["half", -1, 0.0, 1.0, 1.5, -0.5, NAN, True, None, (3,)],
    "stages": [1, None, "ab", (1, 2), [(0.5,)], [(-1, 1)], [(1.0, 1)], [(True, 1)], [(1, 0)]],
    "recycle": [1, 0, None, "yes"],
    "mean_update": [1, 0.5, None, "yes"],
    "hop_summary": NOT_A_COUNT,
    "scorer": ["", None, 3, ["attention"]],
    "hop_delimiters": ["</coor>", 5, None, [""], [[]], [-1], [1.5], [True], [[1, -2]], [None]],
    "always_keep_token_ids": [*NOT_IDS, None],
    "image_token_ids": NOT_IDS,
    "hop_aware": [1, 0, None, "yes"],
    "normalize_input": [1, 0, None, "yes"],
    "tau_start": NOT_POSITIVE,
    "tau_end": NOT_POSITIVE,
    "soft_temperature": NOT_POSITIVE,
    "lambda_ratio": NOT_A_WEIGHT,
    "lambda_soft": NOT_A_WEIGHT,
    "lambda_hard": NOT_A_WEIGHT,
    "mu": NOT_A_WEIGHT,
    "epsilon": NOT_A_WEIGHT,
    "seed": [0.5, NAN, True, "0", None],
    "num_layers": NOT_A_COUNT,
    "hidden_size": NOT_A_COUNT,
    "model_type": ["", 3, ["llava"]],
    "peft_type": ["LORA", None, 3],
}

ACCEPTED = {
    "vision_retention": [(1, 1.0), (0.001, 0.001), (np.float32(0.5), 0.5)],
    "text_retention": [(1, 1.0)],
    "schedule": [
        ("safe", "safe"),
        ("learned", "learned"),
        ([[1, 0.5], (0.25, 1)], ((1.0, 0.5), (0.25, 1.0))),
    ],
    "stages": [((), ()), ([[2, 1], (0.5, 0.25)], ((2, 1.0), (0.5, 0.25)))],
    "recycle": [(True, True)],
    "mean_update": [("auto", "auto"), (True, True), (False, False)],
    "hop_summary": [(None, None), (1, 1)],
    "recent_share": [(0, 0.0), (1, 1.0)],
    "recent_tokens": [(0, 0), (np.int64(3), 3)],
    "first_layers_whole": [("auto", "auto"), (0, 0), (np.int64(3), 3)],
    "cut_layer": [("auto", "auto"), (0, 0), (7, 7), (0.5, 0.5), (np.int64(3), 3)],
    "hop_delimiters": [
        ([5, [6, 7], "</coor>"], (5, (6, 7), "</coor>")),
        ((), ()),
    ],
    "always_keep_token_ids": [([0, 3], (0, 3)), (range(2), (0, 1))],
    "image_token_ids": [(None, None), ([9], (9,)), ((), ())],
    "hop_score": [(None, None), ("stored", "stored"), ("observed", "observed")],
    "hop_budget": [(None, None), ("pooled", "pooled"), ("per_hop", "per_hop")],
    "max_kv_tokens": [(None, None), (1, 1)],
    "decode_window": [(None, None), (1, 1)],
    "prefix_tokens": [(0, 0)],
    "uniform_share": [(0, 0.0), (1, 1.0)],
    "scorer": [("router", "router"), ("a user's own", "a user's own")],
    "mu": [(0, 0.0)],
    "seed": [(-5, -5), (2**63 - 1, 2**63 - 1)],
    "num_layers": [(None, None), (1, 1)],
    "hidden_size": [(None, None), (np.int64(8), 8)],
    "model_type": [(None, None), ("llava", "llava")],
}


def pairs(table: dict) -> list:
    return [
        pytest.param(name, value, id=f"{name}-{value!r}")
        for name, values in table.items()
        for value in values
    ]


def own_fields() -> set[str]:
    return set(DareConfig.__annotations__)


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_refuses_naming_field_and_value(name: str, value: object) -> None:
    with pytest.raises(DareConfigError) as refusal:
        DareConfig(**{name: value})
    text = str(refusal.value)
    assert text.startswith(name), f"the message does not name {name}: {text}"
    assert "must be" in text
    assert ", got " in text
    if not isinstance(value, list | tuple):
        assert repr(value) in text, f"the message does not show the value: {text}"


def test_every_field_has_refusals() -> None:
    assert own_fields() == set(REFUSED)


@pytest.mark.parametrize(("name", "case"), pairs(ACCEPTED))
def test_accepts_and_normalises(name: str, case: tuple[object, object]) -> None:
    value, stored = case
    given = getattr(DareConfig(**{name: value}), name)
    assert given == stored
    assert type(given) is type(stored), "a JSON file must hold plain numbers"


def test_every_field_is_documented() -> None:
    lines = (DareConfig.__doc__ or "").splitlines()
    documented = {line.split(":")[0].strip() for line in lines if line.startswith("        ")}
    assert own_fields() <= documented


def test_defaults_are_the_contract() -> None:
    values = {name: getattr(DareConfig(), name) for name in own_fields()}
    assert values == {
        "vision_retention": 7 / 12,
        "text_retention": 1.0,
        "schedule": "safe",
        "plan_every": 4,
        "batch_budget": "row",
        "uniform_share": 0.25,
        "recent_tokens": 32,
        "recent_share": 0.75,
        "cut_layer": "auto",
        "stages": (),
        "first_layers_whole": "auto",
        "prefix_tokens": 2,
        "pruned": "bypass",
        "recycle": False,
        "mean_update": "auto",
        "scorer": "attention",
        "hop_delimiters": (),
        "hop_aware": True,
        "max_hops": 8,
        "hop_decay": 1.0,
        "hop_summary": None,
        "hop_score": None,
        "hop_budget": None,
        "max_kv_tokens": None,
        "decode": "full",
        "decode_window": None,
        "always_keep_token_ids": (),
        "image_token_ids": None,
        "normalize_input": True,
        "score_scaling": "straight_through",
        "selector": "soft_topk",
        "tau_start": 1.0,
        "tau_end": 0.2,
        "soft_temperature": 0.05,
        "ratio": "mean",
        "loss_reduction": "mean",
        "lambda_ratio": 1.0,
        "lambda_soft": 1.0,
        "lambda_hard": 1.0,
        "mu": 0.1,
        "epsilon": 0.3,
        "seed": 0,
        "num_layers": None,
        "hidden_size": None,
        "model_type": None,
        "peft_type": "DARE_ROUTER",
    }


BY_SCHEDULE = (
    "schedule",
    "vision_retention",
    "text_retention",
    "plan_every",
    "uniform_share",
    "recent_share",
)
SAFE = ("safe", 7 / 12, 1.0, 4, 0.25, 0.75)
OTHERWISE = (0.4, 0.7, 1, 0.0, 0.0)


def by_schedule(config: DareConfig) -> tuple[object, ...]:
    return tuple(getattr(config, name) for name in BY_SCHEDULE)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, SAFE),
        ({"scorer": "random"}, SAFE),
        ({"scorer": "router"}, ("two_stage", *OTHERWISE)),
        ({"scorer": "router", "schedule": "safe"}, SAFE),
        ({"schedule": "learned"}, ("learned", *OTHERWISE)),
        ({"schedule": "constant", "plan_every": 3}, ("constant", 0.4, 0.7, 3, 0.0, 0.0)),
        ({"vision_retention": 0.4}, ("safe", 0.4, 1.0, 4, 0.25, 0.75)),
        ({"schedule": [(0.5, 1.0)]}, (((0.5, 1.0),), *OTHERWISE)),
    ],
)
def test_what_is_unnamed_follows_the_schedule(given: dict, found: tuple) -> None:
    assert by_schedule(DareConfig(**given)) == found


def test_the_safe_preset_is_the_default() -> None:
    assert DareConfig.preset("safe") == DareConfig()


def test_another_schedule_resolves_what_is_unnamed_and_nothing_else() -> None:
    fresh = dataclasses.replace(DareConfig(seed=3), schedule="constant")
    assert by_schedule(fresh) == ("constant", *OTHERWISE)
    assert fresh.seed == 3
    assert by_schedule(dataclasses.replace(fresh, schedule="safe")) == SAFE
    assert by_schedule(dataclasses.replace(DareConfig(), scorer="router"))[0] == "two_stage"
    # a value that is named stays, also where it is the default by chance
    named = DareConfig(vision_retention=7 / 12, plan_every=4)
    found = by_schedule(dataclasses.replace(named, schedule="constant"))
    assert found == ("constant", 7 / 12, 0.7, 4, 0.0, 0.0)
    found = by_schedule(dataclasses.replace(DareConfig(), schedule="constant", plan_every=4))
    assert found == ("constant", 0.4, 0.7, 4, 0.0, 0.0)
    for twin in (copy.deepcopy(DareConfig()), pickle.loads(pickle.dumps(DareConfig()))):
        assert by_schedule(dataclasses.replace(twin, schedule="constant"))[1:] == OTHERWISE


def test_a_serialised_config_is_literal(tmp_path: Path) -> None:
    DareConfig().save_pretrained(str(tmp_path))
    for read in (DareConfig.from_pretrained(str(tmp_path)), DareConfig(**DareConfig().to_dict())):
        assert by_schedule(dataclasses.replace(read, schedule="constant")) == (
            "constant",
            *SAFE[1:],
        )
    assert all(type(value) in (float, int, str) for value in by_schedule(read))


def test_a_file_from_before_protection_protects_nothing(tmp_path: Path) -> None:
    """Adapters route as they were trained."""
    DareConfig(scorer="router").save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert [fields[name] for name in NEWER] == [32, 0.0, "auto"]
    assert DareConfig.from_pretrained(str(tmp_path)).recent_tokens == 32
    for name in NEWER:
        del fields[name]
    file.write_text(json.dumps(fields))
    read = DareConfig.from_pretrained(str(tmp_path))
    assert [getattr(read, name) for name in NEWER] == [0, 0.0, 0]
    again = dataclasses.replace(read, schedule="safe")
    assert [getattr(again, name) for name in NEWER] == [0, 0.0, 0], "what is read is literal"


NEWER = ("recent_tokens", "recent_share", "first_layers_whole")


def test_checked_again() -> None:
    config = DareConfig()
    config.vision_retention = 7
    with pytest.raises(DareConfigError, match=r"vision_retention .*got 7"):
        config.checked()
    config.vision_retention, config.schedule = 0.3, "constant"
    twin = config.checked(num_layers=4)
    assert by_schedule(twin) == ("constant", 0.3, 1.0, 4, 0.25, 0.75), "resolved when it was made"
    assert (twin.num_layers, config.num_layers) == (4, None)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("compression_ratio", r"vision_retention and text_retention.*1 - compression_ratio"),
        ("sparsity", "1 - sparsity"),
        ("pruning_ratio", "1 - pruning_ratio"),
        ("vision_retension", "nearest is vision_retention"),
        ("hop_delimiter", "nearest is hop_delimiters"),
        ("pruned_", "nearest is pruned"),
        ("inference", "nearest is inference_mode"),
        ("x", "nearest is "),
    ],
)
def test_an_unknown_keyword_names_the_nearest_field(name: str, told: str) -> None:
    for make in (DareConfig, lambda **given: DareConfig.preset("safe", **given)):
        with pytest.raises(DareConfigError, match=f"^{name}: .*{told}"):
            make(**{name: 0.5})
    assert "vision_retention" in inspect.signature(DareConfig).parameters


def test_presets() -> None:
    safe = DareConfig.preset("safe")
    assert (safe.schedule, safe.text_retention, safe.plan_every) == ("safe", 1.0, 4)
    assert (safe.uniform_share, safe.hop_decay, safe.scorer) == (0.25, 1.0, "attention")
    literal = DareConfig.preset("literal")
    assert (literal.vision_retention, literal.text_retention) == (0.4, 0.7)
    assert (literal.schedule, literal.pruned, literal.scorer) == ("learned", "bypass", "router")
    assert (literal.selector, literal.score_scaling) == ("gumbel", "multiply_training")
    assert (literal.ratio, literal.loss_reduction) == ("per_rate", "sum")
    assert (literal.normalize_input, literal.hop_aware, literal.prefix_tokens) == (False, True, 2)
    assert DareConfig.preset("literal", score_scaling="multiply").multiplies
    assert not DareConfig.preset("literal").multiplies, "an override changed the preset itself"


def test_preset_refusals() -> None:
    with pytest.raises(DareConfigError, match=r"'literal'.*'safe'.*got 'fast'"):
        DareConfig.preset("fast")
    with pytest.raises(DareConfigError, match="vision_retention"):
        DareConfig.preset("safe", vision_retention=1.5)


@pytest.mark.parametrize(
    ("scorer", "score", "budget"),
    [
        ("attention", "observed", "per_hop"),
        ("router", "stored", "pooled"),
        ("mine", "stored", "pooled"),
    ],
)
def test_hop_choices_follow_the_scorer(scorer: str, score: str, budget: str) -> None:
    config = DareConfig(scorer=scorer)
    assert (config.resolved_hop_score, config.resolved_hop_budget) == (score, budget)
    other = DareConfig(scorer=scorer, hop_score="stored", hop_budget="pooled")
    assert (other.resolved_hop_score, other.resolved_hop_budget) == ("stored", "pooled")


FULL = DareConfig(
    task_type="CAUSAL_LM",
    base_model_name_or_path="somewhere/base",
    inference_mode=True,
    vision_retention=0.123456789012345,
    schedule=[(1, 0.5), (0.25, 1.0)],
    cut_layer=3,
    hop_delimiters=[5, [6, 7], "</coor>"],
    hop_score="stored",
    hop_budget="per_hop",
    max_kv_tokens=100,
    decode_window=16,
    always_keep_token_ids=[1, 2],
    image_token_ids=range(4, 8),
    seed=-7,
    num_layers=4,
    hidden_size=32,
    model_type="llava",
)


@pytest.mark.parametrize(
    "config", [DareConfig(), DareConfig.preset("safe"), DareConfig.preset("literal"), FULL]
)
def test_json_round_trip(config: DareConfig, tmp_path: Path) -> None:
    config.save_pretrained(str(tmp_path))
    loaded = DareConfig.from_pretrained(str(tmp_path))
    assert loaded == config
    assert type(loaded) is DareConfig


def test_json_file_is_strict_json(tmp_path: Path) -> None:
    FULL.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["peft_type"] == (
        "DARE_ROUTER"
    )


def test_loading_refuses_another_method(tmp_path: Path) -> None:
    peft.LoraConfig().save_pretrained(str(tmp_path))
    with pytest.raises(DareConfigError, match=r"peft_type must be 'DARE_ROUTER', got 'LORA'"):
        DareConfig.from_pretrained(str(tmp_path))


def test_loading_refuses_unknown_fields_and_bad_values(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "DARE_ROUTER", "text_rotation": 0.5}))
    with pytest.raises(DareConfigError, match="text_rotation"):
        DareConfig.from_pretrained(str(tmp_path))
    file.write_text('{"peft_type": "DARE_ROUTER", "text_retention": NaN}')
    with pytest.raises(DareConfigError, match="text_retention"):
        DareConfig.from_pretrained(str(tmp_path))


def test_peft_fields_keep_their_meaning() -> None:
    assert FULL.task_type == "CAUSAL_LM"
    assert FULL.inference_mode is True
    assert FULL.is_prompt_learning is False
    assert FULL.peft_version == peft.__version__
    with pytest.raises(DareConfigError, match="task_type must be one of"):
        DareConfig(task_type="MAZES")


def test_copies() -> None:
    other = dataclasses.replace(FULL, text_retention=0.5)
    assert (other.text_retention, other.schedule) == (0.5, FULL.schedule)
    with pytest.raises(DareConfigError, match="text_retention"):
        dataclasses.replace(FULL, text_retention=5)


def test_errors_are_value_errors() -> None:
    assert issubclass(DareConfigError, ValueError)
    assert issubclass(DareConfigError, DareError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_hops", 1025),
        ("max_hops", 10**400),
        ("max_kv_tokens", 2**31),
        ("plan_every", 10**30),
        ("cut_layer", 10**400),
        ("seed", 2**63),
        ("vision_retention", 10**400),
        ("always_keep_token_ids", range(10**9)),
        ("always_keep_token_ids", range(10**400)),
        ("hop_delimiters", ((1,) * 1025,)),
        ("schedule", ((0.5, 0.5),) * 1025),
        ("inference_mode", "yes"),
        ("base_model_name_or_path", ["x"]),
        ("auto_mapping", 3),
    ],
)
def test_nothing_is_unbounded(field: str, value: object) -> None:
    with pytest.raises(DareConfigError, match=field) as refused:
        DareConfig(**{field: value})
    assert len(str(refused.value)) < 1000


def test_an_integer_that_python_does_not_print_is_refused() -> None:
    with pytest.raises(DareConfigError, match=r"seed must be an integer <= .* 16610 bits"):
        DareConfig(seed=10**5000)


def test_a_value_nested_absurdly_is_refused_in_a_short_sentence() -> None:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(DareConfigError, match="schedule") as refused:
        DareConfig(schedule=value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"",
        b'{"seed": ' + b"9" * 5000 + b"}",
        b" " * (2**22 + 1),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(DareConfigError, match=r"adapter_config\.json"):
        DareConfig.from_pretrained(str(tmp_path))
