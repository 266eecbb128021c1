"""What the entry point of lmms-eval gives: where its model class is."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """The ModelManifest of `--model dare_hf`; called by lmms-eval when it looks for models."""
    from lmms_eval.models.registry_v2 import ModelManifest  # ty: ignore[import-not-found]

    return ModelManifest(
        model_id="dare_hf",
        chat_class_path="dare_hf.integrations.lmms_eval_model.DareLmms",
        aliases=("dare",),
    )
