"""HopLoop: the run without it, plus what the callback injects, at the right place and positions."""

import pytest
import torch
from hop_runs import injected_columns
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
    rows_of,
    shared_model,
)
from loop_runs import DELIMITERS, NEW, Featured, assert_steps_are, looped, real_columns, recomputed
from transformers.generation.streamers import BaseStreamer

from dare_hf import DareCache, DareConfig, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.generation import HopInput
from dare_hf.testing import collate, tiny_model

"""Many, so that the random models close several hops in a short run."""

PRUNED = {"vision_retention": 0.5, "text_retention": 0.7, "hop_delimiters": DELIMITERS}
SCORED = {"default": {"config": DareConfig(**PRUNED)}, "stored": PRUNED}
FULL = everything(hop_delimiters=DELIMITERS)


def some_words(hop):
    """Answer by the content of the hop alone: nothing, or one to three words."""
    key = sum(hop.ids.tolist())
    words = [50 + (key + i) % 40 for i in range(key % 4)]
    return HopInput(input_ids=words) if words else None


def assert_same_state(ours: DareCache, theirs: DareCache) -> None:
    assert ours.kept_lengths().tolist() == theirs.kept_lengths().tolist()
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert ours.hops.tolist() == theirs.hops.tolist()
    assert torch.equal(ours.log.modality, theirs.log.modality)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.positions(), other.positions())


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "top_k": 20}, {"eos_token_id": [60, 61]}])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_loop_that_injects_nothing_is_the_run_without_it(name, rows, mode):
    model = shared_model(name)
    inputs, asked = inputs_of(model, BATCHES[rows]), []
    with dare(model, DareConfig(**PRUNED)):
        options = {"max_new_tokens": NEW, "output_scores": True, **mode}
        plain = generate(model, inputs, **options)
        ours = looped(model, inputs, asked.append, output_scores=True, **mode)
    assert asked, "no hop closed"
    assert_same_run(ours, plain, tolerance=0, what=name)
    for left, right in zip(ours.scores, plain.scores, strict=True):
        assert torch.equal(left, right)
    assert_same_state(cache_of(ours), cache_of(plain))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_callback_sees_each_hop_of_each_row(name):
    model = shared_model(name)
    inputs, seen = inputs_of(model, BATCHES["padded"]), []
    with dare(model, **PRUNED):
        out = looped(model, inputs, seen.append)
    prompt = inputs["input_ids"].shape[1]
    for row in range(3):
        hops = [hop for hop in seen if hop.row == row]
        assert [hop.index for hop in hops] == list(range(1, len(hops) + 1))
        joined = [token for hop in hops for token in hop.ids.tolist()]
        written = out.sequences[row, prompt:].tolist()
        assert joined == written[: len(joined)]
        assert all(hop.ids[-1] in DELIMITERS for hop in hops)
        # the last token was sampled but not processed: it can close nothing
        assert not set(written[len(joined) : -1]) & set(DELIMITERS)
    assert all(hop.text is None and hop.images == [] for hop in seen)
    assert [hop.report.hops for hop in seen] == sorted(hop.report.hops for hop in seen)


