"""Stage 1 of train_tiny_anole.py: VQ tokens learned on rendered maze states."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

from dare_hf.generation.vq_decoder import VQPatchDecoder
from dare_hf.tasks import frozen_lake, maze, render

CODES = maze.NUM_CELL_TYPES
VQ_CONFIG = {
    "embed_dim": 32,
    "num_embeddings": CODES,
    "latent_channels": 32,
    "resolution": render.IMAGE_SIZE,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "attn_type": "none",
}
# What the shipped image processor does to 0..255 pixels.
RESCALE, MEAN = 0.0078, 1.0
Log = Callable[[dict], None]


def pixels_of(grids: np.ndarray) -> Tensor:
    """Cell types [n, 7, 7] -> the processor's pixel values, float32 [n, 3, 56, 56]."""
    array = render.grid_to_array(grids).astype(np.float32) * RESCALE - MEAN
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def vq_batch(rng: np.random.Generator, states: np.ndarray, size: int) -> np.ndarray:
    """Half rendered states, half uniformly drawn cells, so that rare cells are learned too."""
    real = states[rng.integers(len(states), size=size // 2)]
    shape = (size - size // 2, maze.FIELD, maze.FIELD)
    drawn = rng.integers(1, maze.NUM_CELL_TYPES, size=shape)
    drawn[rng.random(shape) < 0.2] = maze.OUTSIDE
    return np.concatenate([real, drawn])


def latents(vq: ChameleonVQVAE, grids: np.ndarray) -> Tensor:
    """Cell types [n, 7, 7] -> latents before quantisation, [n, embed_dim, 7, 7]."""
    return vq.quant_conv(vq.encoder(pixels_of(grids)))


@torch.no_grad()
def init_codebook(vq: ChameleonVQVAE, rng: np.random.Generator, states: np.ndarray) -> None:
    """Puts each code at the mean latent of one kind of drawn cell."""
    total, count = torch.zeros(CODES, VQ_CONFIG["embed_dim"]), torch.zeros(CODES)
    for _ in range(24):
        grids = vq_batch(rng, states, 32)
        points = latents(vq, grids).permute(0, 2, 3, 1).flatten(0, 2)
        kinds = torch.from_numpy(grids).flatten()
        total.index_add_(0, kinds, points)
        count += torch.bincount(kinds, minlength=CODES)
    vq.quantize.embedding.weight.copy_(total / count[:, None])


@torch.no_grad()
def vq_exactness(vq: ChameleonVQVAE, decoder: VQPatchDecoder, states: np.ndarray) -> dict:
    """Share of cells [n, 7, 7] whose token decodes to what was drawn, and tokens in use."""
    ids = vq.encode(pixels_of(states)).image_tokens.view(len(states), maze.FIELD, maze.FIELD)
    table = decoded_cell_types(vq, decoder)
    right = table[ids.numpy()] == states
    pairs = np.unique(np.stack([ids.numpy().ravel(), states.ravel()]), axis=1).shape[1]
    return {
        "cells_right": float(right.mean()),
        "images_right": float(right.all((1, 2)).mean()),
        "codes_used": len(ids.unique()),
        "code_type_pairs": pairs,
        "types_seen": len(np.unique(states)),
    }


@torch.no_grad()
def decoded_cell_types(vq: ChameleonVQVAE, decoder: VQPatchDecoder) -> np.ndarray:
    """Cell type that each code decodes to, int64 [CODES]."""
    patches = decoder(vq.quantize.embedding.weight[:, :, None, None])
    table = pixels_of(np.arange(maze.NUM_CELL_TYPES)[:, None, None].repeat(7, 1).repeat(7, 2))
    table = table[:, :, : render.PATCH, : render.PATCH]
    return torch.cdist(patches.flatten(1), table.flatten(1)).argmin(1).numpy()


def train_vq(steps: int, out: Path, seed: int, log: Log) -> None:
    """Autoencoder first, then codes from its latents, then straight-through VQ; saves `out`/vq.pt.

    Pixels alone learn the glyphs slowly (they are an eighth of a patch), so a linear probe of the
    latents names the drawn cell beside the pixel loss; the probe is thrown away.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    items = maze.sample(1500, "train", seed=seed + 1000)
    states = np.concatenate([item.grids() for item in items])
    vq = ChameleonVQVAE(ChameleonVQVAEConfig(**VQ_CONFIG))
    decoder = VQPatchDecoder(VQ_CONFIG["embed_dim"], hidden=256, patch=render.PATCH)
    probe = torch.nn.Conv2d(VQ_CONFIG["embed_dim"], maze.NUM_CELL_TYPES, 1)
    params = [*vq.parameters(), *decoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1, pct_start=0.05)
    start, warm = time.time(), steps // 2
    for step in range(steps):
        grids = vq_batch(rng, states, 16)
        if step == warm:
            init_codebook(vq, rng, states)
        hidden = latents(vq, grids)
        named = functional.cross_entropy(probe(hidden), torch.from_numpy(grids))
        commit = torch.zeros(())
        if step >= warm:
            hidden, commit, _ = vq.quantize(hidden)
        drawn = functional.mse_loss(decoder(hidden), pixels_of(grids))
        loss = drawn + 0.1 * named + commit
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            entry = {"stage": "vq", "step": step + 1, "mse": round(drawn.item(), 6)}
            entry["probe"] = round(named.item(), 4)
            if step >= warm:
                entry |= {
                    "commit": round(commit.item(), 6),
                    **vq_exactness(vq, decoder, states[:256]),
                }
            log(entry | {"seconds": round(time.time() - start)})
            torch.save({"vq": vq.state_dict(), "decoder": decoder.state_dict()}, out / "vq.pt")


def adapt_vq(
    vq: ChameleonVQVAE, decoder: VQPatchDecoder, steps: int, out: Path, seed: int, log: Log
) -> None:
    """Teaches a trained VQ cell types that are drawn anew; saves `out`/vq.pt.

    The codebook stays as it is and code k stays that of cell type k, so that a language model
    trained on these codes keeps its words: the encoder learns to put every type's latents at its
    code, the decoder to draw every code. Distances to all codes are named by cross-entropy.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    mazes = maze.sample(700, "train", seed=seed + 1000)
    lakes = frozen_lake.sample(700, "train", seed=seed + 1000)
    states = np.concatenate([item.grids() for item in (*mazes, *lakes)])
    book = vq.quantize.embedding.weight.detach().clone()
    vq.quantize.requires_grad_(False)
    params = [*vq.encoder.parameters(), *vq.quant_conv.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        grids = vq_batch(rng, states, 16)
        kinds = torch.from_numpy(grids)
        points = latents(vq, grids).permute(0, 2, 3, 1)
        distance = torch.cdist(points.flatten(0, 2), book).square()
        named = functional.cross_entropy(-distance, kinds.flatten())
        near = functional.mse_loss(points, book[kinds])
        exact = book[kinds].permute(0, 3, 1, 2)
        drawn = functional.mse_loss(decoder(exact), pixels_of(grids))
        optimizer.zero_grad()
        (drawn + 0.1 * named + near).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            entry = {"stage": "vq_adapt", "step": step + 1, "mse": round(drawn.item(), 6)}
            entry |= {"named": round(named.item(), 5), "near": round(near.item(), 6)}
            entry |= vq_exactness(vq, decoder, states[rng.permutation(len(states))[:256]])
            log(entry | {"seconds": round(time.time() - start)})
            torch.save({"vq": vq.state_dict(), "decoder": decoder.state_dict()}, out / "vq.pt")
