"""Hop loops that inject, and the same tokens recomputed without a loop."""

import torch
from hop_runs import injected_columns
from laws import (
    FP32_TOLERANCE,
    assert_close,
    generate,
)

from dare_hf.compat import cache_of
from dare_hf.generation import HopInput, HopLoop

DELIMITERS = tuple(range(10, 45))


NEW = 14


def looped(model, inputs, on_hop=lambda hop: None, max_hops=None, **kwargs):
    options = {"max_new_tokens": NEW, "hop_loop": HopLoop(on_hop, max_hops), **kwargs}
    return generate(model, inputs, **options)


def real_columns(out):
    """Bool[B, N] of the sequences: what the cache has seen, and the last sampled token."""
    seen = cache_of(out).log.modality >= 0
    return torch.nn.functional.pad(seen, (0, 1), value=True)


class Featured:
    """Injects words, features and a grid in turn, and remembers what went into each row."""

    def __init__(self, model):
        self.model, self.rows, self.turn = model, {}, 0
        self.token = model.config.image_token_id

    def __call__(self, hop):
        self.turn += 1
        if self.turn % 4 == 0:
            return None
        if self.turn % 4 == 1:
            return HopInput(input_ids=[70, 71])
        size = self.model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(self.turn)
        grid = torch.randn((3, 2 if self.turn % 4 == 2 else 3, size), generator=generator)
        self.rows.setdefault(hop.row, []).append(grid)
        count = grid.shape[0] * grid.shape[1]
        if self.turn % 4 == 2:
            return HopInput(features=grid, input_ids=[80])
        return HopInput(features=grid, input_ids=[4, *[self.token] * count, 5])


def recomputed(model, rows, inputs, out, featured, **kwargs):
    """Logits of one forward over everything the run has seen; of a plain model by default."""
    merge = 2
    kind = model.config.model_type
    # a Chameleon prompt holds its images as ids
    pictures = [[] if kind == "chameleon" else list(row["images"]) for row in rows]
    for row, grids in featured.rows.items():
        for grid in grids:
            size = [1, merge * grid.shape[0], merge * grid.shape[1]]
            pictures[row].append({"features": grid.reshape(-1, grid.shape[-1]), "grid": size})
    flat = [picture for row in pictures for picture in row]
    ids = out.sequences[:, :-1]
    whole = dict(inputs, input_ids=ids, attention_mask=real_columns(out)[:, :-1].long())
    whole.pop("mm_encoder_outputs", None)
    types = (ids == featured.token).long()
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in whole:
            whole[key] = types
    if kind == "qwen2_5_vl":
        whole["image_grid_thw"] = torch.tensor([picture["grid"] for picture in flat])
    whole["position_ids"] = model._prepare_position_ids_for_generation(ids, whole)
    vectors = torch.cat([picture["features"] for picture in flat])

    def put_in(module, args, output):
        return output.masked_scatter((ids == featured.token)[..., None], vectors)

    hook = model.get_input_embeddings().register_forward_hook(put_in)
    try:
        return model(**whole, use_cache=False, **kwargs).logits
    finally:
        hook.remove()


def assert_steps_are(full, out, prompt, what):
    """Hold each sampled step's logits to those before its token in the long forward."""
    real = real_columns(out)
    for row in range(len(full)):
        columns = [c for c in range(out.sequences.shape[1]) if real[row, c]]
        before = dict(zip(columns[1:], columns, strict=False))
        for step, column in enumerate(sampled_tokens(out, row, prompt)):
            ours, theirs = out.logits[step][row], full[row, before[column]].float()
            where = f"{what}, row {row}, step {step}"
            assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what=where)


def sampled_tokens(out, row, prompt):
    """Columns of one row that hold sampled tokens: those whose logits chose them."""
    spans = injected_columns(cache_of(out))
    inside = {c for start, end in spans for c in range(start, end)}
    columns = [c for c in range(prompt, out.sequences.shape[1]) if c not in inside]
    assert len(columns) == len(out.logits)
    return columns
