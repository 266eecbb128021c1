"""A converted VolCano computes what VolCano computes; what is not VolCano is refused by name."""

import json

import pytest
import torch
import volcano_source as source
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from typer.testing import CliRunner

from dare_hf import cli
from dare_hf.convert import convert_volcano
from dare_hf.errors import DareInputError

TOLERANCE = 2e-4
"""float32, another order of sums."""


def test_a_converted_model_is_a_llava_and_its_logits_are_those_of_volcano():
    state, model, processor = source.converted()
    assert type(model) is LlavaForConditionalGeneration
    inputs = source.inputs_of(processor)
    image = processor.image_token_id
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    reference = source.Reference(state)
    features = iter(reference.features(inputs["pixel_values"][0]))
    ids = inputs["input_ids"][0].tolist()
    expected = reference.logits([next(features) if i == image else i for i in ids])
    assert ids.count(image) == source.SIDE**2
    vocab = expected.shape[-1]
    torch.testing.assert_close(logits[:, :vocab], expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert logits.shape[-1] == vocab + 1
    assert image == vocab, "the token added last has the row that was added"


def test_the_image_token_is_never_sampled():
    _, model, processor = source.converted()
    inputs = source.inputs_of(processor)
    image = processor.image_token_id

    def lower(ids, scores):  # all logits below the 0 of the added row, as far as it is still there
        scores[:, :image] -= 1e4
        return scores

    out = model.generate(**inputs, logits_processor=[lower], max_new_tokens=6)
    assert image not in out[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_prompt_is_vocots():
    *_, processor = source.converted()
    assert (
        source.prompt(processor, "where ?") == "<s>[INST] <ImageHere><grounding>\nwhere ? [/INST]"
    )
    assert source.prompt(processor, "q", grounding=False) == "<s>[INST] <ImageHere>\nq [/INST]"


def test_pictures_are_padded_to_a_square_with_the_mean():
    *_, processor = source.converted()
    wide = source.picture(60, 20)
    mean = tuple(int(255 * m) for m in processor.image_processor.image_mean)
    square = Image.new("RGB", (60, 60), mean)
    square.paste(wide, (0, 20))
    made = [
        processor.image_processor(image, return_tensors="pt")["pixel_values"]
        for image in (wide, square)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_both_file_formats_give_the_same_tensors(tmp_path, kind):
    source.write(tmp_path / "source", kind=kind, shards=3)
    convert_volcano(str(tmp_path / "source"), str(tmp_path / "out"), tmp_path / "tower.json")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    expected = source.converted()[1].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def broken(tmp_path, message, edit=None, kind="safetensors", **changes):
    vocab = len(source.tokenizer()) - 1
    state = source.weights(vocab)
    if edit is not None:
        edit(state)
    source.write(tmp_path / "source", kind=kind, state=state, **changes)
    with pytest.raises(DareInputError, match=message):
        convert_volcano(tmp_path / "source", tmp_path / "out", tmp_path / "tower.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tower.json"]


def test_a_missing_tensor_is_named(tmp_path):
    def edit(state):
        del state["model.layers.2.mlp.up_proj.weight"]

    broken(tmp_path, r"without language_model\.model\.layers\.2\.mlp\.up_proj\.weight", edit)


def test_a_foreign_tensor_is_named(tmp_path):
    def edit(state):
        state["q_former.bert.weight"] = torch.zeros(2)

    broken(tmp_path, r"beside them q_former\.bert\.weight", edit)


def test_another_shape_is_named(tmp_path):
    def edit(state):
        state["front_mm_projector.0.bias"] = torch.zeros(7)

    broken(tmp_path, r"multi_modal_projector\.linear_1\.bias of shape \[32\].*\[7\]", edit)


def test_a_lora_checkpoint_is_not_taken_for_a_model(tmp_path):
    broken(tmp_path, "expected VolCano's|model_type", model_type="llava_mistral")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("front_projector_type", "q_former", "front_projector_type"),
        ("mm_vision_select_layer", None, "mm_vision_select_layer"),
        ("mm_vision_select_feature", "cls", "mm_vision_select_feature"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, field, value, message):
    broken(tmp_path, message, **{field: value})


def test_code_in_a_pickle_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    def edit(state):
        state["model.norm.weight"] = Code()

    broken(tmp_path, "weights_only=True", edit, kind="bin")


def test_an_unknown_tower_is_named(tmp_path):
    source.write(tmp_path / "source")
    with pytest.raises(DareInputError, match=r"tiny/clip.*--tower"):
        convert_volcano(tmp_path / "source", tmp_path / "out")


def test_what_exists_is_not_overwritten(tmp_path):
    source.write(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(DareInputError, match="does not exist"):
        convert_volcano(tmp_path / "source", tmp_path / "out", tmp_path / "tower.json")


def test_a_folder_without_weights_or_tokenizer_says_so(tmp_path):
    source.write(tmp_path / "source")
    for path in (tmp_path / "source").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "source" / "training_args.bin").unlink()
    with pytest.raises(DareInputError, match="folder with weights"):
        convert_volcano(tmp_path / "source", tmp_path / "out", tmp_path / "tower.json")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(config))
    with pytest.raises(DareInputError, match="tokenizer"):
        convert_volcano(empty, tmp_path / "out", tmp_path / "tower.json")


def test_the_command_writes_the_folder_or_one_line_why_not(tmp_path):
    source.write(tmp_path / "source")
    arguments = ["convert", "volcano", str(tmp_path / "source"), str(tmp_path / "out")]
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    made = CliRunner().invoke(cli.app, [*arguments, "--tower", str(tmp_path / "tower.json")])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
