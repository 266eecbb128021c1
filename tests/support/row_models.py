"""Tiny models in folders with their processors, and rows for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dare_hf.testing import tiny_model
from dare_hf.testing.models import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, sharpen

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = "what is on the picture a cat dog red blue of answer question and some more text here"
WORDS = _TEXT.split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }} "
    "{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; ids under those of the tiny models."""
    special = {PAD_ID: "<pad>", BOS_ID: "<s>", EOS_ID: "</s>", IMAGE_ID: "<image>"}
    free = (i for i in range(120) if i not in special)
    names = ["<unk>", "user", "assistant", "system", *WORDS]
    names += [f"w{n}" for n in range(120 - len(special) - len(names))]
    vocab = {name: i for i, name in special.items()} | dict(zip(names, free, strict=True))
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_folder(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """A random LLaVA that sees 9 tokens an image."""
    tiny_model("llava").save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": 12, "width": 12}, crop_size={"height": 12, "width": 12}
        ),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def llama_folder(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """A random Llama."""
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    sharpen(model, 0.24, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    return folder


def picture(file: Path, seed: int) -> str:
    """Draws noise; returns the file's name."""
    noise = torch.rand(12, 12, 3, generator=torch.Generator().manual_seed(seed))
    Image.fromarray((noise * 255).byte().numpy()).save(file)
    return file.name


def written_rows(folder: Path, n: int, *, images: bool = True, **more: Any) -> Path:
    """n rows of words with a picture each, unless they are of text alone; `more` goes into each."""
    generator = torch.Generator().manual_seed(n)
    rows = []
    for k in range(n):
        length = int(torch.randint(8, 14, (1,), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        row = {"prompt": " ".join(WORDS[i] for i in picked)} | more
        if images:
            row["image"] = picture(folder / f"{k}.png", k)
        rows.append(row)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
