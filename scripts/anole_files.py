"""Tokenizer, processor and configuration of dare-tiny-anole, and its model directory."""

import re
from pathlib import Path

import torch
from anole_vq import CODES, VQ_CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from dare_hf.generation.vq_decoder import VQPatchDecoder
from dare_hf.tasks import ghost, maze, render

IMAGE_TOKENS = maze.FIELD**2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<sep>", "<image>", "<boi>", "<eoi>"]
NUMBERS = [str(k) for k in range(21)]
_TEXTS = (
    maze.PROMPT.replace("<image>", ""),
    "Go up. Go down. Go left. Go right. The answer is A. B. C. D. Visualize the state after each "
    "reasoning step. Let us think step by step. Yes No",
    "Task: FrozenLake. Determine whether the agent can safely reach the gift following the action "
    "sequence without falling into the holes. A. Action Success. B. Action Failed: Fall into the "
    "Hole. C. Action Failed: Agent Safe but Fail to Reach Destination. The agent moves.",
    "Task: Mini-Behavior Installing the Printer. The agent must pick up the printer, put it on the "
    "table, toggle and switch it on. Drop, dropped elsewhere, not picked up, not switched on. "
    "Pick up. Put down. Toggle. Turn left. Turn right. Move forward. carrying",
    "( ) [ ] : ; , . ? ! - + = / ' \" # @ S G F H _ wall path hole goal start point empty question "
    "image images first latest initial current final state is a an and or of to at in on with this "
    "that you are it maze red blue yes no true false true False hop step steps answer Answer: "
    "Question: Image: User: Assistant:",
)
# Words of later tasks come last, so that the ids of all others stay what they were.
_LATER_TEXTS = (ghost.PROMPT.format(looks=" "), "Look.")


def image_token_name(code: int) -> str:
    """Chameleon's name of a VQ code: its digits as letters A to J, 137 -> IMGIMGBDHZ."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _words(texts: tuple[str, ...]) -> set[str]:
    return {w for text in texts for w in re.findall(r"\w+|[^\w\s]", text.replace("<image>", ""))}


def vocabulary() -> dict[str, int]:
    words = sorted(_words(_TEXTS) - set(NUMBERS))
    words += sorted(_words(_LATER_TEXTS) - {*words, *NUMBERS})
    images = [image_token_name(code) for code in range(CODES)]
    return {token: k for k, token in enumerate([*SPECIAL, *images, *NUMBERS, *words])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    joins = [
        decoders.Replace(a, b) for a, b in ((" :", ":"), ("( ", "("), (" )", ")"), ("  ", " "))
    ]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), *joins]
    )
    tokenizer.add_special_tokens([*SPECIAL, *(image_token_name(code) for code in range(CODES))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        sep_token="<sep>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> ChameleonProcessor:
    side = render.IMAGE_SIZE
    images = ChameleonImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return ChameleonProcessor(images, build_tokenizer(), image_seq_length=IMAGE_TOKENS)


def build_model(
    layers: int, hidden: int, ffn: int, heads: int
) -> ChameleonForConditionalGeneration:
    vocab = vocabulary()
    names = [*SPECIAL, *(image_token_name(code) for code in range(CODES))]
    config = ChameleonConfig(
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
        vq_config=VQ_CONFIG,
        vocabulary_map={name: vocab[name] for name in names},
    )
    return ChameleonForConditionalGeneration(config)


def export(model: ChameleonForConditionalGeneration, decoder: VQPatchDecoder, out: Path) -> None:
    """Writes model, processor and image decoder; float16 on disk, float32 in the configuration."""
    model.half()
    model.generation_config = GenerationConfig(
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    model.save_pretrained(out)
    config = type(model.config).from_pretrained(out)
    config.dtype = torch.float32
    config.vq_config.dtype = torch.float32
    config.save_pretrained(out)
    build_processor().save_pretrained(out)
    decoder.save(out)
    for file in out.iterdir():
        file.chmod(0o644)
