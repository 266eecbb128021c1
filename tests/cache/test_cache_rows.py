"""Rows of a cache repeated, selected and reordered between bare forwards: all follows the rows."""

import copy

import pytest
import torch
from laws import SCORER, dare, inputs_of, rows_of, shared_model

from dare_hf import DareCache, DareConfig
from dare_hf.compat import CACHE
from dare_hf.testing import collate

NAMES = ("llava", "gemma3")
TOLERANCE = 1e-5
"""Float64 models: HF's RMSNorm and RoPE compute in float32."""
PRUNED = {"vision_retention": 0.4, "text_retention": 0.6, "hop_decay": 0.5}
CONFIGS = {
    "function": DareConfig(
        scorer=SCORER, schedule="constant", hop_delimiters=((20,), (30, 31)), **PRUNED
    ),
    "attention": DareConfig(schedule="constant", decode_window=3, max_kv_tokens=15, **PRUNED),
    "drop": DareConfig(
        scorer=SCORER, schedule="constant", pruned="drop", decode_window=2, **PRUNED
    ),
}


class Beam:
    """A cache and what a decoding loop by hand carries beside it."""

    def __init__(self, model, inputs):
        self.model, self.cache = model, DareCache()
        self.mask = inputs["attention_mask"]
        given = copy.deepcopy(inputs) | {"position_ids": self.places(self.mask.shape[1])}
        self.logits = [self.run(given)]

    def places(self, new):
        return (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new:]

    @torch.no_grad()
    def run(self, given):
        return self.model(**given, **{CACHE: self.cache}, use_cache=True).logits[:, -1]

    def step(self, words):
        words = torch.tensor(words)
        words = words[:, None] if words.ndim == 1 else words
        self.mask = torch.cat([self.mask, torch.ones_like(words)], dim=1)
        new = words.shape[1]
        given = {"input_ids": words, "attention_mask": self.mask, "position_ids": self.places(new)}
        self.logits.append(self.run(given))

    def take(self, order):
        self.mask = self.mask[order]


# What happens between two steps; each tells which rows there are afterwards.
def repeat(beam):
    beam.cache.batch_repeat_interleave(2)
    rows = torch.arange(len(beam.mask)).repeat_interleave(2)
    beam.take(rows)
    return rows


def select(rows):
    def change(beam):
        beam.cache.batch_select_indices(torch.tensor(rows))
        beam.take(torch.tensor(rows))
        return torch.tensor(rows)

    return change


def flags(which):
    def change(beam):
        beam.cache.batch_select_indices(torch.tensor(which))
        rows = torch.tensor(which).nonzero()[:, 0]
        beam.take(rows)
        return rows

    return change


def reorder(rows):
    def change(beam):
        beam.cache.reorder_cache(torch.tensor(rows))
        beam.take(torch.tensor(rows))
        return torch.tensor(rows)

    return change


def back(count):
    def change(beam):
        beam.cache.crop(-count)
        beam.mask = beam.mask[:, :-count]
        return count

    return change


# Contrastive search: candidates of each row are run, the best is selected, and so on.
PLANS = {
    "best of n": [repeat, [20, 50, 51, 30, 20, 52], [53, 20, 30, 31, 54, 20], select([4, 1, 2]),
                  [55, 56, 31], [57, 58, 59], [60, 61, 62]],
    "reordered": [[20, 50, 51], reorder([2, 0, 0]), [52, 30, 53], [54, 31, 55], reorder([1, 1, 2]),
                  [20, 56, 20], [57, 58, 59], [60, 61, 62]],
    "contrastive": [repeat, [50, 51, 20, 30, 52, 53], back(1), select([0, 2, 4]), [20, 30, 50],
                    repeat, [51, 52, 31, 53, 54, 20],
                    select([1, 2, 5]), [55, 56, 57], [58, 59, 60]],
    "fewer": [[20, 50, 30], [51, 20, 31], flags([True, False, True]), [52, 53], [54, 20],
              select([1]), [55], [56], repeat, [57, 58], [59, 20], [60, 61]],
    "injected": [[20, 50, 30], reorder([2, 1, 0]), [[51, 52, 53], [54, 55, 56], [57, 58, 59]],
                 [20, 60, 61], select([2, 0]), [62, 63], [20, 64], [65, 66]],
}  # fmt: skip


def history(plan, rows):
    """Return for each last row its words in order, and the prompt's row it came from."""
    kept = [(row, []) for row in range(rows)]
    for item in plan:
        if isinstance(item, list):
            kept = [(row, [*words, word]) for (row, words), word in zip(kept, item, strict=True)]
            continue
        found = item(Fake(len(kept)))
        if isinstance(found, int):
            kept = [(row, words[:-found]) for row, words in kept]
        else:
            kept = [(kept[i][0], list(kept[i][1])) for i in found.tolist()]
    return kept


class Fake(Beam):
    """A beam without a model, on which a plan's changes are tried."""

    def __init__(self, rows):
        self.mask = torch.zeros(rows, 9)
        self.cache = self

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("plan", PLANS)
def test_rows_are_what_they_would_be_alone(name, config, plan):
    model = shared_model(name, dtype=torch.float64)
    steps, images = PLANS[plan], (0, 1, 2)
    prompts = rows_of(model, images)
    with dare(model, CONFIGS[config]):
        beam = Beam(model, inputs_of(model, images))
        for item in steps:
            if isinstance(item, list):
                beam.step(item)
            else:
                item(beam)
        kept = history(steps, len(images))
        assert len(kept) == len(beam.logits[-1])
        told = beam.cache.report
        baseline = predicted = 0
        for row, (prompt, words) in enumerate(kept):
            alone = Beam(model, collate(model, [prompts[prompt]]))
            for word in words:
                alone.step([word])
            torch.testing.assert_close(
                beam.logits[-1][row], alone.logits[-1][0], atol=TOLERANCE, rtol=0
            )
            assert beam.cache.hops[row] == alone.cache.hops[0]
            assert beam.cache.kept_lengths()[:, row].equal(alone.cache.kept_lengths()[:, 0])
            pads = beam.cache.get_seq_length() - alone.cache.get_seq_length()
            for ours, theirs in zip(beam.cache.layers, alone.cache.layers, strict=True):
                where = ours.positions()[row]
                assert (where[where >= 0] - pads).tolist() == theirs.positions()[0].tolist()
            baseline += alone.cache.report.kv_bytes_baseline
            predicted += alone.cache.report.kv_bytes_predicted
        assert told.kv_bytes == told.kv_bytes_predicted == predicted == beam.cache.kv_bytes()
        assert told.kv_bytes_baseline == baseline
        assert sum(map(sum, told.tokens.values())) == int(beam.mask.sum())


@pytest.mark.parametrize("name", NAMES)
def test_held_tokens_are_counted_by_row(name):
    """The retention of a hop that begins after the rows have changed is that of the new rows."""
    model = shared_model(name, dtype=torch.float64)
    config = DareConfig(scorer=SCORER, schedule="constant", hop_delimiters=(20,), **PRUNED)
    prompts = rows_of(model, (0, 1, 2))
    with dare(model, config):
        beam = Beam(model, inputs_of(model, (0, 1, 2)))
        beam.step([50, 51, 52])
        order = [2, 2, 2]
        reorder(order)(beam)
        beam.step([20, 20, 20])
        beam.step([53, 54, 55])
        alone = Beam(model, collate(model, [prompts[2]]))
        for word in (52, 20, 53):
            alone.step([word])
        assert beam.cache.report.retention[2] == alone.cache.report.retention[2]
        assert beam.cache.report.retention[2] != beam.cache.report.retention[0]
