"""Whole images from Chameleon: the mask lifted and restored, images begun, filled and ended."""

from copy import deepcopy

import pytest
import torch
from PIL import Image

from dare_hf.errors import DareConfigError, DareInputError, UnsupportedModelError
from dare_hf.generation.interleaved import (
    WholeImageLogitsProcessor,
    allow_image_tokens,
    find_images,
    image_token_ids,
    load_decoder,
)
from dare_hf.generation.vq_decoder import VQPatchDecoder
from dare_hf.testing.models import tiny_model

BEGIN, END, PLACEHOLDER, N = 4, 5, 3, 4
IMAGES = [6, 7, 8]
VOCAB = 10
TEXT = [0, 1, 2, 9]


@pytest.fixture(scope="module")
def chameleon() -> torch.nn.Module:
    return tiny_model("chameleon", layers=2)


def rule(**changes: object) -> WholeImageLogitsProcessor:
    arguments = {
        "image_ids": IMAGES,
        "begin_id": BEGIN,
        "end_id": END,
        "tokens_per_image": N,
        "placeholder_ids": [PLACEHOLDER],
    }
    return WholeImageLogitsProcessor(**(arguments | changes))


def allowed(ids: list[list[int]]) -> list[list[int]]:
    scores = rule()(torch.tensor(ids), torch.zeros(len(ids), VOCAB))
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in scores]


def test_image_tokens_can_be_sampled_only_inside_the_block(chameleon: torch.nn.Module) -> None:
    ids, tokens = torch.tensor([[10, 11, 12]]), list(image_token_ids(chameleon))
    lowest = torch.finfo(torch.float32).min
    mapping = chameleon.model.vocabulary_mapping
    before = deepcopy(vars(mapping))
    masked = chameleon(input_ids=ids).logits
    assert (masked[..., tokens] == lowest).all()
    with allow_image_tokens(chameleon), allow_image_tokens(chameleon):
        free = chameleon(input_ids=ids).logits
    assert (free[..., tokens] > lowest).all()
    rest = [k for k in range(free.shape[-1]) if k not in tokens]
    assert torch.equal(free[..., rest], masked[..., rest])
    assert torch.equal(chameleon(input_ids=ids).logits, masked)
    assert vars(mapping).keys() - before.keys() <= {"image_tokens"}


def test_the_mapping_is_restored_exactly_even_after_an_error(chameleon: torch.nn.Module) -> None:
    mapping = chameleon.model.vocabulary_mapping
    mapping.__dict__.pop("image_tokens", None)
    before = dict(vars(mapping))
    with pytest.raises(KeyError), allow_image_tokens(chameleon):
        raise KeyError
    assert vars(mapping) == before


def test_images_can_still_be_read_inside_the_block(chameleon: torch.nn.Module) -> None:
    pixels = torch.rand(1, 3, 12, 12)
    outside = chameleon.model.get_image_tokens(pixels)
    with allow_image_tokens(chameleon):
        assert torch.equal(chameleon.model.get_image_tokens(pixels), outside)


def test_a_model_without_image_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="image tokens"):
        image_token_ids(torch.nn.Linear(2, 2))


def test_outside_an_image_no_image_id_and_no_end_can_follow() -> None:
    outside = [BEGIN, *TEXT]
    closed = [BEGIN, 6, 6, 7, 8, END]
    assert allowed([[1, 2]]) == [sorted(outside)]
    assert allowed([closed, [*closed[1:], 1]]) == [sorted(outside)] * 2


def test_inside_an_image_exactly_n_image_ids_then_the_end() -> None:
    row = [1, BEGIN]
    for _ in range(N):
        assert allowed([row]) == [IMAGES]
        row.append(6)
    assert allowed([row]) == [[END]]


def test_rows_are_told_apart_and_left_padding_does_not_matter() -> None:
    rows = [[0, 0, 0, 1, BEGIN, 6], [BEGIN, 6, 6, 6, 6, END], [1, BEGIN, 6, 7, 8, 6]]
    assert allowed(rows) == [IMAGES, sorted([BEGIN, *TEXT]), [END]]
    # The same rows in another order, as a beam search would hand them over.
    assert allowed(rows[::-1]) == allowed(rows)[::-1]


