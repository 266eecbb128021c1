"""What the cache promises, one law a test."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig

from dare_hf.cache import DareCache, DareLayer
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.cache.ring import QueryRing
from dare_hf.cache.slab import limit, roomy
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.routing.scores import Softmax


def random_kv(rows: int, count: int, heads: int = 2, dim: int = 4, **kwargs):
    return torch.randn(rows, heads, count, dim, **kwargs), torch.randn(
        rows, heads, count, dim, **kwargs
    )


def filled(columns: list[list[int]], seen: int, **kwargs) -> DareLayer:
    """A layer that holds the given positions."""
    layer = DareLayer()
    index = torch.tensor(columns)
    layer.stage(index, seen, (index >= 0).sum(1).tolist())
    layer.update(*random_kv(*index.shape, **kwargs))
    return layer


def decode(layer: DareLayer, steps: int) -> None:
    for _ in range(steps):
        layer.stage(None, layer.seen + 1, [1] * layer.rows)
        layer.update(*random_kv(layer.rows, 1))


def assert_bounded(layer: DareLayer) -> None:
    bound = layer.token_bytes() * (1.25 * max(layer.kept_host) * layer.rows + 64)
    assert layer.allocated_bytes() <= bound


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class TestUse:
    def test_answers_before_anything_was_stored(self):
        cache = DareCache()
        assert cache.get_seq_length() == cache.get_query_offset() == 0
        assert cache.get_mask_sizes(5, 0) == cache.get_mask_sizes(5, 3) == (5, 0)
        assert (cache.get_max_length(), cache.batch_size, len(cache)) == (-1, -1, 0)
        assert (cache.is_initialized, cache.is_compileable) == (False, False)
        assert cache.is_sliding == []
        assert cache.kept_lengths().shape == (0, 0)
        assert cache.kv_bytes() == cache.allocated_bytes() == 0
        cache.crop(0)
        cache.crop(-3)
        cache.activate_past_recording()

    def test_a_sequence_that_was_pruned_is_not_continued_without_dare(self):
        layer = filled([[0, 2]], seen=3)
        with pytest.raises(DareStateError, match=r"2 of 3 tokens"):
            layer.update(*random_kv(1, 1))
        assert (layer.seen, layer.kept_host) == (3, [2])


class TestLayers:
    def test_come_in_any_order_and_with_gaps(self):
        cache = DareCache()
        for index in (4, 1):
            cache.update(*random_kv(2, 3, heads=index), index)
        assert len(cache) == 5
        assert cache.kept_lengths().tolist() == [[0, 0], [3, 3], [0, 0], [0, 0], [3, 3]]
        assert cache.get_seq_length() == 3, "layer 0 is unused: the first used one answers"
        assert cache.get_seq_length(2) == 0
        assert (cache.batch_size, cache.is_initialized) == (2, True)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([True, False, True, False]))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.kept_lengths().sum().item() == 2 * 2 * 2

    def test_config_gives_their_number(self):
        cache = DareCache(LlamaConfig(num_hidden_layers=3))
        assert len(cache) == 3
        assert not cache.is_initialized

    def test_config_of_another_kind_is_refused(self):
        with pytest.raises(DareInputError, match=r"model\.config.*got dict"):
            DareCache(config={"layers": 3})

    def test_may_differ_in_heads_dimensions_and_dtype(self):
        cache = DareCache()
        sizes = [(1, 4, torch.float16, 2), (3, 2, torch.bfloat16, 2), (2, 5, torch.float64, 8)]
        for index, (heads, dim, dtype, _) in enumerate(sizes):
            cache.update(*random_kv(2, 7, heads=heads, dim=dim, dtype=dtype), index)
        expected = sum(2 * 7 * heads * dim * 2 * size for heads, dim, _, size in sizes)
        assert cache.kv_bytes() == expected
        assert [layer.keys.dtype for layer in cache.layers] == [dtype for _, _, dtype, _ in sizes]

    def test_work_without_reading_the_device(self):
        """Meta tensors have no data: whatever waits for the device to answer fails on them."""
        layer = DareLayer()
        layer.stage(torch.tensor([[-1, 0, 2], [1, 2, 3]]), 5, [2, 3], torch.rand(2, 3))
        layer.update(*random_kv(2, 3, device="meta"))
        for _ in range(70):
            layer.begin()
            layer.stage(None, layer.seen + 1, [1, 1], torch.rand(2, 1))
            keys, _ = layer.update(*random_kv(2, 1, device="meta"))
            layer.commit()
        assert layer.kept_host == [72, 73]
        layer.advance(layer.seen + 2)
        layer.batch_repeat_interleave(2)
        layer.keep_columns(layer.valid(), [20, 20, 20, 20])
        layer.reorder_cache(torch.tensor([1, 1, 0, 3], device="meta"))
        layer.keep_columns(layer.positions() >= 0, layer.kept_host, layer.scores())
        layer.stage(None, layer.seen + 4, [4] * 4)
        layer.update(*random_kv(4, 4, device="meta"))
        layer.crop(-3)
        assert (layer.kept_host, layer.width, layer.seen) == ([21] * 4, 21, 78)
        tensors = (layer.positions(), layer.scores(), layer.kept_lengths(), layer.keys, keys)
        assert {t.device.type for t in tensors} == {"meta"}


class TestStaging:
    def test_returns_old_columns_then_staged_ones_even_when_it_repacks(self):
        layer = filled([list(range(100)), [-1] * 99 + [99]], seen=100)
        columns = torch.tensor([[-1] * 90, list(range(100, 190))])
        layer.stage(columns, 190, [0, 90])
        before = layer.positions()
        keys, _ = layer.update(*random_kv(2, 90))
        assert keys.shape[2] == before.shape[1] + 90
        assert layer.width == 100, "91 and 100 tokens need no 190 columns"
        assert layer.kept_host == layer.kept_lengths().tolist() == [100, 91]
        assert_bounded(layer)

    @pytest.mark.parametrize(
        ("columns", "seen", "kept", "message"),
        [
            ([[0, 1, 2]], 3, [3], "announced 3 new columns; the attention brought 2"),
            (None, 5, [], "announced 5 new columns; the attention brought 2"),
            ([[0, 1]], 2, [1, 1], "announced 2 rows"),
        ],
    )
    def test_another_number_of_columns_is_refused(self, columns, seen, kept, message):
        layer = DareLayer()
        layer.stage(None if columns is None else torch.tensor(columns), seen, kept)
        with pytest.raises(DareStateError, match=message):
            layer.update(*random_kv(1, 2))
        assert not layer.is_initialized
        layer.update(*random_kv(1, 2))
        assert layer.seen == 2, "what was announced is forgotten"

    def test_another_number_of_rows_is_refused(self):
        layer = filled([[0, 1]], seen=2)
        with pytest.raises(DareStateError, match="holds 1 rows; got keys of 3 rows"):
            layer.update(*random_kv(3, 1))

    def test_a_skipped_span_lies_between_stored_tokens(self):
        layer = DareLayer()
        layer.advance(4)
        assert (layer.seen, layer.width, layer.get_mask_sizes(1)) == (4, 0, (5, 0))
        layer.stage(None, 6, [2], torch.ones(1, 2))
        layer.update(*random_kv(1, 2))
        layer.advance(9)
        decode(layer, 2)
        assert layer.positions().tolist() == [[4, 5, 9, 10]]
        assert layer.scores().tolist() == [[1, 1, 0, 0]]
        layer.crop(-3)
        assert (layer.seen, layer.positions().tolist()) == (8, [[4, 5]])

    def test_a_decode_step_touches_no_bookkeeping_tensor(self):
        layer = filled([[1, 3, 4], [-1, 0, 2]], seen=5)
        table = layer._table.pos
        decode(layer, 1)
        slab = layer._slabs
        decode(layer, 5)
        assert layer._table.pos is table
        assert layer._slabs is slab, "room for the next steps was made once"
        assert layer.kept_host == layer.kept_lengths().tolist() == [9, 8]

    def test_scores_of_the_tail_can_be_noted_one_by_one(self):
        layer = filled([[0, 2]], seen=3)
        for step in range(150):
            decode(layer, 1)
            if step % 2:
                layer._table.note_tail_scores(torch.full((1, 1), float(step)))
        expected = [0.0, 0.0] + [float(s) if s % 2 else 0.0 for s in range(150)]
        assert layer.scores().tolist() == [expected]
        layer.crop(-20)
        layer.reorder_cache(torch.tensor([0, 0]))
        assert layer.scores().tolist() == [expected[:-20]] * 2


class TestMemory:
    def test_first_update_keeps_the_given_tensors(self):
        layer = DareLayer()
        keys, values = random_kv(2, 5)
        got = layer.update(keys, values)
        assert [t.data_ptr() for t in got] == [keys.data_ptr(), values.data_ptr()]

    def test_given_tensors_are_never_written(self):
        layer = DareLayer()
        keys, values = random_kv(2, 5)
        original = keys.clone()
        layer.update(keys, values)
        layer.crop(-2)
        layer.update(*random_kv(2, 2))
        assert torch.equal(keys, original)

    def test_what_was_made_under_inference_mode_goes_on_outside_of_it(self):
        layer = DareLayer()
        with torch.inference_mode():
            layer.update(*random_kv(2, 5))
            decode(layer, 2)
        keys = layer.keys.clone()
        assert layer._slabs.capacity > 7, "there is room to write in place"
        decode(layer, 1)
        assert torch.equal(layer.keys[:, :, :7], keys)

    def test_a_slice_of_a_larger_tensor_is_copied(self):
        layer = DareLayer()
        fused = torch.randn(2, 6, 300, 4)
        layer.update(fused[:, :2], fused[:, 2:4])
        assert layer.allocated_bytes() == 300 * 2 * layer.token_bytes()

    def test_compaction_frees_memory(self):
        layer = DareLayer()
        layer.update(*random_kv(2, 1000))
        keep = torch.zeros(2, 1000, dtype=torch.bool)
        keep[0, ::100] = keep[1, 5] = True
        expected = layer.keys[0, :, ::100].clone()
        layer.keep_columns(keep, [10, 1])
        storages = [t.untyped_storage().nbytes() for t in (layer.keys, layer.values)]
        assert sum(storages) == layer.allocated_bytes() == 2 * 10 * layer.token_bytes()
        assert torch.equal(layer.keys[0], expected)
        assert layer.positions()[1].tolist() == [-1] * 9 + [5]
        assert layer.seen == 1000
        decode(layer, 3)
        assert_bounded(layer)

    def test_compaction_that_drops_nothing_copies_nothing(self):
        layer = filled([[0, 2], [-1, 1]], seen=3)
        slab = layer._slabs
        layer.keep_columns(layer.positions() >= 0, [2, 1])
        assert layer._slabs is slab

    def test_compaction_never_revives_a_hole(self):
        layer = filled([[0, 1, 2], [0, -1, 2]], seen=3)
        keep = torch.tensor([[False, True, True], [True, True, True]])
        layer.keep_columns(keep, [2, 2])
        assert layer.positions().tolist() == [[1, 2], [0, 2]]
        assert layer.kept_host == layer.kept_lengths().tolist() == [2, 2]

    def test_crop_gives_memory_back(self):
        layer = DareLayer()
        layer.update(*random_kv(1, 1000))
        layer.crop(-990)
        assert_bounded(layer)
        assert layer.kept_host == [10]

    def test_short_crops_copy_nothing(self):
        layer = filled([list(range(400))], seen=400)
        decode(layer, 20)
        slab = layer._slabs
        for _ in range(10):
            layer.stage(None, layer.seen + 5, [5])
            layer.update(*random_kv(1, 5))
            layer.crop(-4)
        assert layer._slabs is slab

    def test_rows_by_turns_stay_bounded(self):
        layer = DareLayer()
        layer.update(*random_kv(3, 1))
        for step in range(1, 400):
            column = torch.full((3, 1), -1)
            column[step % 3] = step
            layer.stage(column, step + 1, [int(r == step % 3) for r in range(3)])
            layer.update(*random_kv(3, 1))
            assert_bounded(layer)
        assert layer.kept_host == layer.kept_lengths().tolist() == [134, 134, 134]
        positions = layer.positions()
        for row in range(3):
            real = positions[row][positions[row] >= 0]
            assert (real.diff() > 0).all(), "physical order is position order"

    def test_dropping_the_longest_row_shrinks(self):
        layer = filled([list(range(300)), [-1] * 299 + [7]], seen=300)
        layer.batch_select_indices(torch.tensor([1]))
        assert (layer.width, layer.kept_host) == (1, [1])
        assert_bounded(layer)

    @pytest.mark.parametrize("rows", [1, 2, 7, 33, 100])
    def test_growth_stays_within_the_limit(self, rows):
        for width in range(1, 2000):
            assert width <= roomy(width, rows) <= limit(width, rows)
            assert 4 * limit(width, rows) * rows <= 5 * width * rows + 256

    def test_bookkeeping_is_counted_apart(self):
        layer = filled([list(range(10))], seen=10)
        assert layer.bookkeeping_bytes() == 10 * 8


class TestQueries:
    """The ring of a layer's last queries goes where its keys go."""

    def layer(self) -> DareLayer:
        layer = filled([[0, 2], [-1, 1]], seen=3)
        query = torch.arange(2.0)[:, None, None, None].expand(2, 1, 3, 4)
        layer.ring = QueryRing(query, torch.tensor([[0, 1, 2]] * 2), Softmax(0.5))
        return layer

    def test_a_ring_holds_the_last_of_a_window(self):
        ring = self.layer().ring.pushed(torch.ones(2, 1, 2, 4), torch.tensor([[3, 4]] * 2), 4)
        assert ring.positions.tolist() == [[1, 2, 3, 4]] * 2
        assert ring.query.shape == (2, 1, 4, 4)

    def test_steps_hold_two_windows_at_most(self):
        """The last window of queries is there after every step, and never more than two."""
        ring = QueryRing.empty(torch.zeros(1, 1, 1, 1), 1.0)
        first = torch.arange(4)[None]
        ring = ring.pushed(first[:, None, :, None].float(), first, 4)
        for at in range(4, 30):
            ring = ring.noted(torch.full((1, 1, 1, 1), float(at)), at, 4)
            assert ring.nbytes() <= 2 * 4 * 4
            found = ring.until(torch.tensor([at]), 4)
            assert found.query.flatten().tolist() == found.positions[0].tolist()
            assert found.positions[0].tolist() == list(range(at - 3, at + 1))

    def test_columns_of_other_rows_crowd_nothing_out(self):
        """A row that gets nothing while a neighbour gets input remembers what it would alone."""
        ring = QueryRing.empty(torch.zeros(2, 1, 1, 1), 1.0)
        alone = QueryRing.empty(torch.zeros(1, 1, 1, 1), 1.0)
        at = 0
        for count, is_real in [(3, True), (9, False), (2, True), (1, False), (4, True)]:
            where = torch.arange(at, at + count)
            mine = where if is_real else torch.full((count,), -1)
            both = torch.stack([where, mine])
            ring = ring.pushed(both[:, None, :, None].float(), both, 6, dense=is_real)
            if is_real:
                one = where[None]
                alone = alone.pushed(one[:, None, :, None].float(), one, 6, dense=True)
            at += count
            last = alone.positions[0].tolist()
            assert ring.positions[1, -len(last) :].tolist() == last
            assert ring.query[1, 0, -len(last) :, 0].tolist() == last
            assert ring.positions.shape[1] <= 6
        before = ring.positions[1].tolist()
        next_one = torch.full((2, 1), 99)
        ring = ring.cropped(at - 1, 1, dense=False).pushed(
            next_one[:, None, :, None].float(), next_one, 6
        )
        assert ring.positions[1].tolist() == [*before[:-1], 99], "a rejected query left a hole"

    def test_rows_and_crop_and_rollback(self):
        layer = self.layer()
        ring = layer.ring
        layer.begin()
        layer.reorder_cache(torch.tensor([1, 1, 0]))
        layer.crop(-1)
        assert layer.ring.positions.tolist() == [[-1, 0, 1]] * 3
        assert layer.ring.query[:, 0, 1, 0].tolist() == [1, 1, 0]
        layer.rollback()
        assert layer.ring is ring
        layer.reset()
        assert layer.ring is None


