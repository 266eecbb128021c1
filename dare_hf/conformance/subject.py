"""One tiny model under test: its prompts, its plain runs, and how DARE is put on it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.api import apply_dare, remove_dare
from dare_hf.architectures.locate import locate
from dare_hf.config import DareConfig
from dare_hf.scoring.base import register_scorer
from dare_hf.testing.clips import clip_of
from dare_hf.testing.families import family_of
from dare_hf.testing.models import PAD_ID
from dare_hf.testing.samples import Batch, Sample, batch_of, samples
from dare_hf.testing.shrink import shrunk_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

NEW_TOKENS = 7

SPECIAL_IDS = [PAD_ID, *range(3, 10), *range(81, 120)]
"""Never written: placeholders, frames and image ids, which would ask for an image when they are fed
back, and padding, which has no position."""

SCORER = "conformance_content"


def content_scores(
    hidden: Tensor, modality: Tensor, *, layer: int, hop: Tensor, positions: Tensor
) -> Tensor:
    """Float[B, S] in [0, 1]: by the content of a token alone, differently at each layer."""
    generator = torch.Generator().manual_seed(100 + layer)
    weight = torch.randn(hidden.shape[-1], generator=generator).to(hidden.dtype)
    unit = hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.sigmoid(3 * unit @ weight)


register_scorer(SCORER, content_scores)


@dataclass
class Subject:
    """A tiny model with its prompts.

    Attributes:
        model: The model; patched only inside `dare`.
        rows: The prompts of the padded batch.
        filmed: Those of the batch with videos, empty where the model takes none.
        batches: The batches by name.
        wide: Whether the model runs in float64.
        pruned: What generate wrote for each batch under the laws' rates.
    """

    model: PreTrainedModel
    rows: list[Sample]
    batches: dict[str, Batch]
    wide: bool
    filmed: list[Sample] = field(default_factory=list)
    pruned: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model_type: str) -> Subject:
        """The model in float64 where it can run so unpatched, else in float32."""
        for dtype in (torch.float64, torch.float32):
            model = shrunk_model(model_type, dtype=dtype)
            try:
                rows = samples(model, family_of(model_type).images)
                batches = {
                    "alone": batch_of(model, [rows[_alone(rows)]]),
                    "padded": batch_of(model, rows),
                }
                filmed = _filmed(model)
                if filmed:
                    batches["video"] = batch_of(model, filmed)
                subject = cls(model, rows, batches, dtype == torch.float64, filmed)
                if all(subject.runs(batch) for batch in batches.values()):
                    return subject
            except (RuntimeError, TypeError, ValueError):
                if dtype == torch.float32:
                    raise
        return subject

    def runs(self, batch: Batch) -> bool:
        """Whether an unpatched forward gives numbers."""
        logits = self.forward(batch)[batch.real]
        return not bool(logits.isnan().any())

    @contextmanager
    def dare(self, config: DareConfig | None = None, **fields: Any) -> Iterator[None]:
        """DARE for the length of a block."""
        if config is None:
            options: dict[str, Any] = {"scorer": SCORER, "schedule": "constant", **fields}
            config = DareConfig(**options)
        apply_dare(self.model, config)
        try:
            yield
        finally:
            remove_dare(self.model)

    @torch.no_grad()
    def forward(self, batch: Batch, **kwargs: Any) -> Tensor:
        """Logits [B, S, V] of a bare forward."""
        return self.model(**copied(batch.inputs), **kwargs).logits

    def generate(self, batch: Batch, **kwargs: Any) -> Any:
        """Generate's full output, greedy."""
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "suppress_tokens": [i for i in SPECIAL_IDS if i < self.vocabulary],
            "return_dict_in_generate": True,
            "output_logits": True,
            **kwargs,
        }
        return self.model.generate(**copied(batch.inputs), **options)

    @property
    def alone(self) -> int:
        """The row of the padded batch that the other batch consists of."""
        return _alone(self.rows)

    @property
    def hybrid(self) -> bool:
        """Whether some layers are no self-attention."""
        return bool(locate(self.model).unrouted)

    @property
    def vocabulary(self) -> int:
        """Rows of the language-model head."""
        return self.model.config.get_text_config().vocab_size

    def written(self, batch: Batch, sequences: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Inputs of one forward over a prompt and what was written after it, and its modality."""
        new = sequences.shape[1] - batch.inputs["input_ids"].shape[1]
        inputs = copied(batch.inputs)
        for name, value in batch.inputs.items():
            if isinstance(value, torch.Tensor) and value.shape == batch.modality.shape:
                filler = 1 if name in ("attention_mask", *batch.suffix) else 0
                inputs[name] = torch.nn.functional.pad(value, (0, new), value=filler)
        family = family_of(self.model.config.model_type)
        for name in (name for name in family.watched if name in inputs):
            last = inputs[name][:, -1:]
            inputs[name] = torch.cat([inputs[name], *[last] * new], dim=1)
        modality = torch.nn.functional.pad(batch.modality, (0, new), value=0)
        inputs["input_ids"] = sequences
        if not family.positions:
            return inputs, modality
        inputs["position_ids"] = self.model._prepare_position_ids_for_generation(sequences, inputs)
        del inputs["input_ids"]
        prepared = self.model.prepare_inputs_for_generation(
            sequences, is_first_iteration=True, use_cache=False, **inputs
        )
        asked = ("use_cache", "logits_to_keep")  # some ask for the last token's logits
        given = {k: v for k, v in prepared.items() if v is not None and k not in asked}
        return given, modality


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with containers of their own: forwards write into them."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in inputs.items()}


def _filmed(model: PreTrainedModel) -> list[Sample]:
    """Prompts with videos, one of them beside an image; none where the model takes none."""
    clip = clip_of(model.config.model_type)
    if clip is None:
        return []
    even = family_of(model.config.model_type).even
    beside = (0, 0) if even else (0, 0, int(clip.beside_images))
    return samples(model, beside, videos=(1, 1) if even else (1, 0, 1), seed=1)


def _alone(rows: list[Sample]) -> int:
    """The first row with pictures, else the first."""
    return next((i for i, row in enumerate(rows) if row.pictures), 0)
