"""Memory across hops: what a hop keeps, to the byte, and that the rest is really freed."""

import gc
import itertools
import weakref

import pytest
import torch
from hop_runs import BY_WORD, LONG, PRUNED, closing, held
from laws import SCORER, TINY_MODELS, dare, inputs_of, shared_model

from dare_hf import DareCache, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.routing.reference import budget
from dare_hf.testing import decoder_layers, modality_of

LAYERS = 4
SLACK, SPARE_TOKENS = 1.25, 64
"""What a cache may hold over its largest row, and tokens a layer on top (the public contract)."""
STEPS = [[2, 9], [5, 6, 7, 15], [0, 12]]


def token_bytes(model) -> int:
    """Bytes of one token's keys and values in one layer."""
    attention = decoder_layers(model)[0].self_attn
    heads = model.config.get_text_config().num_key_value_heads
    return 2 * heads * attention.head_dim * torch.finfo(model.dtype).bits // 8


def storage_bytes(cache) -> int:
    """Bytes of the storages behind all keys and values, each counted once."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def hold_bound(model, cache) -> None:
    one, kept = token_bytes(model), cache.kept_lengths()
    limit = sum(SLACK * int(row.max()) * len(row) * one + SPARE_TOKENS * one for row in kept)
    assert storage_bytes(cache) == cache.allocated_bytes() <= limit
    assert cache.kv_bytes() == int(kept.sum()) * one


def predicted(counts, rates, ends, tokens, *, per_hop=False) -> int:
    """Tokens a layer holds of one row, by counting alone: no score says how many stay.

    Args:
        counts: Text and vision tokens of the prompt.
        rates: ``(text, vision)`` of hop 0, and of a later hop as a function of it.
        ends: Sampled tokens that closed a hop, ascending.
        tokens: Sampled tokens processed.
        per_hop: Whether every hop has a budget of its own.
    """
    first, later = rates
    groups = [[(n, budget(rate, n), 0) for n, rate in zip(counts, first, strict=True)]]
    groups[0] = [(n, k, min(n, 2) if m == 0 else 0) for m, (n, k, _) in enumerate(groups[0])]
    begins = [0, *[end + 1 for end in ends if end + 1 < tokens]]
    for hop, begin in enumerate(begins, start=1):
        if hop > 1:
            text, vision = later(hop)
            span = begin - begins[hop - 2]
            groups.append([(span, span, min(span, 2)), (0, 0, 0)])
            groups = per_group(groups, (text, vision)) if per_hop else pooled(groups, text, vision)
    return sum(k for group in groups for _, k, _ in group) + tokens - begins[-1]


def per_group(groups, rates):
    """Each closed hop keeps its share, its prefix at least, and never more than it still has."""
    return [
        [
            (n, min(max(budget(rate, n), forced), k), forced)
            for rate, (n, k, forced) in zip(rates, group, strict=True)
        ]
        for group in groups
    ]


def pooled(groups, text, vision):
    """All closed hops as one, with the sum of their prefixes."""
    whole = [
        tuple(sum(part) for part in zip(*kind, strict=True)) for kind in zip(*groups, strict=True)
    ]
    return per_group([whole], (text, vision))


RATES = {"vision_retention": 0.6, "text_retention": 0.5, "hop_decay": 0.8}


@pytest.mark.parametrize("budgets", ["pooled", "per_hop"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_after_any_number_of_hops_the_bytes_are_the_predicted_ones(name, budgets):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    modality = modality_of(model, inputs)
    with dare(model, **RATES, hop_delimiters=(12,), hop_budget=budgets):
        cache = cache_of(closing(model, inputs, STEPS))
        report = last_report(model)
    wanted = []
    for row, ends in enumerate(STEPS):
        counts = [int((modality[row] == kind).sum()) for kind in (0, 1)]
        wanted.append(
            predicted(
                counts,
                ((0.5, 0.6), lambda hop: (0.5, 0.6 * 0.8 ** (min(hop, 7) - 1))),
                ends,
                LONG - 1,
                per_hop=budgets == "per_hop",
            )
        )
    assert cache.kept_lengths().tolist() == [wanted] * LAYERS
    in_all = LAYERS * sum(wanted) * token_bytes(model)
    assert cache.kv_bytes() == report.kv_bytes == report.kv_bytes_predicted == in_all


LONG_RUNS = {
    "stored": {"scorer": SCORER},
    "observed": {"scorer": "attention"},
    "drop": {"pruned": "drop"},
}
FAST = {"llava": "stored", "qwen2_5_vl": "observed", "gemma3": "drop", "chameleon": "stored"}


def spread(keys):
    """Every model with every key; one of each model is fast, the others slow."""
    for name, key in itertools.product(TINY_MODELS, keys):
        marks = () if FAST[name] == key else pytest.mark.slow
        yield pytest.param(name, key, marks=marks, id=f"{name}-{key}")


@pytest.mark.parametrize(("name", "run"), list(spread(LONG_RUNS)))
def test_twelve_hops_stay_within_the_bound_at_every_token(name, run):
    model, cache, hops = shared_model(name), DareCache(), []
    inputs = inputs_of(model, (0, 1, 2), text=30)
    with dare(model, **PRUNED, decode_window=3, **LONG_RUNS[run]):

        def look(ids):
            hold_bound(model, cache)
            hops.append(int(cache.hops.max()))

        closing(model, inputs, [[]] * 3, max_new_tokens=38, watch=look, **{CACHE: cache})
        report = last_report(model)
    assert hops == sorted(hops)
    assert hops[-1] == 13
    assert report.kv_bytes == report.kv_bytes_predicted == cache.kv_bytes()
    assert report.kv_bytes < 0.75 * report.kv_bytes_baseline


@pytest.mark.parametrize("prefix", [1, 3])
def test_text_without_delimiters_stays_bounded(prefix):
    """With a cap, twelve hops later the cache is no larger than after the first: no prefix adds."""
    model, cache, kept = shared_model("gemma3"), DareCache(), []
    inputs = inputs_of(model, (2,))
    with dare(model, **PRUNED, decode_window=4, max_kv_tokens=16, prefix_tokens=prefix):
        closing(
            model,
            inputs,
            [[]],
            max_new_tokens=49,
            watch=lambda ids: kept.append(int(cache.kept_lengths().max())),
            **{CACHE: cache},
        )
    assert int(cache.hops[0]) == 13
    assert max(kept) <= 16 + 4
    assert cache.allocated_bytes() <= LAYERS * (1.25 * 20 + 64) * token_bytes(model)


def test_a_compaction_lets_the_old_memory_go():
    """Nobody keeps the slabs of before: not the snapshot, nor the views, nor the report."""
    model, cache, slabs = shared_model("llava"), DareCache(), {}
    inputs = inputs_of(model, (2,), text=60)
    with dare(model, **BY_WORD):

        def look(ids):
            hop = int(cache.hops[0])
            slabs.setdefault(hop, [weakref.ref(layer._slabs) for layer in cache.layers])

        closing(model, inputs, [[3, 8, 12]], watch=look, **{CACHE: cache})
        gc.collect()
        report = last_report(model)
    assert len(slabs) == 4
    for hop in (1, 2, 3):
        assert [ref() for ref in slabs[hop]] == [None] * LAYERS, f"slabs of hop {hop} live on"
    assert storage_bytes(cache) == cache.allocated_bytes()
    assert report.hops == 5


CAPS = {"stored": {"scorer": SCORER}, "observed": {"scorer": "attention"}}


@pytest.mark.parametrize("ends", [{"hop_delimiters": (12,)}, {"decode_window": 5}], ids=str)
@pytest.mark.parametrize(("name", "scores"), list(spread(CAPS)))
def test_the_cap_holds_after_the_prompt_and_at_every_hop(name, scores, ends):
    model, cache, cap = shared_model(name), DareCache(), 12
    inputs, seen = inputs_of(model, (0, 1, 2)), []
    rates = {"vision_retention": 0.9, "text_retention": 0.9, "max_kv_tokens": cap}
    with dare(model, **rates, **CAPS[scores], **ends):

        def look(ids):
            hop = cache.log.hop[:, -1]
            for layer in cache.layers:
                _, of = cache.log.lookup(layer.positions())
                closed = (of >= 0) & (of < hop.clamp(min=1)[:, None])
                seen.append(closed.sum(1).tolist())

        closing(model, inputs, STEPS, watch=look, **{CACHE: cache})
    assert seen[:LAYERS] == [[cap] * 3] * LAYERS, "the prompt has more than the cap"
    assert max(max(rows) for rows in seen) == cap


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
@pytest.mark.parametrize(("name", "scores"), list(spread(CAPS)))
def test_forced_tokens_outlive_every_compaction(name, scores, pruned):
    """The first kappa tokens of every closed hop, and ids that are always kept."""
    model, cache, always = shared_model(name), DareCache(), (30, 31)
    inputs = inputs_of(model, (0, 1, 2))
    span, size = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + LONG - 1
    inputs["input_ids"][:, -4] = always[0]
    real, seen = inputs["attention_mask"], []
    fields = {**PRUNED, **CAPS[scores], "vision_retention": 0.1, "text_retention": 0.1}
    with dare(
        model, **fields, hop_delimiters=(12, 31), always_keep_token_ids=always, pruned=pruned
    ):
        closing(
            model,
            inputs,
            STEPS,
            watch=lambda ids: seen.append(held(cache, size)),
            **{CACHE: cache},
        )
    for step, layers in enumerate(seen):
        for row, ends in enumerate(STEPS):
            begins = [0, *[end + 1 for end in ends if end < step]]
            forced = [span + b + i for b in begins for i in (0, 1) if b + i < step]
            first = int(real[row].nonzero()[0, 0])
            forced += [first, first + 1, span - 4]
            for mask in layers:
                assert mask[row, forced].all(), f"step {step}, row {row}"
    last = [int(layer[1, :span].sum()) for layer in seen[-1]]
    assert max(last) < 8, "hardly anything was pruned"


def test_the_report_says_what_was_held_when_each_hop_began():
    model, cache, found = shared_model("llava"), DareCache(), {}
    inputs = inputs_of(model, (2,))
    with dare(model, **BY_WORD):

        def look(ids):
            hop = int(cache.log.hop[0, -1])
            if hop in found:
                return
            kinds, counted = cache.log.modality[0], cache.log.hop[0] < max(hop, 1)
            shares = []
            for layer in held(cache, len(kinds)):
                both = [counted & (kinds == kind) for kind in (0, 1)]
                shares.append([float((layer[0] & m).sum() / m.sum()) for m in both])
            found[hop] = shares

        closing(model, inputs, [[2, 5, 11]], watch=look, **{CACHE: cache})
        report = last_report(model)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert len(report.retention) == 5
    for hop, shares in found.items():
        ours = [[layer["text"], layer["vision"]] for layer in report.retention[hop]]
        assert ours == [pytest.approx(layer) for layer in shares], f"hop {hop}"
