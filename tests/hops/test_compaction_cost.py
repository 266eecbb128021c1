"""What a compaction costs does not grow with the hops it looks back on: operations are counted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dare_hf import DareCache, DareConfig
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.hops.compaction import compact
from dare_hf.hops.ledger import Held, Ledger
from dare_hf.routing.retention import RetentionTable

LAYERS, ROWS = 3, 2
TABLE = RetentionTable(
    ((0.4,) * LAYERS,), ((0.7,) * LAYERS,), tuple(range(LAYERS)), (True,) * LAYERS
)


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def store(cache: DareCache, tokens: int, vision: int) -> None:
    """Store the tokens of a hop in every layer and close it."""
    state, past = cache.hop_counters, len(cache.log)
    modality = (torch.arange(tokens) < vision).to(torch.int8).expand(ROWS, -1)
    cache.log.append(modality, torch.full((ROWS, tokens), state.open_hops()[0]), padded=False)
    for i in range(LAYERS):
        dice = torch.Generator().manual_seed(past + i)
        scores = torch.rand(1, tokens, generator=dice).expand(ROWS, -1)
        cache.layer(i).stage(None, past + tokens, [tokens] * ROWS, scores)
        keys = torch.zeros(ROWS, 1, tokens, 2)
        cache.update(keys, keys.clone(), i)
    for row in range(ROWS):
        state.close(row, past + tokens - 1)


def compaction_operations(config: DareConfig, hops: int) -> int:
    """Operations of the compaction that begins hop `hops`."""
    cache = DareCache()
    cache.hop_counters = HopCounters()
    state = cache.hop_counters
    state.ensure(ROWS)
    span = Ledger((Held.nothing(),) * LAYERS).with_span(0, (2, 10), [(2, 10)] * LAYERS, 12)
    state.ledgers = [span] * ROWS
    store(cache, 12, 10)
    for hop in range(1, hops + 1):
        compact(cache, config, TABLE)
        store(cache, 4, vision=hop % 2 * 2)
    with Operations() as operations:
        compact(cache, config, TABLE)
    kept = cache.kept_lengths()
    assert kept.max() < len(cache.log), "nothing went"
    return operations.count


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_kv_tokens": 20}, {"pruned": "drop"}, {"hop_budget": "pooled"}],
    ids=["per_hop", "cap", "drop", "pooled"],
)
def test_the_number_of_hops_adds_no_operation(fields):
    config = DareConfig(
        scorer="key_norm",
        hop_score="stored",
        schedule="constant",
        **({"hop_budget": "per_hop"} | fields),
    )
    assert compaction_operations(config, 41) == compaction_operations(config, 13)


def test_layers_are_decided_together():
    """Of the work of a layer only what reads and packs its own columns is done for each."""
    config = DareConfig(
        scorer="key_norm", hop_score="stored", schedule="constant", hop_budget="per_hop"
    )
    assert compaction_operations(config, 5) <= 150 + 45 * LAYERS
