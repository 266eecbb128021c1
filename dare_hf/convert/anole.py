"""Anole (Chameleon that draws) with the image decoder that transformers has no place for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor, ChameleonConfig, ChameleonForConditionalGeneration

from dare_hf.convert.source import read_json, shapes, tensor_files, tensors
from dare_hf.convert.target import check_names, new_folder, write_tensors
from dare_hf.errors import DareInputError
from dare_hf.generation.vq_decoder import ChameleonVQDecoder

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "chameleon"
_VQ = "model.vqmodel."
_DRAWS = ("decoder.", "post_quant_conv.")
_BOOK = "quantize.embedding.weight"
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
_BOOKS_AGREE = 1e-2
"""Absolute; the two checkpoints may be of different dtypes."""


def convert_anole(source: str | Path, out: str | Path, decoder: str | Path | None = None) -> None:
    """Write an Anole checkpoint of transformers' layout as a folder that can also draw.

    Weights keep their values and dtype. The image decoder goes beside them, to a file that
    `dare_hf.generation.interleaved.load_decoder` reads.

    Args:
        source: Folder of the checkpoint in transformers' layout: config.json, processor,
            *.safetensors or *.bin.
        out: A folder that does not exist.
        decoder: Folder or file of the VQGAN with its decoder ("decoder.*", "post_quant_conv.*"),
            Anole's or Chameleon's own. Default: the checkpoint has it under "model.vqmodel.".

    Raises:
        DareInputError: The folder is no Anole, a tensor is missing, foreign or of another shape,
            the decoder is of another codebook, or `out` exists; the text names it. Nothing is left
            at `out` then.
    """
    source, out = Path(source), Path(out)
    with new_folder(out) as draft:
        config = _config(source)
        files = tensor_files(source)
        found = {name: shape for name, shape in shapes(files).items() if not _draws(name)}
        with torch.device("meta"):
            model = ChameleonForConditionalGeneration(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings and "lm_head.weight" not in found:
            wanted.pop("lm_head.weight")
        check_names(found, wanted, "Anole (Chameleon)")
        _decoder(config, files, None if decoder is None else Path(decoder)).save(draft, dtype=None)
        write_tensors(files, draft, lambda name, tensor: None if _draws(name) else (name, tensor))
        _copy_texts(source, draft)


def _draws(name: str) -> bool:
    return name.startswith(f"{_VQ}decoder.")


def _config(source: Path) -> ChameleonConfig:
    given = read_json(source / "config.json")
    if given.get("model_type") != MODEL_TYPE:
        raise DareInputError(
            f'convert: expected model_type "{MODEL_TYPE}" in config.json; got '
            f"{given.get('model_type')!r}. Of Anole's two layouts the one of transformers is meant "
            "(leloy/Anole-7b-v0.1-hf)"
        )
    config = ChameleonConfig.from_dict(given)
    names = [name for name in config.vocabulary_map or {} if name.startswith("IMGIMG")]
    codes = config.vq_config.num_embeddings
    if len(names) != codes:
        raise DareInputError(
            f"convert: expected {codes} image tokens (IMGIMG...) in vocabulary_map of config.json, "
            f"one for each code; got {len(names)}"
        )
    if config.vq_config.attn_resolutions or config.vq_config.attn_type != "vanilla":
        raise DareInputError(
            "convert: expected a VQGAN with attention in its middle only; got attn_resolutions="
            f"{config.vq_config.attn_resolutions} and attn_type={config.vq_config.attn_type!r}"
        )
    return config


def _decoder(config: Any, files: list[Path], given: Path | None) -> ChameleonVQDecoder:
    """The image decoder, checked against the codebook of the model.

    Raises:
        DareInputError: Its tensors are not those of the config, or its codebook is another.
    """
    vq = config.vq_config
    fields = ("embed_dim", "latent_channels", "base_channels", "num_res_blocks")
    decoder = ChameleonVQDecoder(
        channel_multiplier=list(vq.channel_multiplier), **{n: getattr(vq, n) for n in fields}
    )
    own = _read(files, _VQ)
    state = own if given is None else _read(tensor_files(given))
    if _BOOK in state and not torch.allclose(
        state[_BOOK].float(), own[_BOOK].float(), atol=_BOOKS_AGREE
    ):
        raise DareInputError(
            f"convert: expected a decoder of the same codebook ({_BOOK}); got another, with which "
            f"pictures are noise: {given}"
        )
    state = {name: tensor for name, tensor in state.items() if name.startswith(_DRAWS)}
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    what = "its image decoder (give its folder with --decoder)"
    check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, wanted, what)
    decoder.load_state_dict(state, assign=True)
    return decoder


def _read(files: list[Path], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the codebook and behind it, names without the prefix."""
    wanted = tuple(prefix + name for name in (*_DRAWS, _BOOK))
    return {
        name.removeprefix(prefix): tensor
        for path in files
        for name, tensor in tensors(path)
        if name.startswith(wanted)
    }


def _copy_texts(source: Path, draft: Path) -> None:
    """Copy config, processor and tokenizer; no code, and no index of the source's files.

    Raises:
        DareInputError: They hold no processor.
    """
    for path in (path for pattern in _TEXTS for path in source.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, draft / path.name)
    try:
        AutoProcessor.from_pretrained(draft, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DareInputError(
            f"convert: expected Anole's processor and tokenizer in {str(source)!r}; got {error}"
        ) from error
