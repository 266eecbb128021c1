"""Runs the laws on every architecture of the image-text-to-text mapping."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dare_hf.architectures.locate import find_spec
from dare_hf.conformance.laws import CHECKS, LawBroken
from dare_hf.conformance.subject import Subject
from dare_hf.errors import DareInputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


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


def architectures() -> dict[str, str]:
    """model_type -> class name of every image-text-to-text architecture of transformers."""
    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def run_row(model_type: str) -> Row:
    """Run all laws on the tiny model of one architecture.

    Raises:
        DareInputError: transformers has no such image-text-to-text architecture.
    """
    _check_name(model_type)
    names = architectures()
    started = time.perf_counter()
    status, reason = _verdict(model_type)
    seconds = time.perf_counter() - started
    return Row(model_type, names[model_type], status, reason, seconds)


def run_all(only: Iterable[str] | None = None, *, jobs: int = 1) -> Iterator[Row]:
    """The rows in the mapping's order, each as it is done.

    Args:
        only: model_types to run; None for every one.
        jobs: Processes that share the rows.

    Raises:
        DareInputError: transformers has no such image-text-to-text architecture.
    """
    names = list(only or architectures())
    for name in names:
        _check_name(name)
    if jobs == 1:
        yield from map(run_row, names)
        return
    with get_context("spawn").Pool(jobs, _one_thread) as pool:
        yield from pool.imap(run_row, names)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _check_name(model_type: str) -> None:
    names = architectures()
    if model_type not in names:
        raise DareInputError(
            f"expected an image-text-to-text architecture of transformers ({', '.join(names)}); "
            f"got {model_type!r}"
        )


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
