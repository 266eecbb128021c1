"""A model of lmms-eval: any supported model of transformers, with DARE on it.

Imported by lmms-eval alone, which has to be there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts  # ty: ignore[import-not-found]
from lmms_eval.api.model import lmms  # ty: ignore[import-not-found]
from transformers import GenerationConfig

from dare_hf import DareConfig, apply_dare, last_report
from dare_hf.errors import DareInputError
from dare_hf.evaluation.costs import ReportTotals
from dare_hf.tuning.answers import MAX_NEW_TOKENS
from dare_hf.tuning.fidelity import forced, on_device
from dare_hf.tuning.loading import as_used, load_model, load_processor
from dare_hf.tuning.prompts import Prompts
from dare_hf.tuning.rows import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

FULL = "full"
"""`config=full`: the model as it is."""

_NOT_FOR_GENERATE = {"until", "image_aspect_ratio", "max_gen_toks"}


class DareLmms(lmms):
    """`--model dare_hf --model_args pretrained=FOLDER,config=safe`.

    Args:
        pretrained: Folder or hub id of a model that DARE supports, or an embedded one.
        config: A preset, a folder of `tune` or `train`, or "full" for no pruning.
        batch_size: Requests of a generate call, of those with the same settings.
        device: None for the accelerator where there is one.
        max_batch_size: Is not used: batches do not grow.
        load_in_4bit: Load the backbone in nf4.
        fields: Fields of DareConfig, over a preset: vision_retention=0.4.

    Attributes:
        totals: FLOPs and KV bytes of all runs, beside those of the unpruned model.

    Raises:
        DareError: There is no such model, or the configuration does not fit it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        config: str = "safe",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | str | None = None,
        load_in_4bit: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DareInputError(f"batch_size: expected a count >= 1; got {batch_size!r}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DareInputError(
                "dare_hf in lmms-eval: expected one process, since each would answer all requests; "
                f"got WORLD_SIZE={os.environ['WORLD_SIZE']}. Run one process per GPU with --offset "
                "and --limit"
            )
        if fields and config == FULL:
            raise DareInputError(f'model_args: expected no {sorted(fields)} beside config="full"')
        self.batch_size = int(batch_size)
        self.prompts = Prompts(load_processor(pretrained))
        self.model = load_model(pretrained, load_in_4bit=load_in_4bit)
        if device is not None and not load_in_4bit:
            self.model = self.model.to(device)
        self.pruned = config != FULL
        if self.pruned:
            chosen = DareConfig.preset(config, **fields) if fields else config
            apply_dare(self.model, chosen, processor=self.prompts.processor)
        self.totals = ReportTotals(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answers in the order of the requests, cut at the task's stop strings."""
        asked = []
        for request in requests:
            _, to_messages, settings, number, task, split = request.args
            asked.append((self._row(to_messages(self.task_dict[task][split][number])), settings))
        found: list[Any] = [None] * len(asked)
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(asked):
            groups.setdefault(repr(sorted(settings.items())), []).append(index)
        for indices in groups.values():
            rows = [asked[index][0] for index in indices]
            settings = asked[indices[0]][1]
            for batch in self.prompts.batches(rows, self.batch_size):
                answers = self._answers([rows[place] for place in batch], settings)
                for place, answer in zip(batch, answers, strict=True):
                    index = indices[place]
                    found[index] = answer
                    key = (requests[index].args[0], settings)
                    self.cache_hook.add_partial("generate_until", key, answer.text)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds; the task says what the next one asks."""
        found = []
        for request in requests:
            _, to_messages, settings, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            said: list[str] = []
            info = None
            messages = to_messages(doc, round_idx=0, previous_output=[], previous_round_info=None)
            while True:
                if isinstance(messages, tuple):
                    messages, ended, _, info = messages
                    if ended:
                        break
                said.append(self._answers([self._row(messages)], settings)[0].text)
                messages = to_messages(
                    doc, round_idx=len(said), previous_output=said, previous_round_info=info
                )
            found.append(said)
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        found = []
        for request in requests:
            context, target, to_visual, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            text = target if isinstance(target, str) else target(doc)
            content = [{"type": "image", "url": image} for image in to_visual(doc) or []]
            content.append({"type": "text", "text": context})
            row = self._row([{"role": "user", "content": content}])
            tokens = torch.tensor([self.prompts.ids(text)])
            with as_used(self.model):
                inputs = on_device(self.model, self.prompts.encode([row]))
                predicted = forced(self.model, inputs, tokens)[0]
            self._count(1)
            each = predicted.gather(-1, tokens[0][:, None])[:, 0]
            found.append((float(each.sum()), bool((predicted.argmax(-1) == tokens[0]).all())))
        return found

    def _answers(self, rows: list[Row], settings: dict[str, Any]) -> list[GenerationResult]:
        with as_used(self.model):
            inputs = on_device(self.model, self.prompts.encode(rows))
            out = self.model.generate(
                **inputs, pad_token_id=self.prompts.pad_id, **_for_generate(settings)
            )
        self._count(len(rows))
        sampled = getattr(out, "sequences", out)[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(1).tolist()
        answers = []
        for ids, length in zip(sampled, lengths, strict=True):
            text = _until(self.prompts.text(ids), settings.get("until"))
            counts = TokenCounts(input_tokens=length, output_tokens=_written(self.model, ids))
            answers.append(GenerationResult(text=text, token_counts=counts))
        return answers

    def _count(self, rows: int) -> None:
        if self.pruned:
            self.totals.add(last_report(self.model), rows)

    def _row(self, messages: Sequence[dict[str, Any]]) -> Row:
        """Messages of a task -> a row; its pictures are PIL images or files."""
        images: list[Any] = []
        made = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] == "image":
                    images.append(part["url"])
                elif part["type"] != "text":
                    raise DareInputError(
                        f"dare_hf in lmms-eval: expected text and images; got {part['type']}. Such "
                        "tasks are not run yet"
                    )
            made.append({"role": message["role"], "content": [_bare(part) for part in parts]})
        return Row(0, tuple(made), tuple(images))


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else dict(part)


def _for_generate(given: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as generate takes them; temperature 0 is greedy.

    Raises:
        DareInputError: One that generate does not know.
    """
    known = GenerationConfig().to_dict()
    unknown = sorted(set(given) - set(known) - _NOT_FOR_GENERATE)
    if unknown:
        raise DareInputError(f"generation_kwargs: expected arguments of generate; got {unknown}")
    settings = {name: value for name, value in given.items() if name in known}
    length = given.get("max_gen_toks", MAX_NEW_TOKENS)
    settings["max_new_tokens"] = settings.get("max_new_tokens") or length
    heat = settings.get("temperature")
    if heat is None or heat > 0:
        settings.setdefault("do_sample", heat is not None)
        return settings
    # the harness writes temperature 0 for greedy, whatever else stands beside it
    greedy = {name: value for name, value in settings.items() if not name.startswith("top_")}
    del greedy["temperature"]
    return greedy | {"do_sample": False}


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text


def _written(model: Any, ids: list[int]) -> int:
    """How many of a row's ids it wrote itself: up to its end, pads not counted."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
