"""Compaction against slow loops over one row at a time: budgets, forced tokens, caps, any history.

No model runs: forwards store tokens in two layers and close hops as generate would.
"""

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dare_hf import DareCache, DareConfig
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.hops.compaction import compact
from dare_hf.routing import reference
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.retention import RetentionTable

LAYERS, HOPS = 2, 3
RATES = st.sampled_from([1.0, 0.6, 0.3, 0.01])


class CompactionMachine(RuleBasedStateMachine):
    """Each rule runs one forward, or what generate does between two.

    A row is a list of (modality, hop, always) by column; what a layer holds of it is a list of
    (column, score).
    """

    @initialize(data=st.data(), rows=st.integers(1, 3), prompt=st.integers(1, 10))
    def start(self, data, rows, prompt):
        self.config = DareConfig(
            scorer="key_norm",
            hop_score="stored",
            schedule="constant",
            hop_budget=data.draw(st.sampled_from(["pooled", "per_hop"])),
            pruned=data.draw(st.sampled_from(["bypass", "drop"])),
            prefix_tokens=data.draw(st.integers(0, 3)),
            max_kv_tokens=data.draw(st.one_of(st.none(), st.integers(1, 9))),
        )
        row = st.tuples(*[RATES] * LAYERS)
        vision, text = (tuple(data.draw(row) for _ in range(HOPS)) for _ in "vt")
        self.table = RetentionTable(vision, text, tuple(range(LAYERS)), (True,) * LAYERS)
        self.cache = DareCache()
        self.cache.hop_counters = HopCounters()
        self.cache.hop_counters.ensure(rows)
        self.rows = [[] for _ in range(rows)]
        self.held = [[[] for _ in range(rows)] for _ in range(LAYERS)]
        self.served, self.next_score = [0] * rows, 0
        self.store(data, prompt, sampled=False)
        for index in range(rows):
            self.cache.hop_counters.close(index, prompt - 1)

    @property
    def seen(self) -> int:
        return len(self.rows[0])

    def kinds(self, data, count: int, sampled: bool) -> list[int]:
        """New modalities of one row; a prompt may begin with pads."""
        pads = 0 if sampled else data.draw(st.integers(0, count - 1))
        real = st.lists(st.sampled_from([TEXT, VISION]), min_size=count, max_size=count)
        return [PAD] * pads + data.draw(real)[pads:]

    def store(self, data, count: int, *, sampled: bool) -> None:
        """Store new tokens: all where they are sampled, else a part that holds the last."""
        hops, past = self.cache.hop_counters.open_hops(), self.seen
        new = []
        for row, hop in zip(self.rows, hops, strict=True):
            always = data.draw(st.integers(0, 2**count - 1)) & data.draw(
                st.integers(0, 2**count - 1)
            )
            kinds = self.kinds(data, count, sampled)
            new.append([(m, hop, always >> i & 1 == 1) for i, m in enumerate(kinds)])
            row += new[-1]
        parts = [torch.tensor([[t[i] for t in row] for row in new]) for i in range(3)]
        self.cache.log.append(parts[0], parts[1], parts[2].bool())
        for i in range(LAYERS):
            chosen = []
            for row in new:
                real = [past + c for c, (m, _, _) in enumerate(row) if m != PAD]
                part = data.draw(st.integers(0, 2**count - 1))
                chosen.append(
                    [p for p in real if sampled or p == real[-1] or part >> (p - past) & 1]
                )
            width = max(map(len, chosen))
            columns = torch.tensor([[-1] * (width - len(c)) + c for c in chosen])
            # Many ties, and sums nobody makes: scores are only compared.
            scores = torch.randint(8, columns.shape, generator=self.dice()) / 8
            layer = self.cache.layer(i)
            layer.stage(columns, past + count, [len(c) for c in chosen], scores)
            keys = columns[:, None, :, None].float()
            self.cache.update(keys.clone(), keys.clone(), i)
            for r, positions in enumerate(chosen):
                values = scores[r, width - len(positions) :].tolist()
                self.held[i][r] += zip(positions, values, strict=True)

    def dice(self) -> torch.Generator:
        self.next_score += 1
        return torch.Generator().manual_seed(self.next_score)

    # The slow rule, for one row alone

    def begin_hop(self, r: int, hop: int) -> None:
        """What each layer keeps of a row when `hop` begins."""
        cap, kappa = self.config.max_kv_tokens, self.config.prefix_tokens
        if hop == 1 and cap is None:
            return
        row, gone = self.rows[r], set()
        closed = [c for c, (m, h, _) in enumerate(row) if m != PAD and h < hop]
        prefix = {c for own in range(hop) for c in [c for c in closed if row[c][1] == own][:kappa]}
        pinned = prefix | {c for c in closed if row[c][2]}
        for i in range(LAYERS):
            mine = self.held[i][r]
            if cap is None and self.config.pruned == "bypass" and self.whole(i):
                continue
            where = [c for c, _ in mine]
            scores = torch.tensor([[s for _, s in mine]])

            def marks(columns, where=where):
                return torch.tensor([[c in columns for c in where]])

            candidates = marks(set(closed) - gone)
            modality = torch.tensor([[row[c][0] for c in where]])
            hops = torch.tensor([[row[c][1] for c in where]])
            budgets = self.budgets(i, row, closed, hop)
            keep = reference.compaction_keep(
                scores, modality, hops, candidates, marks(pinned), budgets
            )
            if cap is not None:
                tiers = [marks(set(closed[-1:])), marks(prefix), marks(pinned)]
                keep = reference.capped_keep(scores, keep, tiers, cap)
            stays = {c for c, kept in zip(where, keep[0].tolist(), strict=True) if kept}
            stays |= set(where) - set(closed)
            gone |= set(where) - stays if self.config.pruned == "drop" else set()
            self.held[i][r] = [(c, s) for c, s in mine if c in stays]

    def whole(self, layer: int) -> bool:
        return all(rates[layer] == 1.0 for rates in (*self.table.vision, *self.table.text))

    def budgets(self, layer, row, closed, hop) -> torch.Tensor:
        every = self.config.hop_budget == "pooled"
        groups = [closed] if every else [[c for c in closed if row[c][1] == h] for h in range(hop)]
        found = []
        for group in groups:
            counts = [sum(row[c][0] == m for c in group) for m in (TEXT, VISION)]
            rates = [self.table.rate(hop, layer, m) if hop > 1 else 1.0 for m in (TEXT, VISION)]
            found.append([reference.budget(r, n) for r, n in zip(rates, counts, strict=True)])
        return torch.tensor([found])

    # Rules

    @rule(data=st.data(), count=st.integers(1, 4))
    def step(self, data, count):
        """Compact, then process sampled tokens; in some rows the last one closes the hop."""
        self.enforce()
        self.store(data, count, sampled=True)
        for row in range(len(self.rows)):
            if data.draw(st.booleans()):
                self.cache.hop_counters.close(row, self.seen - 1)

    @rule()
    def enforce(self):
        compact(self.cache, self.config, self.table)
        for row, hop in enumerate(self.cache.hop_counters.open_hops()):
            while self.served[row] < hop:
                self.served[row] += 1
                self.begin_hop(row, self.served[row])
        cap = self.config.max_kv_tokens
        opened = self.cache.hop_counters.open_hops()
        for layer in self.held:
            for row, hop, mine in zip(self.rows, opened, layer, strict=True):
                later = sum(row[c][1] == hop for c, _ in mine)
                assert cap is None or len(mine) <= cap + later, "the cap does not hold"

    @rule(data=st.data())
    def choose_rows(self, data):
        rows = st.integers(0, len(self.rows) - 1)
        index = data.draw(st.lists(rows, min_size=1, max_size=3))
        self.cache.reorder_cache(torch.tensor(index))
        self.rows = [list(self.rows[i]) for i in index]
        self.held = [[list(layer[i]) for i in index] for layer in self.held]
        self.served = [self.served[i] for i in index]

    @invariant()
    def layers_hold_what_the_slow_rule_left(self):
        for i, layer in enumerate(self.held):
            slot = self.cache.layer(i)
            for r, mine in enumerate(layer):
                where = slot.positions()[r]
                real = where >= 0
                assert where[real].tolist() == [c for c, _ in mine], f"layer {i}, row {r}"
                assert slot.scores()[r, real].tolist() == [s for _, s in mine]
                assert slot.keys[r, 0, real, 0].tolist() == [c for c, _ in mine]


CompactionMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=16, deadline=None
)
TestCompactionMachine = CompactionMachine.TestCase
