"""Rows -> what a model's processor makes of them."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from dare_hf.tuning.rows import Row


class Prompts:
    """Builds inputs of generate from rows, by the processor and its chat template.

    A model without a chat template gets a row's prompt as it is written. An image stands where the
    prompt has the processor's placeholder, and before the text where it has none.

    Args:
        processor: The model's processor, or the tokenizer of a language model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees = getattr(processor, "image_processor", None) is not None
        self._placeholder = getattr(processor, "image_token", None) or "<image>"
        self._template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template

    def check(self, rows: Iterable[Row]) -> None:
        """Build every row once, before any weight is there.

        Raises:
            DareInputError: A row that this processor cannot take; the text has its line.
        """
        for row in rows:
            if row.images and not self.sees:
                raise row.refused(
                    f"expected text alone for a language model; got {len(row.images)} images"
                )
            if not self._template and (len(row.messages) > 1):
                raise row.refused(
                    "messages: expected one message of the user, since the model's folder has no "
                    f"chat template; got {len(row.messages)}"
                )
            try:
                length = self.encode([row])["input_ids"].shape[1]
            except DareInputError:
                raise
            except Exception as error:  # a processor of transformers: any kind of refusal
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise row.refused(
                    f"expected a row that {type(self.processor).__name__} takes; got {reason:.200}"
                ) from error
            texts = (*row.choices, *([row.answer] if row.answer else ()))
            if not length or not all(self.ids(text) for text in texts):
                raise row.refused("expected text that encodes to at least one token; got none")

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows as one batch, padded on the left."""
        texts = [self._text(row) for row in rows]
        begin = self.tokenizer.bos_token
        settings: dict[str, Any] = {"return_tensors": "pt"}
        if len(rows) > 1 and self.tokenizer.pad_token_id is not None:
            settings |= {"padding": True, "padding_side": "left"}
        if self._template and begin and texts[0].startswith(begin):
            settings["add_special_tokens"] = False  # the template has put them
        if any(row.images for row in rows):
            settings["images"] = [[_opened(file) for file in row.images] for row in rows]
        made = self.processor(text=texts, **settings)
        return {name: value for name, value in made.items() if hasattr(value, "shape")}

    def ids(self, answer: str) -> list[int]:
        """The tokens of an answer, without special ones."""
        return list(self.tokenizer.encode(answer, add_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        """What sampled tokens say."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def pad_id(self) -> int:
        """What rows of a batch are filled up with."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next((token for token in (pad, end) if token is not None), 0)

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[list[int]]:
        """Indices of rows that go through the model together: as many images, answers alike.

        Args:
            rows: All rows.
            size: Most rows of a batch; one, where the tokenizer cannot pad.
        """
        size = size if self.tokenizer.pad_token_id is not None else 1
        kinds: dict[tuple[int, bool], list[int]] = {}
        for index, row in enumerate(rows):
            kinds.setdefault((len(row.images), row.answer is None), []).append(index)
        for kind in kinds.values():
            ordered = sorted(kind, key=lambda index: len(rows[index].answer or ""))
            for first in range(0, len(ordered), size):
                yield ordered[first : first + size]

    def _text(self, row: Row) -> str:
        messages = [{**m, "content": self._placed(m["content"], row)} for m in row.messages]
        if not self._template:
            return "".join(
                self._placeholder if part["type"] == "image" else part["text"]
                for part in messages[0]["content"]
            )
        if not self.sees:
            for message in messages:
                message["content"] = "".join(part["text"] for part in message["content"])
        made = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return made[0] if isinstance(made, list) else made

    def _placed(self, content: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
        """Content with images where the text has placeholders, if it has one for each of them."""
        texts = [part["text"] for part in content if part["type"] == "text"]
        written = sum(text.count(self._placeholder) for text in texts)
        if not written or written != len(row.images):
            return content
        parts: list[dict[str, Any]] = []
        for text in texts:
            for number, piece in enumerate(text.split(self._placeholder)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": piece}] if piece else []
        return parts


def _opened(file: Any) -> Any:
    from PIL import Image

    if isinstance(file, Image.Image):
        return file.convert("RGB")
    with Image.open(BytesIO(file.read_bytes())) as picture:
        return picture.convert("RGB")
