"""Tokenizer, processor and model of dare-board, over a folder that pretrained_files.py wrote.

The text model and its vocabulary stay as they are: a special token that chats never hold is renamed
to `<image>`. A picture is a grid of 12 x 12 patches (144 tokens) or of 24 x 24 (576).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dare_hf.assets.board import IMAGE, with_image_token
from dare_hf.tasks import board_render

END = "<|im_end|>"
SIDES = (12, 24)
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
LORA_RANK = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nAnswer:' }}{% endif %}"
)


def build_tokenizer(backbone: Path) -> PreTrainedTokenizerFast:
    """The text model's tokenizer with `<image>` in it."""
    text = (backbone / "tokenizer.json").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(with_image_token(text)),
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def build_processor(backbone: Path, side: int) -> LlavaProcessor:
    """Pictures of 192 x 192 pixels, cut into side x side patches; values from -1 to 1."""
    size = {"height": board_render.IMAGE_SIZE, "width": board_render.IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    # The tower's class token adds one that the strategy "default" takes away.
    return LlavaProcessor(
        images,
        build_tokenizer(backbone),
        patch_size=board_render.IMAGE_SIZE // side,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(backbone: Path, side: int, seed: int) -> LlavaForConditionalGeneration:
    """The pretrained text model under a fresh tower and projector, float32."""
    tokenizer = build_tokenizer(backbone)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **TOWER,
            num_attention_heads=4,
            image_size=board_render.IMAGE_SIZE,
            patch_size=board_render.IMAGE_SIZE // side,
            projection_dim=TOWER["hidden_size"],
        ),
        text_config=AutoConfig.from_pretrained(backbone),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=side**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # HF draws them at 0.02, a tenth of what a patch's pixels come to: where is what must be told.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    text = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model.eval()
