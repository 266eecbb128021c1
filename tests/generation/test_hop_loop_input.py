"""What a HopLoop takes, and what it refuses without leaving a trace."""

import re

import numpy as np
import pytest
import torch
from laws import assert_same_run, dare, everything, generate, inputs_of, rows_of, shared_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dare_hf import DareCache, DareConfig, apply_dare, dare_disabled, last_report, remove_dare
from dare_hf.compat import CACHE, cache_of
from dare_hf.demo.embedded import load_embedded
from dare_hf.errors import DareConfigError, DareError, DareInputError, DareStateError
from dare_hf.generation import HopInput, HopLoop
from dare_hf.generation.interleaved import allow_image_tokens, load_decoder
from dare_hf.testing import tiny_model

DELIMITERS = tuple(range(10, 45))
FULL = everything(hop_delimiters=DELIMITERS)
PRUNED = {"vision_retention": 0.5, "text_retention": 0.7, "hop_delimiters": DELIMITERS}
IMAGE_ID = 3


class Words:
    """A tokenizer of numbers: "70 71" is the ids 70 and 71."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [IMAGE_ID if word == "<i>" else int(word) for word in re.findall(r"<i>|\d+", text)]

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, ids):
        return [f" {token} " for token in ids]


class Processor:
    """Takes the images of `tiny_rows`, and makes of them what real processors make."""

    image_token, tokenizer, image_processor = "<i>", Words(), object()

    def __call__(self, images, text, return_tensors, add_special_tokens):
        ids, pictures = [], iter(images)
        for token in self.tokenizer.encode(text[0], add_special_tokens):
            ids += [token] * (next(pictures)["tokens"] if token == IMAGE_ID else 1)
        batch = {"input_ids": torch.tensor([ids])}
        batch["pixel_values"] = torch.cat([image["pixels"] for image in images])
        if "grid" in images[0]:
            batch["image_grid_thw"] = torch.tensor([image["grid"] for image in images])
        return batch


def once(answer):
    """Return a callback that injects at the first hop only."""
    return lambda hop: answer if hop.index == 1 else None


def run(model, answer, **kwargs):
    loop = HopLoop(answer if callable(answer) else once(answer), processor=Processor())
    return generate(model, inputs_of(model), max_new_tokens=10, hop_loop=loop, **kwargs)


def features_of(model, pictures):
    """The vectors of images, each as a grid where the model counts positions by grids."""
    batch = Processor()(pictures, ["<i>" * len(pictures)], "pt", False)
    del batch["input_ids"]
    with torch.no_grad():
        output = model.base_model.get_image_features(**batch, return_dict=True)
    parts = [part.reshape(-1, part.shape[-1]) for part in output.pooler_output]
    if "grid" in pictures[0]:
        size = [side // 2 for side in pictures[0]["grid"][1:]]
        return parts[0].reshape(*size, -1)
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "chameleon"])
def test_an_image_is_its_features(name):
    model = shared_model(name)
    pictures = rows_of(model, (1,), pixels=True, seed=5)[0]["images"]
    frame = ("4", "5") if name == "qwen2_5_vl" else ("", "")
    with dare(model, **FULL):
        ours = run(model, HopInput(images=pictures, text="70 71"))
        features = features_of(model, pictures)
        count = features.numel() // features.shape[-1]
        ids = [*map(int, filter(None, frame[:1])), *[IMAGE_ID] * count]
        ids += [*map(int, filter(None, frame[1:])), 70, 71]
        theirs = run(model, HopInput(features=features, input_ids=ids))
        placed = run(model, HopInput(images=pictures, text=f"{frame[0]}<i>{frame[1]} 70 71"))
    assert_same_run(ours, theirs, tolerance=0, what=name)
    assert_same_run(placed, theirs, tolerance=0, what=name)
    assert ours.sequences[0].tolist().count(IMAGE_ID) >= count


def test_text_is_tokenised_and_hops_are_decoded():
    model, texts = shared_model("llava"), []

    def answer(hop):
        texts.append(hop.text)
        return HopInput(text="90 91") if hop.index == 1 else None

    with dare(model, **FULL):
        ours = run(model, answer)
        theirs = run(model, HopInput(input_ids=torch.tensor([[90, 91]])))
        by_call = generate(
            model,
            inputs_of(model),
            max_new_tokens=10,
            hop_loop=HopLoop(once(HopInput(text="90 91"))),
            tokenizer=Words(),
        )
    assert_same_run(ours, theirs, tolerance=0, what="text")
    assert_same_run(by_call, theirs, tolerance=0, what="tokenizer of the call")
    assert texts[1].startswith("90 91 ")


def test_the_embedded_model_reads_and_draws_pictures():
    model, processor = load_embedded("anole")
    picture = Image.fromarray(np.full((84, 84, 3), 128, dtype=np.uint8))
    delimiter, seen = processor.image_end_token_id, []
    apply_dare(model, DareConfig.preset("safe", hop_delimiters=(delimiter,)))

    def answer(hop):
        seen.append(hop)
        return HopInput(images=picture) if hop.index == 1 else None

    loop = HopLoop(answer, processor=processor, decoder=load_decoder(model))
    start, size = processor.image_start_token_id, processor.image_seq_length
    codes = list(model.model.vocabulary_mapping.bpe2img)
    inputs = processor(text="map", images=None, return_tensors="pt")
    drawn = [start, *codes[:size], delimiter]
    prompt = inputs["input_ids"].shape[1]
    word = processor.tokenizer.convert_tokens_to_ids("Answer")

    def script(batch, ids):  # the model writes an image, then some text, then closes again
        at = ids.shape[0] - prompt
        later = at - len(drawn) - (size + 2)
        return [drawn[at]] if at < len(drawn) else [delimiter if later == 3 else word]

    with allow_image_tokens(model):
        out = model.generate(
            **inputs,
            hop_loop=loop,
            max_new_tokens=len(drawn) + 6,
            do_sample=False,
            eos_token_id=None,
            prefix_allowed_tokens_fn=script,
        )
    block = out[0, prompt + len(drawn) :][: size + 2].tolist()
    assert block == [start, *[processor.image_token_id] * size, delimiter]
    assert [hop.index for hop in seen] == [1, 2]
    assert seen[0].ids.tolist() == drawn
    assert [image.size for image in seen[0].images] == [(56, 56)]
    assert seen[1].images == [picture]
    assert seen[1].text.endswith(processor.tokenizer.decode([word] * 3 + [delimiter]))
    tokens = last_report(model).tokens
    assert tokens["vision"][1:3] == [size, size]


BAD = {
    "other type": ("words", "expected a HopInput or None; got str"),
    "empty": (HopInput(), "at least one token"),
    "no words": (HopInput(text=""), "at least one token"),
    "text type": (HopInput(text=7), "HopInput.text: expected a string"),
    "outside": (HopInput(input_ids=[50, 120]), "ids of the vocabulary, 0 to 119"),
    "two rows": (HopInput(input_ids=[[50], [51]]), "one row"),
    "floats": (HopInput(input_ids=[0.5]), "whole numbers"),
    "width": (HopInput(features=torch.zeros(2, 31)), r"\[n, 32\].*shape \[2, 31\]"),
    "whole features": (HopInput(features=torch.zeros(2, 32).long()), "float tensor"),
    "no features": (HopInput(features=torch.zeros(0, 32)), r"shape \[0, 32\]"),
    "lonely place": (HopInput(input_ids=[IMAGE_ID]), "1 placeholders and no features"),
    "too few places": (
        HopInput(input_ids=[IMAGE_ID], features=torch.zeros(2, 32)),
        "as many placeholder ids",
    ),
    "torn grid": (
        HopInput(input_ids=[IMAGE_ID, 50, IMAGE_ID], features=torch.zeros(1, 2, 32)),
        "side by side",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused_and_leaves_no_trace(case):
    model, (answer, message) = shared_model("qwen2_5_vl"), BAD[case]
    with dare(model, **PRUNED):
        before = run(model, lambda hop: None)
        with pytest.raises(DareInputError, match=message):
            run(model, lambda hop: answer)
        assert_same_run(run(model, lambda hop: None), before, tolerance=0, what="afterwards")


def test_gemma_needs_type_ids_to_see_an_image_as_a_block():
    model = shared_model("gemma3")
    inputs = {k: v for k, v in inputs_of(model).items() if k != "token_type_ids"}
    loop = HopLoop(once(HopInput(features=torch.ones(4, 32))))
    with dare(model, **PRUNED), pytest.raises(DareInputError, match="token_type_ids"):
        generate(model, inputs, hop_loop=loop)


def test_type_ids_that_say_something_else_are_refused():
    model = shared_model("gemma3")
    inputs = inputs_of(model)
    inputs["token_type_ids"] = torch.ones_like(inputs["token_type_ids"])
    loop = HopLoop(once(HopInput(input_ids=[50])))
    with dare(model, **PRUNED), pytest.raises(DareInputError, match="mark image tokens"):
        generate(model, inputs, hop_loop=loop)


@pytest.mark.parametrize("field", ["text", "images"])
def test_text_and_images_need_a_processor(field):
    model = shared_model("llava")
    loop = HopLoop(once(HopInput(**{field: "50"})))
    with dare(model, **PRUNED), pytest.raises(DareInputError, match=f"{field}: .*a processor"):
        generate(model, inputs_of(model), hop_loop=loop)


REFUSED = {
    "beams": ({"num_beams": 2}, "greedy search or sampling; got beam_search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    "no cache": ({"use_cache": False}, "use_cache=True"),
    "guidance": ({"guidance_scale": 1.5}, "no guidance_scale"),
    "custom": ({"custom_generate": print}, "no custom_generate"),
    "gpus": ({"synced_gpus": True}, "no synced_gpus"),
    "no loop": ({"hop_loop": print}, "expected a dare_hf.generation.HopLoop"),
    "stop strings": ({"stop_strings": "7"}, "tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_loop_cannot_serve_is_refused(case):
    model, (options, message) = shared_model("llava"), REFUSED[case]
    inputs, loop = inputs_of(model), HopLoop(once(HopInput(input_ids=[50])))
    with dare(model, **PRUNED):
        before = generate(model, inputs)
        with pytest.raises(DareInputError, match=message):
            generate(model, inputs, **{"hop_loop": loop, **options})
        assert_same_run(generate(model, inputs), before, tolerance=0, what="afterwards")


def test_an_assistant_is_refused():
    model = shared_model("llava")
    options = {"assistant_model": tiny_model("llava", layers=2)}
    with dare(model, **PRUNED), pytest.raises(DareInputError, match="no assistant_model"):
        generate(model, inputs_of(model), hop_loop=HopLoop(print), **options)


def test_a_loop_needs_dare():
    model, loop = tiny_model("llava"), HopLoop(print)
    with pytest.raises(DareStateError, match="apply_dare"):
        loop.generate(model, **inputs_of(model))
    apply_dare(model, DareConfig(**PRUNED))
    with dare_disabled(model), pytest.raises(DareStateError, match="retention 1"):
        generate(model, inputs_of(model), hop_loop=loop)
    with pytest.raises(DareConfigError, match="on_hop"):
        HopLoop(None)
    with pytest.raises(DareConfigError, match="max_hops"):
        HopLoop(print, max_hops=-1)
    assert issubclass(DareInputError, DareError)


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["callback", "forward"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_crash_leaves_model_and_cache_usable(name, where):
    model, cache = shared_model(name), DareCache()
    layer = model.base_model.language_model.layers[-1]
    hooks = []

    def fail(*args):
        raise Crash

    def crash(hop):
        if hop.index == 1:
            return HopInput(input_ids=[50], features=torch.ones(2, 32))
        if where == "callback":
            raise Crash
        hooks.append(layer.register_forward_pre_hook(fail))
        return HopInput(features=torch.ones(2, 32))

    with dare(model, **PRUNED):
        before = run(model, HopInput(input_ids=[50]))
        with pytest.raises(Crash):
            run(model, crash, **{CACHE: cache}, eos_token_id=None)
        for hook in hooks:
            hook.remove()
        assert not model.get_input_embeddings()._forward_hooks
        seen = cache.get_seq_length()
        assert len(cache.log) == seen
        assert last_report(model).kv_bytes == cache.kv_bytes() > 0
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[50]]), **{CACHE: cache}).logits
        assert logits.isfinite().all()
        assert cache.get_seq_length() == seen + 1
        assert_same_run(run(model, HopInput(input_ids=[50])), before, tolerance=0, what="again")


class Wrapper:
    """A wrapper whose generate checks its arguments."""

    def __init__(self, model):
        self.model = model

    def generate(self, *, hop_loop=None, **kwargs):
        assert hop_loop is None
        return self.model.generate(**kwargs)


def test_a_loop_passes_through_wrappers():
    model, loop = shared_model("llava"), HopLoop(once(HopInput(input_ids=[50, 51])))
    inputs, options = inputs_of(model), {"max_new_tokens": 10, "do_sample": False}
    with dare(model, **PRUNED):
        direct = model.generate(**inputs_of(model), **options, hop_loop=loop)
        same = loop.generate(model, **inputs_of(model), **options)
        wrapped = loop.generate(Wrapper(model), **inputs, **options)
        positional = model.generate(
            inputs["input_ids"],
            **{k: v for k, v in inputs_of(model).items() if k != "input_ids"},
            **options,
            hop_loop=loop,
        )
        plain = model.generate(**inputs_of(model), **options)
    for other in (same, wrapped, positional):
        assert torch.equal(direct, other)
    assert plain.shape[1] == direct.shape[1] - 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 asks
def test_a_loop_passes_through_peft():
    model, loop = tiny_model("llava"), HopLoop(once(HopInput(input_ids=[50, 51])))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    apply_dare(wrapped, DareConfig(**PRUNED))
    out = loop.generate(wrapped, **inputs_of(model), max_new_tokens=10, do_sample=False)
    assert out.shape[1] == inputs_of(model)["input_ids"].shape[1] + 12
    remove_dare(wrapped)


def test_the_callback_may_use_the_model():
    model = shared_model("qwen2_5_vl")
    inner = inputs_of(model, (2,), seed=4)

    def answer(hop):
        generate(model, inner, max_new_tokens=3)
        return HopInput(input_ids=[50]) if hop.index == 1 else None

    with dare(model, **PRUNED):
        theirs = run(model, HopInput(input_ids=[50]))
        ours = run(model, answer)
        assert_same_run(ours, theirs, tolerance=0, what="nested")
        caches = [cache_of(out) for out in (ours, theirs)]
        assert torch.equal(*(cache.kept_lengths() for cache in caches))


def test_stop_strings_stop():
    letters = [*"abcdef", *(chr(0x4E00 + i) for i in range(114))]
    letter_level = Tokenizer(BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    letter_level.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_level)
    model, script = shared_model("llava"), [20, 21, 30, 31, 22, 20, 20]
    inputs = inputs_of(model)
    prompt = inputs["input_ids"].shape[1]
    with dare(model, vision_retention=0.5, text_retention=0.7, decode_window=2):
        out = HopLoop(once(HopInput(input_ids=[30, 31]))).generate(
            model,
            **inputs,
            do_sample=False,
            max_new_tokens=20,
            stop_strings=[tokenizer.decode([22])],
            tokenizer=tokenizer,
            prefix_allowed_tokens_fn=lambda batch, ids: [script[len(ids) - prompt]],
        )
    assert out[0, prompt:].tolist() == script[:5]


def test_a_prompt_of_embeddings_works():
    model = shared_model("llava")
    inputs = inputs_of(model, (0,))
    with dare(model, **PRUNED):
        loop = HopLoop(once(HopInput(input_ids=[50, 51])))
        by_ids = generate(model, inputs, max_new_tokens=10, hop_loop=loop)
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
        given = {"inputs_embeds": embeds, "modality_mask": mask}
        by_embeds = generate(model, given, max_new_tokens=10, hop_loop=loop)
    prompt = inputs["input_ids"].shape[1]
    assert by_embeds.sequences[0].tolist() == by_ids.sequences[0, prompt:].tolist()
