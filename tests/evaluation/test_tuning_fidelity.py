"""Agreement and KL on rows, held to a loop over single tokens; models of both kinds."""

import json

import pytest
import torch
from row_models import llama_folder, llava_folder, written_rows

from dare_hf import DareConfig, apply_dare, dare_applied, last_report, remove_dare
from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError
from dare_hf.evaluation.intervals import clustered_share, paired_difference, wilson
from dare_hf.tuning.fidelity import References, fidelity, on_device
from dare_hf.tuning.loading import load_model, load_processor
from dare_hf.tuning.prompts import Prompts
from dare_hf.tuning.rows import read_rows

EVEN = {"schedule": "constant", "plan_every": 1, "uniform_share": 0.0}
# the cap thins out text alone as well, however much of it is protected
CONFIG = DareConfig(vision_retention=0.3, text_retention=0.6, max_kv_tokens=8, **EVEN)
LONG = "a red cat and a blue dog on the picture of some more text"
KL_TOLERANCE = 1e-4  # float32, batched against single rows


def _loaded(folder, file):
    prompts = Prompts(load_processor(str(folder)))
    rows = read_rows(file)
    prompts.check(rows)
    return load_model(str(folder)), prompts, rows


def _stepwise(model, inputs, tokens):
    """Log-probabilities by one forward for the prompt and one for each token."""
    mask, out = inputs["attention_mask"], []
    step = model(**inputs, use_cache=True)
    for token in tokens:
        out.append(step.logits[0, -1].float().log_softmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        ids = torch.tensor([[token]])
        step = model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: step[CACHE]})
    return torch.stack(out)


@pytest.mark.parametrize(
    ("make", "images", "answer"),
    [
        (llava_folder, True, LONG),
        (llava_folder, True, None),
        (llama_folder, False, LONG),
        (llama_folder, False, None),
    ],
)
@torch.no_grad()
def test_agreement_and_kl_are_those_of_a_loop(tmp_path, make, images, answer):
    file = written_rows(tmp_path, 3, images=images, answer=answer)
    model, prompts, rows = _loaded(make(tmp_path / "model"), file)
    references = References(model, prompts, rows, 8, keep=True)
    with dare_applied(model, CONFIG):
        found = fidelity(model, references)
        again = fidelity(model, references)
    assert found == again
    hits, kls, sizes, kept, full = [], [], [], 0, 0
    for row in rows:
        inputs = on_device(model, prompts.encode([row]))
        if answer is None:
            prompt = inputs["input_ids"].shape[1]
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, prompt:].tolist()
        else:
            ids = prompts.ids(answer)
        plain = _stepwise(model, inputs, ids)
        apply_dare(model, CONFIG)
        pruned = _stepwise(model, inputs, ids)
        report = last_report(model)
        remove_dare(model)
        kept, full = kept + report.kv_bytes, full + report.kv_bytes_baseline
        hits.append(int((plain.argmax(-1) == pruned.argmax(-1)).sum()))
        kls.append(float((plain.exp() * (plain - pruned)).sum()))
        sizes.append(len(ids))
    assert found.hits == tuple(hits)
    assert found.sizes == tuple(sizes)
    assert found.kl == pytest.approx(kls, abs=KL_TOLERANCE, rel=KL_TOLERANCE)
    assert sum(hits) < sum(sizes), "the configuration prunes nothing that matters: no test"
    assert found.kv_ratio < 1
    assert found.flops_ratio < 1 or not images


@torch.no_grad()
def test_keeping_everything_agrees_everywhere(tmp_path):
    file = written_rows(tmp_path, 3)
    model, prompts, rows = _loaded(llava_folder(tmp_path / "model"), file)
    references = References(model, prompts, rows, 2, keep=False)
    everything = DareConfig(vision_retention=1.0, text_retention=1.0, **EVEN)
    with dare_applied(model, everything):
        found = fidelity(model, references)
    assert "_dare" not in vars(model)
    assert found.agreement == 1.0
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.kv_ratio == 1.0
    low, high = found.agreement_interval
    assert low < 0.6, "three rows without a miss promise little"
    assert high == 1.0


