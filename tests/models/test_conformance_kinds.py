"""What is vision: frames of a video are, audio is a kind of its own that nobody prunes."""

import inspect
import math

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from dare_hf import DareCache, DareConfig
from dare_hf.architectures.locate import SPECS
from dare_hf.compat import CACHE
from dare_hf.conformance import architectures
from dare_hf.conformance.subject import Subject
from dare_hf.errors import DareConfigError
from dare_hf.testing.clips import FRAMES, clip_of
from dare_hf.testing.families import family_of
from dare_hf.testing.models import VIDEO_ID

AUDIO_ID = 7


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SPECS) & set(architectures())))
def test_every_architecture_that_takes_frames_is_shown_frames(name):
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[name]]
    takes = "pixel_values_videos" in inspect.signature(kind.forward).parameters
    assert (clip_of(name) is not None) == takes


def test_every_architecture_is_shown_rows_with_0_1_and_3_pictures():
    shown = {name: family_of(name) for name in set(SPECS) & set(architectures())}
    assert {name for name, family in shown.items() if not family.sees} == {"mistral4"}
    assert {family.images for family in shown.values() if family.sees} == {(0, 1, 3)}


def test_frames_share_the_vision_budget_of_their_span():
    """There is no rate for each frame; a name for one is no field."""
    subject = Subject.of("qwen2_vl")
    batch = subject.batches["video"]
    patches = (batch.inputs["input_ids"][0] == VIDEO_ID).sum().item()
    assert patches > FRAMES
    with subject.dare(text_retention=1.0, vision_retention=0.5, schedule="constant"):
        cache = DareCache()
        subject.forward(batch, **{CACHE: cache}, use_cache=True)
    held = cache.log.modality[0][cache.layers[-1].positions()[0]] == 1
    assert held.sum().item() == math.ceil(0.5 * patches)
    with pytest.raises(DareConfigError, match="frame_retention: expected a field"):
        DareConfig(frame_retention=0.5)


def test_frames_keep_their_places_in_time():
    """The frames of one video differ in time alone, and what is stored of them are these places."""
    subject = Subject.of("qwen2_vl")
    batch = subject.batches["video"]
    frames = batch.inputs["input_ids"][0] == VIDEO_ID
    given = subject.model.model.compute_3d_position_ids(
        input_ids=batch.inputs["input_ids"],
        inputs_embeds=None,
        attention_mask=batch.inputs["attention_mask"],
        image_grid_thw=batch.inputs["image_grid_thw"],
        video_grid_thw=batch.inputs["video_grid_thw"],
        mm_token_type_ids=batch.inputs["mm_token_type_ids"],
    )
    assert given[0, 0, frames].unique().numel() == FRAMES
    seen = []

    def watch(layer, args, kwargs):
        seen.append(kwargs["position_embeddings"][0])  # the cosines, [B, kept, d]

    layer = subject.model.model.language_model.layers[-1]
    with subject.dare(text_retention=1.0, vision_retention=0.5):
        handle = layer.self_attn.register_forward_pre_hook(watch, with_kwargs=True)
        cache = DareCache()
        subject.forward(batch, **{CACHE: cache}, use_cache=True)
        handle.remove()
    held = cache.layer(len(cache.layers) - 1).positions()
    rotary = subject.model.model.language_model.rotary_emb(seen[0], given)[0]
    for row, columns in enumerate(held):
        real = columns >= 0
        assert torch.equal(seen[0][row, real], rotary[row, columns[real]])


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
            subject.forward(batch, **{CACHE: cache}, use_cache=True)
        kept = [set(layer.positions()[0].tolist()) for layer in cache.layers]
        stored[name] = [sum(int(w) in layer for w in words) for layer in kept]
    assert stored["audio"] == [len(words)] * len(stored["audio"])
    assert max(stored["vision"]) < len(words)
