"""Crops of a cache with hops: exact, or refused."""

import pytest
import torch
from hop_runs import DELIMITER, held
from laws import FP32_TOLERANCE, assert_close, dare, everything, forward, inputs_of, shared_model

from dare_hf import DareCache
from dare_hf.compat import CACHE
from dare_hf.errors import DareStateError

FREE = {"text_retention": 0.6, "vision_retention": 0.5, "prefix_tokens": 0}
SENTENCE = ((13, 12),)


def run_words(model, inputs, cache, words):
    """Bare forwards: the prompt, then each word, or block of words, by itself."""
    logits = []
    if not cache.get_seq_length():
        forward(model, inputs, **{CACHE: cache}, use_cache=True)
    for word in words:
        block = word if isinstance(word, list) else [word]
        step = {"input_ids": torch.tensor([block] * len(inputs["input_ids"]))}
        logits.append(forward(model, step, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def state_of(cache):
    kept = [mask.tolist() for mask in held(cache, cache.get_seq_length())]
    return cache.hops.tolist(), cache.hop_counters.ends, kept


@pytest.mark.parametrize("fields", [everything(), FREE], ids=["full", "pruned"])
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_crop_leaves_no_part_of_an_input_that_was_pruned(name, fields):
    """What a layer kept was chosen with what goes; where nothing was pruned, a crop is exact."""
    model, cache = shared_model(name), DareCache()
    inputs, block, said = inputs_of(model), list(range(30, 40)), [20, 21] * 4
    with dare(model, **{**fields, "hop_delimiters": (DELIMITER,)}):
        run_words(model, inputs, cache, [*said, block, 22])
        before = state_of(cache)
        if fields is FREE:
            for back in (5, 19 + 3):
                with pytest.raises(DareStateError, match=r"DareCache\.crop.*as a whole"):
                    cache.crop(-back)
                assert state_of(cache) == before
            with pytest.raises(DareStateError, match=r"DareCache\.crop.*hop 2 began"):
                cache.crop(-11)
            assert state_of(cache) == before
        cache.crop(-1 if fields is FREE else -5)
        twin = DareCache()
        run_words(model, inputs, twin, [*said, block if fields is FREE else block[:6]])
        assert cache.get_seq_length() == twin.get_seq_length()
        assert state_of(cache) == state_of(twin)
        rest = [23, DELIMITER, 24, block[:3], 25]
        pair = [run_words(model, inputs, one, rest) for one in (cache, twin)]
    assert_close(*pair, tolerance=FP32_TOLERANCE, what=name)
    assert state_of(cache) == state_of(twin)


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_delimiter_is_found_across_a_crop_of_any_length(name):
    model = shared_model(name)
    inputs, caches = inputs_of(model), (DareCache(), DareCache())
    with dare(model, **FREE, hop_delimiters=SENTENCE):
        for cache, more in zip(caches, (100, 0), strict=True):
            run_words(model, inputs, cache, [20, 13] + [21 + i % 9 for i in range(more)])
            cache.crop(-more)
        pair = [run_words(model, inputs, cache, [12, 13, 12, 25]) for cache in caches]
    assert caches[0].hops.tolist() == [3]
    assert state_of(caches[0]) == state_of(caches[1])
    assert_close(*pair, tolerance=FP32_TOLERANCE, what=name)


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_queries_that_a_crop_took_are_missed_or_not_needed(name):
    """Observed scores read the last 32 queries of a hop: more are there, or none are made up."""
    model = shared_model(name)
    inputs, begun = inputs_of(model), [20 + i % 9 for i in range(60)]
    fields = {**FREE, "scorer": "attention", "hop_delimiters": (DELIMITER,)}
    with dare(model, **fields):
        caches = [DareCache() for _ in range(4)]
        for cache, more in zip(caches, (0, 32, 150, 150), strict=True):
            run_words(model, inputs, cache, (begun * 4)[: 60 + more])
            cache.crop(-more)
        pair = [run_words(model, inputs, cache, [DELIMITER, 25]) for cache in caches[:2]]
        assert_close(*pair, tolerance=FP32_TOLERANCE, what=name)
        assert state_of(caches[0]) == state_of(caches[1])
        run_words(model, inputs, caches[2], [DELIMITER])
        before = state_of(caches[2])
        with pytest.raises(DareStateError, match=r"hop_score='observed'.*has taken some"):
            run_words(model, inputs, caches[2], [25])
        assert state_of(caches[2]) == before
        # as many new tokens as a window: nothing that went is missed
        again = [*begun[:32], DELIMITER, 25]
        run_words(model, inputs, caches[3], again)
        twin = DareCache()
        run_words(model, inputs, twin, begun + again)
        assert state_of(caches[3]) == state_of(twin)
