"""Hops: who counts them, and that rows in different hops leave each other alone."""

import itertools

import pytest
import torch
from hop_runs import BY_WORD, DELIMITER, LONG, PRUNED, CloseAt, closing, held, new_tokens
from laws import (
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    assert_same_run,
    dare,
    everything,
    forward,
    generate,
    inputs_of,
    rows_of,
    shared_model,
)
from transformers import LogitsProcessor

from dare_hf import DareCache, DareConfig, apply_dare, last_report, remove_dare
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.testing import collate

PAIR = (21, 22)
STEPS = [[2, 9], [5, 6, 7, 15], [0, 12]]
SCORES = {
    "stored": {"scorer": SCORER},
    "observed": {"scorer": "attention", "text_retention": 0.9},
}


class Words:
    """A tokenizer of two words."""

    def encode(self, text, add_special_tokens=True):
        ids = [{"<coor>": 21, "</coor>": 22, "stop": DELIMITER}[word] for word in text.split()]
        return [1, *ids] if add_special_tokens else ids


class Processor:
    tokenizer = Words()


def hops_after(model, inputs, steps, *, token=DELIMITER, **kwargs) -> list[int]:
    return cache_of(closing(model, inputs, steps, token=token, **kwargs)).hops.tolist()


@pytest.mark.parametrize(
    ("delimiters", "token"),
    [((DELIMITER,), DELIMITER), ((PAIR,), PAIR), ((99, PAIR, DELIMITER), PAIR)],
    ids=["id", "sequence", "several"],
)
def test_a_row_counts_its_own_delimiters(delimiters, token):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, **PRUNED, hop_delimiters=delimiters):
        assert hops_after(model, inputs, [[], [5], [3, 5, 9]], token=token) == [1, 2, 4]


def test_strings_are_delimiters_where_there_is_a_processor():
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1))
    config = DareConfig(scorer=SCORER, hop_delimiters=("<coor> </coor>", "stop"))
    for processor in (Processor(), Words()):
        apply_dare(model, config, processor=processor)
        try:
            assert hops_after(model, inputs, [[4, 9], [6]], token=PAIR) == [3, 2]
            assert hops_after(model, inputs, [[4], []]) == [2, 1]
        finally:
            remove_dare(model)
    with pytest.raises(DareConfigError, match="processor"):
        apply_dare(model, config)


def test_half_a_sequence_closes_nothing():
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model, **PRUNED, hop_delimiters=(PAIR,)):
        assert hops_after(model, inputs, [[2, 6]], token=PAIR[0]) == [1]
        assert hops_after(model, inputs, [[2, 6]], token=PAIR[1]) == [1]
        assert hops_after(model, inputs, [[3]], token=(PAIR[0], *PAIR)) == [2]


def test_an_image_that_the_model_wrote_ends_a_hop():
    """End-of-image is a delimiter like any other; the image's tokens are vision."""
    model, end = shared_model("chameleon"), 5
    inputs = inputs_of(model)
    image = (4, 103, 117, 101, end)
    with dare(model, **PRUNED, hop_delimiters=(end,)):
        cache = cache_of(closing(model, inputs, [[6, 12]], token=image, suppress_tokens=[3, 6]))
        report = cache.report
    assert cache.hops.tolist() == [3]
    assert report.tokens["vision"][1:] == [3, 3] + [0] * (len(report.tokens["vision"]) - 3)
    modality = cache.log.modality[0, inputs["input_ids"].shape[1] :].tolist()
    assert [i for i, kind in enumerate(modality) if kind == 1] == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_window_closes_hops_without_a_delimiter(name):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1))
    with dare(model, **PRUNED, decode_window=4):
        assert hops_after(model, inputs, [[], []], max_new_tokens=14) == [4, 4]
        # 13 sampled tokens are processed: hops 1 to 3 are full, hop 4 has one
    with dare(model, **BY_WORD, decode_window=4):
        assert hops_after(model, inputs, [[1, 8], []], max_new_tokens=14) == [5, 4]


def test_delimiters_of_the_prompt_do_not_count():
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 0))
    inputs["input_ids"][:, 4] = DELIMITER
    inputs["input_ids"][:, -1] = PAIR[0]
    with dare(model, **PRUNED, hop_delimiters=(DELIMITER, PAIR)):
        out = closing(model, inputs, [[0], []], token=PAIR[1])
        assert cache_of(out).hops.tolist() == [1, 1]
        assert cache_of(forward(model, inputs, use_cache=True)).hops.tolist() == [1, 1]


