"""A converted Anole draws under DARE, its pictures are decoded, and what is no Anole is refused."""

import anole_source as source
import pytest
import torch
from transformers import ChameleonForConditionalGeneration, LogitsProcessorList
from typer.testing import CliRunner

from dare_hf import DareConfig, cli, dare_applied, last_report
from dare_hf.convert import convert_anole
from dare_hf.errors import DareInputError
from dare_hf.generation import HopInput, HopLoop
from dare_hf.generation.interleaved import (
    WholeImageLogitsProcessor,
    allow_image_tokens,
    decode_images,
    find_images,
    image_token_ids,
)
from dare_hf.generation.vq_decoder import ChameleonVQDecoder

TOLERANCE = 1e-5


def test_a_decoded_picture_is_the_reference_decoders():
    drawn, *_, decoder = source.converted()
    assert isinstance(decoder, ChameleonVQDecoder)
    codes = torch.randn(2, source.EMBED, 7, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pixels = decoder(codes)
        expected = source.ReferenceDecoder(drawn)(codes)
    assert pixels.shape == (2, 3, 28, 28)
    assert expected.std() > 0.1, "a picture, not a plane"
    torch.testing.assert_close(pixels, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_ids_become_pictures_through_the_models_codebook():
    drawn, model, processor, decoder = source.converted()
    ids = list(image_token_ids(model))
    chosen = [ids[(7 * k) % len(ids)] for k in range(49)]
    (picture,) = decode_images(model, processor, [chosen], decoder)
    codes = [image_token_ids(model)[i] for i in chosen]
    vectors = drawn["quantize.embedding.weight"][codes].T.view(1, -1, 7, 7)
    pixels = source.ReferenceDecoder(drawn)(vectors)[0].permute(1, 2, 0)
    expected = ((pixels + 1) / 0.0078).round().clamp(0, 255)
    seen = torch.tensor(list(picture.get_flattened_data())).view(28, 28, 3)
    assert (seen - expected).abs().max() <= 1, "one grey level where a value rounds the other way"
    assert seen.float().std() > 1


def test_the_weights_are_those_of_the_source(tmp_path):
    state, _ = source.write(tmp_path, kind="bin", inside=True)
    convert_anole(tmp_path / "source", tmp_path / "out")
    model = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out")
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not list((tmp_path / "out").glob("*.py"))


def test_it_draws_in_hops_under_dare_and_each_picture_is_seen():
    _, model, processor, decoder = source.converted()
    inputs = processor.tokenizer("The answer is", return_tensors="pt")
    whole = WholeImageLogitsProcessor.from_model(model, processor)
    begin, end, count = whole.begin_id, whole.end_id, whole.tokens_per_image

    class Begin:  # a random model begins no image by itself
        def __call__(self, ids, scores):
            drawing = ids[:, -count - 1 :].eq(begin).any(1)
            scores = scores.clone()
            scores[~drawing] = -torch.inf
            scores[~drawing, begin] = 0
            return scores

    seen = []

    def look(hop):
        seen.extend(hop.images)
        return HopInput(input_ids=[20, 21])

    config = DareConfig(
        vision_retention=0.4, text_retention=1.0, schedule="constant", hop_delimiters=(end,)
    )
    with allow_image_tokens(model), dare_applied(model, config):
        out = model.generate(
            **inputs,
            hop_loop=HopLoop(look, processor=processor, decoder=decoder),
            logits_processor=LogitsProcessorList([Begin(), whole]),
            max_new_tokens=2 * (count + 2) + 1,
            do_sample=True,
        )
        report = last_report(model)
    assert [picture.size for picture in seen] == [(28, 28)] * 2
    drawn = find_images(out[0].tolist(), begin, count)
    again = [decode_images(model, processor, [ids], decoder)[0] for ids in drawn[:2]]
    assert [a.tobytes() for a in again] == [s.tobytes() for s in seen]
    assert report.hops >= 3
    assert report.kv_bytes < report.kv_bytes_baseline


def broken(tmp_path, message, edit=None, decoder="vqvae", **changes):
    state, drawn = source.weights(source.config())
    if edit is not None:
        edit(state, drawn)
    source.write(tmp_path, state=state, drawn=drawn, **changes)
    with pytest.raises(DareInputError, match=message):
        convert_anole(tmp_path / "source", tmp_path / "out", decoder and tmp_path / decoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "vqvae"]


def test_a_missing_tensor_of_the_model_is_named(tmp_path):
    def edit(state, drawn):
        del state["model.layers.1.self_attn.q_norm.bias"]

    broken(tmp_path, r"without model\.layers\.1\.self_attn\.q_norm\.bias", edit)


def test_a_missing_tensor_of_the_decoder_is_named(tmp_path):
    def edit(state, drawn):
        del drawn["decoder.up.2.upsample.conv.bias"]

    broken(tmp_path, r"image decoder.*without decoder\.up\.2\.upsample\.conv\.bias", edit)


def test_another_shape_is_named(tmp_path):
    def edit(state, drawn):
        drawn["decoder.conv_out.weight"] = torch.zeros(4, 64, 3, 3)

    broken(tmp_path, r"decoder\.conv_out\.weight of shape \[3, 64, 3, 3\]", edit)


def test_a_decoder_of_another_codebook_is_refused(tmp_path):
    def edit(state, drawn):
        drawn["quantize.embedding.weight"] = drawn["quantize.embedding.weight"].flip(0)

    broken(tmp_path, "same codebook", edit)


def test_a_checkpoint_without_a_decoder_says_how_to_give_one(tmp_path):
    broken(tmp_path, "--decoder", decoder=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type.*leloy/Anole-7b-v0.1-hf"),
        ({"vocabulary_map": {"<image>": 5}}, "IMGIMG"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, changes, message):
    broken(tmp_path, message, **changes)


def test_what_exists_is_not_overwritten(tmp_path):
    source.write(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(DareInputError, match="does not exist"):
        convert_anole(tmp_path / "source", tmp_path / "out", tmp_path / "vqvae")


def test_the_command_writes_the_folder_or_one_line_why_not(tmp_path):
    source.write(tmp_path)
    arguments = ["convert", "anole", str(tmp_path / "source"), str(tmp_path / "out")]
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    made = CliRunner().invoke(cli.app, [*arguments, "--decoder", str(tmp_path / "vqvae")])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out" / "image_decoder.safetensors").is_file()
