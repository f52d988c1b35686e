"""Which pages of the pool are free, shared or kept for a prefix that may come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# The prefix before a text's first page.
ROOT = 0


class Pages:
    """Counts who holds each page, and finds pages again by what they hold.

    A page's content is its tokens and all before them. The tokens before are one number: that of
    the prefix which ends with the page before, given when it was remembered and never used again.
    So two prefixes are taken for one only if all their tokens are equal.

    Pages that nobody holds keep their content until they are needed, the least recently used first.
    """

    def __init__(self, num_pages: int, page_size: int, *, remembers: bool = True) -> None:
        """Starts with all pages free.

        Args:
            num_pages: pages of the pool.
            page_size: tokens of a page.
            remembers: whether prefixes are shared at all.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self.remembers = remembers
        self._free = list(reversed(range(num_pages)))
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, and held by nobody
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefix_of: dict[int, int] = {}
        self._last_prefix = ROOT

    @property
    def num_available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_available

    @property
    def num_remembered(self) -> int:
        """Pages whose content can be found, held or not."""
        return len(self._key_of)

    def take(self) -> int | None:
        """Returns a page to write on, held once, or None where all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, prefix: int, tokens: Sequence[int]) -> int | None:
        """Returns the page of these tokens after a prefix, not yet held for it; None if unknown."""
        return self._page_of.get((prefix, tuple(tokens)))

    def prefix_of(self, page: int) -> int:
        """Returns the prefix that ends with a remembered page."""
        return self._prefix_of[page]

    def hold(self, page: int) -> None:
        """Holds a remembered page once more."""
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def holders(self, page: int) -> int:
        """Returns how many hold a page."""
        return self._holders[page]

    def remember(self, page: int, prefix: int, tokens: Sequence[int]) -> int:
        """Lets a held page be found by its content; returns the prefix that ends with it.

        Where another page has the same content, that one stays the one to be found.
        """
        key = (prefix, tuple(tokens))
        assert len(key[1]) == self.page_size
        assert self._holders[page] > 0
        if not self.remembers:
            return ROOT
        known = self._page_of.get(key)
        if known is not None:
            return self._prefix_of[known]
        self._last_prefix += 1
        self._page_of[key] = page
        self._key_of[page] = key
        self._prefix_of[page] = self._last_prefix
        return self._last_prefix

    def release(self, pages: Iterable[int]) -> None:
        """Lets go of a sequence's pages, given in their order.

        The last are forgotten first: a prefix is of no use without what comes before it.
        """
        for page in reversed(list(pages)):
            assert self._holders[page] > 0, f"page {page} is held by nobody"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget_all(self) -> None:
        """Forgets all content, as after a change of weights; pages that are held stay held."""
        for page in list(self._key_of):
            self._forget(page)
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._prefix_of[page]

    def check(self) -> None:
        """Asserts that every page is in one state: free, idle or held."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page, count in enumerate(self._holders) if count > 0}
        assert len(free) == len(self._free)
        assert min(self._holders, default=0) >= 0
        assert not free & idle
        assert not (free | idle) & held
        assert len(free) + len(idle) + len(held) == self.num_pages
        assert idle <= set(self._key_of)
        assert not free & set(self._key_of)
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert set(self._prefix_of) == set(self._key_of)