def test_a_delimiter_belongs_to_the_hop_it_closes():
    model = shared_model("llava")
    inputs = inputs_of(model, (1, 1))
    with dare(model, **BY_WORD):
        cache = cache_of(closing(model, inputs, [[0, 3], [4]], max_new_tokens=8))
    span = inputs["input_ids"].shape[1]
    assert cache.log.hop[:, :span].unique().tolist() == [0]
    assert cache.log.hop[:, span:].tolist() == [[1, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2]]
    tokens = [sum(pair) for pair in zip(*cache.report.tokens.values(), strict=True)]
    assert tokens == [2 * span, 6, 5, 3]
    assert cache.report.hops == 4


def test_a_new_cache_has_counted_nothing():
    cache = DareCache()
    assert cache.hops.tolist() == []


@pytest.mark.parametrize("fields", [{"max_hops": 3}, {"hop_aware": False}, {}], ids=str)
def test_rates_beyond_the_table_are_its_last(fields):
    """Two words a hop are forced, so that every hop adds the same text; vision shows the decay."""
    model = shared_model("llava")
    inputs, seen, cache = inputs_of(model), {}, DareCache()
    base = {"vision_retention": 0.9, "text_retention": 1.0, "hop_decay": 0.7, "prefix_tokens": 0}
    steps = [list(range(1, LONG, 2))]
    with dare(model, **base, hop_delimiters=(DELIMITER,), **fields):

        def look(ids):
            where = cache.layer(0).positions()
            kinds, _ = cache.log.lookup(where)
            seen.setdefault(int(cache.log.hop[0, -1]), int((kinds == 1).sum()))

        closing(model, inputs, steps, watch=look, **{CACHE: cache})
    top = fields.get("max_hops", 8) - 1
    decay = 1.0 if fields.get("hop_aware") is False else 0.7
    rates = [0.9 * decay ** max(min(hop, top) - 1, 0) for hop in seen]
    assert len(seen) == 10
    assert [seen[hop] for hop in seen] == [-(-int(1e6 * 9 * rate) // 10**6) for rate in rates]


def test_crop_rolls_the_counter_back():
    model = shared_model("llava")
    inputs, cache = inputs_of(model, (0, 1)), DareCache()
    with dare(model, **everything(hop_delimiters=(DELIMITER,))):
        out = closing(model, inputs, [[1, 4], [3]], max_new_tokens=8, **{CACHE: cache})
        assert cache.hops.tolist() == [3, 2]
        cache.crop(-2)
        assert cache.hops.tolist() == [3, 2]
        cache.crop(-1)
        assert cache.hops.tolist() == [2, 2]
        cache.crop(-3)
        assert cache.hops.tolist() == [1, 1]
        step = {"input_ids": out.sequences[:, -7:-6]}
        assert step["input_ids"].tolist()[0] == [DELIMITER]
        forward(model, step, **{CACHE: cache}, use_cache=True)
    assert cache.hops.tolist() == [2, 1]
    cache.reset()
    assert cache.hops.tolist() == []


FAST_CASES = {
    ("llava", "stored", "drop"),
    ("qwen2_5_vl", "observed", "bypass"),
    ("gemma3", "observed", "drop"),
    ("chameleon", "stored", "bypass"),
}


def crossed():
    """Every model, score and mode of pruning; one case of each model is fast, the others slow."""
    for name, scores, pruned in itertools.product(TINY_MODELS, SCORES, ("bypass", "drop")):
        marks = () if (name, scores, pruned) in FAST_CASES else pytest.mark.slow
        yield pytest.param(name, scores, pruned, marks=marks, id=f"{name}-{scores}-{pruned}")


@pytest.mark.parametrize(("name", "scores", "pruned"), list(crossed()))
def test_rows_in_different_hops_do_not_see_each_other(name, scores, pruned):
    """Law 3 across hops: a row alone is the row in a ragged batch, tokens and kept positions.

    In float64: of two scores 1e-7 apart, other gemm kernels in float32 take the other token.
    """
    model = shared_model(name, dtype=torch.float64)
    rows = rows_of(model, (0, 1, 2))
    with dare(model, **{**BY_WORD, **SCORES[scores], "pruned": pruned}):
        together = collate(model, rows)
        batch = closing(model, together, STEPS)
        assert cache_of(batch).hops.tolist() == [3, 5, 3]
        width = together["input_ids"].shape[1]
        for row, one in enumerate(rows):
            inputs = collate(model, [one])
            alone = closing(model, inputs, [STEPS[row]])
            ours = new_tokens(together, batch)[row].tolist()
            assert ours == new_tokens(inputs, alone)[0].tolist(), f"row {row}"
            for left, right in zip(batch.logits, alone.logits, strict=True):
                assert_close(left[row], right[0], tolerance=FP32_TOLERANCE, what=f"row {row}")
            pads = width - inputs["input_ids"].shape[1]
            for left, right in zip(
                held(cache_of(batch), width + LONG - 1),
                held(cache_of(alone), width - pads + LONG - 1),
                strict=True,
            ):
                assert left[row, pads:].tolist() == right[0].tolist(), f"row {row}"


CAPPED = {
    "whole_text": {"text_retention": 1.0, "vision_retention": 0.5, "max_kv_tokens": 10},
    "whole_layers": {"schedule": ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.4, 1.0))},
    "drop": {"schedule": ((0.6, 1.0), (1.0, 0.9), (0.5, 1.0), (0.5, 0.7)), "pruned": "drop"},
    "shared_plans": {"schedule": "two_stage", "plan_every": 2, "text_retention": 1.0},
}
"""Layers that prune some rows of a batch and leave whole those that have no vision to lose."""


