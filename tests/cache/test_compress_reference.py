"""compress_context: which keys stay, against a slow reading of each row alone."""

import contextlib
import copy
import itertools
import math
import sys
from unittest import mock

import pytest
import torch
from laws import everything
from transformers import DynamicCache

from dare_hf import compress_context
from dare_hf.architectures.locate import attention_of, locate
from dare_hf.compat import CACHE, CACHE_NAMES
from dare_hf.conformance.subject import Subject, copied
from dare_hf.engine import reading_scores
from dare_hf.engine.reading_scores import SEEN
from dare_hf.routing import reference
from dare_hf.routing.scores import Softmax, squared_attention
from dare_hf.routing.selection import shared_keep
from dare_hf.testing.samples import batch_of

NAMES = ["llama", "llava", "qwen2_5_vl", "gemma3", "lfm2_vl", "qwen3_5"]
"""Ids alone; features; multimodal RoPE; a sliding window and two-way images; convolutions; linear
attention."""
FIRST, LAST = 4, 3
"""Tokens all layers keep at the head of a context (the default), and at its end (the tests')."""
SAID = (20, 31, 40)
KEEP = 0.5


class Words:
    """A tokenizer that knows one sentence."""

    def encode(self, text, add_special_tokens):
        assert text == "Repeat the previous context:"
        assert not add_special_tokens
        return list(SAID)


@pytest.fixture(scope="module")
def subjects():
    found = {}

    def of(name):
        found[name] = found.get(name) or Subject.of(name)
        return found[name]

    return of


@torch.no_grad()
def slow_scores(model, inputs, said, chunk):
    """Per attention layer the score of each token: one row, whole matrices, eager."""
    anatomy, calls = locate(model), []
    model.set_attn_implementation("eager")
    hook = anatomy.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    # With a config the cache would forget what a sliding window has left.
    config = anatomy.text_config if anatomy.unrouted else None
    cache = DynamicCache(config=config)
    model.generate(**copied(inputs), **{CACHE: cache}, max_new_tokens=1, do_sample=False)
    hook.remove()
    embed, given = model.get_input_embeddings(), calls[0]
    whole = given.get("inputs_embeds")
    whole = embed(given["input_ids"]) if whole is None else whole
    where = given["position_ids"].reshape(-1, whole.shape[1])
    shape, size = given["position_ids"].shape, whole.shape[1]
    best = [torch.zeros(size, dtype=torch.float64) for _ in anatomy.layers]
    for start in range(0, size, chunk):
        begin, end = max(start - 8, 0), min(start + chunk, size)
        words = embed(torch.tensor([said], dtype=torch.long))
        embeds = torch.cat([words, whole[:, begin:end]], dim=1)
        out = anatomy.text_model(
            inputs_embeds=embeds,
            position_ids=slow_positions(where, len(said), begin, end).reshape(*shape[:-1], -1),
            attention_mask=torch.ones(1, size + embeds.shape[1], dtype=torch.long),
            **{CACHE: copy.deepcopy(cache)},
            use_cache=True,
            output_attentions=True,
        )
        seen = [matrix for matrix in out.attentions if matrix is not None]
        for layer, matrix in enumerate(seen[-len(best) :]):
            heads = [sum(query[:size].double() ** 2 for query in head) ** 0.5 for head in matrix[0]]
            best[layer] = torch.maximum(best[layer], sum(heads) / len(heads))
    model.set_attn_implementation("sdpa")
    return best


