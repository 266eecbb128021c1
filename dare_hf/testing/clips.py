"""Frames of a video, in the form each architecture's vision tower takes them.

Only architectures whose forward has arguments for videos stand here. Where a processor turns
frames into images (internvl, smolvlm), several images in a row are what the model sees of a video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.testing import pictures
from dare_hf.testing.models import IMAGE_ID, VIDEO_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dare_hf.testing.pictures import Draw, Picture

FRAMES = 2


@dataclass(frozen=True)
class Clip:
    """How one architecture takes a video.

    Attributes:
        draw: Draws the frames, as keyword arguments of `get_video_features`; None where the tower
            cannot be built here, so that random features take the place of its output.
        apart: Each frame's placeholders stand in a frame of their own, after its time.
        placeholder: The id that stands for a frame's content.
        kind: What marks it in the type ids: 2, or 1 where frames are marked as images are.
        beside_images: Whether a batch may hold pictures and videos: not where transformers marks
            both by one placeholder and takes all of them for either.
        encoded: Run the tower, where there is one, and give the model its features.
        flat: These features are one tensor, not one a video.
    """

    draw: Draw | None
    apart: bool = False
    placeholder: int = VIDEO_ID
    kind: int = 2
    beside_images: bool = True
    encoded: bool = False
    flat: bool = False


def _filmed(draw: Draw) -> Draw:
    """The frames that `draw` makes as a picture of several, under a video's names."""

    def film(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        made = draw(model, pictures.FILM, generator)
        names = {"pixel_values": "pixel_values_videos"}
        return {names.get(k, k.replace("image_", "video_")): v for k, v in made.items()}

    return film


def _frames(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """[1, FRAMES, 3, side, side]."""
    images = [pictures.square(model, number, generator)["pixel_values"] for _ in range(FRAMES)]
    return {"pixel_values_videos": torch.stack(images, dim=1)}


def _singly(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """Each frame with a grid of its own.

    kimi_k25 pools the frames of one grid into one, and then counts their tokens wrongly
    (transformers 5.23, Kimi_K25Model.get_image_features).
    """
    made = _filmed(pictures.square_patches)(model, number, generator)
    (_, height, width) = made["video_grid_thw"][0].tolist()
    return {**made, "video_grid_thw": torch.tensor([[1, height, width]] * FRAMES)}


def _seconds(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """As `patches`, with the time between frames."""
    made = _filmed(pictures.patches)(model, number, generator)
    return {**made, "video_second_per_grid": torch.tensor([1.0])}


def _placed(side: int) -> Draw:
    """Flat patches of each frame, their places, and how many frames there are."""

    def film(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
        frames = [pictures.placed(side)(model, number, generator) for _ in range(FRAMES)]
        return {
            "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in frames]),
            "video_position_ids": torch.cat([frame["image_position_ids"] for frame in frames]),
            "num_frames_per_video": torch.tensor([FRAMES]),
        }

    return film


def _strips(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """The patches of all frames side by side, and each frame's grid."""
    frames = [pictures.strip(model, 2, generator) for _ in range(FRAMES)]
    return {
        "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in frames], dim=-1),
        "target_sizes_videos": torch.cat([frame["target_sizes"] for frame in frames]),
    }


def _pooled(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """Crops of 36 flat patches, one a frame, pooled four by four, and the video's grid."""
    made = [pictures.pooled(model, number, generator) for _ in range(FRAMES)]
    return {
        "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in made]),
        "video_token_pooling": torch.arange(36 * FRAMES).view(-1, 4),
        "video_grids": torch.tensor([[FRAMES, 3, 3]]),
    }


def _bare(model: PreTrainedModel, number: int, generator: torch.Generator) -> Picture:
    """[FRAMES, 3, side, side] of one video, which has no dimension of its own."""
    noise = torch.randn(FRAMES, 3, 16, 16, generator=generator)
    return {"pixel_values_videos": noise.to(model.dtype)}


_GRID = Clip(_filmed(pictures.patches))
_TIMED = Clip(_filmed(pictures.patches), apart=True)
_AS_IMAGES = Clip(_filmed(pictures.patches), apart=True, placeholder=IMAGE_ID, beside_images=False)

CLIPS: dict[str, Clip] = {
    **dict.fromkeys(
        ("cohere_compass", "cosmos3_edge", "cosmos3_omni", "qwen3_5", "qwen3_5_moe"), _TIMED
    ),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _TIMED),
    **dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"), _AS_IMAGES),
    **dict.fromkeys(("exaone4_5", "hyperclovax_vision_v2", "lfm3_vl", "minimax_m3_vl"), _GRID),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), _GRID),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), Clip(_seconds)),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), Clip(_strips, apart=True)),
    **dict.fromkeys(("dots3_note", "ernie4_5_vl_moe"), Clip(_filmed(pictures.flat_patches))),
    "gemma4": Clip(_placed(4)),
    "gemma4_unified": Clip(_placed(4)),
    "kimi_k25": Clip(_singly, apart=True),
    "llava_next_video": Clip(_frames),
    "llava_onevision": Clip(_frames),
    # its pooling counts the patches of all videos of a batch
    "molmo2": Clip(_pooled, placeholder=IMAGE_ID, beside_images=False, encoded=True),
    "muse_glimmer": Clip(_filmed(pictures.deep_patches)),
    "muse_spark": Clip(_filmed(pictures.deep_patches)),
    # its forward joins the features of videos as a list, and its tower gives a tensor (5.23)
    "nemotron_h_omni": Clip(_bare, placeholder=IMAGE_ID, beside_images=False, encoded=True),
    "perception_lm": Clip(None, encoded=True, flat=True),
    "video_llama_3": Clip(_filmed(pictures.merged_patches)),
    "video_llava": Clip(_frames),
}


def clip_of(model_type: str) -> Clip | None:
    """How an architecture takes a video; None where its forward takes none."""
    return CLIPS.get(model_type)