@pytest.mark.parametrize("fields", CAPPED)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_what_a_row_keeps_under_a_cap_is_its_own_affair(name, fields):
    """Law 3 with observed scores: a neighbour that a layer prunes gives a row no other history."""
    model = shared_model(name)
    rows = rows_of(model, (0, 1, 2, 0), text=(30, 12, 9, 14))
    config = {"scorer": "attention", "max_kv_tokens": 14, "hop_delimiters": (DELIMITER,)}
    config |= CAPPED[fields]
    steps = [*STEPS, [3, 8]]
    with dare(model, **config):
        together = collate(model, rows)
        batch, width = closing(model, together, steps), together["input_ids"].shape[1]
        for row, one in enumerate(rows):
            alone = closing(model, collate(model, [one]), [steps[row]])
            pads = width - len(one["ids"])
            ours = held(cache_of(batch), width + LONG - 1)
            theirs = held(cache_of(alone), width - pads + LONG - 1)
            for layer, (left, right) in enumerate(zip(ours, theirs, strict=True)):
                what = f"row {row}, layer {layer}"
                assert left[row, pads:].tolist() == right[0].tolist(), what


class EndRow(LogitsProcessor):
    """Makes one row end at a step."""

    def __init__(self, row, length, end):
        self.row, self.length, self.end = row, length, end

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.end] = -torch.inf
        if input_ids.shape[1] >= self.length:
            scores[self.row] = -torch.inf
            scores[self.row, self.end] = 0
        return scores


@pytest.mark.parametrize("scores", SCORES)
def test_a_row_that_finished_early_leaves_the_others_alone(scores):
    model, end = shared_model("qwen2_5_vl"), 90
    inputs = inputs_of(model, (0, 1, 2))
    span = inputs["input_ids"].shape[1]
    with dare(model, **{**BY_WORD, **SCORES[scores]}):
        whole = closing(model, inputs, STEPS, suppress_tokens=[3, 4, 5, 6, end])
        processor = EndRow(1, span + 4, end)
        ended = generate(
            model,
            inputs,
            max_new_tokens=LONG,
            eos_token_id=end,
            logits_processor=[CloseAt(span, STEPS), processor],
        )
        report = last_report(model)
    assert new_tokens(inputs, ended)[1, 4:].unique().tolist() == [0, end]
    for row in (0, 2):
        assert ended.sequences[row].tolist() == whole.sequences[row].tolist()
    assert cache_of(ended).hops.tolist() == [3, 1, 3]
    ours, theirs = (cache_of(run).kept_lengths()[:, [0, 2]] for run in (ended, whole))
    assert ours.tolist() == theirs.tolist()
    assert report.kv_bytes == report.kv_bytes_predicted


