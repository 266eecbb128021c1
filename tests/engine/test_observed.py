"""Observed scores against a slow oracle: who scores whom when a hop closes, and what stays."""

from collections import defaultdict

import pytest
import torch
from hop_runs import DELIMITER, PRUNED
from laws import dare, forward, inputs_of, shared_model

from dare_hf import DareCache
from dare_hf.compat import CACHE
from dare_hf.engine import routed_layer
from dare_hf.engine.counted_call import CountedCall
from dare_hf.hops.compaction import due_rows
from dare_hf.routing import reference

WINDOW, DECAY = 32, 0.9
"""Queries that look back, and what an older observation is worth (method page, section 5)."""
TOLERANCE = 1e-4
"""Scores are means of fp32 softmaxes around 1, summed in another order."""
STEPS = [40, 3, 5, 1, 2, 1, 4]
"""Sampled tokens of each forward; the first is longer than the window."""


@pytest.fixture
def queries(monkeypatch):
    """Every query a layer was told to remember: by cache layer, [B, H, K, d] and positions."""
    seen, inner = defaultdict(list), routed_layer.push_queries
    inner_next = routed_layer.push_next

    def record(slot, query, columns, call, **kwargs):
        seen[id(slot)].append((query, columns.expand(len(query), -1), call.softmax.scaling))
        return inner(slot, query, columns, call, **kwargs)

    def record_next(slot, query, past, call):
        columns = torch.full((len(query), 1), past)
        seen[id(slot)].append((query, columns, call.softmax.scaling))
        return inner_next(slot, query, past, call)

    monkeypatch.setattr(routed_layer, "push_queries", record)
    monkeypatch.setattr(routed_layer, "push_next", record_next)
    return seen


def looked_back(slot, row: int, end: int, closed, seen) -> torch.Tensor:
    """Float[C]: the stored columns `closed`, scored by the row's last queries up to `end`."""
    all_queries = torch.cat([query[row] for query, _, _ in seen], dim=1)
    where = torch.cat([columns[row] for _, columns, _ in seen])
    chosen = [i for i, at in enumerate(where.tolist()) if 0 <= at <= end][-WINDOW:]
    query, at = all_queries[None, :, chosen], where[chosen]
    stored = slot.positions()[row]
    visible = (stored[None, :] <= at[:, None]) & (stored >= 0)
    everyone = torch.ones(1, len(chosen), dtype=torch.bool)
    keys, values = slot.keys[row : row + 1], slot.values[row : row + 1]
    shown = (visible[None, None], everyone, closed[None])
    return reference.attention_scores(query, keys, values, *shown, seen[0][2])[0]


def observed(cache, queries, due):
    """Per layer and due row: {position: score} of the closed tokens once the hop's end was seen."""
    found = {}
    for i, slot in enumerate(cache.layers):
        old = slot.scores()
        for row, hop in enumerate(due):
            if not hop:
                continue
            where = slot.positions()[row]
            closed = (where >= 0) & (cache.log.lookup(slot.positions())[1][row] < hop)
            end = cache.hop_counters.ends[row][hop - 1]
            new = looked_back(slot, row, end, closed, queries[id(slot)])
            best = torch.maximum(DECAY * old[row], new.float())
            found[i, row] = dict(zip(where[closed].tolist(), best[closed].tolist(), strict=True))
    return found


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_closed_hop_is_scored_by_its_last_queries(name, queries):
    """Delimiters stand inside verified steps too: queries behind one do not look back for it."""
    model, cache, checked = shared_model(name), DareCache(), 0
    inputs = inputs_of(model, (0, 1, 2))
    size = inputs["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(3)
    mask = inputs["attention_mask"]
    with dare(model, scorer="attention", hop_delimiters=(DELIMITER,), **PRUNED):
        controller = model._dare.controller
        call = CountedCall(prompt_length=size, start=0, continues=True)
        with controller.generating(call, cache):
            forward(model, inputs, **{CACHE: cache}, use_cache=True)
            for step, count in enumerate(STEPS):
                words = torch.randint(20, 90, (3, count), generator=generator)
                for row in range(3):
                    if (step + row) % 2 == 0:
                        words[row, (row * 7 + step) % count] = DELIMITER
                mask = torch.cat([mask, torch.ones_like(words)], dim=1)
                due = due_rows(cache)
                expected = observed(cache, queries, due) if max(due) > 1 else {}
                step_inputs = {"input_ids": words, "attention_mask": mask}
                forward(model, step_inputs, **{CACHE: cache}, use_cache=True)
                for (i, row), scores in expected.items():
                    where = cache.layers[i].positions()[row].tolist()
                    ours = dict(zip(where, cache.layers[i].scores()[row].tolist(), strict=True))
                    stays = [position for position in scores if position in ours]
                    gone = [position for position in scores if position not in ours]
                    pairs = [(ours[position], scores[position]) for position in stays]
                    assert pairs == [(pytest.approx(b, abs=TOLERANCE), b) for _, b in pairs]
                    checked += len(gone) > 0
    assert checked > 10, "hardly anything went"
