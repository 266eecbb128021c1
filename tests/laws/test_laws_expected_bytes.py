"""Beside law 6: what `expected_kv_bytes` says before a run is what the run stores, to the byte."""

import copy
from typing import Any

import pytest
import torch
from hop_runs import CloseAt, Watch
from laws import dare, generate, inputs_of, shared_model
from peft import get_peft_model

from dare_hf import DareCache, DareConfig, HopTokens, expected_kv_bytes, last_report
from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance import architectures
from dare_hf.conformance.subject import SCORER, Subject
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.report.flops import LayerShape, shapes_of
from dare_hf.testing import decoder_layers

MODELS = [
    name
    for name in (
        "llava",
        "qwen2_5_vl",  # three position ids a token
        "gemma3",  # sliding windows
        "chameleon",  # vision tokens are sampled
        "qwen3_5",  # linear attention between
        "mllama",  # cross-attention between
        "gemma4",  # layers that read the keys of others
        "kimi_k25",  # latents
        "lfm2_vl",  # convolutions between
    )
    if name in architectures()
]
LONG, DELIMITER, KEPT_ID = 12, 12, 20
STEPS = [[2, 6, 9], [4, 5], [0, 7]]
RATES = {"vision_retention": 0.5, "text_retention": 0.6, "hop_decay": 0.7}
WHOLE = {"vision_retention": 1.0, "text_retention": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "pooled": {**RATES},
    "per_hop": {**RATES, "hop_budget": "per_hop"},
    "observed": {**RATES, "hop_score": "observed"},
    "drop": {**RATES, "pruned": "drop"},
    "drop_stages": {**RATES, "schedule": "two_stage", "pruned": "drop", "hop_decay": 1.0},
    "drop_rising": {"schedule": "rising", "pruned": "drop"},
    "rising": {"schedule": "rising"},
    "stages": {**RATES, "schedule": "two_stage", "plan_every": 2},
    "safe": {"schedule": "safe", "text_retention": 1.0, "hop_decay": 0.6},
    "cap": {"vision_retention": 0.8, "text_retention": 1.0, "max_kv_tokens": 11},
    "cap_forced": {"max_kv_tokens": 5, "always_keep_token_ids": (KEPT_ID, 30)},
    "cap_drop": {**WHOLE, "max_kv_tokens": 10, "pruned": "drop"},
    "forced": {**RATES, "prefix_tokens": 4, "always_keep_token_ids": (KEPT_ID, 30, 40)},
}
INEXACT = {
    "decayed": {**RATES, "schedule": "two_stage", "pruned": "drop", "hop_decay": 0.5},
    "cap": {**RATES, "max_kv_tokens": 12, "hop_decay": 0.3},
}
"""What scores decide as well: which of its own a deeper layer loses, what a cap takes."""


@pytest.fixture(scope="module")
def subjects():
    return {}


def subject_of(subjects, name) -> Subject:
    if name not in subjects:
        subjects[name] = Subject.of(name)
    return subjects[name]


def watched(subject, cache, **kwargs):
    """Generate with hops that close at STEPS; [step][layers][rows] tokens stored, and the ids."""
    batch, seen = subject.batches["padded"], []
    prompt = batch.inputs["input_ids"].shape[1]
    look = Watch(lambda ids: seen.append(cache.kept_lengths().tolist()))
    out = subject.generate(
        batch,
        max_new_tokens=LONG,
        logits_processor=[CloseAt(prompt, STEPS), look],
        **{CACHE: cache},
        **kwargs,
    )
    return seen, out.sequences


def counted(log, ids, row: int, config: DareConfig) -> list[HopTokens]:
    """One row's hops, told token by token from what the run turned out to be."""
    modality, hop = log.modality[row].tolist(), log.hop[row].tolist()
    tokens = [(h, m, int(i)) for h, m, i in zip(hop, modality, ids[row], strict=False) if m >= 0]
    found = []
    for number in range(max(h for h, _, _ in tokens) + 1):
        own = [(m, i in config.always_keep_token_ids) for h, m, i in tokens if h == number]
        pinned = [m for n, (m, kept) in enumerate(own) if n < config.prefix_tokens or kept]
        forced = [
            m
            for n, (m, kept) in enumerate(own)
            if n < config.prefix_tokens or kept or n == len(own) - 1
        ]
        kinds = [m for m, _ in own]
        fields = {"pinned_text": pinned.count(0), "pinned_vision": pinned.count(1)}
        if number:
            fields |= {"sampled_text": kinds.count(0), "sampled_vision": kinds.count(1)}
        else:
            fields |= {"text": kinds.count(0), "vision": kinds.count(1)}
            fields |= {"forced_text": forced.count(0), "forced_vision": forced.count(1)}
        found.append(HopTokens(**fields))
    return found


