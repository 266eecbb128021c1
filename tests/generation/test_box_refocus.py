"""BoxRefocus: the region a hop names is injected, the right one, and bad boxes harm no row."""

import itertools

import pytest
import torch
from laws import (
    assert_close,
    dare,
    everything,
    generate,
    inputs_of,
    needs_later_images,
    shared_model,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessorPil, LlavaProcessor, LogitsProcessor
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf import DareCache, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareInputError, UnsupportedModelError
from dare_hf.generation import BoxRefocus, HopInput, HopLoop

IMAGE_ID, COOR, END, STOP = 3, 11, 12, 14
LLAVA_TYPES = ["llava", "qwen2_5_vl", "gemma3"]
FULL = everything(hop_delimiters=(END, STOP))
PRUNED = {"vision_retention": 0.5, "text_retention": 0.6, "hop_delimiters": (END, STOP)}
TOLERANCE = 2e-4
"""As FP32_TOLERANCE: gemms of other shapes."""


def tokenizer() -> FastTokenizer:
    """One word a token, decoded with spaces between all of them, digits as well."""
    words = {f"w{i}": i for i in range(120)}
    named = {"<unk>": 1, "<image>": 3, "<coor>": COOR, "</coor>": END, ".": 20, ",": 21, "-": 22}
    named.update({str(digit): 30 + digit for digit in range(10)})
    named["x"] = 15
    words = {word: i for word, i in words.items() if i not in named.values()}
    core = Tokenizer(WordLevel({**words, **named}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"additional_special_tokens": ["<image>"]}
    return FastTokenizer(tokenizer_object=core, unk_token="<unk>", pad_token="w0", **special)


TOKENIZER = tokenizer()
NAMES = TOKENIZER.get_vocab()


def says(*boxes):
    """The ids of thoughts that each end in a box; None is a thought without one."""
    ids = []
    for box in boxes:
        ids += [50, STOP] if box is None else [50, COOR, *(NAMES[c] for c in box), END]
    return ids


class Say(LogitsProcessor):
    """Makes each row write given tokens, then what the model wants; never a delimiter."""

    def __init__(self, rows):
        self.rows, self.step = rows, 0

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [COOR, END, STOP]] = -torch.inf
        copies = len(input_ids) // len(self.rows)
        for row in range(len(input_ids)):
            said = self.rows[row // copies]
            if self.step < len(said):
                scores[row] = -torch.inf
                scores[row, said[self.step]] = 0
        self.step += 1
        return scores


class Heard:
    """An on_hop that passes a BoxRefocus on and remembers what it answered."""

    def __init__(self, refocus):
        self.refocus, self.answers = refocus, []

    def begin(self, prompt):
        inner = self.refocus.begin(prompt)

        def answer(hop):
            self.answers.append((hop.row, inner(hop)))
            return self.answers[-1][1]

        return answer

    def of(self, row):
        return [answer for heard, answer in self.answers if heard == row]


def run(model, inputs, rows, on_hop, processor=TOKENIZER, **kwargs):
    steps = max(map(len, rows)) + 3
    return generate(
        model,
        inputs,
        logits_processor=[Say(rows)],
        max_new_tokens=kwargs.pop("max_new_tokens", steps),
        hop_loop=HopLoop(on_hop, processor=processor),
        **kwargs,
    )


def grids_of(model, inputs):
    """Feature grids of all pictures, computed here by the model's own tower."""
    keys = ("pixel_values", "image_grid_thw")
    with torch.no_grad():
        output = model.base_model.get_image_features(
            **{key: inputs[key] for key in keys if key in inputs}, return_dict=True
        )
    if "image_grid_thw" in inputs:
        sizes = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    else:
        sizes = [(3, 3)] * len(output.pooler_output)
    return [v.reshape(*s, -1) for v, s in zip(output.pooler_output, sizes, strict=True)]


BOX = "0.500,0.000,1.000,0.600"


def by_hand(grid):
    """The cells of `BOX`: counted, not computed."""
    rows, columns = {3: (0, 2), 2: (0, 2), 4: (0, 3)}[grid.shape[0]], grid.shape[1] // 2
    return grid[slice(*rows), columns:]


FRAMED = {"llava": ([], []), "qwen2_5_vl": ([4], [5]), "gemma3": ([4], [5])}


@torch.no_grad()
@pytest.mark.parametrize("name", LLAVA_TYPES)
def test_the_region_is_seen_as_one_long_prompt_with_it_would_show_it(name):
    """Every sampled step equals a plain forward over all that was written, features put in.

    The unpatched model counts the positions of that prompt itself, those of the region included.
    """
    model, refocus = shared_model(name), BoxRefocus()
    inputs = inputs_of(model, pixels=True)
    prompt = inputs["input_ids"].shape[1]
    with dare(model, **FULL):
        said = says(BOX)
        out = run(model, inputs, [said], refocus, max_new_tokens=len(said) + 6)
        report = last_report(model)
    grid = grids_of(model, inputs)[0]
    region = by_hand(grid)
    size = region.shape[:2]
    before, after = FRAMED[name]
    injected = [*before, *[IMAGE_ID] * (size[0] * size[1]), *after]
    ids = out.sequences
    begin = prompt + len(said)
    assert ids[0, begin : begin + len(injected)].tolist() == injected
    assert report.tokens["vision"] == [grid.shape[0] * grid.shape[1], 0, size[0] * size[1]]
    logits = plainly(model, inputs, ids, [grid, region])
    sampled = [*range(prompt, begin), *range(begin + len(injected), ids.shape[1])]
    for step, column in enumerate(sampled):
        ours, theirs = out.logits[step][0], logits[0, column - 1]
        assert_close(ours, theirs, tolerance=TOLERANCE, what=f"{name}, step {step}")
    assert (refocus.counts.used, refocus.counts.boxes) == (1, 1)


def plainly(model, inputs, ids, grids):
    """Logits of one forward of the unpatched model; its positions are its own."""
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            whole[key] = (ids == IMAGE_ID).long()
    if "image_grid_thw" in inputs:
        whole["image_grid_thw"] = torch.tensor([[1, 2 * g.shape[0], 2 * g.shape[1]] for g in grids])
    vectors = torch.cat([grid.flatten(0, 1) for grid in grids])

    def put_in(module, args, output):
        return output.masked_scatter((ids == IMAGE_ID)[..., None], vectors)

    hook = model.get_input_embeddings().register_forward_hook(put_in)
    try:
        whole["position_ids"] = model._prepare_position_ids_for_generation(ids, dict(whole))
        return model(**whole, use_cache=False).logits
    finally:
        hook.remove()


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "encoded"])
@pytest.mark.parametrize("name", LLAVA_TYPES)
def test_each_row_gets_its_own_picture(name, pixels):
    """Rows with 0, 1 and 3 pictures; two samples of each prompt; a picture chosen by a rule."""
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 3), pixels=pixels)
    rows = [says(BOX, BOX), says(BOX), says(BOX, BOX, BOX)]
    heard = Heard(BoxRefocus(image_of=lambda hop, count: (hop.index - 1) % count))
    if pixels:
        grids = grids_of(model, inputs)
    else:
        vectors = inputs["mm_encoder_outputs"]["image"].pooler_output
        thw = inputs.get("image_grid_thw", torch.tensor([[1, 6, 6]] * 4)).tolist()
        grids = [v.reshape(h // 2, w // 2, -1) for v, (_, h, w) in zip(vectors, thw, strict=True)]
    wanted = [[None, None], [grids[0]], [grids[1], grids[2], grids[3]]]
    with dare(model, **PRUNED):
        run(model, inputs, rows, heard, do_sample=True, num_return_sequences=2)
    for row in range(6):
        answers = heard.of(row)
        assert len(answers) == len(wanted[row // 2])
        for answer, grid in zip(answers, wanted[row // 2], strict=True):
            if grid is None:
                assert answer is None
            else:
                region = by_hand(grid)
                assert answer.features.shape == region.shape
                assert (answer.features - region).abs().max() < TOLERANCE
    assert (heard.refocus.counts.used, heard.refocus.counts.no_image) == (8, 4)


def test_the_first_picture_is_meant_by_default():
    model = shared_model("llava")
    inputs, heard = inputs_of(model, (2,), pixels=True), Heard(BoxRefocus())
    with dare(model, **PRUNED):
        run(model, inputs, [says(BOX, BOX)], heard)
    first = by_hand(grids_of(model, inputs)[0])
    assert len(heard.of(0)) == 2
    for answer in heard.of(0):
        assert (answer.features - first).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", LLAVA_TYPES)
def test_a_later_call_sees_its_own_pictures(name):
    model, heard = shared_model(name), Heard(BoxRefocus())
    calls = [inputs_of(model, pixels=True, seed=seed) for seed in (0, 1)]
    with dare(model, **PRUNED):
        for inputs in calls:
            run(model, inputs, [says(BOX)], heard)
    for answer, inputs in zip(heard.of(0), calls, strict=True):
        region = by_hand(grids_of(model, inputs)[0])
        assert (answer.features - region).abs().max() < TOLERANCE
    assert heard.refocus.counts.used == 2


@pytest.mark.parametrize("name", LLAVA_TYPES)
def test_the_tower_runs_no_more_often_than_without_boxes(name):
    model, runs = shared_model(name), []
    inputs = inputs_of(model, (1, 2), pixels=True)
    tower = model.model.visual if name == "qwen2_5_vl" else model.model.vision_tower
    hook = tower.register_forward_hook(lambda *args: runs.append(1))
    try:
        with dare(model, **PRUNED):
            run(model, inputs, [says(BOX, BOX)] * 2, BoxRefocus())
    finally:
        hook.remove()
    assert len(runs) == 1


def test_features_are_computed_where_generate_has_not():
    """A model whose forward takes no features from outside encodes pictures itself."""
    model, heard = shared_model("llava"), Heard(BoxRefocus())
    inputs = inputs_of(model, (0, 1, 2), pixels=True)
    model._supports_mm_encoder_outputs = lambda: False
    try:
        with dare(model, **PRUNED):
            run(model, inputs, [says(BOX)] * 3, heard)
            once = dict(inputs_of(model, (1,), pixels=True))
            run(model, once, [says(BOX)], heard, do_sample=True, num_return_sequences=2)
    finally:
        del model._supports_mm_encoder_outputs
    grids = grids_of(model, inputs)
    wanted = [None, by_hand(grids[0]), by_hand(grids[1])]
    alone = by_hand(grids_of(model, once)[0])
    for (row, answer), region in zip(heard.answers, [*wanted, alone, alone], strict=True):
        if region is None:
            assert answer is None
        else:
            assert (answer.features - region).abs().max() < TOLERANCE, row


BAD = {
    "malformed": ["0.1,0.2,0.3", "x,0.2,0.3,0.4", "", "0.1.1,0,1,1"],
    "empty": ["0.2,0.2,0.2,0.9", "0.3,0.4,0.9,0.4", "1.1,0,1.5,1", "-2,0,-1,1"],
    "no_box": [None],
}


def test_bad_boxes_are_counted_and_harm_no_row():
    """Rows of one batch write good and bad boxes; every row goes on as its boxes say."""
    model = shared_model("llava")
    kinds = [(kind, box) for kind, boxes in BAD.items() for box in boxes]
    rows = [says(box) for _, box in kinds] + [says(BOX)]
    inputs = inputs_of(model, (1,) * len(rows), pixels=True)
    heard = Heard(BoxRefocus())
    with dare(model, **PRUNED):
        ours = run(model, inputs, rows, heard)
        plain = generate(
            model, inputs, logits_processor=[Say(rows)], max_new_tokens=max(map(len, rows)) + 3
        )
    counts = heard.refocus.counts
    assert {kind: getattr(counts, kind) for kind in BAD} == {k: len(v) for k, v in BAD.items()}
    assert (counts.used, counts.boxes) == (1, len(rows) - 1)
    assert [row for row, answer in heard.answers if answer is not None] == [len(rows) - 1]
    real = cache_of(ours).log.modality >= 0
    real = torch.nn.functional.pad(real, (0, 1), value=True)
    own = cache_of(plain).log.modality >= 0
    own = torch.nn.functional.pad(own, (0, 1), value=True)
    for row in range(len(kinds)):
        assert ours.sequences[row, real[row]].tolist() == plain.sequences[row, own[row]].tolist()


@pytest.mark.parametrize(
    ("box", "same", "kind"),
    [
        ("1.000,0.600,0.500,0.000", BOX, "inverted"),
        ("0.500,0.600,1.000,0.000", BOX, "inverted"),
        ("0.500,-0.300,1.700,0.600", BOX, "clamped"),
        ("1.700,0.600,0.500,-0.300", BOX, "clamped"),
    ],
)
def test_boxes_that_can_be_repaired_are(box, same, kind):
    model, heard = shared_model("llava"), Heard(BoxRefocus())
    inputs = inputs_of(model, (1, 1), pixels=True)
    inputs = {key: value[:1].repeat(2, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    with dare(model, **PRUNED):
        run(model, inputs, [says(box), says(same)], heard)
    one, other = heard.of(0)[0], heard.of(1)[0]
    assert torch.equal(one.features, other.features)
    assert getattr(heard.refocus.counts, kind) == 1
    assert heard.refocus.counts.used == 2


def test_a_row_uses_no_more_boxes_than_it_may():
    model, refocus = shared_model("llava"), BoxRefocus(max_boxes=2)
    inputs = inputs_of(model, (1, 1), pixels=True)
    with dare(model, **PRUNED):
        for calls in (1, 2):
            run(model, inputs, [says(BOX, "", BOX, BOX, BOX), says(BOX)], refocus)
            assert (refocus.counts.used, refocus.counts.over_limit) == (3 * calls, 2 * calls)
    assert str(refocus.counts).startswith("used 6, inverted 0")


def test_other_units_and_tags():
    model = shared_model("llava")
    inputs = inputs_of(model, pixels=True)
    region = by_hand(grids_of(model, inputs)[0])
    for options, box in (
        ({"scale": 1000}, "500,0,1000,600"),
        ({"scale": (24, 10.0)}, "12,0,24,6"),
        ({"tags": ("<coor>x", "</coor>")}, "x" + BOX),
        ({"tags": ("<coor> x", "</coor>")}, "x" + BOX),
    ):
        heard = Heard(BoxRefocus(**options))
        with dare(model, **PRUNED):
            run(model, inputs, [says(box)], heard)
        answer = heard.of(0)[0]
        if options.get("tags") == ("<coor>x", "</coor>"):
            assert answer is None, "the tags are other text"
        else:
            assert (answer.features - region).abs().max() < TOLERANCE


def test_a_frame_of_ones_own():
    model, heard = shared_model("qwen2_5_vl"), Heard(BoxRefocus(frame=([60, 4], [])))
    inputs = inputs_of(model, pixels=True)
    with dare(model, **PRUNED):
        run(model, inputs, [says(BOX)], heard)
    answer = heard.of(0)[0]
    assert answer.input_ids == [60, 4, *[IMAGE_ID] * answer.features[..., 0].numel()]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_chat_turn_refers_to_the_pictures_it_brings(name):
    """The features of an earlier turn's picture are in the cache only."""
    model, heard, cache = shared_model(name), Heard(BoxRefocus()), DareCache()
    needs_later_images(model)
    first, more = inputs_of(model, (1, 2)), inputs_of(model, (2, 1), seed=5)
    with dare(model, **PRUNED):
        out = generate(model, first, **{CACHE: cache})
        ids = torch.cat([out.sequences, more["input_ids"]], dim=1)
        turn = {"input_ids": ids, "mm_encoder_outputs": more["mm_encoder_outputs"]}
        written = torch.ones_like(out.sequences[:, first["input_ids"].shape[1] :])
        masks = [first["attention_mask"], written, more["attention_mask"]]
        turn["attention_mask"] = torch.cat(masks, dim=1)
        if name == "qwen2_5_vl":
            turn["mm_token_type_ids"] = (ids == IMAGE_ID).long()
            old, new = first["image_grid_thw"], more["image_grid_thw"]
            turn["image_grid_thw"] = torch.cat([old[:1], new[:2], old[1:], new[2:]])
        run(model, turn, [says(BOX)] * 2, heard, **{CACHE: cache})
    vectors = more["mm_encoder_outputs"]["image"].pooler_output
    thw = more.get("image_grid_thw", torch.tensor([[1, 6, 6]] * 3)).tolist()
    grids = [v.reshape(h // 2, w // 2, -1) for v, (_, h, w) in zip(vectors, thw, strict=True)]
    for row, picture in ((0, 0), (1, 2)):
        assert torch.equal(heard.of(row)[0].features, by_hand(grids[picture]))


# Out of the pixels


def processor(model):
    vision = model.config.vision_config
    pixels = CLIPImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        do_center_crop=False,
    )
    return LlavaProcessor(
        pixels,
        TOKENIZER,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def scene(seed, width=60, height=40):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def test_pixels_are_cut_out_at_full_resolution():
    model = shared_model("llava")
    ours = processor(model)
    scenes = [[], [scene(1)], [scene(2), scene(3)]]
    flat = list(itertools.chain.from_iterable(scenes))
    texts = ["w50 " + "<image> " * len(row) + "w51 w52" for row in scenes]
    inputs = dict(ours(images=flat, text=texts, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    heard = Heard(BoxRefocus("pixels", images=scenes, image_of=lambda hop, count: count - 1))
    with dare(model, **PRUNED):
        out = run(model, inputs, [says(BOX)] * 3, heard, processor=ours)
    assert heard.of(0) == [None]
    for row in (1, 2):
        crop = heard.of(row)[0].images[0]
        whole = scenes[row][-1]
        assert crop.size == (30, 24)
        assert crop.tobytes() == whole.crop((30, 0, 60, 24)).tobytes()
        assert out.sequences[row].tolist().count(IMAGE_ID) == 9 * (len(scenes[row]) + 1)
    assert (heard.refocus.counts.used, heard.refocus.counts.no_image) == (2, 1)


def test_samples_of_a_prompt_share_its_picture():
    model = shared_model("llava")
    scenes = [scene(1), scene(2)]
    inputs = dict(processor(model)(images=scenes, text=["<image> w50"] * 2, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    heard = Heard(BoxRefocus("pixels", images=scenes))
    with dare(model, **PRUNED):
        run(
            model,
            inputs,
            [says(BOX)] * 2,
            heard,
            processor=processor(model),
            do_sample=True,
            num_return_sequences=3,
        )
    for row in range(6):
        crop = heard.of(row)[0].images[0]
        assert crop.tobytes() == scenes[row // 3].crop((30, 0, 60, 24)).tobytes()


def test_a_crop_no_processor_takes_is_counted():
    model, thin = shared_model("llava"), scene(1, width=600, height=10)
    refocus = BoxRefocus("pixels", images=[[thin]])
    inputs = dict(processor(model)(images=[thin], text=["<image> w50"], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    with dare(model, **PRUNED):
        said = [says("0,0,1,1", "0,0,0.8,1")]
        run(model, inputs, said, refocus, processor=processor(model))
    assert (refocus.counts.thin, refocus.counts.used) == (1, 1)


# Refusals


def test_a_model_without_a_grid_is_refused():
    model = shared_model("chameleon")
    inputs = inputs_of(model, pixels=True)
    with dare(model, **PRUNED):
        with pytest.raises(UnsupportedModelError, match=r"one grid a picture.*got 'chameleon'"):
            run(model, inputs, [says(BOX)], BoxRefocus())
        generate(model, inputs)


def test_what_does_not_fit_the_call_is_refused_before_it_runs():
    model = shared_model("llava")
    inputs = inputs_of(model, (1, 1), pixels=True)
    encoded = inputs_of(model, (1, 1))
    output = encoded["mm_encoder_outputs"]["image"]
    halves = [half for v in output.pooler_output for half in (v[:4], v[4:])]
    encoded["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=halves)}
    with dare(model, **PRUNED):
        with pytest.raises(DareInputError, match=r"each of the 2 prompts.*got 1"):
            run(model, inputs, [says(BOX)] * 2, BoxRefocus("pixels", images=[scene(1)]))
        with pytest.raises(DareInputError, match="can read the hops"):
            run(model, inputs, [says(BOX)] * 2, BoxRefocus(), processor=None)
        with pytest.raises(DareInputError, match="grid of one frame"):
            run(model, encoded, [says(BOX)] * 2, BoxRefocus())
        with pytest.raises(DareInputError, match="image_of: expected"):
            run(model, inputs, [says(BOX)] * 2, BoxRefocus(image_of=lambda hop, count: count))
        generate(model, inputs)


def test_a_callback_of_ones_own_may_begin_one():
    """As the documentation says: add words to what a BoxRefocus answers."""
    model = shared_model("llava")
    inputs, seen = inputs_of(model, pixels=True), []

    class WithWords:
        refocus = BoxRefocus()

        def begin(self, prompt):
            look = self.refocus.begin(prompt)

            def on_hop(hop):
                seen.append(hop)
                answer = look(hop)
                return answer and HopInput(features=answer.features, input_ids=[60])

            return on_hop

    with dare(model, **PRUNED):
        out = run(model, inputs, [says(BOX)], WithWords())
    assert seen[0].text.startswith("w50 <coor> 0 . 5 0 0 ,")
    assert out.sequences[0, -4].item() == 60
