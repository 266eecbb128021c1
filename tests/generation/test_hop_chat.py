"""Chat turns: one cache over turns that bring images; positions, hops and what is kept."""

import copy

import pytest
import torch
from hop_runs import DELIMITER, closing
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
    needs_later_images,
    prefills_in_chunks,
    shared_model,
)
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf import DareCache, last_report
from dare_hf.compat import CACHE
from dare_hf.routing.reference import budget
from dare_hf.testing import collate, modality_of, tiny_rows, written_inputs

PRUNED = {"vision_retention": 0.5, "text_retention": 0.6}


def next_turn(model, inputs, sequences, more):
    """Return a turn's inputs: all ids so far and the new message, but only the new image.

    The image of an earlier turn is in the cache; its features are not sent again. Grids are, since
    qwen2_5_vl counts the positions of the whole conversation.
    """
    turn = written_inputs(model, inputs, sequences)
    del turn["position_ids"]
    turn["input_ids"] = torch.cat([sequences, more["input_ids"]], dim=1)
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            turn[name] = torch.cat([turn[name], more[name]], dim=1)
    if "mm_encoder_outputs" in more:
        turn["mm_encoder_outputs"] = more["mm_encoder_outputs"]
    if "image_grid_thw" in more:
        # Row by row: one image of each turn.
        grids = [inputs["image_grid_thw"], more["image_grid_thw"]]
        turn["image_grid_thw"] = torch.stack(grids, dim=1).flatten(0, 1)
    return turn


def all_at_once(turn, inputs, more):
    """The same conversation as one prompt: the features of both turns."""
    whole = copy.copy(turn)
    if "mm_encoder_outputs" in turn:
        parts = [part["mm_encoder_outputs"]["image"].pooler_output for part in (inputs, more)]
        tensors = all(isinstance(part, torch.Tensor) for part in parts)
        joined = torch.cat(parts) if tensors else [*parts[0], *parts[1]]
        whole["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=joined)}
    return whole


def two_turns(model, cache, *, rows=1, run=generate):
    """Run two turns over one cache; each row brings an image in both."""
    needs_later_images(model)
    inputs = inputs_of(model, (1,) * rows)
    first = run(model, inputs, **{CACHE: cache})
    more = inputs_of(model, (1,) * rows, seed=5, text=9)
    turn = next_turn(model, inputs, first.sequences, more)
    second = run(model, turn, **{CACHE: cache})
    return inputs, first, more, turn, second


@pytest.mark.parametrize(("rows", "scorer"), [(1, SCORER), (2, "attention")])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_two_turns_with_images_are_the_models_own_at_retention_one(name, rows, scorer):
    """Token for token what the unpatched model says over the same turns with its own cache."""
    model = shared_model(name)
    plain = DynamicCache(config=model.config.get_text_config())
    _, first, _, turn, second = two_turns(model, plain, rows=rows)
    cache = DareCache()
    with dare(model, **everything(scorer=scorer, hop_delimiters=(DELIMITER,))):
        _, ours, _, our_turn, our_second = two_turns(model, cache, rows=rows)
    assert_same_run(ours, first, what=f"{name}, first turn")
    assert our_turn["input_ids"].tolist() == turn["input_ids"].tolist()
    assert_same_run(our_second, second, what=f"{name}, second turn")
    assert cache.get_seq_length() == our_second.sequences.shape[1] - 1


@pytest.mark.parametrize("name", TINY_MODELS)
def test_two_turns_are_one_conversation(name):
    """The positions of a later turn's image are those of one prompt that holds both turns."""
    model = shared_model(name)
    with dare(model, **everything()):
        inputs, _, more, turn, second = two_turns(model, DareCache())
    whole = all_at_once(turn, inputs, more)
    logits = generate(model, whole).logits
    for step, (ours, theirs) in enumerate(zip(second.logits, logits, strict=True)):
        assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what=f"{name}, step {step}")


STEPS = [[2, 5]]


