"""A tiny stand-in of dare-board: the same classes and files, a random text model of three layers.

Its functions need the training scripts on sys.path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from dare_hf.tasks import board

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<gh_stars>"]
SIDE = 12


def write_backbone(folder: Path) -> Path:
    """A folder as scripts/pretrained_files.py writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f" {i.question} {i.response}\nassistant user Answer: nothing" for i in board.sample(99)
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():  # what bfloat16 holds: stage 2 trains beside such weights
        weight.data = weight.data.bfloat16().float()
    model.save_pretrained(folder)
    return folder


def read_backbone(folder: Path) -> tuple[Any, Any]:
    """As `dare_hf.assets.backbone.read` returns the real one."""
    from types import SimpleNamespace

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder)
    return model, SimpleNamespace(backend_tokenizer=tokenizer)


def trained(backbone: Path, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with a LoRA as stage 2 leaves it, with random weights, and those weights."""
    import board_files
    import board_lora

    model = board_files.build_model(backbone, SIDE, seed)
    learned = board_lora.attach(model)
    torch.manual_seed(seed)
    drawn = {name: (0.2 * torch.randn(p.shape)).bfloat16().float() for name, p in learned.items()}
    board_lora.load(learned, drawn)
    return model, drawn


def ship(backbone: Path, folder: Path, seed: int = 0) -> Path:
    """The files that the package would hold."""
    import board_files
    import board_ship

    model = board_files.build_model(backbone, SIDE, seed)
    processor = board_files.build_processor(backbone, SIDE)
    board_ship.ship(model, processor, trained(backbone, seed)[1], folder)
    return folder
