"""VolCano (VoCoT's model) as a LLaVA of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
)

from dare_hf.convert.source import read_json, shapes, tensor_files
from dare_hf.convert.target import Shape, check_names, new_folder, write_tensors
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "VolCanoMistral"
IMAGE_TOKEN = "<ImageHere>"
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    }
}
"""What the checkpoint names but does not describe."""

RENAMED = (
    ("vision_encoder.vision_tower.", "vision_tower."),
    ("front_mm_projector.0.", "multi_modal_projector.linear_1."),
    ("front_mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
"""Prefix of VolCano's names -> of LLaVA's as they stand on the hub."""

_LEFT_OUT = ("behind_projector.", "vision_generator.")  # they draw pictures, which no answer needs
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
_SELECTS: dict[str, Any] = {"patch": "default", "cls_patch": "full"}
_ROWS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{{ '" + IMAGE_TOKEN + "' * (images | length) }}"
    "{% if images and grounding | default(false) %}<grounding>{% endif %}"
    "{% if images %}{{ '\\n' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} [/INST]{% else %} {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>"
    "{% endif %}{% endfor %}"
)
"""VoCoT's prompt; `grounding=True` writes the token that asks for boxes."""


def convert_volcano(source: str | Path, out: str | Path, tower: str | Path | None = None) -> None:
    """Write a VolCano checkpoint as a folder that AutoModelForImageTextToText loads.

    Weights keep their values and dtype and are copied file by file. The token that stands for the
    picture was added to the tokenizer after the embeddings had their last size, and transformers
    embeds ids before it replaces them: embeddings and head get rows of zeros for it, and
    generation_config.json forbids it.

    Args:
        source: Folder of the checkpoint: config.json, tokenizer, *.safetensors or *.bin.
        out: A folder that does not exist.
        tower: A config.json of its CLIP tower, where that is not one of `TOWERS`.

    Raises:
        DareInputError: The folder is not VolCano's, a tensor is missing, foreign or of another
            shape, or `out` exists; the text names it. Nothing is left at `out` then.
    """
    source, out = Path(source), Path(out)
    with new_folder(out) as draft:
        given = read_json(source / "config.json")
        config: Any = _config(given, tower)
        processor = _processor(source, config)
        config.image_token_index = processor.image_token_id
        rows = max(len(processor.tokenizer), config.text_config.vocab_size)
        added = list(range(config.text_config.vocab_size, rows))
        config.text_config.vocab_size = rows
        files = tensor_files(source)
        found = {new: shape for old, shape in shapes(files).items() if (new := renamed(old))}
        wanted = _wanted(config)
        check_names(_grown(found, len(added)), wanted, "VolCano")
        write_tensors(files, draft, partial(_change, added=len(added)))
        config.architectures = ["LlavaForConditionalGeneration"]
        config.save_pretrained(draft)
        processor.save_pretrained(draft)
        _generation(config, processor, added).save_pretrained(draft)


def renamed(name: str) -> str | None:
    """LLaVA's name of a tensor of VolCano; None for what a LLaVA has no place for."""
    if name.startswith(_LEFT_OUT) or name.endswith(_BUFFERS):
        return None
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _config(given: dict[str, Any], tower: str | Path | None) -> LlavaConfig:
    if given.get("model_type") != MODEL_TYPE:
        raise DareInputError(
            f'convert: expected model_type "{MODEL_TYPE}" in config.json; got '
            f"{given.get('model_type')!r}"
        )
    if given.get("front_projector_type") != "mlp2x_gelu":
        raise DareInputError(
            'convert: expected front_projector_type "mlp2x_gelu" in config.json; got '
            f"{given.get('front_projector_type')!r}"
        )
    feature = given.get("mm_vision_select_feature", "patch")
    layer = given.get("mm_vision_select_layer")
    if feature not in _SELECTS or not isinstance(layer, int):
        raise DareInputError(
            "convert: expected a whole number mm_vision_select_layer and an "
            f"mm_vision_select_feature of {sorted(_SELECTS)} in config.json; got {layer!r} and "
            f"{feature!r}"
        )
    vision: Any = _vision(given, tower)
    return LlavaConfig(
        text_config=_text(given),
        vision_config=vision,
        projector_hidden_act="gelu",
        vision_feature_layer=layer,
        vision_feature_select_strategy=_SELECTS[feature],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (feature != "patch"),
        tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        dtype=given.get("torch_dtype", given.get("dtype")),
    )


def _text(given: dict[str, Any]) -> MistralConfig:
    """The fields of a Mistral; what VolCano has beside them means nothing to it."""
    known = {*MistralConfig().to_dict(), "rope_theta", "rope_scaling", "head_dim"}
    known -= {"model_type", "architectures", "transformers_version", "_name_or_path"}
    return MistralConfig(**{name: value for name, value in given.items() if name in known})


def _vision(given: dict[str, Any], tower: str | Path | None) -> CLIPVisionConfig:
    if tower is not None:
        described = read_json(Path(tower))
        return CLIPVisionConfig(**described.get("vision_config", described))
    name = given.get("vision_encoder")
    if name not in TOWERS:
        raise DareInputError(
            f"convert: expected a vision_encoder of {sorted(TOWERS)} in config.json; got {name!r}. "
            "Give the config.json of that tower with --tower"
        )
    return CLIPVisionConfig(**TOWERS[name])


def _processor(source: Path, config: Any) -> LlavaProcessor:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, config=config.text_config, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DareInputError(
            f"convert: expected VolCano's tokenizer in {str(source)!r}; got {error}"
        ) from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise DareInputError(
            f"convert: expected the token {IMAGE_TOKEN} in the tokenizer; got {len(tokenizer)} "
            "tokens without it. This is no VolCano, or not its last stage"
        )
    side = config.vision_config.image_size
    image = LlavaImageProcessorPil(  # pads to a square with its mean colour, as VoCoT does
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=TEMPLATE,
    )


def _wanted(config: LlavaConfig) -> dict[str, Shape]:
    """Name -> shape of this LLaVA, by its names on the hub."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    named = (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )
    return {
        next(new + name[len(old) :] for old, new in named if name.startswith(old)): tuple(t.shape)
        for name, t in model.state_dict().items()
    }


def _grown(found: dict[str, Shape], added: int) -> dict[str, Shape]:
    return {
        name: (shape[0] + added, *shape[1:]) if name in _ROWS else shape
        for name, shape in found.items()
    }


def _change(name: str, tensor: Tensor, added: int) -> tuple[str, Tensor] | None:
    new = renamed(name)
    if new is None:
        return None
    if new in _ROWS and added:
        tensor = torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])
    return new, tensor


def _generation(config: Any, processor: LlavaProcessor, added: list[int]) -> GenerationConfig:
    text = config.text_config
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    ids["pad_token_id"] = processor.tokenizer.pad_token_id
    # a row of zeros has logit 0, which would win where all others are below it
    return GenerationConfig(**ids, suppress_tokens=added or None, do_sample=False)
