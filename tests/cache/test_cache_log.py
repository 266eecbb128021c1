"""The log of a sequence's tokens."""

import pytest
import torch

from dare_hf.cache import DareCache, TokenLog
from dare_hf.cache.hop_counters import HopCounters
from dare_hf.cache.log import PAD, UNWRITTEN
from dare_hf.errors import DareStateError
from dare_hf.forward.generation_call import GenerationCall
from dare_hf.forward.hop_closing import close_context
from dare_hf.forward.inputs import open_context
from dare_hf.forward.token_rules import TokenRules
from dare_hf.simulation.layout import read_layout


def test_counts_by_hop_leave_pads_out():
    log = TokenLog()
    log.append(torch.tensor([[-1, 0, 1, 1], [1, 1, 0, 0]]), torch.tensor([[0] * 4] * 2))
    log.append(torch.tensor([[0, -1], [0, 0]]), torch.tensor([[1, 9], [1, 2]]))
    assert log.counts_by_hop() == [
        [[1, 2], [1, 0], [0, 0]],
        [[2, 2], [1, 0], [1, 0]],
    ]
    assert TokenLog().counts_by_hop() == []


def test_lookup_by_position():
    log = TokenLog()
    log.append(torch.tensor([[0, 1, 1], [-1, 0, 1]]), torch.tensor([[0, 0, 3], [0, 0, 1]]))
    modality, hop = log.lookup(torch.tensor([[-1, 2], [1, 2]]))
    assert modality.tolist() == [[-1, 1], [0, 1]]
    assert hop.tolist() == [[-1, 3], [0, 1]]


def test_tokens_to_keep_always_travel_along():
    log = TokenLog()
    log.append(torch.zeros(2, 2), torch.zeros(2, 2))
    assert log.always is None
    named = torch.tensor([[True, False], [False, True]])
    log.append(torch.zeros(2, 2), torch.zeros(2, 2), named)
    log.append(torch.zeros(2, 1), torch.zeros(2, 1))
    log.reorder(torch.tensor([1, 0, 1]))
    saved = log.snapshot()
    log.crop(4)
    log.repeat(2)
    odd, even = [False] * 3 + [True], [False, False, True, False]
    assert log.always.tolist() == [odd, odd, even, even, odd, odd]
    assert saved.always.tolist() == [[*odd, False], [*even, False], [*odd, False]]
    log.reset()
    assert log.always is None


def test_many_steps_are_joined():
    log = TokenLog()
    for step in range(1000):
        log.append(torch.full((1, 1), step % 2), torch.full((1, 1), step // 100))
    assert len(log._modality) < 70
    assert log.hop.tolist() == [[step // 100 for step in range(1000)]]
    log.crop(150)
    assert log.counts_by_hop() == [[[50, 50], [25, 25]]]


def test_another_number_of_rows_is_refused():
    log = TokenLog()
    log.append(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(DareStateError, match="2 rows; got tokens of 3 rows"):
        log.append(torch.zeros(3, 1), torch.zeros(3, 1))


def test_hop_numbers_do_not_wrap():
    """A decode window of one token opens a hop at each; 16 bits end at 32,767."""
    many, cache = 40_000, DareCache()
    cache.hop_counters = HopCounters(
        [list(range(many))], [many], thinned=[[]], spans=[[]], gaps=[[]], cuts=[[]]
    )
    cache.layer(0).advance(many)
    cache.log.append(torch.zeros(1, many), torch.arange(many)[None])
    rules = TokenRules((), (), (), False, 2, (), 1)
    call, arguments = (
        GenerationCall(prompt_length=1, start=0),
        {"input_ids": torch.ones(1, 1).long()},
    )
    context = open_context(arguments, cache, rules, call)
    close_context(context)
    assert cache.log.hop[0, -2:].tolist() == [many - 1, many]
    assert cache.hops.tolist() == [many + 1]
    real, hops = torch.ones(1, many, dtype=torch.bool), torch.arange(many)[None]
    assert torch.equal(read_layout(None, None, hops, real, rules).hop, hops.int())


def test_pads_break_no_sequence_in_a_training_row():
    """As in steps of one token: a pad is skipped, an injected token is not."""
    rules = TokenRules((), (), (), False, 2, ((13, 12),), None)
    ids = torch.tensor([[20, 21, 13, 12, 22], [20, 13, 0, 12, 22], [20, 13, 30, 12, 22]])
    labels = ids.masked_fill(
        torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]]) > 0, -100
    )
    real = ids != 0
    hops = read_layout(ids, labels, None, real, rules).hop
    assert hops.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, 2], [0, 1, 2, 2, 2]]


def test_ids_looked_back_to_follow_the_log():
    """What a row wrote last, past its pads, after crops and changes of rows."""
    log = TokenLog()
    log.append(torch.zeros(2, 3), torch.zeros(2, 3))
    assert log.last_written(2) is None
    log.append(torch.zeros(2, 2), torch.ones(2, 2), None, torch.tensor([[5, 6], [7, PAD]]))
    log.append(torch.zeros(2, 1), torch.ones(2, 1), None, torch.tensor([[8], [9]]), padded=False)
    assert log.last_written(2).tolist() == [[6, 8], [7, 9]]
    for step in range(100):
        log.append(
            torch.zeros(2, 1), torch.ones(2, 1), None, torch.full((2, 1), step), padded=False
        )
    assert log.last_written(3).tolist() == [[97, 98, 99]] * 2
    log.reorder(torch.tensor([1, 0]))
    saved = log.snapshot()
    log.crop(5)
    assert log.last_written(3).tolist() == [[UNWRITTEN, UNWRITTEN, 7], [UNWRITTEN, 5, 6]]
    assert saved.last_written(1).tolist() == [[99]] * 2
    log.reset()
    assert log.last_written(1) is None
