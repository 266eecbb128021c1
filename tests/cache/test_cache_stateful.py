"""The cache against a model of plain lists, under any order of the calls HF and DARE make."""

import copy

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dare_hf.cache import DareCache
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.errors import DareStateError

# Layer 1 is never used. Layers differ in heads, dimensions and dtype: none may speak for another.
SHAPES = {0: (1, 2, 2, torch.float64), 2: (2, 3, 1, torch.float32)}
MODES = {
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
}
MAX_ROWS = 6


class Layer:
    """What a layer must hold: per row a list of (position, id stored as its key, score)."""

    def __init__(self, rows: int) -> None:
        self.seen = 0
        self.rows: list[list[tuple[int, int, float]]] = [[] for _ in range(rows)]

    @property
    def kept(self) -> list[int]:
        return [len(row) for row in self.rows]


def keys_values(ids: torch.Tensor, layer: int, graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that say which token they are; values that say minus that."""
    heads, d_k, d_v, dtype = SHAPES[layer]
    keys = ids.to(dtype)[:, None, :, None].expand(-1, heads, -1, d_k).clone()
    values = -ids.to(dtype)[:, None, :, None].expand(-1, heads, -1, d_v).clone()
    if graph and torch.is_grad_enabled():
        keys.requires_grad_()
    return keys, values


class CacheMachine(RuleBasedStateMachine):
    """Every rule does the same to the cache and to the lists."""

    @initialize(rows=st.integers(1, 3))
    def start(self, rows: int) -> None:
        self.cache = DareCache()
        self.cache.hop_counters = HopCounters()
        self.model = {i: Layer(rows) for i in SHAPES}
        self.log: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        self.next_id = 1
        self.stored = False

    @property
    def seen(self) -> int:
        return self.model[0].seen

    @property
    def n_rows(self) -> int:
        return len(self.log)

    # One layer's share of a forward

    def ids(self, columns: int) -> torch.Tensor:
        first = self.next_id
        self.next_id += self.n_rows * columns
        return torch.arange(first, self.next_id).view(self.n_rows, columns)

    def store(self, i: int, positions: list[list[int]], scored: bool, graph: bool) -> None:
        """Store columns at `positions` (-1: a hole), or the next dense ones where it fits."""
        layer, model = self.cache.layer(i), self.model[i]
        columns = torch.tensor(positions)
        ids = self.ids(columns.shape[1])
        # Sums of these are exact in fp32.
        scores = torch.randint(64, columns.shape) / 64 if scored else None
        kept = [sum(p >= 0 for p in row) for row in positions]
        seen = self.target
        dense = [list(range(model.seen, seen))] * self.n_rows == positions
        before = layer.positions() if layer.rows else columns[:, :0]
        layer.stage(None if dense else columns, seen, kept, scores)
        places = range(model.seen, seen)
        plain = columns.shape[1] == len(places) and all(
            position in (-1, place)
            for row in positions
            for position, place in zip(row, places, strict=True)
        )
        layer.plain = layer.plain and plain
        keys, values = self.cache.update(*keys_values(ids, i, graph), i)
        for r, row in enumerate(positions):
            for c, position in enumerate(row):
                if position >= 0:
                    score = 0.0 if scores is None else float(scores[r, c])
                    model.rows[r].append((position, int(ids[r, c]), score))
        model.seen = seen
        self.stored = True
        attended = torch.cat([before, columns], dim=1) >= 0
        for r, row in enumerate(model.rows):
            expected = [token for _, token, _ in row]
            assert keys[r, 0, attended[r], 0].tolist() == expected, "update returned other columns"
            assert (-values[r, 0, attended[r], 0]).tolist() == expected

    def log_tokens(self, data: st.DataObject, count: int) -> None:
        tokens = [
            [(data.draw(st.integers(-1, 1)), data.draw(st.integers(0, 3))) for _ in range(count)]
            for _ in self.log
        ]
        table = torch.tensor(tokens)
        self.cache.log.append(table[..., 0], table[..., 1])
        for row, new in zip(self.log, tokens, strict=True):
            row.extend(new)

    def forward(self, data: st.DataObject, count: int) -> None:
        """Each layer stores all, some or none of `count` new tokens."""
        self.target = self.seen + count
        scored, graph = data.draw(st.booleans()), data.draw(st.booleans())
        new = range(self.seen, self.target)
        for i in SHAPES:
            what = data.draw(st.sampled_from(["dense", "ragged", "ragged", "skip"]))
            if what == "dense":
                self.store(i, [list(new)] * self.n_rows, scored, graph)
                continue
            chosen = [
                [p for p in new if what == "ragged" and data.draw(st.booleans())] for _ in self.log
            ]
            width = max(len(row) for row in chosen)
            if width == 0:
                self.cache.layer(i).advance(self.target)
                self.model[i].seen = self.target
                continue
            width += data.draw(st.integers(0, 2))
            self.store(i, [[-1] * (width - len(r)) + r for r in chosen], scored, graph)

    # Forwards

    @rule(data=st.data(), count=st.integers(1, 5), mode=st.sampled_from(sorted(MODES)))
    def run(self, data: st.DataObject, count: int, mode: str) -> None:
        with MODES[mode]():
            self.cache.begin()
            self.log_tokens(data, count)
            self.forward(data, count)
            self.cache.commit()

    @rule(data=st.data(), steps=st.integers(1, 40))
    def decode(self, data: st.DataObject, steps: int) -> None:
        self.log_tokens(data, steps)
        with torch.no_grad():
            for step in range(self.seen, self.seen + steps):
                self.target = step + 1
                for i in SHAPES:
                    self.store(i, [[step]] * self.n_rows, False, False)

    @rule(data=st.data(), count=st.integers(30, 120))
    def run_lopsided(self, data: st.DataObject, count: int) -> None:
        """One row keeps everything, the others one token: the bound needs a repack."""
        row = data.draw(st.integers(0, self.n_rows - 1))
        self.log_tokens(data, 1)
        self.log_more(count - 1)
        self.target = self.seen + count
        new = list(range(self.seen, self.target))
        filled = [-1] * (count - 1) + new[-1:]
        with torch.no_grad():
            for i in SHAPES:
                rows = [new if r == row else filled for r in range(self.n_rows)]
                self.store(i, rows, True, False)

    def log_more(self, count: int) -> None:
        fill = torch.zeros(self.n_rows, count, dtype=torch.int8)
        self.cache.log.append(fill, fill)
        for row in self.log:
            row.extend([(0, 0)] * count)

    @rule(data=st.data(), count=st.integers(1, 60), mode=st.sampled_from(sorted(MODES)))
    def fail(self, data: st.DataObject, count: int, mode: str) -> None:
        """A forward that stops half-way: some layers have stored, some have not."""
        model, log, stored = copy.deepcopy(self.model), copy.deepcopy(self.log), self.stored
        with MODES[mode]():
            self.cache.begin()
            if data.draw(st.booleans()):
                self.log_more(count)
            if data.draw(st.booleans()):
                self.target = self.seen + count
                positions = list(range(self.seen, self.target))
                self.store(0, [positions] * self.n_rows, True, False)
            elif data.draw(st.booleans()) and stored:
                self.crop_by(data.draw(st.integers(0, 3)))
                self.forward(data, count % 5 + 1)
                self.compact(data)
            self.cache.layer(2).stage(None, 999, [])
            self.cache.rollback()
        self.model, self.log, self.stored = model, log, stored

    @precondition(lambda self: self.stored)
    @rule(count=st.integers(1, 3))
    def run_without_dare(self, count: int) -> None:
        """Unstaged updates are a DynamicCache's, unless something was pruned."""
        layer = self.cache.layer(0)
        if layer.pruned:
            try:
                self.cache.update(*keys_values(self.ids(count), 0, False), 0)
            except DareStateError:
                return
            raise AssertionError("a pruned cache was continued without DARE")
        where = layer.positions()
        assert ((where == -1) | (where == torch.arange(self.seen))).all(), "HF's mask would not fit"
        ids = self.ids(count)
        seen = self.seen
        self.target = seen + count
        self.log_more(count)
        self.cache.update(*keys_values(ids, 0, False), 0)
        for row, new in zip(self.model[0].rows, ids.tolist(), strict=True):
            row.extend((seen + c, token, 0.0) for c, token in enumerate(new))
        self.model[0].seen = self.target
        self.store(2, [list(range(seen, self.target))] * self.n_rows, False, False)

    # What HF and DARE do between forwards

    @rule(fraction=st.floats(0, 1.2))
    def crop(self, fraction: float) -> None:
        self.crop_by(int(fraction * self.seen))

    @rule(count=st.integers(0, 5))
    def crop_by(self, count: int) -> None:
        self.cache.crop(-count)
        for layer in self.model.values():
            layer.seen = max(layer.seen - count, 0)
            layer.rows = [[t for t in row if t[0] < layer.seen] for row in layer.rows]
        self.log = [row[: max(len(row) - count, 0)] for row in self.log]

    def take_rows(self, index: list[int]) -> None:
        for layer in self.model.values():
            layer.rows = [list(layer.rows[r]) for r in index]
        self.log = [list(self.log[r]) for r in index]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = st.integers(0, self.n_rows - 1)
        index = data.draw(st.lists(rows, min_size=self.n_rows, max_size=self.n_rows))
        self.cache.reorder_cache(torch.tensor(index))
        self.take_rows(index)

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data: st.DataObject, as_mask: bool) -> None:
        rows = st.integers(0, self.n_rows - 1)
        index = data.draw(st.lists(rows, min_size=1, max_size=self.n_rows, unique=True))
        if as_mask:
            index = sorted(index)
            chosen = torch.tensor([r in index for r in range(self.n_rows)])
        else:
            chosen = torch.tensor(index)
        self.cache.batch_select_indices(chosen)
        self.take_rows(index)

    @precondition(lambda self: self.stored and self.n_rows * 2 <= MAX_ROWS)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.take_rows([r for r in range(self.n_rows) for _ in range(2)])

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        for i, model in self.model.items():
            layer = self.cache.layer(i)
            if not layer.rows:
                continue
            gone = data.draw(st.sets(st.integers(0, max(self.seen - 1, 0)), max_size=40))
            keep = torch.tensor(
                [
                    [p >= 0 and (p + r) not in gone for p in row]
                    for r, row in enumerate(layer.positions().tolist())
                ]
            ).view(layer.rows, layer.width)
            model.rows = [
                [t for t in row if (t[0] + r) not in gone] for r, row in enumerate(model.rows)
            ]
            layer.keep_columns(keep, model.kept)

    @precondition(lambda self: self.stored)
    @rule()
    def rescore(self) -> None:
        for i, model in self.model.items():
            layer = self.cache.layer(i)
            if layer.rows:
                layer.keep_columns(layer.positions() >= 0, model.kept, layer.scores() + 1)
                model.rows = [[(p, token, s + 1) for p, token, s in row] for row in model.rows]

    @precondition(
        lambda self: (
            not any(
                layer.keys is not None and layer.keys.requires_grad for layer in self.cache.layers
            )
        )
    )
    @rule()
    def replace_by_copy(self) -> None:
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        for layer in original.layers:
            if layer.keys is not None:
                with torch.inference_mode():
                    layer.keys.fill_(float("nan"))
        original.reset()

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.model = {i: Layer(self.n_rows) for i in SHAPES}
        self.log = [[] for _ in self.log]
        self.stored = False

    # What holds at all times

    @invariant()
    def layers_hold_the_lists(self) -> None:
        for i, model in self.model.items():
            layer = self.cache.layer(i)
            assert layer.seen == layer.get_seq_length() == model.seen
            assert layer.get_mask_sizes(3) == (model.seen + 3, 0)
            if not layer.rows:
                assert not any(model.rows)
                continue
            assert layer.kept_host == layer.kept_lengths().tolist() == model.kept
            positions, scores = layer.positions(), layer.scores()
            assert positions.shape == scores.shape == (self.n_rows, layer.width)
            assert layer.keys.shape[2] == layer.values.shape[2] == layer.width
            valid = layer.valid()
            assert (valid is None) == bool((positions >= 0).all())
            for r, row in enumerate(model.rows):
                real = positions[r] >= 0
                stored = zip(
                    positions[r, real].tolist(),
                    layer.keys[r, 0, real, 0].tolist(),
                    scores[r, real].tolist(),
                    strict=True,
                )
                assert list(stored) == row
                assert (-layer.values[r, -1, real, -1]).tolist() == [token for _, token, _ in row]

    @invariant()
    def memory_is_bounded_and_measured(self) -> None:
        expected = 0
        for i, model in self.model.items():
            layer = self.cache.layer(i)
            if not layer.rows:
                assert layer.allocated_bytes() == 0
                continue
            heads, d_k, d_v, dtype = SHAPES[i]
            token = heads * (d_k + d_v) * dtype.itemsize
            assert layer.token_bytes() == token
            expected += token * sum(model.kept)
            bound = token * (1.25 * max(model.kept) * self.n_rows + 64)
            assert layer.allocated_bytes() <= bound
        assert self.cache.kv_bytes() == expected
        allocated = sum(layer.allocated_bytes() for layer in self.cache.layers)
        assert self.cache.allocated_bytes() == allocated

    @invariant()
    def cache_answers_for_all(self) -> None:
        cache = self.cache
        assert cache.get_seq_length() == cache.get_query_offset() == self.seen
        assert cache.get_seq_length(1) == cache.get_seq_length(7) == 0
        assert not cache.is_compileable
        assert cache.is_croppable
        assert len(cache.log) == len(self.log[0])
        if self.stored:
            assert cache.batch_size == self.n_rows
            kept = cache.kept_lengths()
            assert kept.tolist()[0] == self.model[0].kept
            assert kept.shape == (len(cache), self.n_rows)
        if self.log[0]:
            assert cache.log.modality.tolist() == [[m for m, _ in row] for row in self.log]
            assert cache.log.hop.tolist() == [[h for _, h in row] for row in self.log]


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestCacheMachine = CacheMachine.TestCase