def test_placeholders_of_a_prompt_count_as_its_image() -> None:
    prompt = [1, BEGIN, *[PLACEHOLDER] * N, END, 2]
    assert allowed([prompt]) == [sorted([BEGIN, *TEXT])]


@pytest.mark.parametrize(
    "changes",
    [
        {"image_ids": []},
        {"image_ids": [6, 6]},
        {"end_id": BEGIN},
        {"tokens_per_image": 0},
        {"vocab_size": 8},
        {"image_ids": [-1, 6], "vocab_size": VOCAB},
    ],
)
def test_bad_ids_are_refused_when_made(changes: dict) -> None:
    with pytest.raises(DareConfigError):
        rule(**changes)


def test_ids_outside_the_logits_are_refused_by_name() -> None:
    with pytest.raises(DareConfigError, match=r"vocabulary of 8, got \[8\]"):
        rule()(torch.tensor([[1]]), torch.zeros(1, 8))


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_generate_keeps_images_whole(chameleon: torch.nn.Module, search: dict) -> None:
    """Begin is forced every 12 tokens, as random weights would hardly draw by themselves."""
    codes, count = list(image_token_ids(chameleon)), 6
    begin, end = (chameleon.config.vocabulary_map[n] for n in ("<racm3:break>", "<eoss>"))
    whole = WholeImageLogitsProcessor(codes, begin, end, count, chameleon.config.vocab_size)

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] % 12 == 0:
            scores = scores.clone()
            scores[:, begin] = scores.amax() + 10
        return whole(ids, scores)

    rows = 1 if "prompt_lookup_num_tokens" in search else 2
    prompt = torch.tensor([[0, 0, 10, 11, 10], [12, 10, 11, 13, 10]])[-rows:]
    mask = (prompt != 0).long()
    with allow_image_tokens(chameleon):
        out = chameleon.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=40,
            logits_processor=[force],
            **search,
        )
    for row in out.tolist():
        images = find_images(row, begin, count)
        assert images, "no image was begun"
        assert all(token in codes for image in images for token in image)
        for start in (k for k, token in enumerate(row[: -count - 1]) if token == begin):
            assert row[start + count + 1] == end
        assert sum(token in codes for token in row[: -count - 1]) <= len(images) * count


def test_the_decoder_round_trips_through_its_file(tmp_path: object) -> None:
    decoder = VQPatchDecoder(embed_dim=4, hidden=8, patch=2).half().float()
    decoder.save(tmp_path)
    codes = torch.randn(1, 4, 3, 3)
    loaded = VQPatchDecoder.load(tmp_path)
    assert loaded(codes).shape == (1, 3, 6, 6)
    assert torch.equal(loaded(codes), decoder(codes))


def test_a_missing_decoder_is_named(tmp_path: object, chameleon: torch.nn.Module) -> None:
    with pytest.raises(FileNotFoundError, match=r"image_decoder\.safetensors"):
        VQPatchDecoder.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"image_decoder\.safetensors"):
        load_decoder(chameleon)


def test_cut_off_images_are_left_out() -> None:
    assert find_images([1, BEGIN, 6, 7, 8, 6, END, BEGIN, 6], BEGIN, N) == [[6, 7, 8, 6]]


def test_only_image_ids_can_be_decoded(chameleon: torch.nn.Module) -> None:
    from types import SimpleNamespace

    from dare_hf.generation.interleaved import decode_images

    scale = SimpleNamespace(image_std=[1.0] * 3, image_mean=[1.0] * 3, rescale_factor=0.0078)
    processor = SimpleNamespace(image_processor=scale)
    decoder = VQPatchDecoder(embed_dim=8, hidden=8, patch=2)
    codes = list(image_token_ids(chameleon))
    pictures = decode_images(chameleon, processor, [codes[:4]], decoder)
    assert [picture.size for picture in pictures] == [(4, 4)]
    assert isinstance(pictures[0], Image.Image)
    assert decode_images(chameleon, processor, [], decoder) == []
    with pytest.raises(DareInputError, match="image-token ids"):
        decode_images(chameleon, processor, [[*codes[:3], 1]], decoder)
    with pytest.raises(DareInputError, match="square"):
        decode_images(chameleon, processor, [codes[:3]], decoder)