class TestPlain:
    """Whether HF's own masks fit: the columns are the logical ones, pads included."""

    def test_pads_are_holes_and_hf_can_go_on(self):
        layer = filled([[-1, -1, 2, 3], [0, 1, 2, 3]], seen=4)
        assert (layer.holes, layer.pruned, layer.kept_host) == (True, False, [2, 4])
        layer.update(*random_kv(2, 1))
        assert layer.positions().tolist() == [[-1, -1, 2, 3, 4], [0, 1, 2, 3, 4]]

    def test_dropping_columns_ends_it(self):
        layer = filled([[-1] * 200 + [200], list(range(201))], seen=201)
        layer.batch_select_indices(torch.tensor([0]))
        assert layer.pruned
        layer.crop(-201)
        assert not layer.pruned, "an empty layer can be anything"


class TestCrop:
    def test_positive_is_refused_as_hf_does(self):
        for cache in (DareCache(), filled([[0]], seen=1)):
            with pytest.raises(ValueError, match="positive"):
                cache.crop(1)

    def test_into_ragged_rows(self):
        layer = filled([[0, 1, 4, 6], [-1, 2, 3, 5]], seen=7)
        decode(layer, 2)
        keys = layer.keys.clone()
        layer.crop(-4)
        assert layer.seen == 5
        assert layer.positions().tolist() == [[0, 1, 4], [-1, 2, 3]]
        assert layer.kept_host == layer.kept_lengths().tolist() == [3, 2]
        assert torch.equal(layer.keys[0], keys[0, :, :3])
        assert torch.equal(layer.keys[1, :, 1:], keys[1, :, 1:3])

    def test_of_tokens_that_were_not_stored(self):
        layer = filled([[0, 1]], seen=9)
        layer.crop(-5)
        assert (layer.seen, layer.positions().tolist()) == (4, [[0, 1]])

    def test_of_more_than_there_is(self):
        cache = DareCache()
        cache.update(*random_kv(2, 3), 0)
        cache.crop(-10)
        assert (cache.get_seq_length(), cache.kv_bytes()) == (0, 0)
        cache.update(*random_kv(2, 2), 0)
        assert cache.get_seq_length() == 2

    def test_log_and_hops_go_back(self):
        cache = DareCache()
        cache.hop_counters = HopCounters(
            [[3, 6], [3]], [2, 1], thinned=[[], []], spans=[[], []], gaps=[[], []], cuts=[[], []]
        )
        cache.log.append(torch.zeros(2, 8), torch.tensor([[0] * 4 + [1] * 4] * 2))
        cache.update(*random_kv(2, 8), 0)
        assert cache.hops.tolist() == [2, 1]
        cache.crop(-2)
        assert cache.hops.tolist() == [1, 1]
        assert cache.hop_counters.compacted == [1, 1]
        assert len(cache.log) == 6


