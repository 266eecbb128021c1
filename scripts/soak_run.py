"""One case of `make soak`, run once with DARE while somebody watches."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from soak_cases import batch, config_of, rows_of, subject_of
from torch.nn.functional import pad
from transformers import LogitsProcessor

from dare_hf import DareCache, last_report
from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance.laws import snapshot
from dare_hf.conformance.subject import copied
from dare_hf.generation import HopInput, HopLoop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from soak_cases import Case
    from torch import Tensor

    from dare_hf.testing.samples import Batch

TOP_K = 20
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
TURN_WORDS = 7


@dataclass
class Forward:
    """What a cache held after one forward.

    Attributes:
        start: Logical tokens before it.
        end: Logical tokens after it.
        where: Per layer, Long[B, C]: positions of the columns its attention read.
        left: The same of what it held when the forward had ended: a cap is enforced then.
    """

    start: int
    end: int
    where: list[Tensor]
    left: list[Tensor]

    def held(self, layer: int, columns: int, *, left: bool = False) -> Tensor:
        """Bool[B, columns]: the tokens a layer could see, or had when the forward had ended."""
        where = (self.left if left else self.where)[layer]
        mask = torch.zeros(len(where), columns + 1, dtype=torch.bool)
        return mask.scatter(1, where.clamp(max=columns) % (columns + 1), True)[:, :columns]


class Forced(LogitsProcessor):
    """Makes generate write given tokens after a prompt of `span` columns."""

    def __init__(self, tokens: Tensor, span: int) -> None:
        self.tokens, self.span = tokens, span

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Bar every other token."""
        step = input_ids.shape[1] - self.span
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, step, None], 0.0)


def inject(hop: Any) -> HopInput | None:
    """Answer by the content of a hop alone: nothing, or one to three words."""
    key = sum(hop.ids.tolist())
    words = [20 + (key + i) % 50 for i in range(key % 4)]
    return HopInput(input_ids=words) if words else None


class Run:
    """A case that has run once with DARE, and what was seen of it.

    Args:
        case: The case.
        noise: Relative size of noise on the embeddings, for `undecided`.
        phase: Which noise.
    """

    def __init__(self, case: Case, noise: float = 0.0, phase: float = 0.0) -> None:
        self.case, self.subject = case, subject_of(case.arch, case.dtype)
        self.rows = rows_of(case)
        self.batch, self.config = batch(case, self.rows, pad=case.pad), config_of(case)
        self.span = self.batch.modality.shape[1]
        self.sources = locate(self.subject.model).sources
        self.before = snapshot(self.subject.model)
        self.logits = self.subject.forward(self.batch)
        self.seen: list[Forward] = []
        if case.mode == "refused":
            return
        with self.subject.dare(self.config), self.noise(noise, phase), self.watched():
            self.out = self.generate(self.batch)
            self.report = last_report(self.subject.model)
        self.state = state_of(cache_of(self.out))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of generate."""
        case = self.case
        others = [i for i in range(self.subject.vocabulary) if i not in case.allowed]
        options: dict[str, Any] = {"max_new_tokens": case.new, "suppress_tokens": others}
        if case.ends:
            options["eos_token_id"] = list(case.ends)
        if case.chunk:
            options["prefill_chunk_size"] = case.chunk
        if case.mode == "sample":
            options |= {"do_sample": True, "top_k": TOP_K}
        if case.mode == "beam":
            options |= {"num_beams": 2 + case.seed % 2, "output_scores": True}
        if case.mode == "lookup":
            options |= LOOKUP
        return options

    def generate(self, given: Batch, **kwargs: Any) -> Any:
        """One run; with two turns the output is that of the second, its logits those of both.

        Args:
            given: The prompts.
            kwargs: Keyword arguments of generate.
        """
        case, options = self.case, {**self.options(), **kwargs}
        if case.mode == "inject":
            options["hop_loop"] = HopLoop(inject)
        torch.manual_seed(case.seed)
        if case.turns == 1:
            return self.subject.generate(given, **options)
        cache = options.pop(CACHE, None) or DareCache()
        first = self.subject.generate(given, **{CACHE: cache}, **options)
        second = self.subject.generate(self.turn(given, first), **{CACHE: cache}, **options)
        second.logits = first.logits + second.logits
        return second

    def turn(self, given: Batch, first: Any) -> Batch:
        """What was said, and words of the next turn that depend on the row."""
        generator = torch.Generator().manual_seed(9)
        words = torch.randint(10, 80, (8, TURN_WORDS), generator=generator)
        new = torch.stack([words[int(ids[-1]) % 8] for ids in first.sequences])
        ids = torch.cat([first.sequences, new], dim=1)
        grown = ids.shape[1] - given.modality.shape[1]
        inputs = {"input_ids": ids}
        for name, value in given.inputs.items():
            if isinstance(value, torch.Tensor) and value.shape == given.modality.shape:
                filler = int(name in ("attention_mask", *given.suffix))
                inputs.setdefault(name, pad(value, (0, grown), value=filler))
        return type(given)(inputs, pad(given.modality, (0, grown), value=0), given.suffix)

    @contextmanager
    def noise(self, size: float, phase: float) -> Iterator[None]:
        """Noise on the embeddings that is a function of them: what was equal stays equal."""
        if not size:
            yield
            return
        found = self.subject.model.get_input_embeddings()
        hook = found.register_forward_hook(
            lambda module, args, out: out * (1 + size * torch.sin(1e4 * out + phase))
        )
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the cache holds after every forward."""
        model, where = self.subject.model, []
        used: dict[str, DareCache] = {}

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            used[CACHE] = kwargs[CACHE]

        def read(*_: Any) -> None:
            source = self.sources[len(where)]
            where.append(used[CACHE].layer(source).positions().clone())

        def end(*_: Any) -> None:
            cache, start = used[CACHE], self.seen[-1].end if self.seen else 0
            left = [cache.layer(source).positions().clone() for source in self.sources]
            self.seen.append(Forward(start, cache.get_seq_length(), where[:], left))
            where.clear()

        hooks = [layer.register_forward_hook(read) for layer in locate(model).layers]
        hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(model.register_forward_hook(end))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # What was run, in one piece

    @property
    def real(self) -> Tensor:
        """Bool[B, N]: tokens that are no padding, of all that the cache has seen."""
        return cache_of(self.out).log.modality >= 0

    def written(self) -> dict[str, Any]:
        """Inputs of one forward over the prompt and what followed it."""
        inputs, _ = self.subject.written(self.batch, self.out.sequences[:, :-1])
        if self.case.mode != "inject":
            return inputs
        model, ids = self.subject.model, self.out.sequences[:, :-1]
        inputs = {**copied(inputs), "attention_mask": self.real.long(), "input_ids": ids}
        if "position_ids" in inputs:
            given = {k: v for k, v in inputs.items() if k not in ("position_ids", "input_ids")}
            given["input_ids"] = ids
            inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, given)
        return inputs

    def places(self) -> list[list[int]]:
        """Per row the columns whose logits chose the sampled tokens, in order."""
        last = self.out.sequences.shape[1] - 1
        if self.case.turns == 2:
            first = range(self.span - 1, self.span - 1 + self.case.new)
            return [[*first, *range(last - self.case.new, last)]] * len(self.rows)
        if self.case.mode != "inject":
            return [list(range(self.span - 1, last))] * len(self.rows)
        rows = cache_of(self.out).hop_counters.spans
        inside = {column for spans in rows for start, end in spans for column in range(start, end)}
        sampled = [c for c in range(self.span, last + 1) if c not in inside]
        return [self._before(row, sampled) for row in range(len(self.rows))]

    def _before(self, row: int, columns: list[int]) -> list[int]:
        """The row's real column before each of these."""
        real = self.real[row].nonzero().flatten().tolist()
        return [max(r for r in real if r < column) for column in columns]


