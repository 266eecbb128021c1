"""Layers that are not routed travel in the cache: beams, failures, turns and resets of hybrids."""

import pytest
import torch

from dare_hf import DareCache, last_report
from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance import architectures
from dare_hf.conformance.laws import PRUNED, hold_run
from dare_hf.conformance.subject import Subject
from dare_hf.errors import DareInputError
from dare_hf.generation import HopInput, HopLoop

HYBRIDS = [n for n in ("qwen3_5", "lfm2_vl", "mllama", "dots3_note") if n in architectures()]
"""Recurrent states, convolution states, keys of images, index keys."""


@pytest.fixture(scope="module")
def subjects():
    return {name: Subject.of(name) for name in HYBRIDS}


@pytest.mark.parametrize("name", HYBRIDS)
def test_beams_take_the_states_with_them(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    plain = subject.generate(batch, num_beams=3)
    with subject.dare(vision_retention=1.0, text_retention=1.0):
        ours = subject.generate(batch, num_beams=3)
    assert ours.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_failed_forward_leaves_the_states_as_they_were(subjects, name):
    subject = subjects[name]
    batch = subject.batches["alone"]
    last = locate(subject.model).layers[-1]
    with subject.dare(**PRUNED), torch.no_grad():
        cache, whole = DareCache(), DareCache()
        for each in (cache, whole):
            subject.forward(batch, **{CACHE: each}, use_cache=True)
        step = {"input_ids": torch.tensor([[20]]), "use_cache": True}
        if name == "mllama":
            step["cross_attention_mask"] = batch.inputs["cross_attention_mask"][:, -1:]

        def fail(*args):
            raise KeyError("broken")

        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="broken"):
            subject.model(**step, **{CACHE: cache})
        handle.remove()
        again = subject.model(**step, **{CACHE: cache}).logits
        assert torch.equal(again, subject.model(**step, **{CACHE: whole}).logits)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hop_loop_takes_no_padding_into_a_state(subjects, name):
    """A row that gets nothing stands still while another's tokens are injected, or is refused."""
    subject, loop = subjects[name], HopLoop(lambda hop: HopInput(input_ids=[20, 30, 40]), 1)
    batch, recurrent = subject.batches["padded"], name in ("qwen3_5", "lfm2_vl")
    with subject.dare(**PRUNED, decode_window=2):
        before = subject.generate(batch)
        alone = subject.generate(subject.batches["alone"], hop_loop=loop)
        assert alone.sequences[0, -8:-5].tolist() == [20, 30, 40]
        if recurrent:
            with pytest.raises(DareInputError, match=r"one row.*recurrent layers.*3 rows"):
                subject.generate(batch, hop_loop=loop)
        else:
            subject.generate(batch, hop_loop=loop)
        hold_run(subject, subject.generate(batch), before, "after the refusal")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_cache_that_was_reset_starts_anew(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    with subject.dare(**PRUNED):
        fresh = subject.generate(batch)
        cache = DareCache(subject.model.config)
        subject.generate(batch, **{CACHE: cache})
        cache.reset()
        hold_run(subject, subject.generate(batch, **{CACHE: cache}), fresh, "after reset")


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_report_says_what_is_not_routed(subjects, name):
    subject = subjects[name]
    anatomy = locate(subject.model)
    with subject.dare(**PRUNED):
        out = subject.generate(subject.batches["padded"])
        report = last_report(subject.model)
    assert any("run every token" in note for note in report.notes)
    assert len(report.retention[0]) == len(anatomy.layers)
    assert len(cache_of(out).kept_lengths()) == len(anatomy.layers)
    assert len(anatomy.unrouted) == 2
    assert anatomy.slots == tuple(sorted(anatomy.slots))


def test_a_cache_filled_by_another_model_is_refused(subjects):
    cache = DareCache()
    for name, raises in (("qwen3_5", False), ("mllama", True)):
        subject = subjects[name]
        with subject.dare(**PRUNED):
            if not raises:
                subject.forward(subject.batches["alone"], **{CACHE: cache}, use_cache=True)
                continue
            with pytest.raises(DareInputError, match="another model"):
                subject.forward(subject.batches["alone"], **{CACHE: cache}, use_cache=True)