class TestRollback:
    def forward(self, cache: DareCache, layers: int, count: int = 3) -> None:
        seen = cache.get_seq_length()
        cache.log.append(torch.zeros(2, count), torch.zeros(2, count))
        for index in range(layers):
            cache.layer(index).stage(None, seen + count, [count] * 2)
            cache.update(*random_kv(2, count), index)

    def state(self, cache: DareCache) -> object:
        layers = [(la.positions().tolist(), la.keys.tolist(), la.seen) for la in cache.layers]
        return layers, cache.log.modality.tolist(), cache.hops.tolist()

    def test_leaves_everything_as_before(self):
        cache = DareCache()
        cache.hop_counters = HopCounters(
            [[2], []], [0, 0], thinned=[[], []], spans=[[], []], gaps=[[], []], cuts=[[], []]
        )
        self.forward(cache, layers=2)
        before = self.state(cache)
        cache.begin()
        self.forward(cache, layers=1, count=200)
        cache.hop_counters.close(1, 4)
        cache.layer(5).stage(None, 4, [1, 1])
        cache.rollback()
        assert self.state(cache) == before
        assert_bounded(cache.layers[0])
        assert len(cache) == 2
        self.forward(cache, layers=2)
        assert cache.kept_lengths().tolist() == [[6, 6], [6, 6]]

    def test_of_the_first_forward_leaves_an_empty_cache(self):
        cache = DareCache()
        cache.begin()
        self.forward(cache, layers=2)
        cache.rollback()
        assert (len(cache), len(cache.log), cache.is_initialized) == (0, 0, False)

    def test_brings_back_what_was_cropped_and_written_over(self):
        layer = filled([[0, 2]], seen=3)
        decode(layer, 3)
        keys = layer.keys.clone()
        layer.begin()
        layer.crop(-2)
        decode(layer, 2)
        layer.rollback()
        assert torch.equal(layer.keys, keys)

    def test_after_commit_does_nothing(self):
        cache = DareCache()
        cache.begin()
        self.forward(cache, layers=2)
        cache.commit()
        cache.rollback()
        assert cache.get_seq_length() == 3

    def test_growing_lets_the_old_slab_go(self):
        cache = DareCache()
        self.forward(cache, layers=1)
        cache.begin()
        self.forward(cache, layers=1, count=100)
        assert cache.layers[0]._saved.slabs is cache.layers[0]._slabs


