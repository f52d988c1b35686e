"""Which experts a device keeps of those in the host's memory: the least recently used one goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from dsjax.weights.host_experts import ExpertTraffic


class ExpertCache[Key: Hashable, Value]:
    """Keeps what was brought, up to a number of experts; knows nothing of what they are.

    Whoever was given an expert still holds it when it goes from here. So nothing need be kept from
    going while a layer uses it, and one that wants more than there is room for works too.
    """

    def __init__(
        self,
        capacity: int,
        bring: Callable[[Sequence[Key]], Sequence[Value]],
        num_bytes: int,
        traffic: ExpertTraffic,
    ) -> None:
        """Makes an empty cache.

        Args:
            capacity: experts kept at most.
            bring: begins to copy some to the device and returns them at once.
            num_bytes: of an expert.
            traffic: what is counted here.
        """
        self.capacity = capacity
        self._bring_all = bring
        self._num_bytes = num_bytes
        self._traffic = traffic
        self._kept: OrderedDict[Key, Value] = OrderedDict()  # the longest unused first
        self._foreseen: set[Key] = set()

    def take(self, keys: Sequence[Key], *, passing: bool = False) -> list[Value]:
        """Returns what a layer wants now.

        Args:
            keys: the experts, each once.
            passing: whether they are likely not wanted again soon, as a long prompt goes through
                all of them: those that are missing are kept only where there is room.
        """
        # First what is there: bringing others could make it go.
        found = {key: self._kept[key] for key in keys if key in self._kept}
        for key in found:
            self._traffic.foreseen += key in self._foreseen
            self._foreseen.discard(key)
            if not passing:
                self._kept.move_to_end(key)
        self._traffic.wanted += len(keys)
        self._traffic.hits += len(found)
        for key, value in self._bring([key for key in keys if key not in found]):
            found[key] = value
            if not passing or len(self._kept) < self.capacity:
                self._keep(key, value)
        return [found[key] for key in keys]

    def foresee(self, keys: Sequence[Key], most: int) -> None:
        """Begins to bring what the next layer will likely want, at most half of what is kept.

        Args:
            keys: the experts, the likeliest first.
            most: how many to bring; those that are there already cost nothing.
        """
        keys = keys[: self.capacity // 2]
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)  # it must not go for one that is brought beside it
        missing = [key for key in keys if key not in self._kept][:most]
        self._traffic.guessed += len(missing)
        for key, value in self._bring(missing):
            self._keep(key, value)
            self._foreseen.add(key)

    def clear(self) -> None:
        """Lets all go."""
        self._kept.clear()
        self._foreseen.clear()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def _bring(self, keys: list[Key]) -> list[tuple[Key, Value]]:
        if not keys:
            return []
        self._traffic.copied += len(keys)
        self._traffic.copied_bytes += len(keys) * self._num_bytes
        return list(zip(keys, self._bring_all(keys), strict=True))

    def _keep(self, key: Key, value: Value) -> None:
        self._kept[key] = value
        while len(self._kept) > self.capacity:
            gone, _ = self._kept.popitem(last=False)
            self._foreseen.discard(gone)
