"""A tiny random Anole in the layout of its checkpoints, and its image decoder in plain torch."""

import functools
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf.assets import model_path
from dare_hf.convert import convert_anole
from dare_hf.generation.interleaved import load_decoder

WIDTHS = [64, 32, 96]
BASE, BLOCKS, EMBED, LATENT = 32, 1, 16, 16
RESOLUTION = 28  # 7 x 7 codes, as the processor of dare-tiny-anole expects


def config(**changes):
    """dare-tiny-anole's names and ids with a VQGAN of three levels and a small text model."""
    given = json.loads((model_path("dare-tiny-anole") / "config.json").read_text())
    codes = sum(name.startswith("IMGIMG") for name in given["vocabulary_map"])
    vq = {
        "embed_dim": EMBED,
        "num_embeddings": codes,
        "latent_channels": LATENT,
        "resolution": RESOLUTION,
        "base_channels": BASE,
        "channel_multiplier": [width // BASE for width in WIDTHS],
        "num_res_blocks": BLOCKS,
    }
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return given | small | {"vq_config": vq, "tie_word_embeddings": False} | changes


def residual(draw, at, entry, width):
    found = {}
    for number, (first, channels) in enumerate([(entry, entry), (width, width)], start=1):
        found |= {
            f"{at}norm{number}.weight": 1 + draw(first),
            f"{at}norm{number}.bias": draw(first),
        }
        found[f"{at}conv{number}.weight"] = draw(width, channels, 3, 3)
        found[f"{at}conv{number}.bias"] = draw(width)
    if entry != width:
        found[f"{at}nin_shortcut.weight"] = draw(width, entry, 1, 1)
        found[f"{at}nin_shortcut.bias"] = draw(width)
    return found


def attention(draw, at, width):
    found = {f"{at}norm.weight": 1 + draw(width), f"{at}norm.bias": draw(width)}
    for name in ("q", "k", "v", "proj_out"):
        found |= {f"{at}{name}.weight": draw(width, width, 1, 1), f"{at}{name}.bias": draw(width)}
    return found


def convolution(draw, at, entry, width, size=3):
    return {f"{at}.weight": draw(width, entry, size, size), f"{at}.bias": draw(width)}


def coder(draw, at, levels):
    """The middle and the levels, which encoder and decoder have alike."""
    last = WIDTHS[-1]
    found = attention(draw, f"{at}mid.attn_1.", last)
    found |= residual(draw, f"{at}mid.block_1.", last, last)
    found |= residual(draw, f"{at}mid.block_2.", last, last)
    for name, entries, width in levels:
        for number, entry in enumerate(entries):
            found |= residual(draw, f"{at}{name}.block.{number}.", entry, width)
    return found


def decoder_weights(codebook, seed=1):
    """Tensors of the VQGAN's drawing half by their names, with the codebook."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    levels = [("up.0", [32, 64], 64), ("up.1", [96, 32], 32), ("up.2", [96, 96], 96)]
    found = coder(draw, "decoder.", levels)
    found |= convolution(draw, "decoder.conv_in", LATENT, 96)
    found |= convolution(draw, "decoder.up.1.upsample.conv", 32, 32)
    found |= convolution(draw, "decoder.up.2.upsample.conv", 96, 96)
    found |= {"decoder.norm_out.weight": 1 + draw(64), "decoder.norm_out.bias": draw(64)}
    found |= convolution(draw, "decoder.conv_out", 64, 3)
    found |= convolution(draw, "post_quant_conv", EMBED, LATENT, 1)
    return found | {"quantize.embedding.weight": codebook}


def weights(given, seed=0):
    """Tensors of the model by their names on the hub."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.1):
        return torch.randn(*shape, generator=generator) * std

    d, f, heads = given["hidden_size"], given["intermediate_size"], given["num_attention_heads"]
    vocab = given["vocab_size"]
    found = {"model.embed_tokens.weight": draw(vocab, d, std=1.0)}
    found["lm_head.weight"] = draw(vocab, d, std=0.5)
    for i in range(given["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{at}self_attn.{name}.weight"] = draw(d, d, std=0.3)
        for name in ("q_norm", "k_norm"):
            found[f"{at}self_attn.{name}.weight"] = 1 + draw(heads, d // heads)
            found[f"{at}self_attn.{name}.bias"] = draw(heads, d // heads)
        for name, shape in (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f))):
            found[f"{at}mlp.{name}.weight"] = draw(*shape, std=0.3)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = 1 + draw(d)
    found["model.norm.weight"] = 1 + draw(d)
    at = "model.vqmodel.encoder."
    levels = [("down.0", [32], 64), ("down.1", [64], 32), ("down.2", [32], 96)]
    found |= coder(draw, at, levels)
    found |= convolution(draw, f"{at}conv_in", 3, BASE)
    found |= convolution(draw, f"{at}down.0.downsample.conv", 64, 64)
    found |= convolution(draw, f"{at}down.1.downsample.conv", 32, 32)
    found |= {f"{at}norm_out.weight": 1 + draw(96), f"{at}norm_out.bias": draw(96)}
    found |= convolution(draw, f"{at}conv_out", 96, LATENT)
    codebook = draw(given["vq_config"]["num_embeddings"], EMBED, std=1.0)
    drawn = decoder_weights(codebook)
    found |= convolution(draw, "model.vqmodel.quant_conv", LATENT, EMBED, 1)
    for name in ("quantize.embedding.weight", "post_quant_conv.weight", "post_quant_conv.bias"):
        found[f"model.vqmodel.{name}"] = drawn[name]
    return found, drawn


def write(place, kind="safetensors", state=None, drawn=None, inside=False, **changes):
    """`source` and `vqvae` under a folder; returns the tensors of both."""
    folder = place / "source"
    folder.mkdir(parents=True)
    given = config(**changes)
    AutoProcessor.from_pretrained(model_path("dare-tiny-anole")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of the folder ran')")
    fresh = weights(config())
    state, drawn = state or fresh[0], drawn or fresh[1]
    inner = {f"model.vqmodel.{n}": t for n, t in drawn.items() if n.startswith("decoder.")}
    names = sorted(state | (inner if inside else {}))
    for number in range(2):
        part = {name: (state | inner)[name].clone() for name in names[number::2]}
        if kind == "safetensors":
            save_file(part, folder / f"model-{number}.safetensors")
        else:
            torch.save(part, folder / f"pytorch_model-{number}.bin")
    (place / "vqvae").mkdir()
    save_file({n: t.clone() for n, t in drawn.items()}, place / "vqvae" / "model.safetensors")
    return state, drawn


@functools.cache
def converted():
    """(tensors of the drawing half, model, processor, decoder) as the converter wrote them."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _, drawn = write(place)
        convert_anole(place / "source", place / "out", place / "vqvae")
        model = AutoModelForImageTextToText.from_pretrained(place / "out").eval()
        processor = AutoProcessor.from_pretrained(place / "out")
        return drawn, model, processor, load_decoder(model)


class ReferenceDecoder:
    """Chameleon's VQGAN decoder written out: nothing but functions of torch on named tensors."""

    def __init__(self, state):
        self.state = state

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, x, name):
        weight, bias = self.pair(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def swish_norm(self, x, name):
        normed = self.norm(x, name)
        return normed / (1 + torch.exp(-normed))

    def norm(self, x, name):
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        spread = (groups - mean).pow(2).mean((2, 3, 4), keepdim=True)
        normed = ((groups - mean) / (spread + 1e-6).sqrt()).flatten(1, 2)
        weight, bias = self.pair(name)
        return normed * weight[:, None, None] + bias[:, None, None]

    def block(self, x, name):
        inner = self.conv(self.swish_norm(x, f"{name}.norm1"), f"{name}.conv1")
        inner = self.conv(self.swish_norm(inner, f"{name}.norm2"), f"{name}.conv2")
        shortcut = f"{name}.nin_shortcut"
        return inner + (self.conv(x, shortcut) if f"{shortcut}.weight" in self.state else x)

    def attend(self, x, name):
        normed = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(normed, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.mT @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.conv((v @ weights.mT).view_as(x), f"{name}.proj_out")

    def __call__(self, codes):
        x = self.conv(self.conv(codes, "post_quant_conv"), "decoder.conv_in")
        x = self.attend(self.block(x, "decoder.mid.block_1"), "decoder.mid.attn_1")
        x = self.block(x, "decoder.mid.block_2")
        for level in (2, 1, 0):
            for number in range(BLOCKS + 1):
                x = self.block(x, f"decoder.up.{level}.block.{number}")
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv")
        return self.conv(self.swish_norm(x, "decoder.norm_out"), "decoder.conv_out")