@dataclass
class Counts:
    """A recorder whose report is its counts."""

    flops: list[int]

    def report(self, cache: DareCache) -> list[int]:
        return self.flops


class TestCopies:
    def test_deepcopy_is_independent(self):
        cache = DareCache()
        cache.recorder = Counts([1, 2])
        cache.hop_counters = HopCounters([[1]], [0], thinned=[[]], spans=[[]], gaps=[[]], cuts=[[]])
        cache.log.append(torch.zeros(1, 3), torch.zeros(1, 3))
        layer = cache.layer(0)
        layer.stage(torch.tensor([[0, 2]]), 3, [2], torch.rand(1, 2))
        cache.update(*random_kv(1, 2), 0)
        decode(layer, 2)
        twin = copy.deepcopy(cache)
        keys, scores = layer.keys.clone(), layer.scores()
        decode(twin.layer(0), 3)
        twin.layer(0).keys.zero_()
        twin.hop_counters.close(0, 4)
        twin.crop(-3)
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.scores(), scores)
        assert (cache.hops.tolist(), len(cache.log), layer.seen) == ([1], 3, 5)
        assert twin.report == [1, 2]
        cache.recorder.flops.append(3)
        assert (cache.report, twin.report) == ([1, 2, 3], [1, 2])

    def test_reset_forgets_all_but_the_report(self):
        cache = DareCache()
        cache.recorder = Counts([1])
        cache.hop_counters = HopCounters([[1]], [0], thinned=[[]], spans=[[]], gaps=[[]], cuts=[[]])
        cache.log.append(torch.zeros(1, 3), torch.zeros(1, 3))
        cache.update(*random_kv(1, 3), 0)
        cache.reset()
        assert (cache.get_seq_length(), cache.allocated_bytes(), len(cache.log)) == (0, 0, 0)
        assert (cache.is_initialized, cache.hop_counters.ends, cache.report) == (False, [], [1])
        cache.update(*random_kv(4, 2), 0)
        assert cache.batch_size == 4
