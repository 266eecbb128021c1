"""More than one sequence inside one generate: each forward is of the sequence of its cache."""

import copy

import pytest
import torch
from laws import SCORER, SPECIAL_IDS, assert_same_run, dare, generate, inputs_of, shared_model
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from dare_hf import DareCache, DareConfig, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareInputError

NAMES = ("llava", "gemma3", "chameleon")
PRUNED = {"vision_retention": 0.4, "text_retention": 0.6, "hop_decay": 0.5}
CONFIGS = {
    "function": DareConfig(
        scorer=SCORER, schedule="constant", hop_delimiters=tuple(range(10, 60)), **PRUNED
    ),
    "attention": DareConfig(schedule="constant", decode_window=2, max_kv_tokens=14, **PRUNED),
}
TOLERANCE = 1e-5


class Second(LogitsProcessor):
    """Writes another sequence, beside the one that is generated, and changes nothing."""

    def __init__(self, model, inputs, cached=True):
        self.model, self.inputs, self.cached = model, inputs, cached
        self.logits, self.cache, self.reports = [], DareCache(), []

    def __call__(self, input_ids, scores):
        if not self.logits or not self.cached:
            given = copy.deepcopy(self.inputs)
        else:
            given = {"input_ids": self.written[:, -1:], "attention_mask": self.mask}
        cached = {CACHE: self.cache, "use_cache": True} if self.cached else {"use_cache": False}
        with torch.no_grad():
            found = self.model(**given, **cached).logits[:, -1]
        new = torch.argmax(found[:, 70:], dim=-1)[:, None] + 70
        first = not self.logits
        self.written = torch.cat([self.inputs["input_ids"] if first else self.written, new], dim=1)
        mask = self.inputs["attention_mask"] if first else self.mask
        self.mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        self.logits.append(found)
        if self.cached:
            self.reports.append(plain(self.cache.report))
        return scores


