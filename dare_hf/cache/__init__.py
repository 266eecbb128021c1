"""The cache: what every layer has kept of a sequence that the outside sees at full length."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from transformers.cache_utils import Cache

from dare_hf.cache.layer import DareLayer
from dare_hf.cache.log import TokenLog
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedConfig

    from dare_hf.report import DareReport

__all__ = ["DareCache", "DareLayer", "HopTracker", "TokenLog"]


class Recorder(Protocol):
    """Who counts a run."""

    def report(self, cache: DareCache) -> DareReport:
        """What was counted, with the cache as it is now."""


class HopTracker(Protocol):
    """The hop counters that travel with a cache."""

    def open_hops(self) -> list[int]:
        """The hop each row is in."""

    def reorder(self, indices: Tensor) -> None:
        """Take the rows `indices`."""

    def repeat(self, repeats: int) -> None:
        """Repeat every row in place."""

    def crop(self, length: int) -> None:
        """Forget the tokens at logical positions >= `length`."""

    def crop_tail(self, count: int) -> None:
        """Forget the last `count` sampled tokens."""

    def reset(self) -> None:
        """Back to an empty sequence."""


class _Saved(NamedTuple):
    """A cache as it was when a forward began; its layers keep their own."""

    layers: int
    log: TokenLog
    hop_counters: HopTracker | None


class DareCache(Cache):
    """Keys and values of the tokens each layer kept, behind the lengths of the whole sequence.

    Pass one as `past_key_values` and carry it across turns, or let generate make it. What HF reads
    (`get_seq_length`, `get_mask_sizes`) is logical: pruned tokens count.

    Args:
        config: The model's config; gives the number of layers. Without it layers appear when they
            are first used.

    Attributes:
        log: Modality and hop of every logical token.
        hop_counters: Hop counters of the rows; None until a model with DARE has run.
        recorder: Who counted the run this cache was last used in, or None.

    Raises:
        DareInputError: `config` is not a transformers config.
    """

    layers: list[DareLayer]

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(layer_class_to_replicate=DareLayer)
        if config is not None:
            self.layers.extend(DareLayer() for _ in range(_num_layers(config)))
        self.log = TokenLog()
        self.hop_counters: HopTracker | None = None
        self.recorder: Recorder | None = None
        self._saved: _Saved | None = None

    def layer(self, layer_idx: int) -> DareLayer:
        """The layer at `layer_idx`, made (and those before it) when it does not exist yet."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DareLayer())
        return self.layers[layer_idx]

    @property
    def report(self) -> DareReport | None:
        """DareReport of the run this cache was last used in; None before any."""
        return None if self.recorder is None else self.recorder.report(self)

    # What is stored

    @property
    def hops(self) -> Int[Tensor, " rows"]:
        """The hop each row is in; 0 before the prompt has been processed."""
        if self.hop_counters is not None:
            return torch.tensor(self.hop_counters.open_hops(), dtype=torch.long)
        return torch.zeros(max(self.batch_size, 0), dtype=torch.long)

    def kept_lengths(self) -> Int[Tensor, "layers rows"]:
        """Real tokens stored per layer and row, counted on the device and returned on the CPU."""
        counts = torch.zeros(len(self.layers), max(self.batch_size, 0), dtype=torch.long)
        stored = {i: layer.kept_lengths() for i, layer in enumerate(self.layers) if layer.rows}
        for i, kept in zip(stored, _to_host(list(stored.values())), strict=True):
            counts[i] = torch.tensor(kept)
        return counts

    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the real tokens stored, measured."""
        kept = self.kept_lengths().sum(1).tolist()
        return sum(n * layer.token_bytes() for n, layer in zip(kept, self.layers, strict=True))

    def allocated_bytes(self) -> int:
        """Bytes of the storage of keys and values: holes, pads and spare columns included.

        At most 1.25 x (longest row's kept x rows) + 64 tokens in every layer.
        """
        return sum(layer.allocated_bytes() for layer in self.layers)

    # What HF asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical tokens seen by a layer; the first used layer answers for an unused layer 0."""
        if layer_idx >= len(self.layers):
            return 0
        seen = self.layers[layer_idx].seen
        if layer_idx == 0 and seen == 0:
            return next((layer.seen for layer in self.layers if layer.seen), 0)
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
        return next((layer.rows for layer in self.layers if layer.rows), -1)

    @property
    def is_initialized(self) -> bool:
        """Whether any token has passed; a layer that is never used does not count."""
        return any(layer.is_initialized or layer.seen for layer in self.layers)

    # What HF changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` logical tokens; hop counters go back as well.

        Raises:
            ValueError: `tokens_to_remove` is positive.
        """
        if tokens_to_remove > 0:
            DareLayer().crop(tokens_to_remove)
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        counts = {i: layer.crop_counts(tokens_to_remove) for i, layer in enumerate(self.layers)}
        unknown = {i: kept for i, kept in counts.items() if kept is not None}
        known = dict(zip(unknown, _to_host(list(unknown.values())), strict=True))
        for i, layer in enumerate(self.layers):
            layer.crop(tokens_to_remove, known.get(i))
        if tokens_to_remove == 0:
            return
        self.log.crop(length)
        if self.hop_counters is not None:
            self.hop_counters.crop(length)
            self.hop_counters.crop_tail(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, as beam search does."""
        even = all(layer.even for layer in self.layers)
        order = None if even else beam_idx.tolist()
        for layer in self.layers:
            layer.reorder_cache(beam_idx, order)
        self.log.reorder(beam_idx)
        if self.hop_counters is not None:
            self.hop_counters.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask)."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)
        self.log.repeat(repeats)
        if self.hop_counters is not None:
            self.hop_counters.repeat(repeats)

    def reset(self) -> None:
        """Forget the sequence; the report of the last run stays."""
        for layer in self.layers:
            layer.reset()
        self.log.reset()
        self._saved = None
        if self.hop_counters is not None:
            self.hop_counters.reset()

    # A forward that fails leaves no trace

    def begin(self) -> None:
        """Remember everything, until `commit` or `rollback`; called when a forward starts.

        Memory that is freed before the commit is held until then: compact before beginning.
        """
        for layer in self.layers:
            layer.begin()
        self._saved = _Saved(
            len(self.layers), self.log.snapshot(), copy.deepcopy(self.hop_counters)
        )

    def commit(self) -> None:
        """Keep what has happened since `begin`; called when a forward ends."""
        self._saved = None
        for layer in self.layers:
            layer.commit()

    def rollback(self) -> None:
        """Undo everything since `begin`; without one, nothing."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        del self.layers[saved.layers :]
        for layer in self.layers:
            layer.rollback()
        self.log, self.hop_counters = saved.log, saved.hop_counters


def _num_layers(config: PreTrainedConfig) -> int:
    if not hasattr(config, "get_text_config"):
        raise DareInputError(
            "DareCache(config=...): expected a transformers model config (model.config) or None; "
            f"got {type(config).__name__}"
        )
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)


def _to_host(counts: Sequence[Tensor]) -> list[list[int]]:
    """Counts of several layers as lists, with one device-to-host copy per device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, kept in enumerate(counts):
        by_device.setdefault(kept.device, []).append(i)
    lists: list[list[int]] = [[] for _ in counts]
    for members in by_device.values():
        fetched = torch.stack([counts[i] for i in members]).tolist()
        for i, kept in zip(members, fetched, strict=True):
            lists[i] = kept
    return lists