def run(subject, fields):
    """What was stored, what was expected of each row, and the bytes of a token in each layer."""
    options = {"scorer": SCORER, "schedule": "constant", **fields}
    if options["schedule"] == "rising":  # a layer may keep more than the one before it
        layers = len(locate(subject.model).layers)
        options["schedule"] = [(0.4 + 0.1 * (i % 5), 0.5 + 0.1 * (i % 4)) for i in range(layers)]
    config = DareConfig(**options, hop_delimiters=(DELIMITER,))
    cache = DareCache()
    with subject.dare(config):
        stored, ids = watched(subject, cache)
        report = last_report(subject.model)
        rows = [counted(cache.log, ids, row, config) for row in range(len(ids))]
        expected = [expected_kv_bytes(subject.model, hops=row) for row in rows]
    hops = [[*row, LONG - 2] for row in STEPS]  # the last token is not processed
    token = [layer.token_bytes() for layer in cache.stored]
    assert report.kv_bytes == report.kv_bytes_predicted == cache.kv_bytes()
    together = expected_kv_bytes(subject.model, config, hops=rows)
    return stored, hops, token, expected, together, report


def at(stored, step, row, token):
    return tuple(layer[row] * size for layer, size in zip(stored[step], token, strict=True))


def spread():
    """Every model under every configuration; of all but the first model some are fast."""
    for m, name in enumerate(MODELS):
        for c, config in enumerate(CONFIGS):
            marks = () if not m or (c + m) % 4 == 0 else pytest.mark.slow
            yield pytest.param(name, config, marks=marks, id=f"{name}-{config}")


@pytest.mark.parametrize(("name", "config"), list(spread()))
def test_bytes_at_every_hop_are_those_expected(subjects, name, config):
    subject = subject_of(subjects, name)
    stored, hops, token, expected, together, report = run(subject, CONFIGS[config])
    for row, ends in enumerate(hops):
        mine = expected[row]
        assert mine.exact
        assert mine.ends[0] == at(stored, 0, row, token), "after the prefill"
        for hop, end in enumerate(ends[: len(mine.ends) - 1], start=1):
            assert mine.ends[hop] == at(stored, end + 1, row, token), f"row {row}, end of {hop}"
            begin = ends[hop - 2] + 2 if hop > 1 else 1
            if begin < len(stored):
                first = at(stored, begin, row, token)
                begun = tuple(a - b for a, b in zip(first, token, strict=True))
                assert mine.begins[hop] == begun, f"row {row}, begin of {hop}"
    assert together.total == sum(mine.total for mine in expected) == report.kv_bytes
    assert together.baseline == report.kv_bytes_baseline


@pytest.mark.parametrize("config", INEXACT)
def test_where_scores_decide_too_it_is_the_most_there_can_be(subjects, config):
    subject = subject_of(subjects, "llava")
    stored, hops, token, expected, together, report = run(subject, INEXACT[config])
    assert not together.exact
    assert together.total >= report.kv_bytes
    for row, ends in enumerate(hops):
        for hop, end in enumerate(ends[: len(expected[row].ends) - 1], start=1):
            pairs = zip(expected[row].ends[hop], at(stored, end + 1, row, token), strict=True)
            assert all(most >= held for most, held in pairs)


FLOPS = {
    "attention": {"scorer": "attention", "schedule": "two_stage", "plan_every": 2},
    "stored": {"scorer": "attention", "hop_score": "stored", "hop_delimiters": (DELIMITER,)},
    "key_norm": {"scorer": "key_norm", "pruned": "drop", "text_retention": 1.0},
    "position": {"scorer": "position", "text_retention": 1.0},
    "safe": {},
    "router": {"scorer": SCORER, "schedule": "constant"},
}


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("config", FLOPS)
def test_flops_before_a_run_are_those_of_the_report(name, config):
    from dare_hf.expected.flops import expected_flops
    from dare_hf.expected.subject import Subject as Expected

    model, fields = shared_model(name), FLOPS[config]
    inputs = inputs_of(model, (1,))
    with dare(model, DareConfig(**fields)):
        generate(model, inputs, max_new_tokens=2, return_dict_in_generate=False)
        report = last_report(model)
        counts = [report.tokens[kind][0] for kind in ("text", "vision")]
        prompt = facts_of(model, inputs, counts)
        expected = expected_flops(Expected.of(model, None, None), prompt)
    assert (expected.prefill, expected.decode) == (report.flops["prefill"], report.flops["decode"])
    if name == "llava":  # the report's baseline keeps to no window
        whole = report.flops_baseline
        assert (expected.plain_prefill, expected.plain_decode) == (
            whole["prefill"],
            whole["decode"],
        )