def state_of(cache: DareCache) -> dict[str, Any]:
    """What a cache holds, comparable by ==."""
    return {
        "hops": cache.hops.tolist(),
        "kept": cache.kept_lengths().tolist(),
        "tokens": [layer.positions().tolist() for layer in cache.stored],
    }


def own_tokens(cache: DareCache, row: int) -> list[list[int]]:
    """Per layer what a row stores, its own tokens numbered without its padding."""
    number = (cache.log.modality[row] >= 0).cumsum(0) - 1
    found = [layer.positions()[row] for layer in cache.stored if layer.rows]
    return [number[where[where >= 0]].sort().values.tolist() for where in found]


NOISE = {"wide": 1e-6, "float32": 2e-5, "bfloat16": 1e-3}
"""Of the embeddings: a little more than what other shapes of a matrix product round by, which
reaches 1e-7 of a float64 model too, whose norms and rotary angles are computed in float32."""
JUMP = 1e4
"""By how many times the noise a run's logits may move where nothing flips: an expert chosen
otherwise moves them by far more."""


def undecided(case: Case) -> bool:
    """Whether rounding decides the case: noise of its size changes what is kept or written.

    Two scores can lie closer together than what two right ways to compute them differ by, and so
    can two logits or the two experts of a token; then either choice is right. A token that occurs
    twice is no such case: it gets the same noise, and an exact tie goes to the earlier one.
    """
    first = Run(case)
    size = NOISE[case.dtype if first.subject.wide or case.dtype != "wide" else "float32"]
    for phase in (0.0, 1.0, 2.0):
        other = Run(case, size, phase)
        if other.out.sequences.tolist() != first.out.sequences.tolist():
            return True
        if other.state != first.state:
            return True
        pairs = zip(other.out.logits, first.out.logits, strict=True)
        if max(_gap(a, b) for a, b in pairs) > JUMP * size:
            return True
    return False


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits; those of barred tokens are -inf or the dtype's minimum."""
    known = theirs > torch.finfo(torch.float32).min
    return float((ours - theirs)[known].abs().max())
