"""Reading forwards against a model of plain lists: hops, spans and forced tokens of any history.

No model runs: a forward is its arguments, and one layer that stores nothing counts its columns.
"""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dare_hf.cache import DareCache
from dare_hf.forward.generation_call import GenerationCall
from dare_hf.forward.hop_closing import close_context
from dare_hf.forward.inputs import open_context
from dare_hf.forward.token_rules import TokenRules
from dare_hf.hops.compaction import due_rows

PAD_ID, KEEP, IMAGE = 0, 8, 9
WORDS = st.sampled_from([1, 1, 1, 2, 2, 2, 3, KEEP, IMAGE])
DELIMITERS = [(), ((1,),), ((1, 2),), ((1, 2, 1), (2, 2)), ((3,), (1, 1, 2, 2))]


@dataclass(frozen=True)
class Token:
    """A column of one row.

    Attributes:
        id: Its id.
        kind: "prompt", "sampled", "injected", or "pad".
        span: Which injected input it belongs to.
    """

    id: int
    kind: str
    span: int = 0


def hops_of(row: list[Token], prompt: int, rules: TokenRules) -> tuple[list[int], list[int]]:
    """The hop of each column of a row, read from its beginning, and where its hops ended."""
    hops, ends, written, since, span = [], [], [], 0, 0
    for column, token in enumerate(row):
        if token.kind == "injected" and token.span != span:
            last = max(c for c in range(column) if row[c].kind != "pad")
            ends += [last] if ends[-1] < last else []
            written, since, span = [], 0, token.span
        hops.append(len(ends))
        if column == prompt - 1:
            ends.append(column)
        if token.kind == "sampled":
            written.append(token.id)
            since += 1
            said = any(tuple(written[-len(d) :]) == d for d in rules.delimiters)
            if said or (rules.window is not None and since >= rules.window):
                ends.append(column)
                since = 0
    return hops, ends


