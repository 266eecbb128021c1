"""The repetition of a context over its own cache: what each stored key is needed for.

A context is read once more behind itself, "Repeat the previous context:" first, and each stored
key is scored by the attention this repetition gives it (the idea of KVzip, Kim et al. 2025): the
root of the sum of squares over queries, which one strong look or many weak ones raise, mean over
heads. It is read in chunks, each over the context's cache alone, so that memory stays that of the
context and one chunk; each begins with the last tokens of the one before, which say where it goes
on, and the best of a key's scores counts. What the repetition would store is rolled back.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE
from dare_hf.engine.methods import named
from dare_hf.errors import DareInputError, DareStateError, UnsupportedModelError
from dare_hf.report.flops import attention_scorer_flops, forward_flops
from dare_hf.routing.scores import squared_attention
from dare_hf.scoring.attention import visible_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor, nn

    from dare_hf.cache import DareCache
    from dare_hf.engine.controller import Controller
    from dare_hf.engine.thread_state import Listener
    from dare_hf.scoring.observe import AttentionCall

LEAD = 8
"""Tokens before a chunk that it repeats once more."""

_TOKEN_INPUTS = ("per_layer_inputs", "moe_mm_token_type_ids")
"""What text models take for each token ([B, S, ...]) beside ids or embeddings."""

_BESIDE = ("cross_attention", "image_", "pixel_")
"""How arguments begin by which text models read images beside the tokens."""

_LARGEST = 2**25
"""Attention weights computed at once, of one layer: rows x heads x queries x keys."""


@contextmanager
def keeping_all(controller: Controller) -> Iterator[None]:
    """Let every layer keep every token in this thread, whatever the configuration says."""
    controller._local.whole += 1
    try:
        yield
    finally:
        controller._local.whole -= 1


@contextmanager
def reading_inputs(text_model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Note what the text model is called with in this thread, by name."""
    thread, calls = threading.get_ident(), []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            calls.append(named(type(module), args, kwargs))

    handle = text_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass
