"""The cache: what every layer has kept of a sequence that the outside sees at full length."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from dare_hf.cache.companions import Recorder, RunningCall, Told
from dare_hf.cache.cropping import check_crop
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.cache.layer import BeforeStep, DareLayer
from dare_hf.cache.log import TokenLog
from dare_hf.cache.mixed import other_layers, row_count, select_rows, snapshot
from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedConfig

    from dare_hf.cache.columns import ColumnTable
    from dare_hf.report import DareReport

__all__ = ["DareCache", "DareLayer", "Thinning", "TokenLog", "to_host"]


class Thinning(NamedTuple):
    """What a compaction has decided for one layer.

    Attributes:
        layer: The layer.
        table: Its bookkeeping when that was decided; another one when it was done.
        keep: Bool[B, C] columns that stay.
        kept: Real tokens among them per row.
        scores: Float32[B, C] new scores, None for none.
    """

    layer: DareLayer
    table: ColumnTable
    keep: Tensor
    kept: list[int]
    scores: Tensor | None


class _Saved(NamedTuple):
    """A cache as it was when a forward began; its layers keep their own."""

    layers: int
    log: TokenLog
    hop_counters: HopCounters
    others: dict[int, Any]
    steps: list[BeforeStep] | None


class DareCache(Cache):
    """Keys and values of the tokens each layer kept, behind the lengths of the whole sequence.

    Pass one as `cache` (`past_key_values` before transformers 5.24) and carry it across turns, or
    let generate make it. What HF reads (`get_seq_length`, `get_mask_sizes`) counts pruned tokens.

    Args:
        config: The model's config; gives the number of layers. Without it layers appear when they
            are first used.

    Attributes:
        log: Modality and hop of every logical token.
        hop_counters: Hop counters of the rows; of none until a model with DARE has run.
        recorder: Who counted the run this cache was last used in, or None.
        call: The generate whose sequence it holds, or held last; None outside of one.
        drafts: Whether an assistant of speculative decoding runs on it.
        changes: Goes up whenever rows or columns go or move; forwards only add.

    Raises:
        DareInputError: `config` is not a transformers config.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(layer_class_to_replicate=DareLayer)
        if config is not None:
            self.layers.extend(DareLayer() for _ in range(_num_layers(config)))
        self.log = TokenLog()
        self.hop_counters = HopCounters()
        self.recorder: Recorder | None = None
        self.drafts = False
        self.call: RunningCall | None = None
        self._slots: tuple[int, ...] | None = None
        self._saved: _Saved | None = None
        self._decided: tuple[list[Thinning], Callable[[DareCache], None] | None] | None = None
        self.changes = 0

    def arrange(self, slots: tuple[int, ...], config: PreTrainedConfig) -> None:
        """Make room for layers that are not routed between those that are, once.

        Args:
            slots: For each routed layer, in order, its index in the model's cache.
            config: The text config, which says what the other layers hold.

        Raises:
            DareInputError: The cache was filled by a model of other layers.
        """
        if self._slots == slots:
            return
        if any(layer.seen for layer in self.stored):
            raise DareInputError(
                f"{CACHE}: expected an empty DareCache or one of this model, whose layers "
                f"{list(slots)} store tokens; got one filled by another model. Pass a new "
                "DareCache()"
            )
        others = other_layers(config, slots)
        count = len(slots) + len(others)
        self.layers[:] = [others[i] if i in others else DareLayer() for i in range(count)]
        self._slots = slots

    @property
    def stored(self) -> list[DareLayer]:
        """The layers that store tokens: all of them, but for hybrid models."""
        if self._slots is None:
            return self.layers
        return [self.layers[slot] for slot in self._slots]

    @property
    def _others(self) -> dict[int, Any]:
        if self._slots is None:
            return {}
        return {i: layer for i, layer in enumerate(self.layers) if i not in self._slots}

    def layer(self, layer_idx: int) -> DareLayer:
        """The routed layer number `layer_idx`, made (and those before it) when it is new."""
        if self._slots is not None:
            return self.layers[self._slots[layer_idx]]
        while len(self.layers) <= layer_idx:
            self.layers.append(DareLayer())
        return self.layers[layer_idx]

    @property
    def report(self) -> DareReport | None:
        """DareReport of the run this cache was last used in; None before any."""
        return None if self.recorder is None else self.recorder.report(self)

    def __getstate__(self) -> dict[str, Any]:
        """Tensors and plain numbers; a copy knows what its run counted so far."""
        told = None if self.recorder is None else Told(self.recorder.report(self))
        return vars(self) | {"recorder": told}

    # What is stored

    @property
    def hops(self) -> Int[Tensor, " rows"]:
        """The hop each row is in; 0 before the prompt has been processed."""
        hops = self.hop_counters.open_hops() or [0] * max(self.batch_size, 0)
        return torch.tensor(hops, dtype=torch.long)

    def kept_lengths(self) -> Int[Tensor, "layers rows"]:
        """Real tokens stored per layer and row, counted on the device and returned on the CPU."""
        counts = torch.zeros(len(self.stored), max(self.batch_size, 0), dtype=torch.long)
        stored = {i: layer.kept_lengths() for i, layer in enumerate(self.stored) if layer.rows}
        for i, kept in zip(stored, to_host(list(stored.values())), strict=True):
            counts[i] = torch.tensor(kept)
        return counts

    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the real tokens stored, measured."""
        kept = self.kept_lengths().sum(1).tolist()
        return sum(n * layer.token_bytes() for n, layer in zip(kept, self.stored, strict=True))

    def allocated_bytes(self) -> int:
        """Bytes of the storage of keys and values: holes, pads and spare columns included.

        At most 1.25 x (longest row's kept x rows) + 64 tokens in every layer.
        """
        return sum(layer.allocated_bytes() for layer in self.stored)

    # What HF asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical tokens seen by a layer; the first used layer answers for an unused layer 0."""
        if layer_idx >= len(self.layers):
            return 0
        layer = self.layers[layer_idx]
        if hasattr(layer, "get_seq_length") and not isinstance(layer, DareLayer):
            return layer.get_seq_length()  # of a cross-attention layer
        seen = getattr(layer, "seen", 0)
        if seen == 0 and (layer_idx == 0 or not isinstance(layer, DareLayer)):
            return next((layer.seen for layer in self.stored if layer.seen), 0)
        return seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Logical length of the keys of a layer, and offset 0."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows without limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before anything was stored."""
        return next((layer.rows for layer in self.stored if layer.rows), -1)

    @property
    def is_initialized(self) -> bool:
        """Whether any token has passed; a layer that is never used does not count."""
        return any(layer.is_initialized or layer.seen for layer in self.stored)

    # A compaction that has begun is finished

    def decide(
        self, thinnings: list[Thinning], serve: Callable[[DareCache], None] | None = None
    ) -> None:
        """Note what layers shall let go of; it is done before anything else changes the cache.

        Args:
            thinnings: By layer.
            serve: What counters and reports are told by then; it may be told more than once.
        """
        self._decided = (thinnings, serve)

    def settle(self) -> None:
        """Do what is decided, one layer after the other, so that little memory is in use twice.

        Where memory lacks for a layer, or an interrupt comes, the rest is left for the next call.
        """
        if self._decided is None:
            return
        thinnings, serve = self._decided
        if serve is not None:
            serve(self)
        self.changes += bool(thinnings)
        for change in thinnings:
            if change.layer._table is change.table:
                change.layer.keep_columns(change.keep, change.kept, change.scores)
        self._decided = None

    # What HF changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` logical tokens; hop counters go back as well.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            DareStateError: It leaves a part of an input of which layers hold some tokens only.
        """
        if tokens_to_remove > 0:
            DareLayer().crop(tokens_to_remove)
        self.settle()
        removed = min(-tokens_to_remove, self.get_seq_length())
        check_crop(self, length := self.get_seq_length() - removed)
        for layer in self._others.values():
            layer.crop(tokens_to_remove)
        counts = {i: layer.crop_counts(tokens_to_remove) for i, layer in enumerate(self.stored)}
        unknown = {i: kept for i, kept in counts.items() if kept is not None}
        known = dict(zip(unknown, to_host(list(unknown.values())), strict=True))
        for i, layer in enumerate(self.stored):
            layer.crop(tokens_to_remove, known.get(i))
        if tokens_to_remove == 0:
            return
        self.changes += 1
        self.log.crop(length)
        self.hop_counters.crop(length)
        if self.recorder is not None:
            self.recorder.crop(removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, as beam search does."""
        self.settle()
        even = all(layer.even for layer in self.stored)
        order = None if even else beam_idx.tolist()
        self.changes += 1
        for layer in self.stored:
            layer.reorder_cache(beam_idx, order)
        for layer in self._others.values():
            select_rows(layer, beam_idx)
        self.log.reorder(beam_idx)
        self.hop_counters.reorder(beam_idx)
        if self.recorder is not None:
            self.recorder.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask)."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        self.settle()
        self.changes += 1
        for layer in self.stored:
            layer.batch_repeat_interleave(repeats)
        for layer in self._others.values():
            if rows := row_count(layer):
                select_rows(layer, torch.arange(rows).repeat_interleave(repeats))
        self.log.repeat(repeats)
        self.hop_counters.repeat(repeats)
        if self.recorder is not None:
            self.recorder.repeat(repeats)

    def reset(self) -> None:
        """Forget the sequence; the report of the last run stays."""
        for layer in self.layers:
            layer.reset()
        self.log.reset()
        self.changes += 1
        self._saved = self._decided = None
        self.hop_counters.reset()

    # A forward that fails leaves no trace

    def begin(self, *, step: bool = False) -> None:
        """Remember everything, until `commit` or `rollback`; called when a forward starts.

        Memory that is freed before the commit is held until then: compact before beginning.

        Args:
            step: The forward adds one real token to every row of every layer, and nothing else.
        """
        steps = [layer.before_step() for layer in self.stored] if step else None
        if steps is None:
            for layer in self.stored:
                layer.begin()
        others = {i: snapshot(layer) for i, layer in self._others.items()}
        counters = self.hop_counters.snapshot()
        self._saved = _Saved(len(self.layers), self.log.snapshot(), counters, others, steps)

    def commit(self) -> None:
        """Keep what has happened since `begin`; called when a forward ends."""
        saved, self._saved = self._saved, None
        if saved is None or saved.steps is None:
            for layer in self.stored:
                layer.commit()

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back what the block does when it fails, from `begin` on and hop counters before it.

        But for a hop whose compaction was decided: it stays served, and what that leaves to do is
        done by whatever comes next (`settle`).
        """
        before = self.hop_counters.snapshot()
        try:
            yield
        except BaseException:
            self.rollback()
            if sum(self.hop_counters.compacted) == sum(before.compacted):
                self.hop_counters = before
            raise

    def rollback(self) -> None:
        """Undo everything since `begin`; without one, nothing."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        del self.layers[saved.layers :]
        for layer in self.stored:
            layer.rollback()
        for before in saved.steps or ():
            before.layer.undo_step(before)
        for i, layer in saved.others.items():
            self.layers[i] = layer
        self.log, self.hop_counters, self._decided = saved.log, saved.hop_counters, None
        for layer in self.stored:
            layer.give_back()


def _num_layers(config: PreTrainedConfig) -> int:
    if not hasattr(config, "get_text_config"):
        raise DareInputError(
            "DareCache(config=...): expected a transformers model config (model.config) or None; "
            f"got {type(config).__name__}"
        )
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)


def to_host(counts: Sequence[Tensor]) -> list[Any]:
    """Counts of several layers as lists, with one device-to-host copy per device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, kept in enumerate(counts):
        by_device.setdefault(kept.device, []).append(i)
    lists: list[Any] = [[] for _ in counts]
    for members in by_device.values():
        fetched = torch.stack([counts[i] for i in members]).tolist()
        for i, kept in zip(members, fetched, strict=True):
            lists[i] = kept
    return lists
