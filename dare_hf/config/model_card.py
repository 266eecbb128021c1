"""The README.md of an adapter's folder: what it is and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

_BEGIN, _END = "<!-- dare_hf: written when saved -->", "<!-- dare_hf: end -->"
# What peft 0.21 writes where there is no README.md yet; says nothing about this adapter.
_TEMPLATE = "# Model Card for Model ID"
TAG = "token-routing"

_TEXT = """{begin}
# DARE router adapter

Routers of [dare_hf](https://openreview.net/forum?id=BQASoLmREU) for {base}: every decoder layer
runs only the tokens its router keeps, and the KV cache forgets finished thoughts layer by layer.
This is not DARE "drop and rescale" weight merging; no weight of the base model is changed.

{facts}

## How to load

`import dare_hf` makes the method known to peft; without it loading ends in a KeyError.

```python
import dare_hf
from transformers import {auto}

model = {auto}.from_pretrained("this folder or its hub id")
```

or, on a base model you hold: `dare_hf.apply_dare(model, "...")` or
`peft.PeftModel.from_pretrained(model, "...")`. Then `model.generate(...)` as ever.
{end}
"""


def write_card(
    folder: str | Path,
    base_model: str | None,
    model_type: str | None,
    facts: Mapping[str, object],
) -> None:
    """Write or renew the README.md of an adapter's folder; a text of the user's own stays.

    Args:
        folder: The folder the adapter is saved to.
        base_model: Name or path of the base model, None where it has none.
        model_type: Of the base model; says what class loads it.
        facts: What to list: name -> value.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    card.data = card.data or ModelCardData()
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "dare", TAG})
    if base_model:
        card.data["base_model"] = base_model
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    base = f"`{base_model}`" if base_model else "a model without a name"
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    block = _TEXT.format(begin=_BEGIN, end=_END, base=base, facts=lines, auto=auto).strip()
    card.text = _placed(card.text, block) + "\n"
    card.save(path)


def _placed(text: str, block: str) -> str:
    """`block` in place of the one written before, of peft's template, or after the user's text."""
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        return before + block + rest.partition(_END)[2].rstrip()
    if not text.strip() or _TEMPLATE in text:
        return block
    return f"{text.rstrip()}\n\n{block}"