def said(model, inputs, **kwargs):
    return closing(model, inputs, STEPS, max_new_tokens=8, **kwargs)


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_turn_opens_a_hop_of_its_own(name, pruned):
    """Hop 0 is the first prompt; the message of a later turn is a span injected into a new hop."""
    model, cache = shared_model(name), DareCache()
    fields = {**PRUNED, "hop_decay": 0.8, "pruned": pruned, "hop_delimiters": (DELIMITER,)}
    with dare(model, **fields):
        inputs, first, more, turn, _ = two_turns(model, cache, run=said)
        report = last_report(model)
    span, end = inputs["input_ids"].shape[1], first.sequences.shape[1]
    hops = cache.log.hop[0].tolist()
    assert hops[:span] == [0] * span
    assert hops[span : end - 1] == [1, 1, 1, 2, 2, 2, 3]
    # The turn's last sampled token was not processed yet: it comes with the new message.
    message = turn["input_ids"].shape[1] - (end - 1)
    assert hops[end - 1 :] == [4] * (message + 3) + [5, 5, 5, 6]
    assert cache.hops.tolist() == [6]
    assert report.kv_bytes == report.kv_bytes_predicted == cache.kv_bytes()
    vision = int((modality_of(model, more) == 1).sum())
    assert report.tokens["vision"][4] == vision


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_a_turn_keeps_is_what_the_rates_say(name):
    """The old hops are compacted to the new hop's rates, then the message is routed by itself."""
    model, cache, counts = shared_model(name), DareCache(), {}
    fields = {**PRUNED, "hop_decay": 0.8, "hop_delimiters": (DELIMITER,), "prefix_tokens": 0}
    with dare(model, **fields):

        def look(ids):
            length = cache.get_seq_length()
            layers = [cache.log.lookup(layer.positions()) for layer in cache.layers]
            counts.setdefault(
                length,
                [
                    [
                        [int(((kinds == m) & part(hop)).sum()) for m in (0, 1)]
                        for part in (lambda h: (h < 4) & (h >= 0), lambda h: h == 4)
                    ]
                    for kinds, hop in layers
                ],
            )

        def run(model, inputs, **kwargs):
            return said(model, inputs, watch=look, **kwargs)

        _, first, _, turn, _ = two_turns(model, cache, run=run)
    columns = turn["input_ids"].shape[1]
    kinds = cache.log.modality[0, :columns]
    before = first.sequences.shape[1] - 1
    for layer in counts[columns]:
        old = [int((kinds[:before] == m).sum()) for m in (0, 1)]
        new = [int((kinds[before:] == m).sum()) for m in (0, 1)]
        rates = (0.6, 0.5 * 0.8**3)
        assert layer[0] == [budget(rate, n) for rate, n in zip(rates, old, strict=True)]
        assert layer[1] == [budget(rate, n) for rate, n in zip(rates, new, strict=True)]


@pytest.mark.parametrize("scorer", ["attention", SCORER])
def test_a_turn_by_hand_is_a_turn_of_generate(scorer):
    """A bare forward of the message on the carried cache routes it as generate does."""
    model, caches = shared_model("llava"), (DareCache(), DareCache())
    inputs = inputs_of(model)
    fields = {"scorer": scorer, **PRUNED, "hop_delimiters": (DELIMITER,)}
    with dare(model, **fields):
        runs = [said(model, inputs, **{CACHE: cache}) for cache in caches]
        more = inputs_of(model, (1,), seed=5, text=9)
        turn = next_turn(model, inputs, runs[0].sequences, more)
        out = generate(model, turn, **{CACHE: caches[0]}, max_new_tokens=1)
        message = {**turn, "input_ids": turn["input_ids"][:, caches[1].get_seq_length() :]}
        logits = forward(model, message, **{CACHE: caches[1]}, use_cache=True).logits
    assert_close(logits[:, -1], out.logits[0], tolerance=FP32_TOLERANCE, what="first step")
    assert caches[0].kept_lengths().tolist() == caches[1].kept_lengths().tolist()
    assert caches[0].hops.tolist() == caches[1].hops.tolist() == [4]


def token_rows(rows, pad):
    """Ids and mask of rows of real ids and None, which is a pad."""
    ids = torch.tensor([[pad if token is None else token for token in row] for row in rows])
    mask = torch.tensor([[int(token is not None) for token in row] for row in rows])
    return ids, mask


def kept_tokens(cache, row: int) -> list[list[int]]:
    """Per layer the row's real tokens that are stored, by their number among the real ones."""
    number = (cache.log.modality[row] >= 0).long().cumsum(0) - 1
    stored = [layer.positions()[row] for layer in cache.layers]
    return [number[where[where >= 0]].tolist() for where in stored]


CHUNK = 4
LATER = {
    "observed": {"scorer": "attention"},
    "stored": {"scorer": SCORER, "pruned": "drop"},
    "window": {"scorer": SCORER, "decode_window": 3},
    "cap": {"scorer": "key_norm", "max_kv_tokens": 14},
}


