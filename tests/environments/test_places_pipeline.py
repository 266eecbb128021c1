"""pipeline("image-text-to-text"): what it writes is what generate writes, pruned or not."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import torch
from laws import dare
from peft import get_peft_model
from peft_runs import LEARNED, learn
from PIL import Image
from transformers import pipeline

from dare_hf import DareConfig, dare_disabled, last_report
from dare_hf.demo.embedded import load_embedded
from dare_hf.generation import HopInput, HopLoop

TEXTS = ["<image> the red square is left of", "<image> the"]
OPTIONS = {"max_new_tokens": 14, "do_sample": False}
FULL = DareConfig(schedule="constant", vision_retention=1.0, text_retention=1.0, decode_window=4)
PRUNED = {
    "safe": DareConfig.preset("safe"),
    "attention": DareConfig(
        schedule="constant", vision_retention=0.2, text_retention=0.5, decode_window=4
    ),
    "key_norm": DareConfig(
        schedule="constant",
        scorer="key_norm",
        vision_retention=0.3,
        text_retention=0.5,
        decode_window=5,
        hop_decay=0.7,
    ),
}
CHAT = (
    "{% for m in messages %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else ' ' + c.text }}{% endfor %}{% endfor %}"
)


@functools.cache
def loaded(name: str):
    """An embedded model with its processor; no test may leave it patched."""
    return load_embedded(name)


@pytest.fixture(params=["volcano", "anole"])
def place(request):
    model, processor = loaded(request.param)
    return model, processor, pipeline("image-text-to-text", model=model, processor=processor)


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def written(pipe, count: int = 2, **options) -> list[list[int]]:
    """The ids of each row without pads, through the pipeline."""
    found = pipe(
        text=TEXTS[:count],
        images=pictures(count),
        batch_size=count,
        return_tensors=True,
        generate_kwargs={**OPTIONS, **options},
    )
    return [unpadded(pipe.processor, row["generated_token_ids"]) for row in found]


def generated(model, processor, count: int = 2, **options) -> list[list[int]]:
    """The same without it."""
    inputs = processor(
        text=TEXTS[:count], images=pictures(count), padding=True, return_tensors="pt"
    )
    return [unpadded(processor, row) for row in model.generate(**inputs, **OPTIONS, **options)]


def unpadded(processor, row) -> list[int]:
    return [token for token in row.tolist() if token != processor.tokenizer.pad_token_id]


@contextmanager
def chat_template(processor, template: str):
    processor.chat_template = template
    try:
        yield
    finally:
        processor.chat_template = None


def numbers(model) -> dict:
    found = last_report(model).to_dict()
    del found["seconds"]
    return found


def test_a_left_padded_batch(place):
    model, processor, pipe = place
    plain = written(pipe)
    with dare(model, FULL):
        assert written(pipe) == plain
        assert last_report(model).hops > 2
    for config in PRUNED.values():
        with dare(model, config):
            found, report = written(pipe), numbers(model)
            assert found == generated(model, processor)
            assert report == numbers(model)
            with dare_disabled(model):
                assert written(pipe) == plain
        assert report["kv_bytes"] < report["kv_bytes_baseline"]
    assert written(pipe) == plain


def test_a_chat_turn_with_a_hop_loop():
    model, processor = loaded("volcano")
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": TEXTS[0][8:]}]
    loop = HopLoop(on_hop=lambda hop: HopInput(input_ids=[20, 21]), max_hops=2)
    with dare(model, PRUNED["attention"]), chat_template(processor, CHAT):
        said = pipe(
            text=[{"role": "user", "content": content}],
            return_tensors=True,
            generate_kwargs={**OPTIONS, "hop_loop": loop},
        )
        report = numbers(model)
        expected = generated(model, processor, 1, hop_loop=loop)
        assert unpadded(processor, said[0]["generated_token_ids"]) == expected[0]
        assert numbers(model) == report
    assert report["hops"] > 3


def test_a_peft_model_in_the_pipeline():
    model, processor = loaded("volcano")
    plain = written(pipeline("image-text-to-text", model=model, processor=processor))
    wrapped = get_peft_model(model, DareConfig(**LEARNED, decode_window=5))
    learn(wrapped)
    wrapped.eval()
    pipe = pipeline("image-text-to-text", model=wrapped, processor=processor)
    found = written(pipe)
    assert found == generated(wrapped, processor) != plain
    assert last_report(wrapped).hops == 4
    wrapped.unload()
    assert written(pipeline("image-text-to-text", model=model, processor=processor)) == plain
