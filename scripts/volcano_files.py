"""Tokenizer, processor and configuration of dare-tiny-volcano, and its model directory."""

import re
from pathlib import Path

import torch
from PIL.Image import Resampling
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dare_hf.tasks import scene

IMAGE_SIZE, PATCH = 64, 16  # a token per cell; patches of 8 made each sample 2.5 times as dear
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
BOX = ["<coor>", "</coor>"]
NUMBERS = [f"{k / 8:.3f}" for k in range(9)]
WORD = r"\d\.\d{3}|\w+|[^\w\s]"
_TEXTS = (
    scene.PROMPT.replace("<image>", "").replace("{place}", "the shape"),
    " ".join((*scene.COLOURS, *scene.FORMS, *scene.MARKS, *scene.RELATIONS)),
    "The answer is A. Look at the picture. What Where How many Is there a an and or of to at in "
    "with this that you are it no yes No Yes between next row column near far first second last "
    "bars upright level slanting checks box image question Question: Answer: user assistant",
)


def vocabulary() -> dict[str, int]:
    words = sorted({word for text in _TEXTS for word in re.findall(WORD, text)} - set(NUMBERS))
    return {token: k for k, token in enumerate([*SPECIAL, *BOX, *NUMBERS, *words, ","])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    joins = [decoders.Replace(f", {k}.", f",{k}.") for k in (0, 1)]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            *joins,
            decoders.Replace(" </coor>", "</coor>"),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(BOX)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Squeezes any picture to 64 x 64 with the BOX filter; values from -1 to 1."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=Resampling.BOX,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    # The tower's class token adds one that the strategy "default" takes away.
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(
    layers: int, hidden: int, ffn: int, heads: int, tower_layers: int, tower_hidden: int
) -> LlavaForConditionalGeneration:
    vocab = vocabulary()
    text = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        initializer_range=0.04,
        pad_token_id=vocab["<pad>"],
        bos_token_id=vocab["<s>"],
        eos_token_id=vocab["</s>"],
        tie_word_embeddings=True,
    )
    tower = CLIPVisionConfig(
        hidden_size=tower_hidden,
        intermediate_size=2 * tower_hidden,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=tower_hidden,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=vocab["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # HF draws them at 0.02, a tenth of what a patch's pixels come to: where is what must be told.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    return model


def export(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Writes model and processor; float16 on disk, float32 in the configuration."""
    model.half()
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    model.save_pretrained(out)
    config = type(model.config).from_pretrained(out)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    config.save_pretrained(out)
    build_processor().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