class ReadingMachine(RuleBasedStateMachine):
    """Every rule runs one forward, or changes the cache as generate does between forwards."""

    @initialize(
        data=st.data(),
        rows=st.integers(1, 3),
        prompt=st.integers(1, 9),
        delimiters=st.sampled_from(DELIMITERS),
        window=st.sampled_from([None, None, 1, 3, 5]),
        prefix=st.integers(0, 3),
    )
    def start(self, data, rows, prompt, delimiters, window, prefix):
        self.rules = TokenRules((IMAGE,), (KEEP,), (), False, prefix, delimiters, window)
        self.cache, self.prompt = DareCache(), prompt
        self.rows: list[list[Token]] = [[] for _ in range(rows)]
        self.served, self.spans = [0] * rows, 0
        while self.seen < prompt:
            self.read_prompt(data, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3)))

    @property
    def seen(self) -> int:
        return len(self.rows[0])

    def forward(
        self,
        new: list[list[Token]],
        *,
        injecting: bool = False,
        turn: tuple[int, int] | None = None,
        bare: bool = False,
    ) -> None:
        """Open and close one forward, and hold what it read to the lists.

        Args:
            new: Its tokens.
            injecting: Whether a hop loop injects them.
            turn: Where the generate began that runs it, and where its prompt ends, on a carried
                cache.
            bare: Whether no generate runs it.
        """
        past, before = self.seen, [list(row) for row in self.rows]
        self.rows = [row + more for row, more in zip(self.rows, new, strict=True)]
        mask = torch.tensor([[int(token.kind != "pad") for token in row] for row in self.rows])
        ids = torch.tensor([[token.id for token in row] for row in new])
        start, prompt = turn or (0, self.prompt)
        call = GenerationCall(prompt_length=prompt, start=start, injecting=injecting)
        arguments = {"input_ids": ids, "attention_mask": mask}
        self.cache.begin()
        context = open_context(arguments, self.cache, self.rules, None if bare else call)
        self.cache.layer(0).advance(past + len(new[0]))
        self.hold_context(context, before, past)
        close_context(context)
        self.cache.commit()
        self.hold_state()

    def hold_context(self, context, before, past) -> None:
        for r, row in enumerate(self.rows):
            hops, _ = hops_of(row, self.prompt, self.rules)
            new = row[past:]
            real = [token.kind != "pad" for token in new]
            found = context.token_hop[r].tolist()
            assert [h for h, is_real in zip(found, real, strict=True) if is_real] == [
                h for h, is_real in zip(hops[past:], real, strict=True) if is_real
            ], "hops"
            modality = [-1 if token.kind == "pad" else int(token.id == IMAGE) for token in new]
            assert context.modality[r].tolist() == modality
            span = [token.kind in ("prompt", "injected") for token in new]
            assert context.sampled[r] == sum(token.kind == "sampled" for token in new)
            kinds = [
                [s and kind == m for s, kind in zip(span, modality, strict=True)] for m in (0, 1)
            ]
            assert context.counts[r] == [sum(kind) for kind in kinds]
            if context.span is None:
                assert not any(span)
                continue
            assert context.span[r].tolist() == span
            own = max((h for h, inside in zip(hops[past:], span, strict=True) if inside), default=0)
            earlier = sum(
                token.kind != "pad" and hop == own
                for token, hop in zip(before[r], hops[:past], strict=True)
            )
            forced = []
            for column, inside in enumerate(span):
                first = earlier + sum(span[:column]) < self.rules.prefix
                last = inside and not any(span[column + 1 :])
                forced.append(inside and (first or last or new[column].id == KEEP))
            assert context.forced[r].tolist() == forced, "forced tokens"

    def hold_state(self) -> None:
        """Between forwards the counters and the log say what the lists say."""
        state = self.cache.hop_counters
        for r, row in enumerate(self.rows):
            hops, ends = hops_of(row, self.prompt, self.rules)
            assert state.ends[r] == ends, "closed hops"
            since = sum(token.kind == "sampled" for token in row[(ends or [0])[-1] + 1 :])
            assert state.since(r, self.seen) == since, "sampled tokens of the open hop"
            real = [token.kind != "pad" for token in row]
            logged = self.cache.log.hop[r].tolist()
            assert [h for h, is_real in zip(logged, real, strict=True) if is_real] == [
                h for h, is_real in zip(hops, real, strict=True) if is_real
            ], "the log's hops"
            self.served[r] = min(self.served[r], len(ends))
        opened = state.open_hops()
        due = [s + 1 if hop > s else 0 for hop, s in zip(opened, self.served, strict=True)]
        assert due_rows(self.cache) == due, "hops that were never served"

    def words(self, data, count: int, kind: str) -> list[list[Token]]:
        words = st.lists(WORDS, min_size=count, max_size=count)
        return [[Token(word, kind) for word in data.draw(words)] for _ in self.rows]

    # Forwards

    def read_prompt(self, data, count, sampled):
        """A chunk of the prompt, left-padded in some rows; candidates may follow the last one."""
        count = min(count, self.prompt - self.seen)
        new = self.words(data, count, "prompt")
        for row, more in zip(self.rows, new, strict=True):
            if all(token.kind == "pad" for token in row):
                most = count if self.seen + count < self.prompt else count - 1
                pads = data.draw(st.integers(0, most))
                more[:pads] = [Token(PAD_ID, "pad")] * pads
        if self.seen + count == self.prompt and sampled:
            more = self.words(data, sampled, "sampled")
            new = [row + extra for row, extra in zip(new, more, strict=True)]
        self.forward(new)

    @rule(data=st.data(), count=st.integers(1, 5))
    def sample(self, data, count):
        self.forward(self.words(data, count, "sampled"))

    @rule(data=st.data(), waits=st.integers(0, 6))
    def sample_some(self, data, waits):
        """Bare forwards of one token, in which rows wait or have finished."""
        new = self.words(data, 1, "sampled")
        self.forward(
            [[Token(PAD_ID, "pad")] if waits >> r & 1 else row for r, row in enumerate(new)],
            bare=True,
        )

    def message(self, data, count: int) -> list[list[Token]]:
        """Input for some row at least; those that get less, or nothing, are padded."""
        self.spans += 1
        new = [
            [Token(token.id, "injected", self.spans) for token in row]
            for row in self.words(data, count, "injected")
        ]
        sizes = [data.draw(st.integers(0, count)) for _ in new]
        sizes[data.draw(st.integers(0, len(sizes) - 1))] = count
        pads = [[Token(PAD_ID, "pad")] * (count - size) for size in sizes]
        return [pad + row[count - size :] for pad, size, row in zip(pads, sizes, new, strict=True)]

    @rule(data=st.data(), count=st.integers(1, 6), bare=st.booleans())
    def inject(self, data, count, bare):
        """Input after a token, by a hop loop or in a bare forward of several tokens."""
        bare = bare and count > 1
        self.forward(self.message(data, count), injecting=not bare, bare=bare)

    @rule(data=st.data(), count=st.integers(1, 9), chunk=st.integers(1, 5))
    def next_turn(self, data, count, chunk):
        """A later generate on the same cache, whose message is read in chunks."""
        new, turn = self.message(data, count), (self.seen, self.seen + count)
        for at in range(0, count, chunk):
            self.forward([row[at : at + chunk] for row in new], turn=turn)

    @rule(data=st.data(), count=st.integers(2, 14), more=st.integers(1, 5))
    def verify(self, data, count, more):
        """A speculative step: candidates are run, the last of them rejected, others run."""
        self.sample(data, count)
        self.crop(data.draw(st.integers(1, count)))
        self.sample(data, more)

    @rule(data=st.data(), count=st.integers(1, 6), more=st.integers(0, 3))
    def take_back(self, data, count, more):
        """Input that is injected, answered, and taken back; the hop goes on as if never closed."""
        self.inject(data, count, bare=False)
        self.sample(data, 1)
        self.crop(1 + count + more)
        self.sample(data, 2)

    # Between forwards

    @rule(count=st.one_of(st.integers(1, 14), st.integers(1, 200)))
    def crop(self, count):
        """Back to any token of the last ones."""
        count = min(count, self.seen - self.prompt)
        self.cache.crop(-count)
        self.rows = [row[: len(row) - count] for row in self.rows]
        self.hold_state()

    @rule()
    def serve(self):
        """What a compaction notes of the hops it serves."""
        state = self.cache.hop_counters
        due = due_rows(self.cache)
        state.compacted = [max(a, b) for a, b in zip(state.compacted, due, strict=True)]
        self.served = [max(a, b) for a, b in zip(self.served, due, strict=True)]
        self.hold_state()

    @rule(data=st.data())
    def choose_rows(self, data):
        rows = st.integers(0, len(self.rows) - 1)
        index = data.draw(st.lists(rows, min_size=1, max_size=4))
        self.cache.reorder_cache(torch.tensor(index))
        self.rows = [list(self.rows[i]) for i in index]
        self.served = [self.served[i] for i in index]
        self.hold_state()

    @precondition(lambda self: len(self.rows) < 3)
    @rule()
    def repeat_rows(self):
        self.cache.batch_repeat_interleave(2)
        self.rows = [list(row) for row in self.rows for _ in range(2)]
        self.served = [hop for hop in self.served for _ in range(2)]
        self.hold_state()

    @rule(data=st.data(), count=st.integers(1, 4), injecting=st.booleans())
    def fail(self, data, count, injecting):
        """A forward that stops after it was read leaves the counters as they were."""
        ids = torch.tensor([[t.id for t in row] for row in self.words(data, count, "sampled")])
        ones = torch.ones(len(self.rows), self.seen + count, dtype=torch.long)
        call = GenerationCall(prompt_length=self.prompt, start=0, injecting=injecting)
        arguments = {"input_ids": ids, "attention_mask": ones}
        self.cache.begin()
        context = open_context(arguments, self.cache, self.rules, call)
        if data.draw(st.booleans()):
            close_context(context)
        self.cache.rollback()
        self.hold_state()


ReadingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=24, deadline=None)
TestReadingMachine = ReadingMachine.TestCase