@prefills_in_chunks
@pytest.mark.parametrize("fields", LATER)
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_message_that_begins_after_the_first_chunk_is_the_rows_own(name, fields):
    """Its hop closes, and its prefix is forced, in the chunk that brings its first token."""
    model = shared_model(name)
    text = [14, 11]
    messages = [list(range(30, 30 + 3 * CHUNK)), list(range(60, 60 + CHUNK))]
    options = {"text_retention": 0.4, "hop_decay": 0.7, "hop_delimiters": ((13, 12),)}

    def run(rows):
        """Two turns; where both rows run, the second waits in two chunks of the later one."""
        cache = DareCache()
        parts = tiny_rows(model, images=(0, 0), text=text)
        inputs = collate(model, [parts[row] for row in rows])
        first = closing(model, inputs, STEPS, token=(13, 12), max_new_tokens=7, **{CACHE: cache})
        seen, new = first.sequences[:, :-1], []
        for row in rows:
            late = [None] * (3 * CHUNK - len(messages[row])) if len(rows) > 1 else []
            new.append(late + messages[row])
        ids, mask = token_rows(new, 0)
        turn = {
            "input_ids": torch.cat([seen, ids], dim=1),
            "attention_mask": torch.cat(
                [inputs["attention_mask"], mask.new_ones(len(rows), 6), mask], dim=1
            ),
        }
        steps = {"max_new_tokens": 7, "prefill_chunk_size": CHUNK}
        out = closing(model, turn, STEPS, token=(13, 12), **{CACHE: cache}, **steps)
        return out, cache

    with dare(model, **options, **LATER[fields]):
        together, shared = run([0, 1])
        for row in (0, 1):
            alone, own = run([row])
            assert shared.hops[row] == own.hops[0]
            assert kept_tokens(shared, row) == kept_tokens(own, 0)
            for step, logits in enumerate(alone.logits):
                pair = logits[0], together.logits[step][row]
                what = f"{name}, row {row}, step {step}"
                assert_close(*pair, tolerance=10 * FP32_TOLERANCE, what=what)
    forced = {n for layer in kept_tokens(own, 0) for n in layer}
    assert forced != set(range(int((own.log.modality[0] >= 0).sum()))), "nothing went"


WAITING = [
    [13, 30, 12, 31, 13, 12, None, None, 33, None, 35, 36, 12, 37],
    [40, 13, None, 12, 41, None, None, 42, 43, 13, None, None, 12, 44],
    [None, None, 50, 13, 12, 53, 54, 55, 13, 12, None, 13, 56, 57],
]
"""What three rows write in bare forwards of one token, None where one waits."""


@pytest.mark.parametrize("fields", LATER)
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_row_that_waits_between_two_tokens_is_the_row_alone(name, fields):
    """Pads belong to no hop: no window counts them, and no delimiter is broken by them."""
    model = shared_model(name)
    parts = tiny_rows(model, images=(0, 1, 1), text=[14, 11, 8])
    message = [[None, 70, 71, 72], [73, 74, 75, 76], [None] * 4]
    options = {"text_retention": 0.4, "hop_decay": 0.7, "hop_delimiters": ((13, 12),)}

    def run(rows, blocks):
        cache, logits = DareCache(), []
        inputs = collate(model, [parts[row] for row in rows])
        mask = inputs["attention_mask"]
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        forward(model, {**inputs, **places}, **{CACHE: cache}, use_cache=True)
        for block in blocks:
            ids, new = token_rows(block, 12)  # were it read, the pad would end a delimiter
            mask = torch.cat([mask, new], dim=1)
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            step = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
            out = forward(model, step, **{CACHE: cache}, use_cache=True).logits
            logits.append([row[real] for row, real in zip(out, new.bool(), strict=True)])
        return [torch.cat([step[row] for step in logits]) for row in range(len(rows))], cache

    blocks = [[[row[i]] for row in WAITING] for i in range(len(WAITING[0]))]
    blocks.insert(9, message)
    with dare(model, **options, **LATER[fields]):
        together, shared = run([0, 1, 2], blocks)
        for row in range(3):
            own = [[token for token in block[row] if token is not None] for block in blocks]
            logits, cache = run([row], [[words] for words in own if words])
            assert shared.hops[row] == cache.hops[0], row
            assert kept_tokens(shared, row) == kept_tokens(cache, 0), row
            what = f"{name}, row {row}"
            assert_close(logits[0], together[row], tolerance=10 * FP32_TOLERANCE, what=what)
    assert min(shared.hops.tolist()) >= 3, "hardly a hop closed"
