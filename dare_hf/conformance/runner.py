"""Runs the laws on every architecture of transformers that reads images and text, or text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dare_hf.architectures.locate import find_spec
from dare_hf.conformance.laws import CHECKS, LawBroken
from dare_hf.conformance.subject import Subject
from dare_hf.errors import DareInputError, UnsupportedModelError, alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Kind(StrEnum):
    """Whether a model reads images, or text alone."""

    vision = "vision"
    text = "text"


MAPPINGS = {
    Kind.vision: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    Kind.text: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""Where transformers lists the architectures of a kind: model_type -> class name."""


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        model_type: Its `config.model_type`.
        name: The class of its model.
        status: "pass", "refused" or "fail".
        reason: Why it is refused, or which law broke and by how much; empty for a pass.
        seconds: How long the row took.
    """

    model_type: str
    name: str
    status: str
    reason: str
    seconds: float

    def to_dict(self) -> dict[str, str]:
        """The row as `dare-hf conformance --json` prints it."""
        return {
            "model_type": self.model_type,
            "class": self.name,
            "status": self.status,
            "reason": self.reason,
        }


def architectures(kind: Kind = Kind.vision) -> dict[str, str]:
    """model_type -> class name of every architecture of a kind that transformers has.

    Args:
        kind: Vision is the mapping of AutoModelForImageTextToText; text that of
            AutoModelForCausalLM, without those names that are in the other one too.
    """
    above = () if kind is Kind.vision else MAPPINGS[Kind.vision]
    return {name: found for name, found in MAPPINGS[kind].items() if name not in above}


def run_row(model_type: str) -> Row:
    """Run all laws on the tiny model of one architecture.

    Raises:
        DareInputError: transformers has no such architecture.
    """
    name = _class_name(model_type)
    started = time.perf_counter()
    status, reason = _verdict(model_type)
    seconds = time.perf_counter() - started
    return Row(model_type, name, status, reason, seconds)


def run_all(
    only: Iterable[str] | None = None, *, kind: Kind = Kind.vision, jobs: int = 1
) -> Iterator[Row]:
    """The rows in the mapping's order, each as it is done.

    Args:
        only: model_types to run, of either kind; None for every one of `kind`.
        kind: Vision-language models or language models.
        jobs: Processes that share the rows.

    Raises:
        DareInputError: transformers has no such architecture.
    """
    names = list(only or architectures(kind))
    for name in names:
        _class_name(name)
    if jobs == 1:
        yield from map(run_row, names)
        return
    with get_context("spawn").Pool(jobs, _one_thread) as pool:
        yield from pool.imap(run_row, names)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _class_name(model_type: str) -> str:
    names = architectures(Kind.text) | architectures()
    if model_type not in names:
        raise DareInputError(
            "expected the model_type of an image-text-to-text or causal-language-model "
            f"architecture of transformers; got {model_type!r}{alike(model_type, names)}"
        )
    return names[model_type]


def _verdict(model_type: str) -> tuple[str, str]:
    try:
        find_spec(model_type)
    except UnsupportedModelError as refusal:
        return "refused", str(refusal)
    try:
        subject = Subject.of(model_type)
        for check in CHECKS:
            check(subject)
    except UnsupportedModelError as refusal:
        return "refused", str(refusal)
    except LawBroken as broken:
        return "fail", str(broken)
    except Exception as error:
        return "fail", f"{type(error).__name__}: {error}"
    return "pass", ""