@torch.no_grad()
def slow_reading(model, inputs, queries):
    """Per attention layer the score of each token by the reading itself: one row, loops, eager."""
    anatomy, calls = locate(model), []
    model.set_attn_implementation("eager")
    hook = anatomy.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    cache = DynamicCache(config=anatomy.text_config if anatomy.unrouted else None)
    model.generate(**copied(inputs), **{CACHE: cache}, max_new_tokens=1, do_sample=False)
    hook.remove()
    heard, homes = {}, {sys.modules[type(attention_of(one)).__module__] for one in anatomy.layers}
    with contextlib.ExitStack() as undone:
        for home in homes:
            eager = home.eager_attention_forward

            def hear(module, query, key, value, *args, eager=eager, **kwargs):
                output, matrix = eager(module, query, key, value, *args, **kwargs)
                heard[module.layer_idx] = matrix, key[0].double(), value[0].double()
                return output, matrix

            undone.enter_context(mock.patch.object(home, "eager_attention_forward", hear))
        new = DynamicCache(config=anatomy.text_config if anatomy.unrouted else None)
        again = {k: v for k, v in calls[0].items() if k not in CACHE_NAMES}
        anatomy.text_model(**again | {"use_cache": True, CACHE: new})
    model.set_attn_implementation("sdpa")
    found = []
    for _, (matrix, keys, values) in sorted(heard.items()):
        heads, size, _ = keys.shape
        group = matrix.shape[1] // heads
        looked = []
        for i in range(size):
            rows = range(max(size - queries, 0), size)
            mass = [
                sum(float(matrix[0, h, q, i]) for q in rows) * float(values[h // group, i].norm())
                for h in range(matrix.shape[1])
            ]
            looked.append(sum(mass) / len(mass))
        parts = [looked]
        for kind in (keys, values):
            units = [[kind[h, i] / kind[h, i].norm() for i in range(size)] for h in range(heads)]
            means = [sum(head) / size for head in units]
            parts.append(
                [
                    sum(1 - float(units[h][i] @ means[h] / means[h].norm()) for h in range(heads))
                    for i in range(size)
                ]
            )
        # a key outside the window of every query is not in the mean
        counts = [sum(value > 0 for value in looked), size, size]
        sized = zip(parts, counts, strict=True)
        parts = [[value * count / sum(part) for value in part] for part, count in sized]
        shares = zip((SEEN, (1 - SEEN) / 2, (1 - SEEN) / 2), parts, strict=True)
        found.append(sum(share * torch.tensor(part) for share, part in shares))
    return found


def slow_positions(where, said, begin, end):
    """[dims, said + end - begin] behind the context; of four dims the first is text's own."""
    groups = [[0], [1, 2, 3]] if len(where) == 4 else [list(range(len(where)))]
    rows = {}
    for dims in groups:
        after = max(int(where[d].max()) for d in dims) + 1
        base = min(int(where[d][begin]) for d in dims)
        for d in dims:
            words = [after + i for i in range(said)]
            rows[d] = words + [after + said + int(p) - base for p in where[d][begin:end]]
    return torch.tensor([rows[d] for d in sorted(rows)])


def slow_keep(best, keep, first=FIRST, last=LAST):
    """Per layer the positions that stay."""
    size = len(best[0])
    stays = [{i for i in range(size) if i < first or i >= size - last} for _ in best]
    others = [
        (-score, layer, place)
        for layer, scores in enumerate(best)
        for place, score in enumerate(scores.tolist())
        if place not in stays[layer]
    ]
    budget = math.ceil(keep * len(best) * size - 1e-4)
    for _, layer, place in sorted(others)[: max(budget - sum(map(len, stays)), 0)]:
        stays[layer].add(place)
    return stays


def stored(cache, row, before):
    """Per layer the positions a row's cache holds, counted without the pads before the row."""
    found = []
    for slot in cache.stored:
        where = slot.positions()[row]
        found.append({int(place) - before for place in where if place >= 0})
    return found


@pytest.mark.parametrize("chunk", [2048, 11])
@pytest.mark.parametrize("name", NAMES)
def test_each_row_keeps_what_a_slow_reading_of_it_alone_keeps(subjects, name, chunk):
    """In a left-padded batch; with the instruction in one piece, without it in chunks."""
    subject = subjects(name)
    model, batch = subject.model, subject.batches["padded"]
    words, said = (Words(), SAID) if chunk == 2048 else (None, ())
    expected = [
        slow_keep(slow_scores(model, batch_of(model, [row]).inputs, said, chunk), KEEP)
        for row in subject.rows
    ]
    with subject.dare(**everything()):
        cache = compress_context(
            model,
            copied(batch.inputs),
            KEEP,
            processor=words,
            recent_tokens=LAST,
            chunk_tokens=chunk,
        )
    assert not batch.real.all()
    for row, layers in enumerate(expected):
        pads = int((~batch.real[row]).sum())
        assert stored(cache, row, pads) == layers, f"{name}, row {row}"
    counts = [{len(kept) for kept in layers} for layers in expected]
    assert max(map(len, counts)) > 1, "the case has equal budgets"


@pytest.mark.parametrize("queries", [128, 5])
@pytest.mark.parametrize("name", [*NAMES, "deepseek_v3"])
def test_each_row_keeps_what_its_own_reading_says(subjects, name, queries, monkeypatch):
    """Without a second pass, in a left-padded batch."""
    monkeypatch.setattr(reading_scores, "QUERIES", queries)
    subject = subjects(name)
    model, batch = subject.model, subject.batches["padded"]
    expected = [
        slow_keep(slow_reading(model, batch_of(model, [row]).inputs, queries), KEEP)
        for row in subject.rows
    ]
    with subject.dare(**everything()):
        cache = compress_context(
            model, copied(batch.inputs), KEEP, score="reading", recent_tokens=LAST
        )
    for row, layers in enumerate(expected):
        pads = int((~batch.real[row]).sum())
        assert stored(cache, row, pads) == layers, f"{name}, row {row}"


def test_squared_attention_is_that_of_whole_matrices():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 7, 8, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, 1, 5, 7, generator=generator) < 0.6
    valid = torch.rand(2, 5, generator=generator) < 0.7
    found = squared_attention(query, key, visible, valid, Softmax(0.3))
    expected = torch.zeros(2, 4, 7, dtype=torch.float64)
    for row, head, q in itertools.product(range(2), range(4), range(5)):
        able = [c for c in range(7) if visible[row, 0, q, c] and valid[row, q]]
        logits = [0.3 * float(query[row, head, q] @ key[row, head // 2, c]) for c in able]
        whole = sum(map(math.exp, logits))
        for c, logit in zip(able, logits, strict=True):
            expected[row, head, c] += (math.exp(logit) / whole) ** 2
    assert (found - expected).abs().max() < 1e-12


def test_one_threshold_is_one_sorted_list():
    """Ties go to the lower layer, then to the earlier column."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (3, 4, 9), generator=generator).float()
    able = torch.rand(3, 4, 9, generator=generator) < 0.8
    forced = torch.rand(3, 4, 9, generator=generator) < 0.2
    budgets = [11, 3, 30]
    found = shared_keep(scores, able, forced, budgets)
    kinds = torch.zeros(3, 36, dtype=torch.long)
    flat = scores.flatten(1), kinds, able.flatten(1), forced.flatten(1)
    wanted = torch.tensor([[k, 0] for k in budgets])
    assert torch.equal(found.flatten(1), reference.keep_mask(*flat, wanted))