MODES = {
    "beam": {"num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
}
FAST_MODES = {
    ("llava", "beam", "observed"),
    ("qwen2_5_vl", "sample", "stored"),
    ("gemma3", "beam_sample", "observed"),
    ("chameleon", "sequences", "stored"),
}


@pytest.mark.parametrize(
    ("name", "mode", "scores"),
    [
        pytest.param(*case, marks=() if case in FAST_MODES else pytest.mark.slow)
        for case in itertools.product(TINY_MODELS, MODES, SCORES)
    ],
)
def test_modes_of_generate_run_with_hops(name, mode, scores):
    """Natural delimiters: every third word closes a hop, so that beams part in different hops."""
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    fields = {**PRUNED, **SCORES[scores], "hop_delimiters": tuple(range(10, 100, 3))}
    with dare(model, **fields):
        runs = [generate(model, inputs, max_new_tokens=14, seed=3, **MODES[mode]) for _ in "ab"]
        report, cache = last_report(model), cache_of(runs[1])
    assert_same_run(runs[0], runs[1], tolerance=0.0, what="the same seed")
    assert int(cache.hops.max()) >= 3
    assert len(cache.hops) == 3 * MODES[mode].get("num_beams", 1) * (
        2 if mode == "sequences" else 1
    )
    assert report.kv_bytes == report.kv_bytes_predicted == cache.kv_bytes()


class Follow(LogitsProcessor):
    """Makes generate write given sequences."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        pytest.param(name, scores, marks=() if scores == "observed" else pytest.mark.slow)
        for name, scores in itertools.product(TINY_MODELS, SCORES)
    ],
)
def test_a_beam_carries_its_own_hops(name, scores):
    """A beam's score is what its tokens score when each sequence is written without beams."""
    model = shared_model(name)
    inputs = inputs_of(model, (1, 0))
    fields = {**PRUNED, **SCORES[scores], "hop_delimiters": tuple(range(10, 100, 3))}
    three = {"num_return_sequences": 3, "output_scores": True, "max_new_tokens": 12}
    with dare(model, **fields):
        beams = generate(model, inputs, num_beams=3, **three)
        follow = [Follow(beams.sequences)]
        alone = generate(model, inputs, do_sample=True, logits_processor=follow, **three)
    assert len(set(cache_of(alone).hops.tolist())) > 1, "all beams are in one hop"
    steps = torch.stack(alone.logits, dim=1).log_softmax(-1)
    written = alone.sequences[:, -steps.shape[1] :, None]
    assert alone.sequences.tolist() == beams.sequences.tolist()
    mean = steps.gather(-1, written).mean(dim=1).flatten()
    assert_close(mean, beams.sequences_scores, tolerance=FP32_TOLERANCE, what="beam scores")


@pytest.mark.parametrize(("name", "scores", "pruned"), list(crossed()))
def test_one_hop_without_delimiters_is_layer_only_routing(name, scores, pruned):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    fields = {**SCORES[scores], "vision_retention": 0.5, "pruned": pruned}
    runs = []
    for hops in ({}, {"hop_delimiters": (DELIMITER,), "hop_decay": 0.3}, {"decode_window": 99}):
        with dare(model, **fields, **hops):
            runs.append(closing(model, inputs, [[], [], []], max_new_tokens=8))
    for run in runs[1:]:
        assert_same_run(run, runs[0], tolerance=0.0, what="hops that never close")
        assert cache_of(run).hops.tolist() == [1, 1, 1]
        kept = [cache_of(r).kept_lengths().tolist() for r in (run, runs[0])]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_sampled_tokens_given_as_embeddings_are_counted_or_refused(name):
    """A window needs no ids; a delimiter does."""
    model, cache = shared_model(name), DareCache()
    inputs, embed = inputs_of(model), model.get_input_embeddings()
    step = {
        "inputs_embeds": embed(torch.tensor([[21]])).detach(),
        "modality_mask": torch.zeros(1, 1),
    }
    with dare(model, **PRUNED, decode_window=2):
        forward(model, inputs, **{CACHE: cache}, use_cache=True)
        for _ in range(4):
            forward(model, step, **{CACHE: cache}, use_cache=True)
    assert cache.hops.tolist() == [3]
    with dare(model, **BY_WORD):
        with pytest.raises(DareInputError, match="input_ids of sampled tokens"):
            forward(model, step, **{CACHE: cache}, use_cache=True)
        forward(model, {"input_ids": torch.tensor([[DELIMITER]])}, **{CACHE: cache}, use_cache=True)
    assert cache.hops.tolist() == [4]
