"""What is vision: frames of a video are, audio is a kind of its own that nobody prunes."""

import pytest
import torch

from dare_hf import DareCache
from dare_hf.conformance.laws import hops, identity, oracle
from dare_hf.conformance.subject import Subject
from dare_hf.testing.models import IMAGE_END_ID, IMAGE_START_ID, VIDEO_ID
from dare_hf.testing.samples import Batch

AUDIO_ID = 7
FRAMES, SIDE = 2, 4
"""Grid of the video: two pairs of frames of four by four patches, merged two by two."""


def video_batch(model, rows: int) -> Batch:
    """Left-padded prompts: the first has a video, the others text alone, and all other lengths."""
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(3)
    tokens = FRAMES * SIDE * SIDE // 4
    video = [1, 20, 21, IMAGE_START_ID, *[VIDEO_ID] * tokens, IMAGE_END_ID, 31, 32, 33, 34, 35, 36]
    prompts = [video] + [[1, *range(40, 48 + 2 * row)] for row in range(rows - 1)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    modality = torch.where(ids == VIDEO_ID, 1, 0)
    for row, prompt in enumerate(prompts):
        modality[row, : width - len(prompt)] = -1
    flat = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(FRAMES * SIDE * SIDE, flat, generator=generator).to(model.dtype)
    inputs = {
        "input_ids": ids,
        "attention_mask": (modality >= 0).long(),
        "mm_token_type_ids": torch.where(ids == VIDEO_ID, 2, 0),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[FRAMES, SIDE, SIDE]]),
    }
    return Batch(inputs, modality.to(torch.int8))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_of_a_video_are_vision_and_keep_their_places_in_time(name):
    subject = Subject.of(name)
    model = subject.model
    subject.batches = {"alone": video_batch(model, 1), "padded": video_batch(model, 3)}
    for law in (identity, oracle, hops):
        law(subject)


def test_audio_is_never_pruned_unless_it_is_called_vision():
    subject = Subject.of("qwen2_5_omni_thinker")
    batch = subject.batches["alone"]
    ids = batch.inputs["input_ids"]
    words = (batch.modality[0] == 0).nonzero().flatten()[-8:-2]
    ids[0, words] = AUDIO_ID
    stored = {}
    for name, fields in (("audio", {}), ("vision", {"image_token_ids": (3, 6, AUDIO_ID)})):
        cache = DareCache()
        with subject.dare(text_retention=0.3, vision_retention=0.3, **fields):
            subject.forward(batch, past_key_values=cache, use_cache=True)
        kept = [set(layer.positions()[0].tolist()) for layer in cache.layers]
        stored[name] = [sum(int(w) in layer for w in words) for layer in kept]
    assert stored["audio"] == [len(words)] * len(stored["audio"])
    assert max(stored["vision"]) < len(words)