@torch.no_grad()
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_injected_tokens_stand_where_one_long_prompt_would_have_them(name, rows):
    model = shared_model(name)
    parts = rows_of(model, BATCHES[rows], text=[9, 14, 7][: len(BATCHES[rows])])
    inputs, featured = collate(model, parts), Featured(model)
    with dare(model, **FULL):
        out = looped(model, inputs, featured, max_new_tokens=20)
        assert last_report(model).kv_bytes == last_report(model).kv_bytes_predicted
    assert featured.rows
    full = recomputed(model, parts, inputs, out, featured)
    assert_steps_are(full, out, inputs["input_ids"].shape[1], name)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, pytest.param(11, marks=prefills_in_chunks)])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_loop_serves_a_later_turn(name, chunk):
    if name == "gemma3" and chunk is not None:
        pytest.skip("a chunk that ends inside an image cuts its two-way attention, in HF as well")
    model = shared_model(name)
    parts = rows_of(model, BATCHES["padded"])
    inputs, featured = collate(model, parts), Featured(model)
    with dare(model, **FULL):
        first = generate(model, inputs, prefill_chunk_size=chunk)
        told = torch.full((3, 2), 90)
        ids = torch.cat([first.sequences, told], dim=1)
        grown = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        if name == "gemma3":
            turn["token_type_ids"] = (ids == featured.token).long()
        out = looped(model, turn, featured, **{CACHE: cache_of(first)})
    assert featured.rows
    full = recomputed(model, parts, inputs, out, featured)
    assert_steps_are(full, out, ids.shape[1], name)


@pytest.mark.parametrize("fields", SCORED)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_row_does_not_depend_on_what_others_get(name, fields):
    # A sliding window counts columns, pads between tokens included: here nothing reaches its end.
    model = tiny_model(name, sliding_window=512) if name == "gemma3" else shared_model(name)
    parts = rows_of(model, BATCHES["padded"])
    with dare(model, **SCORED[fields]):
        together = looped(model, collate(model, parts), some_words)
        real = real_columns(together)
        width = collate(model, parts)["input_ids"].shape[1]
        for row, part in enumerate(parts):
            inputs = collate(model, [part])
            alone = looped(model, inputs, some_words)
            written = together.sequences[row, width:][real[row, width:]].tolist()
            assert written == alone.sequences[0, inputs["input_ids"].shape[1] :].tolist(), row
            for step, logits in enumerate(alone.logits):
                what = f"{name}, row {row}, step {step}"
                pair = logits[0], together.logits[step][row]
                assert_close(*pair, tolerance=10 * FP32_TOLERANCE, what=what)
    assert not real[:, width:].all(), "nothing was padded"
    pads = together.sequences[:, width:][~real[:, width:]]
    assert set(pads.tolist()) == {model.config.get_text_config().pad_token_id}


@torch.no_grad()
@pytest.mark.parametrize("fields", SCORED)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_injection_is_the_span_that_a_loop_of_ones_own_would_run(name, fields):
    model, injected = shared_model(name), []

    def note(hop):
        answer = some_words(hop)
        injected.append(answer and list(answer.input_ids))
        return answer

    inputs = inputs_of(model)
    with dare(model, **SCORED[fields]):
        out = looped(model, inputs, note)
        cache, step = DareCache(), 0
        # A prompt of one sampled token: generate prepares the inputs, bare forwards follow.
        generate(model, inputs, max_new_tokens=1, **{CACHE: cache})
        queue = [ids for ids in injected if ids]
        at = inputs["input_ids"].shape[1]
        spans = dict(injected_columns(cache_of(out)))
        assert [b - a for a, b in spans.items()] == [len(ids) for ids in queue]
        while at < out.sequences.shape[1] - 1:
            end = spans.get(at, at + 1)
            logits = model(input_ids=out.sequences[:, at:end], **{CACHE: cache}).logits
            at = end
            if at not in spans:
                step += 1
                what = f"{name}, step {step}"
                assert_close(logits[:, -1], out.logits[step], tolerance=FP32_TOLERANCE, what=what)
    assert spans
    assert_same_state(cache_of(out), cache)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_chat_turn_goes_on_after_a_loop(name):
    model = shared_model(name)
    inputs, featured = inputs_of(model, BATCHES["padded"]), Featured(model)
    parts = rows_of(model, BATCHES["padded"])
    with dare(model, **FULL):
        first = looped(model, inputs, featured)
        told = torch.full((3, 2), 90)
        ids = torch.cat([first.sequences, told], dim=1)
        mask = torch.nn.functional.pad(real_columns(first), (0, 2), value=True).long()
        turn = {"input_ids": ids, "attention_mask": mask}
        second = generate(model, turn, **{CACHE: cache_of(first)}, max_new_tokens=2)
    with torch.no_grad():
        full = recomputed(model, parts, inputs, second, featured)
    assert_close(second.logits[0], full[:, -2].float(), tolerance=FP32_TOLERANCE, what=name)


