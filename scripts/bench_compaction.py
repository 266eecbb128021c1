"""Time of one compaction against the number of hops it looks back on; no model runs.

`python scripts/bench_compaction.py --hops 2 50 100 --heads 2 --dim 16` shows the bookkeeping alone:
what moves keys and values grows with them.
"""

import argparse
import copy
import statistics
import time

import torch

from dare_hf import DareCache, DareConfig
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.hops.compaction import compact
from dare_hf.hops.ledger import Held, Ledger
from dare_hf.routing.retention import RetentionTable

TABLE = RetentionTable(((0.4,) * 12,), ((0.7,) * 12,), tuple(range(12)), (True,) * 12)


def store(cache: DareCache, tokens: int, vision: int, shape: tuple[int, int]) -> None:
    """Store the tokens of a hop in every layer and close it."""
    state, past = cache.hop_counters, len(cache.log)
    modality = (torch.arange(tokens) < vision).to(torch.int8)[None]
    cache.log.append(modality, torch.full((1, tokens), state.open_hops()[0]), padded=False)
    for i in range(len(TABLE.plan_layers)):
        cache.layer(i).stage(None, past + tokens, [tokens], torch.rand(1, tokens))
        keys = torch.zeros(1, shape[0], tokens, shape[1])
        cache.update(keys, keys.clone(), i)
    state.close(0, past + tokens - 1)


def cache_at(config: DareConfig, hops: int, shape: tuple[int, int]) -> DareCache:
    """A cache that was compacted at every hop but the last; 64 prompt tokens and 4 a hop."""
    torch.manual_seed(0)
    cache = DareCache()
    cache.hop_counters = HopCounters()
    state, layers = cache.hop_counters, len(TABLE.plan_layers)
    state.ensure(1)
    empty = Ledger((Held.nothing(),) * layers)
    state.ledgers = [empty.with_span(0, (7, 57), [(7, 57)] * layers, 64)]
    store(cache, 64, 57, shape)
    for _ in range(hops):
        compact(cache, config, TABLE)
        store(cache, 4, 0, shape)
    return cache


def main() -> None:
    """Prints the median and the range of each number of hops."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hops", type=int, nargs="+", default=[2, 50, 100])
    parser.add_argument("--budget", choices=["per_hop", "pooled"], default="per_hop")
    parser.add_argument("--pruned", choices=["bypass", "drop"], default="bypass")
    parser.add_argument("--cap", type=int)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = DareConfig(
        scorer="key_norm",
        hop_score="stored",
        schedule="constant",
        hop_budget=args.budget,
        pruned=args.pruned,
        max_kv_tokens=args.cap,
    )
    for hops in args.hops:
        cache, times = cache_at(config, hops, (args.heads, args.dim)), []
        for _ in range(args.repeats):
            own = copy.deepcopy(cache)
            start = time.perf_counter()
            compact(own, config, TABLE)
            times.append(1e3 * (time.perf_counter() - start))
        middle, width = statistics.median(times), cache.stored[0].width
        print(f"hop {hops}: {middle:.2f} ms ({min(times):.2f} to {max(times):.2f}), {width} stored")


if __name__ == "__main__":
    main()
