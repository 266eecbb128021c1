"""Where in a picture each image feature lies, by changing one cell of the picture at a time."""

import numpy as np
import pytest
import torch
from laws import shared_model
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from dare_hf.errors import DareInputError, UnsupportedModelError
from dare_hf.generation.feature_grid import GRIDS, feature_grids
from dare_hf.generation.hop_types import HopPrompt

IMAGE_ID = 3
TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LLAMA = {"model_type": "llama", **TEXT}
MISTRAL = {"model_type": "mistral", "head_dim": 8, **TEXT}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4}
CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 12, **TOWER}
PIXTRAL = {
    "model_type": "pixtral",
    "num_hidden_layers": 1,
    "image_size": 40,
    "head_dim": 8,
    **TOWER,
}


def pixtral_llava():
    config = LlavaConfig(
        vision_config=PIXTRAL,
        text_config=LLAMA,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration, config


def vipllava():
    config = VipLlavaConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_index=IMAGE_ID,
        vision_feature_layers=[-2, -1],
    )
    return VipLlavaForConditionalGeneration, config


def mistral3():
    config = Mistral3Config(
        vision_config=PIXTRAL,
        text_config=MISTRAL,
        image_token_index=IMAGE_ID,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration, config


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE_ID,
    )
    return Qwen2VLForConditionalGeneration, config


BUILT = {
    "pixtral_llava": pixtral_llava,
    "vipllava": vipllava,
    "mistral3": mistral3,
    "qwen2_vl": qwen2_vl,
}
SHARED = ["llava", "gemma3", "qwen2_5_vl"]


def model_of(name):
    if name in SHARED:
        return shared_model(name)
    cls, config = BUILT[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.24)
    return model


def sizes_of(name):
    """Cells and pixels a cell of two pictures: one shape where the tower takes no other."""
    if "qwen" in name or name == "mistral3":
        return [(2, 4), (4, 3)], 8
    if name == "pixtral_llava":
        return [(2, 4), (4, 3)], 4
    return [(3, 3), (3, 3)], 8 if name == "gemma3" else 4


def picture(size, side, turned=None):
    """[h, w, 3] pixels, noise of which one cell is turned into its negative."""
    shape = (size[0] * side, size[1] * side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if turned is not None:
        row, column = turned
        cell = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        pixels[cell] = 255 - pixels[cell]
    return pixels


def inputs_for(name, pictures):
    """What the processor of this model makes of pictures."""
    if "qwen" in name:
        ours = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=10**4
        )
        return dict(ours(images=pictures, return_tensors="pt"))
    height = max(len(pixels) for pixels in pictures)
    width = max(pixels.shape[1] for pixels in pictures)
    batch = torch.zeros(len(pictures), 3, height, width)
    for index, pixels in enumerate(pictures):
        values = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        batch[index, :, : pixels.shape[0], : pixels.shape[1]] = values
    inputs = {"pixel_values": batch}
    if name in ("pixtral_llava", "mistral3"):
        inputs["image_sizes"] = torch.tensor([pixels.shape[:2] for pixels in pictures])
    return inputs


def grids(model, inputs, rows):
    """The grids of rows of pictures, as `feature_grids` finds them."""
    width = max(map(sum, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    for row, counts in enumerate(rows):
        ids[row, : sum(counts)] = IMAGE_ID
    prompt = HopPrompt(model, ids, 0, inputs, None, 1, None)
    with torch.no_grad():
        return feature_grids(prompt, IMAGE_ID)


@pytest.mark.parametrize("name", [*SHARED, *BUILT])
def test_a_cell_of_the_grid_is_that_part_of_the_picture(name):
    model = model_of(name)
    assert model.config.model_type in GRIDS
    sizes, side = sizes_of(name)
    rows = [[], [sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1]]]
    plain = [picture(size, side) for size in sizes]
    nothing, before = grids(model, inputs_for(name, plain), rows)
    assert nothing == []
    assert [tuple(grid.shape[:2]) for grid in before] == sizes
    for index, size in enumerate(sizes):
        for turned in np.ndindex(*size):
            pictures = list(plain)
            pictures[index] = picture(size, side, turned)
            after = grids(model, inputs_for(name, pictures), rows)[1]
            change = (after[index] - before[index]).norm(dim=-1)
            assert np.unravel_index(int(change.argmax()), size) == turned, (
                f"{name}, picture {index}"
            )


def test_pictures_that_do_not_fill_the_placeholders_are_refused():
    model = model_of("llava")
    inputs = inputs_for("llava", [picture((3, 3), 4)] * 2)
    for rows in ([[9]], [[9], [9], [9]], [[8], [10]], [[18, 1]]):
        with pytest.raises(DareInputError, match="fill each row's image tokens"):
            grids(model, inputs, rows)
    assert [len(row) for row in grids(model, inputs, [[9], [], [9]])] == [1, 0, 1]
    assert [len(row) for row in grids(model, inputs, [[18], []])] == [2, 0]


def test_pictures_of_unknown_shape_are_refused():
    qwen, llava = model_of("qwen2_5_vl"), model_of("llava")
    encoded = HopPrompt(
        qwen, torch.full((1, 4), IMAGE_ID), 0, {}, Encoded([torch.ones(4, 8)]), 1, 0
    )
    with pytest.raises(DareInputError, match="expected image_grid_thw"):
        feature_grids(encoded, IMAGE_ID)
    frames = {"image_grid_thw": torch.tensor([[2, 2, 4]])}
    video = HopPrompt(
        qwen, torch.full((1, 4), IMAGE_ID), 0, frames, Encoded([torch.ones(4, 8)]), 1, 0
    )
    with pytest.raises(DareInputError, match="one frame"):
        feature_grids(video, IMAGE_ID)
    wide = {"pixel_values": torch.zeros(1, 3, 4, 64)}
    oblong = HopPrompt(
        llava, torch.full((1, 16), IMAGE_ID), 0, wide, Encoded([torch.ones(16, 8)]), 1, 0
    )
    with pytest.raises(DareInputError, match="square pictures"):
        feature_grids(oblong, IMAGE_ID)


class Encoded:
    """What get_image_features returns, as far as it is read."""

    def __init__(self, vectors):
        self.pooler_output = vectors


@pytest.mark.parametrize("kind", ["llava_next", "internvl", "qwen3_vl", "idefics3", "chameleon"])
def test_tiles_deepstack_and_resamplers_are_refused(kind):
    class Model:
        class config:
            model_type = kind

    prompt = HopPrompt(Model, torch.zeros((1, 1)), 0, {}, None, 1, None)
    with pytest.raises(UnsupportedModelError, match=f"got '{kind}'"):
        feature_grids(prompt, IMAGE_ID)