@torch.no_grad()
def test_a_batch_of_answers_of_different_lengths_is_its_rows(tmp_path):
    file = written_rows(tmp_path, 3)
    answers = ["a cat", LONG, "dog on the picture here"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(
            json.dumps(row | {"answer": a}) + "\n" for row, a in zip(lines, answers, strict=True)
        )
    )
    model, prompts, rows = _loaded(llava_folder(tmp_path / "model"), file)
    with dare_applied(model, CONFIG):
        found = fidelity(model, References(model, prompts, rows, 8, keep=False))
        alone = [fidelity(model, References(model, prompts, [r], 8, keep=False)) for r in rows]
    assert found.sizes == tuple(len(prompts.ids(answer)) for answer in answers)
    assert found.hits == tuple(one.hits[0] for one in alone)
    assert found.kl == pytest.approx([one.kl[0] for one in alone], rel=KL_TOLERANCE)


def test_a_row_the_processor_cannot_take_is_refused_with_its_line(tmp_path):
    file = written_rows(tmp_path, 2)
    words = Prompts(load_processor(str(llama_folder(tmp_path / "text"))))
    with pytest.raises(DareInputError, match=r"line 1.*text alone"):
        words.check(read_rows(file))
    bare = Prompts(load_processor(str(llava_folder(tmp_path / "bare", template=None))))
    file.write_text('{"messages": [%s, %s]}' % (('{"role": "user", "content": "a"}',) * 2))
    with pytest.raises(DareInputError, match=r"line 1.*chat template"):
        bare.check(read_rows(file))
    file.write_text('{"prompt": "<image> a", "image": "0.png"}\n{"prompt": "<image> <image>"}')
    with pytest.raises(DareInputError, match="line 2"):
        bare.check(read_rows(file))


def test_a_placeholder_in_the_prompt_says_where_the_image_stands(tmp_path):
    file = written_rows(tmp_path, 1)
    prompts = Prompts(load_processor(str(llava_folder(tmp_path / "model"))))
    file.write_text(
        '{"prompt": "red <image> blue", "image": "0.png"}\n{"prompt": "red blue", "image": "0.png"}'
    )
    inside, before = (prompts.encode([row])["input_ids"][0].tolist() for row in read_rows(file))
    red, image = prompts.ids("red")[0], prompts.ids("<image>")[0]
    assert sorted(inside) == sorted(before)
    assert inside.index(red) < inside.index(image)
    assert before.index(image) < before.index(red)


def test_intervals():
    assert clustered_share([1] * 40, [1] * 40) == wilson(1.0, 40)
    # rows that are alike inside count once, however many trials they have
    apart, alike = clustered_share([1, 0] * 20, [1] * 40), clustered_share([9, 0] * 20, [9] * 40)
    assert alike == pytest.approx(apart, abs=0.01)
    even = clustered_share([5, 4] * 20, [9] * 40)
    assert even[1] - even[0] < alike[1] - alike[0]
    low, high = paired_difference([1] * 30, [1] * 30)
    assert -0.1 < low < 0 < high < 0.1
    assert paired_difference([1] * 30, [0] * 30)[0] > 0.7


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_the_interval_of_a_share_covers_it(share):
    """95 % of samples of 32 rows of 8 places, rows alike inside; a percent or two are noise."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(500):
        rate = torch.where(torch.rand(32, generator=generator) < 0.5, 1.0, 2 * share - 1)
        hits = torch.bernoulli(rate[:, None].expand(-1, 8), generator=generator).sum(1)
        low, high = clustered_share(hits.tolist(), [8] * 32)
        covered += low <= share <= high
    assert covered >= 460