def facts_of(model, inputs, counts) -> HopTokens:
    """The prompt with what its forward forced, protection by an untrained scorer included."""
    found = []
    controller = model._dare.controller
    opened = controller.after_forward

    def told(module, *, failed):
        if controller.context is not None and controller.context.span is not None:
            found.append(controller.context.forced_counts[0])
        opened(module, failed=failed)

    controller.after_forward = told
    with torch.no_grad():
        model(**inputs)
    del controller.after_forward
    (text, vision), (forced_text, forced_vision) = counts, found[0]
    return HopTokens(vision, text, forced_text=forced_text, forced_vision=forced_vision)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_protected_tokens_are_counts_like_any(name):
    model = shared_model(name)
    inputs = inputs_of(model, (1,))
    rates = {"scorer": "attention", "vision_retention": 0.3, "text_retention": 0.3}
    with dare(model, DareConfig(**rates, schedule="constant")):
        out = generate(model, inputs, max_new_tokens=1)
        report = last_report(model)
        counts = [report.tokens[kind][0] for kind in ("text", "vision")]
        prompt = facts_of(model, inputs, counts)
        assert sum(prompt.forced(2)) > 3
        assert expected_kv_bytes(model, hops=[prompt]).total == cache_of(out).kv_bytes()
        fewer = HopTokens(prompt.vision, prompt.text)
        assert expected_kv_bytes(model, hops=[fewer]).total < cache_of(out).kv_bytes()


@pytest.mark.parametrize("budget", ["row", "equal"])
def test_rows_of_a_batch_share_their_forwards(budget):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, vision_retention=0.3, batch_budget=budget):
        cache, kinds = cache_of(generate(model, inputs, max_new_tokens=1)), [0, 1]
        counts = [[int((row == m).sum()) for m in kinds] for row in cache.log.modality]
        rows = [[HopTokens(vision, text)] for text, vision in counts]
        expected = expected_kv_bytes(model, hops=rows)
        assert expected.total == cache.kv_bytes() == last_report(model).kv_bytes_predicted


