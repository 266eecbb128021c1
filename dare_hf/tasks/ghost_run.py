"""Ghost letters with a model: every look closes a hop, and the hop loop puts the next image in.

The model writes `2. Look.` and its separator, which is the hop's delimiter; the environment answers
with image 2 and a separator; after the last one the model writes `The answer is C.`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.compat import processed
from dare_hf.errors import DareInputError
from dare_hf.generation import HopInput, HopLoop, HopState
from dare_hf.tasks import render
from dare_hf.tasks.ghost import GhostItem
from dare_hf.tasks.mvot import (
    ANSWER,
    BatchOutput,
    Context,
    Solution,
    blank_image,
    build_inputs,
    check_context,
)

# Ids of a look (number, dot, Look, dot, separator) and of the answer with end of text.
_LOOK_IDS = 5
_ANSWER_IDS = 6
_OPENING = "The answer is"


def delimiters(processor: ChameleonProcessor) -> tuple[int, ...]:
    """What ends a hop here: the separator the model writes after a look."""
    return (processor.tokenizer.sep_token_id,)


def keep_everything(processor: ChameleonProcessor) -> DareConfig:
    """DARE that prunes nothing: the plain model, with hops to put images between."""
    return DareConfig(
        vision_retention=1.0,
        text_retention=1.0,
        schedule="constant",
        hop_delimiters=delimiters(processor),
    )


def solve(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    items: Sequence[GhostItem],
    batch_size: int = 32,
    *,
    context: Context = "append_all",
    on_batch: Callable[[BatchOutput], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Solution]:
    """Solves items by greedy generation, the environment putting in one image per look.

    Args:
        model: dare-tiny-anole or another Chameleon-type model that learned the task. If DARE is on
            it, its config must have `delimiters(processor)`; otherwise DARE that prunes nothing is
            put on for the length of the call.
        processor: Its processor.
        items: From `ghost.sample`; items with equally many images share a batch, results keep this
            order.
        batch_size: Rows of a generate call.
        context: "append_all"; "markov" (every look is a generate call of its own, after question,
            first image and latest look with its image; the last one is opened with "The answer is",
            so that only the letter is at stake); "text_only" (no images at all); "blank"
            (all images show an empty field).
        on_batch: Called after each generate call; the place to collect `last_report(model)`.
        progress: Called with (items done, items in all) after each batch.
        generate_kwargs: Further arguments of generate.

    Returns:
        One solution per item; none of their images are the model's, so there are none in it.

    Raises:
        DareInputError: There is no such context, or the DARE on the model closes no hop at looks.
    """
    check_context(context)
    order = sorted(range(len(items)), key=lambda k: len(items[k].points))
    solutions: dict[int, Solution] = {}
    with _dare(model, processor):
        while order:
            length = len(items[order[0]].points)
            indices = [k for k in order[:batch_size] if len(items[k].points) == length]
            order = order[len(indices) :]
            rows = [items[k] for k in indices]
            call = _Call(model, processor, rows, tuple(indices), context, generate_kwargs, on_batch)
            for k, new in zip(indices, call.run(), strict=True):
                text = processor.decode(new, skip_special_tokens=True)
                found = ANSWER.search(text)
                answer = found.group(1) if found else None
                solutions[k] = Solution(
                    item=items[k],
                    answer=answer,
                    correct=answer == items[k].answer,
                    text=text,
                    images=(),
                    image_correct=(),
                    ids=tuple(new),
                    prompt_length=call.length,
                )
            if progress is not None:
                progress(len(solutions), len(items))
    return [solutions[k] for k in range(len(items))]


@contextmanager
def _dare(model: Any, processor: ChameleonProcessor) -> Iterator[None]:
    """DARE with the right delimiter for the length of the block."""
    if "_dare" not in vars(model):
        apply_dare(model, keep_everything(processor))
        try:
            yield
        finally:
            remove_dare(model)
        return
    ends = set(delimiters(processor))
    if not ends & set(model._dare.controller.config.hop_delimiters):
        raise DareInputError(
            f"model: expected DARE with the hop delimiter {sorted(ends)} (the separator), got "
            f"{model._dare.controller.config.hop_delimiters}: apply DARE with "
            "hop_delimiters=ghost_run.delimiters(processor)"
        )
    yield


class _Call:
    """The generate calls of one batch, whose rows have equally many images."""

    def __init__(
        self,
        model: Any,
        processor: ChameleonProcessor,
        rows: Sequence[GhostItem],
        indices: tuple[int, ...],
        context: Context,
        settings: dict[str, Any],
        on_batch: Callable[[BatchOutput], None] | None,
    ) -> None:
        self.model, self.processor, self.rows, self.indices = model, processor, rows, indices
        self.context, self.settings, self.on_batch = context, settings, on_batch
        self.count = len(rows[0].points)
        self.length = 0

    def run(self) -> list[list[int]]:
        """Ids of each row after the prompt."""
        return self._steps() if self.context == "markov" else self._whole()

    def _whole(self) -> list[list[int]]:
        loop = HopLoop(self._answer_look, max_hops=self.count, processor=self.processor)
        room = (self.count + 1) * _LOOK_IDS + _ANSWER_IDS
        inputs = build_inputs(self.processor, self.rows, self.context)
        return self._generate(inputs, self.indices, max_new_tokens=room, hop_loop=loop)

    def _answer_look(self, state: HopState) -> HopInput:
        """The next image, or what stands for it in this context, and a separator."""
        if self.context == "text_only":
            return HopInput(text="<sep>")
        return HopInput(
            text="<image><sep>", images=self._picture(self.rows[state.row], state.index)
        )

    def _picture(self, item: GhostItem, step: int) -> Image.Image:
        return blank_image() if self.context == "blank" else render.grid_to_image(item.grid(step))

    def _steps(self) -> list[list[int]]:
        """The context "markov"; the call after the last image begins with the answer's words.

        So a model that has lost count of its looks still answers: what fails is not the counting.
        """
        separator = self.processor.tokenizer.sep_token_id
        new: list[list[int]] = [[] for _ in self.rows]
        asked: list[list[str]] = [[] for _ in self.rows]
        alive = list(range(len(self.rows)))
        opening = self.processor.tokenizer.encode(_OPENING, add_special_tokens=False)
        for step in range(self.count + 1):
            if not alive:
                break
            begun = opening if step == self.count else []
            inputs = self._given(alive, [asked[k] for k in alive], bool(begun))
            which = tuple(self.indices[k] for k in alive)
            sampled = self._generate(
                inputs,
                which,
                max_new_tokens=_LOOK_IDS + _ANSWER_IDS,
                eos_token_id=[self.processor.tokenizer.eos_token_id, separator],
            )
            going = []
            for k, ids in zip(alive, sampled, strict=True):
                new[k] += [*begun, *ids]
                if ids[-1] == separator and step < self.count:
                    asked[k].append(self.processor.decode(ids[:-1]))
                    going.append(k)
            alive = going
        return new

    def _given(self, alive: list[int], asked: list[list[str]], answering: bool) -> dict[str, Any]:
        """Question and first image, the latest look with its image, and the answer's begin."""
        texts, pictures = [], []
        for k, looks in zip(alive, asked, strict=True):
            item = self.rows[k]
            text, shown = item.prompt, [render.grid_to_image(item.grid(0))]
            if looks:
                text += f"<sep>{looks[-1]}<sep><image>"
                shown.append(render.grid_to_image(item.grid(len(looks))))
            texts.append(text + "<sep>" + (_OPENING if answering else ""))
            pictures.append(shown)
        return dict(
            processed(  # the separators are written above
                self.processor,
                text=texts,
                images=pictures,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )

    def _generate(
        self, inputs: dict[str, Any], indices: tuple[int, ...], **settings: Any
    ) -> list[list[int]]:
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        self.length = inputs["input_ids"].shape[1]
        outputs = self.model.generate(**inputs, **{"do_sample": False, **settings, **self.settings})
        if self.on_batch is not None:
            self.on_batch(BatchOutput(indices, inputs, outputs, self.length))
        ids = getattr(outputs, "sequences", outputs)
        return [self._cut(row[self.length :]) for row in ids.tolist()]

    def _cut(self, new: list[int]) -> list[int]:
        """Up to and including end of text, without padding."""
        tokenizer = self.processor.tokenizer
        new = [token for token in new if token != tokenizer.pad_token_id]
        end = tokenizer.eos_token_id
        return new[: new.index(end) + 1] if end in new else new
