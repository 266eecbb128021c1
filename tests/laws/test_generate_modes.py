"""Every way generate can run: identical at retention 1.0, consistent with itself when pruned."""

import functools

import pytest
import torch
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    TINY_MODELS,
    assert_close,
    assert_same_run,
    dare,
    everything,
    generate,
    inputs_of,
    prefills_in_chunks,
    shared_model,
)
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dare_hf import DareCache, DareConfig, apply_dare, remove_dare
from dare_hf.compat import cache_of
from dare_hf.testing import tiny_model

LONGER = 14
EOS_IDS = list(range(10, 60))
PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}


@functools.cache
def draft_of(name: str):
    """Return a model that guesses some tokens of the shared one right and some wrong."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.02 * noise)
    return model


def draft_options(name: str) -> dict:
    return {"assistant_model": draft_of(name)}


def lookup_options(name: str) -> dict:
    return {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}


SPECULATIVE = {"lookup": lookup_options, "assistant": draft_options}
MODES = {
    "sample": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "eos": {"eos_token_id": EOS_IDS},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_mode_is_token_identical_at_retention_one(name, mode, rows):
    model = shared_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    plain = generate(model, inputs, **MODES[mode])
    with dare(model, **everything()):
        routed = generate(model, inputs, **MODES[mode])
    assert_same_run(routed, plain, what=f"{name}, {mode}")
    if mode != "no_cache":
        assert isinstance(cache_of(routed), DareCache)


@pytest.mark.parametrize("fields", [everything(), PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("mode", SPECULATIVE)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_speculation_is_token_identical_to_greedy(name, mode, fields):
    model = shared_model(name)
    inputs = inputs_of(model)
    options = SPECULATIVE[mode](name)
    plain = generate(model, inputs, max_new_tokens=LONGER)
    with dare(model, **fields):
        greedy = generate(model, inputs, max_new_tokens=LONGER)
        fast = generate(model, inputs, max_new_tokens=LONGER, **options)
    assert fast.sequences.tolist() == greedy.sequences.tolist()
    if fields == PRUNED:
        assert greedy.sequences.tolist() != plain.sequences.tolist(), "the pruning pruned nothing"
    else:
        assert greedy.sequences.tolist() == plain.sequences.tolist()
    assert cache_of(fast).get_seq_length() < fast.sequences.shape[1]


@pytest.mark.parametrize("scorer", ["attention", "random", "position", "key_norm"])
@pytest.mark.parametrize("mode", SPECULATIVE)
def test_speculation_is_token_identical_to_greedy_with_each_scorer(mode, scorer):
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model, scorer=scorer, **PRUNED):
        greedy = generate(model, inputs, max_new_tokens=LONGER)
        fast = generate(model, inputs, max_new_tokens=LONGER, **SPECULATIVE[mode]("llava"))
    assert fast.sequences.tolist() == greedy.sequences.tolist()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_assistant_may_be_patched_too(name):
    model, draft = shared_model(name), tiny_model(name, layers=2)
    inputs = inputs_of(model)
    with dare(model, **PRUNED), dare(draft, vision_retention=0.5):
        greedy = generate(model, inputs, max_new_tokens=LONGER)
        fast = generate(model, inputs, max_new_tokens=LONGER, assistant_model=draft)
    assert fast.sequences.tolist() == greedy.sequences.tolist()


class Heard(BaseStreamer):
    """Remembers what generate streams."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class StopAfter(StoppingCriteria):
    """Stops each row after so many tokens in all."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("fields", [everything(), PRUNED], ids=["full", "pruned"])
def test_a_streamer_hears_the_prompt_and_every_token(fields):
    model = shared_model("llava")
    inputs, heard = inputs_of(model), Heard()
    with dare(model, **fields):
        out = generate(model, inputs, streamer=heard)
    assert heard.tokens == out.sequences[0].tolist()
    assert heard.ended


@pytest.mark.parametrize("fields", [everything(), PRUNED], ids=["full", "pruned"])
def test_a_stopping_criterion_stops(fields):
    model = shared_model("qwen2_5_vl")
    inputs = inputs_of(model, (0, 1, 2))
    stop = StoppingCriteriaList([StopAfter(inputs["input_ids"].shape[1] + 3)])
    with dare(model, **fields):
        whole = generate(model, inputs)
        out = generate(model, inputs, stopping_criteria=stop)
    assert out.sequences.tolist() == whole.sequences[:, :-5].tolist()


@prefills_in_chunks
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_chunked_prefill_is_token_identical_at_retention_one(name, rows):
    model = shared_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    plain = generate(model, inputs, prefill_chunk_size=7)
    with dare(model, **everything()):
        assert_same_run(generate(model, inputs, prefill_chunk_size=7), plain, what=name)


@prefills_in_chunks
@pytest.mark.parametrize("name", TINY_MODELS)
def test_each_chunk_of_a_prefill_is_a_span_of_its_own(name):
    model = shared_model(name)
    inputs = inputs_of(model)
    length, chunk = inputs["input_ids"].shape[1], 7
    with dare(model, vision_retention=0.5, text_retention=0.5, prefix_tokens=0):
        out = generate(model, inputs, prefill_chunk_size=chunk, max_new_tokens=1)
    kept = cache_of(out).kept_lengths()
    chunks = -(-length // chunk)
    # k rounds up for each modality of each chunk, and a chunk's last token may exceed it.
    assert (kept >= length // 2).all()
    assert (kept <= length // 2 + 2 * chunks).all()


@pytest.mark.parametrize("fields", [everything(), PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_rows_that_ended_do_not_disturb_the_others(name, fields):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, **fields):
        whole = generate(model, inputs)
        ended = generate(model, inputs, eos_token_id=EOS_IDS)
    width = ended.sequences.shape[1]
    for row in range(3):
        new = whole.sequences[row, inputs["input_ids"].shape[1] : width].tolist()
        stop = next((i for i, token in enumerate(new) if token in EOS_IDS), len(new)) + 1
        ours = ended.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        assert ours[:stop] == new[:stop]


class Forced(LogitsProcessor):
    """Makes generate write given sequences."""

    def __init__(self, sequences: torch.Tensor):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_beams_carry_their_own_cache_rows(name, rows):
    """A beam's score is what its tokens score when each sequence is written without beams."""
    model = shared_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    three = {"num_return_sequences": 3, "output_scores": True}
    with dare(model, **PRUNED):
        beams = generate(model, inputs, num_beams=3, **three)
        forced = Forced(beams.sequences)
        alone = generate(model, inputs, do_sample=True, logits_processor=[forced], **three)
    assert alone.sequences.tolist() == beams.sequences.tolist()
    steps = torch.stack(alone.logits, dim=1).log_softmax(-1)
    new = alone.sequences[:, -steps.shape[1] :, None]
    scores = steps.gather(-1, new).mean(dim=1).flatten()
    assert_close(scores, beams.sequences_scores, tolerance=FP32_TOLERANCE, what="beam scores")


def test_the_preset_and_no_config_are_the_same():
    model = shared_model("llava")
    inputs = inputs_of(model, text=30)
    with dare(model, DareConfig.preset("safe")):
        preset = generate(model, inputs)
    apply_dare(model)
    try:
        bare = generate(model, inputs)
    finally:
        remove_dare(model)
    assert_same_run(bare, preset, tolerance=0.0, what="apply_dare(model)")