def test_chunks_of_a_prefill_are_spans_of_their_own():
    model = shared_model("llava")
    inputs = inputs_of(model, (0,), text=23)
    with dare(model, text_retention=0.5):
        cache = cache_of(generate(model, inputs, max_new_tokens=1, prefill_chunk_size=5))
        count = int(inputs["attention_mask"].sum())
        sizes = [5] * (count // 5) + ([count % 5] if count % 5 else [])
        chunks = [HopTokens(text=size, continues=n > 0) for n, size in enumerate(sizes)]
        assert expected_kv_bytes(model, hops=chunks).total == cache.kv_bytes()
        assert last_report(model).kv_bytes_predicted == cache.kv_bytes()


def test_injected_spans_open_hops():
    model, cache = shared_model("llava"), DareCache()
    rates = {"vision_retention": 0.4, "text_retention": 0.5, "hop_decay": 0.5}
    with dare(model, **rates), torch.no_grad():
        hops = []
        for images in (2, 1, 1):
            inputs = inputs_of(model, (images,), text=9)
            step = {k: v for k, v in inputs.items() if k != "attention_mask"}
            model(**step, **{CACHE: cache}, use_cache=True)
            [[text, vision]] = [row[-1] for row in cache.log.counts_by_hop()]
            hops.append(HopTokens(vision, text))
        expected = expected_kv_bytes(model, hops=hops)
        assert expected.exact
        assert expected.total == cache.kv_bytes() == cache.report.kv_bytes_predicted


def test_shapes_and_models_without_weights_will_do():
    model = shared_model("llava")
    config = DareConfig(vision_retention=0.4, schedule="two_stage", text_retention=1.0)
    hops = [HopTokens(30, 10), HopTokens(sampled_text=5)]
    own = expected_kv_bytes(model, config, hops=hops)
    assert expected_kv_bytes(copy.deepcopy(model).to("meta"), config, hops=hops) == own
    shapes = shapes_of(decoder_layers(model), model.config.get_text_config())
    assert expected_kv_bytes(shapes, config, hops=hops, itemsize=4) == own
    assert expected_kv_bytes(shapes, config, hops=hops).total * 2 == own.total
    assert not hasattr(model, "_dare")


def test_learned_rates_are_read_from_the_adapter(tmp_path):
    model, folder = shared_model("llava"), str(tmp_path)
    fresh = DareConfig(scorer="router", schedule="learned", vision_retention=0.3)
    peft_model = get_peft_model(copy.deepcopy(model), fresh)
    peft_model.save_pretrained(folder)
    hops = [HopTokens(30, 10), HopTokens(sampled_text=5), HopTokens(sampled_text=5)]
    own = expected_kv_bytes(model, folder, hops=hops)
    assert own == expected_kv_bytes(peft_model, hops=hops)
    assert own.total < own.baseline
    with pytest.raises(DareConfigError, match="without an adapter"):
        expected_kv_bytes(model, fresh, hops=hops)


@pytest.mark.parametrize(
    ("hops", "text"),
    [
        ([], "at least the prompt"),
        ([[]], "the prompt first"),
        (["prompt"], "the prompt first"),
        ([HopTokens(sampled_text=1)], "without sampled tokens"),
        ([HopTokens(1, continues=True)], "continues"),
    ],
)
def test_counts_that_cannot_be_are_refused(hops, text):
    with pytest.raises(DareInputError, match=text):
        expected_kv_bytes(shared_model("llava"), hops=hops)


@pytest.mark.parametrize(
    "fields", [{"text": -1}, {"vision": 1.5}, {"forced_text": 1}, {"pinned_vision": 2, "vision": 1}]
)
def test_tokens_are_counts(fields):
    with pytest.raises(DareInputError, match=next(iter(fields))):
        HopTokens(**fields)


def test_what_is_no_model_is_refused():
    with pytest.raises(DareInputError, match="LayerShape"):
        expected_kv_bytes("llava", hops=[HopTokens(1)])
    follower = LayerShape(10, 4, 0, 8, 8)
    with pytest.raises(DareInputError, match="own their keys"):
        expected_kv_bytes([follower], hops=[HopTokens(1)])


@pytest.mark.parametrize("left", [12, 24])
def test_a_crop_into_what_was_pruned_changes_nothing(left):
    """Into the prompt of 22 tokens; before a compaction that was done: refused, and all stays."""
    model, cache = shared_model("llava"), DareCache()
    inputs = inputs_of(model, (1,))
    with dare(model, vision_retention=0.4, text_retention=0.5, decode_window=2):
        generate(model, inputs, **{CACHE: cache})
        with pytest.raises(DareStateError, match=r"DareCache\.crop"):
            cache.crop(left - cache.get_seq_length())
        assert cache.report.kv_bytes_predicted == cache.kv_bytes()
        with torch.no_grad():
            for _ in range(6):
                model(input_ids=torch.tensor([[20]]), **{CACHE: cache}, use_cache=True)
        assert cache.report.kv_bytes_predicted == cache.kv_bytes()


def test_what_a_cap_took_before_is_gone_from_deeper_layers_too():
    """Under "drop" forced tokens that the cap took in layer 0 are no longer in those behind it."""
    model = shared_model("llava")
    config = {
        "pruned": "drop",
        "scorer": "key_norm",
        "hop_score": "stored",
        "hop_budget": "pooled",
        "max_kv_tokens": 10,
        "prefix_tokens": 1,
        "always_keep_token_ids": (
            *(15, 17, 18, 19, 22, 33, 35, 38, 40, 43),
            *(48, 54, 55, 56, 60, 65, 67, 69, 74, 89),
        ),
        "decode_window": 2,
        "schedule": ((1.0, 1.0), (0.5, 0.3), (0.08, 0.08), (0.5, 0.5)),
    }
    cache = DareCache()
    with dare(model, **config):
        generate(model, inputs_of(model, (0, 1)), **{CACHE: cache}, max_new_tokens=14)
        report = last_report(model)
    assert report.kv_bytes == report.kv_bytes_predicted