def test_the_limits_count_sampled_tokens_only():
    model = shared_model("llava")
    inputs = inputs_of(model, BATCHES["padded"])
    with dare(model, **PRUNED):
        out = looped(model, inputs, lambda hop: HopInput(input_ids=[50] * 9))
        assert len(out.logits) == NEW
        early = list(range(10, 120))
        held = looped(model, inputs, some_words, eos_token_id=early, min_new_tokens=11)
        assert len(held.logits) in (11, 12)
        absolute = looped(model, inputs, some_words, max_new_tokens=None, max_length=40)
        assert len(absolute.logits) == 40 - inputs["input_ids"].shape[1]


def test_max_hops_ends_injection_not_generation():
    model, seen = shared_model("qwen2_5_vl"), []
    inputs = inputs_of(model)

    def inject(hop):
        seen.append(hop.index)
        return HopInput(input_ids=[50])

    with dare(model, **PRUNED):
        out = looped(model, inputs, inject, max_hops=2)
        assert seen == [1, 2]
        assert len(out.logits) == NEW
        assert cache_of(out).hops.tolist()[0] > 3
        assert looped(model, inputs, inject, max_hops=0).sequences.tolist()
    assert seen == [1, 2]


def test_finished_rows_stay_finished():
    model = shared_model("chameleon")
    inputs, asked = inputs_of(model, BATCHES["padded"]), []
    with dare(model, **PRUNED):
        free = looped(model, inputs)
        end = int(free.sequences[0, inputs["input_ids"].shape[1]])

        def inject(hop):
            asked.append(hop.row)
            return HopInput(input_ids=[50, 51])

        out = looped(model, inputs, inject, eos_token_id=end)
    written = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert written[0] == end
    assert set(written[1:]) == {model.config.pad_token_id}
    assert 0 not in asked


def test_sampling_with_a_seed_repeats():
    model = shared_model("gemma3")
    inputs = inputs_of(model, BATCHES["padded"])
    options = {"do_sample": True, "num_return_sequences": 2}
    with dare(model, **PRUNED):
        runs = [looped(model, inputs, some_words, seed=3, **options) for _ in range(2)]
    assert runs[0].sequences.shape[0] == 6
    assert_same_run(*runs, tolerance=0, what="two runs")


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_hears_what_is_returned():
    model, heard = shared_model("llava"), Heard()
    with dare(model, **PRUNED):
        out = looped(model, inputs_of(model), some_words, streamer=heard)
    assert heard.tokens == out.sequences[0].tolist()
    assert heard.ended == 1


def test_a_window_does_not_count_injected_tokens():
    model, seen = shared_model("llava"), []

    def inject(hop):
        seen.append((hop.row, hop.index, len(hop.ids)))
        return HopInput(input_ids=[50] * 7) if hop.row == 1 else None

    with dare(model, vision_retention=0.5, text_retention=0.7, decode_window=4):
        looped(model, inputs_of(model, BATCHES["padded"]), inject)
    for row, later in ((0, 4), (1, 11), (2, 4)):
        assert [(i, n) for r, i, n in seen if r == row] == [(1, 4), (2, later), (3, later)]


def test_hidden_states_come_once_a_sampled_step():
    model = shared_model("llava")
    with dare(model, **PRUNED):
        out = looped(model, inputs_of(model), some_words, output_hidden_states=True)
    assert len(out.hidden_states) == len(out.logits) == NEW
    columns = sum(step[-1].shape[1] for step in out.hidden_states)
    assert columns == out.sequences.shape[1] - 1
