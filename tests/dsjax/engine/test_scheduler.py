"""The scheduler on random schedules, without a device: pages conserved, nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.engine.pages import ROOT, Pages
from dsjax.engine.scheduler import Scheduler
from dsjax.engine.state import ChunkShape, Limits, Sequence

pytestmark = pytest.mark.core

PAGE = 4
CHUNKS = (ChunkShape(1, 8), ChunkShape(2, 4))


def a_scheduler(num_pages: int = 12, max_batch: int = 3, **limits: int) -> Scheduler:
    return Scheduler(Limits(max_batch, 40, CHUNKS, **limits), Pages(num_pages, PAGE))


def following(text: list[int]) -> int:
    """The next token of a text: a function of what was before, as a model's is."""
    return (sum(text) * 7 + len(text)) % 3


class Device:
    """Computes a step later than it is asked to, and checks what the steps read."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.pages: dict[int, list[int]] = {}  # tokens that were written on each page
        self.table: dict[tuple[int, int], int] = {}
        self.newest: dict[int, int] = {}
        self.pending: list[tuple[Sequence, int]] = []
        self.num_read = 0

    def turn(self) -> bool:
        """Begins a step and takes the tokens of the one before; False where nothing runs."""
        step = self.scheduler.next_step()
        self.scheduler.check()
        samples: list[tuple[Sequence, int]] = []
        if step is not None:
            for slot, column, page in step.new_pages:
                self.table[slot, column] = page
            reads = [(s, s.num_cached - 1, [self.newest[s.slot or 0]]) for s in step.decoding]
            for sequence, start, count in step.pieces:
                reads.append((sequence, start, sequence.tokens[start : start + count]))
            for sequence, start, tokens in reads:
                self._write(sequence, start, tokens)
            samples = [(s, self._next_token(s)) for s in step.samples]
            self.num_read += sum(len(tokens) for *_, tokens in reads)
        for sequence, token in self.pending:
            if sequence.is_finished:
                continue
            self.scheduler.read(sequence, token)
            if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
                self.scheduler.finish(sequence)
        moved = step is not None or bool(self.pending)
        self.pending = samples
        self.scheduler.check()
        return moved

    def _write(self, sequence: Sequence, start: int, tokens: list[int]) -> None:
        """Writes tokens where the table says, after those that must lie there already."""
        slot = sequence.slot
        assert slot is not None
        for index, token in enumerate(tokens):
            column, place = divmod(start + index, PAGE)
            page = self.table[slot, column]
            assert page == sequence.pages[column]
            content = self.pages.setdefault(page, [])
            if place < len(content) and content[place] != token:
                assert self.scheduler.pages.holders(page) == 1  # nobody else reads it
            del content[place:]
            assert len(content) == place
            content.append(token)
        assert len(sequence.pages) * PAGE >= start + len(tokens)

    def _next_token(self, sequence: Sequence) -> int:
        """Reads a whole text off its pages, as attention does."""
        assert sequence.slot is not None
        text = [token for page in sequence.pages for token in self.pages.get(page, [])]
        text = text[: sequence.num_cached]
        assert len(text) == sequence.num_cached
        known = sequence.tokens[: sequence.num_cached]
        assert text[: len(known)] == known
        token = following(text)
        self.newest[sequence.slot] = token
        return token


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 6),  # turns before it arrives
        st.lists(st.integers(0, 1), min_size=1, max_size=20),  # few tokens: prefixes are shared
        st.integers(1, 12),
        st.integers(0, 2),  # priority
        st.sampled_from([None, None, None, 1, 5]),  # turns until it is cancelled
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(ARRIVALS, st.integers(8, 16), st.integers(1, 4), st.booleans())
def test_random_schedules_give_every_text_and_conserve_pages(arrivals, num_pages, batch, remembers):
    limits = Limits(batch, 40, CHUNKS, ageing=4, patience=3)
    scheduler = Scheduler(limits, Pages(num_pages, PAGE, remembers=remembers))
    device = Device(scheduler)
    added: list[Sequence] = []
    cancels: dict[Sequence, int] = {}
    now = 0
    for wait, prompt, count, priority, cancelled in arrivals:
        for _ in range(wait):
            now += 1
            _cancel(scheduler, cancels, now)
            device.turn()
        if scheduler.refusal(len(prompt), count) is not None:
            assert -(-(len(prompt) + count) // PAGE) > num_pages
            continue
        sequence = Sequence(list(prompt), len(prompt), count, priority)
        scheduler.add(sequence)
        added.append(sequence)
        if cancelled is not None:
            cancels[sequence] = now + cancelled
    for _ in range(4000):
        now += 1
        _cancel(scheduler, cancels, now)
        if not device.turn() and scheduler.num_unfinished == 0:
            break
    assert scheduler.num_unfinished == 0
    assert scheduler.pages.num_held == 0
    for sequence in added:
        assert sequence.is_finished
        if sequence not in cancels:
            want = expected(sequence.tokens[: sequence.num_prompt], sequence.max_tokens)
            assert sequence.tokens == want


def _cancel(scheduler: Scheduler, cancels: dict[Sequence, int], now: int) -> None:
    for sequence, at in cancels.items():
        if at == now:
            scheduler.finish(sequence)


def run_alone(scheduler: Scheduler, *sequences: Sequence) -> Device:
    device = Device(scheduler)
    for sequence in sequences:
        scheduler.add(sequence)
    while device.turn():
        pass
    return device


def test_a_prefix_is_read_once():
    scheduler = a_scheduler(num_pages=30)
    prefix = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]
    first = Sequence([*prefix, 0], 13, 1)
    run_alone(scheduler, first)
    later = Sequence([*prefix, 1, 1], 14, 1)
    scheduler.add(later)
    step = scheduler.next_step()
    assert step is not None
    assert [(piece.start, piece.num_tokens) for piece in step.pieces] == [(12, 2)]
    assert later.num_shared == 12


def test_texts_of_one_prompt_read_it_once_even_at_once():
    scheduler = a_scheduler(num_pages=30)
    prompt = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    device = run_alone(scheduler, *(Sequence(list(prompt), 13, 1) for _ in range(3)))
    assert device.num_read == 13 + 1 + 1


def test_too_few_pages_preempt_the_last_and_it_goes_on_later():
    scheduler = a_scheduler(num_pages=6)
    texts = [Sequence([index % 2] * 6, 6, 12) for index in range(2)]
    run_alone(scheduler, *texts)
    assert scheduler.num_preemptions > 0
    assert texts[0].num_preemptions == 0
    for text in texts:
        assert text.tokens == expected(text.tokens[:6], 12)


def test_what_can_never_run_is_refused_with_the_number():
    scheduler = a_scheduler(num_pages=5)
    assert scheduler.refusal(10, 10) is None
    text = scheduler.refusal(10, 11)
    assert text == "10 tokens of prompt and max_tokens=11 need 6 pages, num_pages=5"
    assert scheduler.refusal(30, 11) == (
        "30 tokens of prompt and max_tokens=11 exceed max_length=40"
    )


def test_short_ones_do_not_keep_a_long_one_waiting_for_ever():
    """A stream of short prompts, and one that needs nearly all pages."""
    scheduler = a_scheduler(num_pages=10, max_batch=3, patience=5)
    device = Device(scheduler)
    long = Sequence([1] * 30, 30, 6)
    for turn in range(200):
        scheduler.add(Sequence([turn % 2, 1], 2, 6))
        if turn == 3:
            scheduler.add(long)
        device.turn()
        if long.is_finished:
            break
    assert long.is_finished
    assert turn < 100


def test_urgent_ones_go_first_and_waiting_makes_up_for_it():
    scheduler = a_scheduler(num_pages=30, max_batch=1, ageing=10)
    usual, urgent = Sequence([1], 1, 2), Sequence([0], 1, 2, priority=-1)
    scheduler.add(usual)
    scheduler.add(urgent)
    assert scheduler.waiting == [urgent, usual]
    for _ in range(25):
        scheduler.next_step()
    late = Sequence([0], 1, 2, priority=-1)
    scheduler.add(late)
    assert scheduler.waiting[-1] is late


@pytest.mark.parametrize(("num_pages", "max_batch"), [(30, 2), (10, 3)])
def test_an_urgent_one_takes_the_place_of_the_last_usual_one(num_pages, max_batch):
    """Of its slot, or of its pages; those that yield go on later and say the same."""
    scheduler = a_scheduler(num_pages, max_batch)
    device = Device(scheduler)
    usual = [Sequence([index] * 14, 14, 6) for index in range(2)]
    for sequence in usual:
        scheduler.add(sequence)
    for _ in range(4):
        device.turn()
    assert scheduler.running == usual
    equal = Sequence([1, 1], 2, 4)
    scheduler.add(equal)
    device.turn()
    assert scheduler.num_preemptions == 0
    urgent = Sequence([0] * 10, 10, 4, priority=-1)
    scheduler.add(urgent)
    device.turn()
    assert urgent.slot is not None
    assert usual[0].num_preemptions == 0
    assert scheduler.num_preemptions >= 1
    while device.turn():
        pass
    for sequence in (*usual, equal, urgent):
        assert sequence.tokens == expected(
            sequence.tokens[: sequence.num_prompt], sequence.max_tokens
        )


def test_one_that_has_run_long_is_not_preempted_by_an_urgent_one():
    scheduler = a_scheduler(num_pages=30, max_batch=1, ageing=10)
    usual, urgent = Sequence([1], 1, 30), Sequence([0], 1, 2, priority=-1)
    scheduler.add(usual)
    device = Device(scheduler)
    for _ in range(15):
        device.turn()
    scheduler.add(urgent)
    while device.turn():
        assert usual.slot is not None or usual.is_finished
    assert urgent.is_finished


@pytest.mark.parametrize(
    ("first", "usual", "urgent", "shareable"),
    [
        ([0] * 20, [1] * 4, [2] * 20, 0),  # others hold too few pages for themselves
        ([0] * 12, [1] * 12, [1] * 12 + [2] * 12, 12),  # it would only share what they hold
    ],
)
def test_nobody_yields_where_it_would_not_be_enough(first, usual, urgent, shareable):
    scheduler = a_scheduler(num_pages=10, max_batch=3)
    device = Device(scheduler)
    kept = Sequence(list(first), len(first), 8, priority=-1)
    less_urgent = Sequence(list(usual), len(usual), 8)
    for sequence in (kept, less_urgent):
        scheduler.add(sequence)
    for _ in range(4):
        device.turn()
    late = Sequence(list(urgent), len(urgent), 4, priority=-1)
    scheduler.add(late)
    assert scheduler.num_shareable(late) == shareable
    device.turn()
    assert late.slot is None
    assert less_urgent.num_preemptions == 0
    while device.turn():
        pass
    assert late.is_finished


def test_pages_that_nobody_holds_are_forgotten_the_last_of_a_prefix_first():
    pages = Pages(3, PAGE)
    taken = [page for _ in range(3) if (page := pages.take()) is not None]
    prefix = ROOT
    for page in taken:
        prefix = pages.remember(page, prefix, [page] * PAGE)
    assert pages.take() is None
    pages.release(taken)
    assert pages.num_available == 3
    first = pages.find(ROOT, [taken[0]] * PAGE)
    assert first == taken[0]
    assert pages.take() == taken[2]
    assert pages.find(ROOT, [taken[0]] * PAGE) == taken[0]
    pages.check()
