"""How near a pruned model stays to the unpruned one: agreement and KL, teacher-forced, on rows.

Both run in generate, token by token along the same text, so that what is measured is what is
deployed: hops close, budgets are enforced, reports count.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from dare_hf.api import dare_disabled, last_report
from dare_hf.calibration.continuation import until_end
from dare_hf.engine.attach import unwrap
from dare_hf.evaluation.intervals import clustered_share
from dare_hf.evaluation.processes import ALONE, Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

OWN_ANSWER = 32  # most tokens of the model's own greedy answer
BATCH = 8
_KEPT_BYTES = 2**31  # of reference log-probabilities; beyond it they are computed again


@dataclass(frozen=True)
class Fidelity:
    """What a pruned model predicts where the unpruned one was asked too.

    Attributes:
        hits: Per row, places where both predict the same token.
        sizes: Per row, places.
        kl: Per row, the sum over its places of the KL of the pruned to the unpruned predictions,
            nats.
        flops_ratio: FLOPs as a share of the same tokens' unpruned.
        kv_ratio: KV bytes at the end of each generate call, likewise.
    """

    hits: tuple[int, ...]
    sizes: tuple[int, ...]
    kl: tuple[float, ...]
    flops_ratio: float
    kv_ratio: float

    @property
    def agreement(self) -> float:
        """Share of places with the same prediction."""
        return sum(self.hits) / sum(self.sizes)

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """Its 95 % interval, over rows."""
        return clustered_share(self.hits, self.sizes)

    @property
    def mean_kl(self) -> float:
        """Mean over places."""
        return sum(self.kl) / sum(self.sizes)


@dataclass(frozen=True)
class Reference:
    """A batch of rows, and the text a model is led along.

    Attributes:
        indices: Which rows.
        inputs: Inputs of generate.
        tokens: Long[B, n] the text: the given answers, or the unpruned model's own.
        live: Bool[B, n] where a row's text goes on.
    """

    indices: list[int]
    inputs: dict[str, Any]
    tokens: Tensor
    live: Tensor


class References:
    """The unpruned model on rows, computed once.

    Args:
        model: The model, plain or with DARE, which is off while it is asked.
        prompts: Builds its inputs.
        rows: At least one.
        batch_size: Most rows of a generate call.
        keep: Keep predictions for further comparisons, up to 2 GiB of them.
    """

    def __init__(
        self, model: Any, prompts: Prompts, rows: Sequence[Row], batch_size: int, *, keep: bool
    ) -> None:
        self.model, self.prompts, self.rows, self.keep = model, prompts, rows, keep
        self._plan = list(prompts.batches(rows, batch_size))
        self._made: dict[int, Reference] = {}
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Batches."""
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[Reference, Tensor]]:
        """Each batch as `batch` has it."""
        return map(self.batch, range(len(self)))

    def batch(self, number: int) -> tuple[Reference, Tensor]:
        """A batch with Float32[B, n, V] log-probabilities of the unpruned model."""
        made = self._made.get(number) or self._new(self._plan[number])
        truth = self._kept.get(number)
        if truth is None:
            with _plain(self.model):
                truth = forced(self.model, made.inputs, made.tokens)
        if self.keep:
            self._made[number] = made
            if sum(kept.nbytes for kept in self._kept.values()) + truth.nbytes <= _KEPT_BYTES:
                self._kept[number] = truth
        return made, truth

    def _new(self, indices: list[int]) -> Reference:
        rows = [self.rows[index] for index in indices]
        inputs = on_device(self.model, self.prompts.encode(rows))
        if rows[0].answer is None:
            with _plain(self.model):
                tokens = greedy(self.model, inputs, OWN_ANSWER, self.prompts.pad_id)
            return Reference(indices, inputs, tokens, until_end(self.model, tokens))
        answers = [self.prompts.ids(row.answer or "") for row in rows]
        tokens, live = filled(answers, self.prompts.pad_id)
        return Reference(indices, inputs, tokens, live & until_end(self.model, tokens))


def fidelity(
    model: Any,
    references: References,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> Fidelity:
    """Compare a model with DARE on it with the references.

    Args:
        model: With DARE.
        references: Of the same model.
        progress: Called with the rows done after each batch.
        processes: Those that share the batches; all have the result.
    """
    rows = 0

    def done(_: int, batch: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(batch["indices"])
        if progress is not None:
            progress(rows)

    batches = processes.mapped(
        range(len(references)), lambda number: _compared(model, *references.batch(number)), done
    )
    found = {k: row for one in batches for k, row in zip(one["indices"], one["rows"], strict=True)}
    hits, sizes, kl = zip(*(found[index] for index in sorted(found)), strict=True)
    totals = {name: sum(one[name] for one in batches) for name in _TOTALS}
    flops_ratio = totals["flops"] / totals["flops_baseline"]
    return Fidelity(hits, sizes, kl, flops_ratio, totals["kv"] / totals["kv_baseline"])


_TOTALS = ("flops", "flops_baseline", "kv", "kv_baseline")


def _compared(model: Any, reference: Reference, truth: Tensor) -> dict[str, Any]:
    """Of a batch: per row its hits, places and KL; FLOPs and KV bytes of the call."""
    predicted = forced(model, reference.inputs, reference.tokens)
    report = last_report(model)
    same = (predicted.argmax(-1) == truth.argmax(-1)) & reference.live
    kl = (truth.exp() * (truth - predicted)).sum(-1).clamp(min=0) * reference.live
    columns = (same.sum(1), reference.live.sum(1), kl.sum(1))
    return {
        "indices": reference.indices,
        "rows": list(zip(*(column.tolist() for column in columns), strict=True)),
        "flops": sum(report.flops.values()),
        "flops_baseline": sum(report.flops_baseline.values()),
        "kv": report.kv_bytes,
        "kv_baseline": report.kv_bytes_baseline,
    }


def greedy(model: Any, inputs: dict[str, Any], length: int, pad_id: int) -> Tensor:
    """Long[B, n] on the CPU: the model's own answer of at most `length` tokens."""
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": pad_id}
    output = model.generate(**inputs, max_new_tokens=length, **settings)
    sequences = getattr(output, "sequences", output)
    return sequences[:, inputs["input_ids"].shape[1] :].cpu()


def forced(model: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Float32[B, n, V] log-probabilities on the CPU, led along `tokens` Long[B, n]."""
    led = _Led(tokens.to(inputs["input_ids"].device), inputs["input_ids"].shape[1])
    output = model.generate(
        **inputs,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([led]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = torch.stack(
        [step.float().log_softmax(-1).clamp(min=-1e4).cpu() for step in output.logits], 1
    )
    missing = tokens.shape[1] - steps.shape[1]  # every row had ended
    return torch.nn.functional.pad(steps, (0, 0, 0, missing)) if missing else steps


class _Led(LogitsProcessor):
    """Lets generate sample nothing but the tokens of a text.

    Args:
        tokens: Long[B, n].
        prompt: Columns before them.
    """

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, step, 0.0)


def on_device(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs where the model is, pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _plain(model: Any) -> Any:
    return dare_disabled(model) if "_dare" in vars(unwrap(model)) else nullcontext()


def filled(answers: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Long[B, n] and Bool[B, n]: answers of different lengths, and where they are."""
    most = max(map(len, answers))
    tokens = torch.tensor([[*ids, *[pad_id] * (most - len(ids))] for ids in answers])
    lengths = torch.tensor([len(ids) for ids in answers])
    return tokens, torch.arange(most)[None] < lengths[:, None]