class Scoring(StoppingCriteria):
    """Runs the model over what was written so far, as a judge would, and stops nothing."""

    def __init__(self, model):
        self.model, self.logits = model, []

    def __call__(self, input_ids, scores, **kwargs):
        with torch.no_grad():
            text = input_ids.masked_fill(input_ids < 10, 70)
            self.logits.append(self.model(input_ids=text, use_cache=False).logits[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


def plain(report):
    told = report.to_dict()
    told.pop("seconds")
    return told


def run(model, inputs, others, **kwargs):
    """Return generate's output and report, with `others` in it."""
    processors = LogitsProcessorList([o for o in others if isinstance(o, LogitsProcessor)])
    criteria = StoppingCriteriaList([o for o in others if isinstance(o, StoppingCriteria)])
    out = generate(model, inputs, logits_processor=processors, stopping_criteria=criteria, **kwargs)
    return out, plain(last_report(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_second_sequence_is_its_own(name, config, use_cache):
    model = shared_model(name)
    inputs, other = inputs_of(model, (0, 1, 2)), inputs_of(model, (2, 1), text=31)
    with dare(model, CONFIGS[config]):
        twin = copy.deepcopy(model)  # runs the other sequences where nothing else does
        alone, report = run(model, inputs, [], use_cache=use_cache)
        told = []
        for runs in (twin, model):
            others = [Second(runs, other), Second(runs, other, cached=False), Scoring(runs)]
            out, found = run(model, inputs, others, use_cache=use_cache)
            assert_same_run(out, alone, tolerance=TOLERANCE, what=f"{name}, beside another")
            assert found == report
            told.append(others)
    for left, right in zip(*told, strict=True):
        assert len(left.logits) == len(right.logits) == 8
        for a, b in zip(left.logits, right.logits, strict=True):
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
    assert told[0][0].reports == told[1][0].reports
    assert told[0][0].cache.kept_lengths().equal(told[1][0].cache.kept_lengths())
    hops = told[0][0].cache.hops
    assert hops.min() >= 1, "the second sequence sampled nothing"


@pytest.mark.parametrize("name", NAMES)
def test_guidance_writes_the_unconditional_sequence(name):
    model = shared_model(name)
    inputs = inputs_of(model, (1, 1))
    negative = torch.randint(70, 90, (2, 23), generator=torch.Generator().manual_seed(1))
    with dare(model, CONFIGS["function"]):
        twin = copy.deepcopy(model)
        outs = []
        for runs in (twin, model):
            guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, runs, negative)
            outs.append(run(model, inputs, [guide]))
        assert_same_run(outs[0][0], outs[1][0], tolerance=TOLERANCE, what=f"{name}, guided")
        assert outs[0][1] == outs[1][1]
        called = generate(model, inputs, guidance_scale=1.5, negative_prompt_ids=negative)
        assert_same_run(called, outs[0][0], tolerance=TOLERANCE, what=f"{name}, by its argument")


class Peek(LogitsProcessor):
    """Runs the next step on a copy of the cache before generate takes it."""

    def __init__(self, model, cache):
        self.model, self.cache, self.next, self.hops = model, cache, [], []

    def __call__(self, input_ids, scores):
        token = torch.argmax(scores, dim=-1)[:, None]
        cache = copy.deepcopy(self.cache)
        mask = torch.ones(len(token), cache.get_seq_length() + 1, dtype=torch.long)
        with torch.no_grad():
            out = self.model(input_ids=token, attention_mask=mask, **{CACHE: cache}, use_cache=True)
        self.next.append(out.logits[:, -1])
        self.hops.append(cache.report.hops)
        return scores


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_the_cache_is_of_the_same_sequence(name):
    model, cache = shared_model(name), DareCache()
    inputs = inputs_of(model)
    with dare(model, CONFIGS["function"]):
        alone, report = run(model, inputs, [], **{CACHE: DareCache()})
        peek = Peek(model, cache)
        out, found = run(model, inputs, [peek], **{CACHE: cache})
        assert found == report
    assert_same_run(out, alone, tolerance=0, what=f"{name}, with copies")
    for ahead, step in zip(peek.next[:-1], out.logits[1:], strict=True):
        torch.testing.assert_close(ahead, step, atol=TOLERANCE, rtol=0)
    assert peek.hops[-1] >= 2
    assert cache.call is None, "nothing runs any more"


@pytest.mark.parametrize("name", NAMES)
def test_a_custom_loop_over_two_caches(name):
    model = shared_model(name)
    inputs, other = inputs_of(model), inputs_of(model, (2,), text=20)

    def loop(model, input_ids, logits_processor, **kwargs):
        sides = []
        for given in (inputs, other):
            sides.append(Second(model, given))
        for _ in range(6):
            for side in sides:
                side(None, None)
        caches.extend(side.cache for side in sides)
        logits.extend(torch.stack(side.logits) for side in sides)
        return sides[0].written

    with dare(model, CONFIGS["function"]):
        results = []
        for custom in (True, False):
            caches, logits = [], []
            if custom:
                model.generate(**copy.deepcopy(inputs), custom_generate=loop, max_new_tokens=6)
                newest = plain(last_report(model))
                assert newest in [plain(cache.report) for cache in caches]
            else:
                loop(model, inputs["input_ids"], None)
            results.append((caches, logits))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert plain(a.report) == plain(b.report)


@pytest.mark.parametrize("name", NAMES[:2])
def test_rejected_tokens_are_not_counted(name):
    model = shared_model(name)
    inputs = inputs_of(model, text=30)
    with dare(model, scorer=SCORER, vision_retention=0.4):
        greedy = generate(model, inputs, max_new_tokens=20)
        expected = last_report(model)
        looked = generate(model, inputs, max_new_tokens=20, prompt_lookup_num_tokens=3)
        found = last_report(model)
    assert looked.sequences.tolist() == greedy.sequences.tolist()
    assert cache_of(looked).get_seq_length() == cache_of(greedy).get_seq_length()
    assert found.kv_bytes == found.kv_bytes_predicted == expected.kv_bytes
    assert found.kv_bytes_baseline == expected.kv_bytes_baseline
    assert found.tokens == expected.tokens


def widened(model, extra):
    """Return a model whose generate puts `extra` [n, D] embeddings before every prompt."""
    kind = type(model)

    def prepare(self, input_ids, **kwargs):
        inputs = kind.prepare_inputs_for_generation(self, input_ids, **kwargs)
        for name in ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"):
            inputs.pop(name, None)
        if inputs[CACHE].get_seq_length() == 0:
            embeds = self.get_input_embeddings()(inputs["input_ids"])
            ahead = extra.expand(len(embeds), *extra.shape)
            inputs["inputs_embeds"] = torch.cat([ahead, embeds], dim=1)
            inputs["input_ids"] = None
        return inputs

    mine = type("Widened", (kind,), {"prepare_inputs_for_generation": prepare})(model.config).eval()
    mine.load_state_dict(model.state_dict())
    return mine


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_prompt_that_is_widened_is_as_long_as_what_the_model_sees(name):
    model = shared_model(name)
    ids = torch.randint(70, 90, (2, 19), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    embeddings = model.get_input_embeddings()
    extra = embeddings(torch.arange(80, 85)).detach()
    whole = torch.cat([extra.expand(2, -1, -1), embeddings(ids).detach()], dim=1)
    mask = torch.zeros(2, 24, dtype=torch.long)
    mask[:, 8:16] = 1
    mine = widened(model, extra)
    with dare(mine, CONFIGS["function"]), dare(model, CONFIGS["function"]):
        found, cache = generate(mine, inputs, modality_mask=mask), DareCache()
        given = {"inputs_embeds": whole, "modality_mask": mask}
        for step, logits in enumerate(found.logits):
            with torch.no_grad():
                expected = model(**given, **{CACHE: cache}, use_cache=True).logits[:, -1]
            expected[:, SPECIAL_IDS] = logits[:, SPECIAL_IDS]
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
            given = {"input_ids": found.sequences[:, 19 + step, None]}
        assert cache_of(found).kept_lengths().equal(cache.kept_lengths())
        assert last_report(mine).retention == last_report(model).retention
        for wrong in (mask[:, 5:], mask[:, 1:], torch.cat([mask, mask], dim=1), mask[:1], None):
            with pytest.raises(DareInputError, match="modality_mask"):
                generate(mine, inputs, modality_mask=wrong)