class KeyScores:
    """Hears the attentions of one chunk and scores the context's keys by them.

    Attributes:
        columns: Long[B, N + W] logical position of every key, -1 for pads: the context, the chunk.
        live: Bool[B, W] real tokens of the chunk.
        found: By layer Float[B, N], the best score of each key so far.
        heard: Layers whose attention was heard in this chunk.
    """

    columns: Tensor
    live: Tensor
    found: dict[int, Tensor] = field(default_factory=dict)
    heard: set[int] = field(default_factory=set)

    @torch.no_grad()
    def __call__(
        self, layer: int, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall
    ) -> None:
        """Score the keys of `layer` by query [B, H, W, d], key [B, Hkv, N + W, d]."""
        query, key, _ = tensors
        width, stored = self.live.shape[1], self.columns.shape[1]
        if query.shape[2] != width or key.shape[2] != stored:
            raise DareStateError(
                f"compress_context: expected an attention of {width} queries over {stored} keys in "
                f"layer {layer}; got {query.shape[2]} over {key.shape[2]}. This model cannot be "
                "read a second time: use max_kv_tokens of the configuration instead"
            )
        context = stored - width
        columns, live = self.columns.to(key.device), self.live.to(key.device)
        step = max(_LARGEST // (query.shape[0] * query.shape[1] * stored), 1)
        total: Any = 0  # [B, H, N]
        for part in torch.arange(width, device=key.device).split(step):
            seen = visible_keys(call, part.expand(len(live), -1), columns, width)
            given = squared_attention(query[:, :, part], key, seen, live[:, part], call.softmax)
            total = total + given[..., :context]
        score, before = total.sqrt().mean(1), self.found.get(layer)
        self.found[layer] = score if before is None else torch.maximum(before, score)
        self.heard.add(layer)


@dataclass(frozen=True)
class Repetition:
    """A context to be read once more.

    Attributes:
        controller: The model's controller.
        cache: The context's cache, unpruned.
        given: What the text model was called with when it read the context.
        instruction: Ids that stand before each chunk.
        chunk: Tokens of a row read at once.
    """

    controller: Controller
    cache: DareCache
    given: dict[str, Any]
    instruction: tuple[int, ...]
    chunk: int

    @torch.no_grad()
    def scores(self) -> dict[int, Tensor]:
        """By layer Float[B, N]: how much attention each stored key gets from the repetition.

        `check` comes first.

        Raises:
            DareStateError: An attention was not heard.
        """
        real = self.cache.log.modality >= 0
        found: dict[int, Tensor] = {}
        for start in range(0, int(real.sum(1).max()), self.chunk):
            found = self._read(real, start, found)
        return found

    def check(self) -> None:
        """Refuse contexts whose keys cannot be told by column, or not be read once more.

        Raises:
            DareInputError: Every row of the batch is padded, or words are to be said to a model
                that takes more than their ids.
            UnsupportedModelError: The text model reads images beside the tokens.
        """
        beside = [
            name
            for name, value in self.given.items()
            if isinstance(value, torch.Tensor) and name.startswith(_BESIDE)
        ]
        if beside:
            raise UnsupportedModelError(
                "compress_context: expected a model whose text model sees images as tokens; that "
                f"of a {self.controller.anatomy.spec.model_type} reads them beside the tokens "
                f"({beside[0]}), which a repetition cannot bring. Use max_kv_tokens instead"
            )
        if self.instruction and self.given.get("per_layer_inputs") is not None:
            raise DareInputError(
                "processor: expected none for a model whose tokens bring inputs for every layer "
                f"({self.controller.anatomy.spec.model_type}); got one. Leave it out"
            )
        length = self.cache.log.modality.shape[1]
        if any(slot.rows and slot.width != length for slot in self.cache.stored):
            raise DareInputError(
                "attention_mask: expected at least one row of the batch with (nearly) no pads; got "
                "pads in all. Cut the columns that are pads in every row"
            )

    def _read(self, real: Tensor, start: int, found: dict[int, Tensor]) -> dict[int, Tensor]:
        """Read the chunk from each row's real token number `start` on."""
        controller, cache = self.controller, self.cache
        arguments, live = self._chunk(real, start)
        width = live.shape[1]
        places = torch.arange(real.shape[1] + width, device=real.device)
        columns = torch.where(torch.cat([real, live], dim=1), places, -1)
        listener = KeyScores(columns, live, found)
        self._count(real, live)
        cache.begin()
        try:
            with controller.disable(), listening(controller, listener):
                controller.anatomy.text_model(**arguments, **{CACHE: cache}, use_cache=True)
        finally:
            cache.rollback()
        check_heard(controller, listener.heard)
        return listener.found

    def _count(self, real: Tensor, live: Tensor) -> None:
        """Add the FLOPs of reading and scoring a chunk to the report."""
        recorder: Any = self.cache.recorder
        shapes = self.controller.shapes
        queries = live.sum(1).tolist()
        keys = [q + n for q, n in zip(queries, real.sum(1).tolist(), strict=True)]
        flops = forward_flops(shapes, [queries] * len(shapes), [keys] * len(shapes))
        for shape in shapes:
            pairs = zip(queries, keys, strict=True)
            flops += sum(attention_scorer_flops(shape, q, k) for q, k in pairs)
        recorder.builder.scorer(flops, "prefill")

    def _chunk(self, real: Tensor, start: int) -> tuple[dict[str, Any], Tensor]:
        """The text model's arguments of one chunk, and Bool[B, W] which of its tokens are real.

        Instruction, lead, the chunk's tokens; pads stand at the right, so that nothing lies between
        a left-padded row and its repetition (windows count columns, convolutions read them).
        """
        count = real.sum(1, keepdim=True)
        begin = max(start - LEAD, 0)
        size = torch.where(count > start, (count - begin).clamp(max=start + self.chunk - begin), 0)
        head = torch.where(size > 0, len(self.instruction), 0)
        width = int((size + head).max())
        place = torch.arange(width, device=real.device).expand(len(real), -1)
        live, own = place < size + head, place >= head
        # Real tokens of a row in order: [B, N], its columns.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        index = order.gather(1, (begin + place - head).clamp(0, real.shape[1] - 1))
        arguments = self._tokens(index, place, own)
        arguments["attention_mask"] = torch.cat([real, live], dim=1).long()
        if (positions := self.given.get("position_ids")) is not None:
            first = order[:, begin : begin + 1]
            arguments["position_ids"] = self._positions(positions, real, index, first, place, own)
        return arguments, live

    def _tokens(self, index: Tensor, place: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Ids [B, W], or embeddings [B, W, D] where the text model got those."""
        ids, embeds = self.given.get("input_ids"), self.given.get("inputs_embeds")
        extra = {
            name: _taken(self.given[name], index)
            for name in _TOKEN_INPUTS
            if self.given.get(name) is not None
        }
        said = torch.tensor(self.instruction or (0,), device=index.device)
        said = said[place.clamp(0, len(said) - 1)]
        if embeds is None:
            return {"input_ids": torch.where(own, ids.gather(1, index), said)} | extra
        taken = _taken(embeds, index)
        if self.instruction:
            model: Any = self.controller.anatomy.hooked[0]
            said = model.get_input_embeddings()(said).to(taken)
            taken = torch.where(own[..., None], taken, said)
        return {"inputs_embeds": taken} | extra

    def _positions(
        self,
        given: Tensor,
        real: Tensor,
        index: Tensor,
        first: Tensor,
        place: Tensor,
        own: Tensor,
    ) -> Tensor:
        """[..., B, W]: the instruction goes on behind the context, the chunk behind it.

        Distances within the chunk are those of the context. What counts text alone ([4, B, N] of
        multimodal RoPE) goes on by itself.
        """
        given = given.expand(*given.shape[:-2], *real.shape)
        parts = [given[:1], given[1:]] if given.ndim == 3 and len(given) == 4 else [given]
        moved = []
        for part in parts:
            dims = tuple(range(part.ndim - 2))
            whole = part.amax(dims) if dims else part  # [B, N]
            after = whole.masked_fill(~real, -1).amax(1, keepdim=True) + 1
            low = part.amin(dims) if dims else part
            base = low.gather(1, first)
            taken = part.gather(-1, index.expand(*part.shape[:-1], -1))
            moved.append(torch.where(own, taken - base + len(self.instruction), place) + after)
        return torch.cat(moved).clamp(min=0)


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` [B, W] of a tensor [B, N, ...]."""
    view = index.view(*index.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, view.expand(*index.shape, *tensor.shape[2:]))


def check_heard(controller: Controller, heard: Collection[int]) -> None:
    """Refuse a context of which a layer's attention was not heard."""
    if missing := sorted(set(controller.anatomy.sources) - set(heard)):
        raise DareStateError(
            f"compress_context: the attentions of layers {missing} were not heard; was the "
            "attention implementation changed since DARE was put on (set_attn_implementation)? "
            "Call remove_dare(model), set it, then apply_dare(model) again"
        )


@contextmanager
def listening(controller: Controller, listener: Listener) -> Iterator[None]:
    """Let `listener` hear every attention of the model in this thread."""
    before, controller._local.listener = controller._local.listener, listener
    try:
        yield
    finally:
        controller._local.listener = before
