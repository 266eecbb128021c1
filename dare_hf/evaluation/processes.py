"""Rows dealt to the processes of one launch, so that the result is that of one process.

Messages go through the store by which torchrun, `accelerate launch` and the like let processes find
each other: no collective that waits could hang or time out where rows take long, and a process that
fails ends the others with its message.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_FAILED = "failed"
_SHORTEST, _LONGEST = 0.002, 0.1  # seconds between two looks at the store
_launches = itertools.count()


class OtherProcessError(DareStateError):
    """Another process of the launch has failed.

    Args:
        text: Which one, and why.
        told: Whether this process failed in the same way, so that all has been said.
    """

    def __init__(self, text: str, told: bool = False) -> None:
        super().__init__(text)
        self.told = told


class Processes:
    """This process among those of a launch; alone by default.

    Args:
        store: Where all of them meet: a `torch.distributed.Store`; None where there is one process.
        rank: Which one this is, from 0.
        count: How many there are.
    """

    def __init__(self, store: Any = None, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._calls = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mapped(
        self,
        items: Sequence[Any],
        work: Callable[[Any], Any],
        done: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """Work on each item in one process, and tell all of them every result.

        All processes call this with the same items, in the same order of calls.

        Args:
            items: Dealt in turn: item k to process k mod `count`.
            work: Makes a JSON value of an item.
            done: Gets an item's place and its value, each place once. The first process gets them
                as they come, the others at the end.

        Returns:
            The values in the order of the items, in every process.

        Raises:
            OtherProcessError: One of the others failed.
        """
        self._calls += 1
        keep = done or (lambda place, value: None)
        if not self.first:
            self._send(items, work)
            made = self._get("all")
            for place, value in enumerate(made):
                keep(place, value)
            return made
        found: dict[int, Any] = {}

        def have(place: int, value: Any) -> None:
            found[place] = value
            keep(place, value)

        awaited = {r: list(range(r, len(items), self.count))[::-1] for r in range(1, self.count)}
        for place in range(0, len(items), self.count):
            have(place, self._value(work(items[place])))
            self._receive(awaited, have)
        self._until(lambda: self._receive(awaited, have))
        made = [found[place] for place in range(len(items))]
        if self.count > 1:
            self._put("all", made)
        return made

    def gathered(self, value: Any) -> list[Any]:
        """A JSON value of each process, in every process."""
        return self.mapped(range(self.count), lambda _: value)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """A JSON value that the first process makes, in every process."""
        return self.mapped([None], lambda _: make())[0]

    def fail(self, text: str) -> tuple[int, str]:
        """Tell the others that this process fails; which one said so first, and what."""
        if self.count == 1:
            return self.rank, text
        said = json.dumps([self.rank, text])
        try:
            rank, text = json.loads(self._store.compare_set(_FAILED, "", said))
        except RuntimeError:  # the process that the store was in has gone
            return self.rank, text
        return rank, text

    def leave(self) -> None:
        """The first process stays until all have left: it may be where they meet."""
        self.gathered(None)
        if self.count > 1:
            self._put(f"left {self.rank}", None)
        for rank in range(1, self.count if self.first else 1):
            self._get(f"left {rank}")

    def _send(self, items: Sequence[Any], work: Callable[[Any], Any]) -> None:
        for place in range(self.rank, len(items), self.count):
            self._put(str(place), self._value(work(items[place])))

    def _receive(self, awaited: dict[int, list[int]], have: Callable[[int, Any], None]) -> bool:
        """Take the others' results that are there; whether these were the last."""
        for places in awaited.values():
            while places and self._store.check([self._key(str(places[-1]))]):
                place = places.pop()
                have(place, self._get(str(place)))
                self._store.delete_key(self._key(str(place)))
        return not any(awaited.values())

    def _value(self, value: Any) -> Any:
        """A value as the others see it, unless one of them has failed meanwhile."""
        if self.count == 1:
            return value
        self._end_with_others()
        return json.loads(json.dumps(value))

    def _key(self, name: str) -> str:
        return f"{self._calls}/{name}"

    def _put(self, name: str, value: Any) -> None:
        self._store.set(self._key(name), json.dumps(value))

    def _get(self, name: str) -> Any:
        """A value that is awaited."""
        self._until(lambda: self._store.check([self._key(name)]))
        return json.loads(self._store.get(self._key(name)))

    def _until(self, there: Callable[[], bool]) -> None:
        """Wait, as long as no other process has failed."""
        pause = _SHORTEST
        while not there():
            self._end_with_others()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def _end_with_others(self) -> None:
        if self._store.check([_FAILED]):
            rank, text = json.loads(self._store.get(_FAILED))
            raise OtherProcessError(f"process {rank} of {self.count} has failed: {text}")


ALONE = Processes()


def launched() -> int:
    """How many processes this one was started among, by torchrun or the like."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process prints and writes, of those it was started among."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def together() -> Iterator[Processes]:
    """The processes that this one was started among, each on an accelerator of its own.

    An error in one of them ends all.

    Raises:
        DareStateError: Their meeting place is not given as torchrun gives it.
        OtherProcessError: One of the others failed.
    """
    if launched() == 1:
        yield ALONE
        return
    if torch.accelerator.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.accelerator.set_device_index(index % torch.accelerator.device_count())
    try:
        store, rank, count = next(iter(distributed.rendezvous("env://")))
    except (ValueError, KeyError) as error:
        raise DareStateError(
            "processes: expected RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets "
            f"them; got WORLD_SIZE={launched()} and: {error}. Start them by torchrun"
        ) from error
    store = distributed.PrefixStore(f"dare_hf/{next(_launches)}", store)
    processes = Processes(store, rank, count)
    with ended_together(processes):
        yield processes


@contextmanager
def ended_together(processes: Processes) -> Iterator[None]:
    """What fails inside in one process fails in all; else they leave together.

    Raises:
        OtherProcessError: Another process failed before this one.
    """
    try:
        yield
        processes.leave()
    except OtherProcessError:
        raise
    except BaseException as error:
        own = str(error) or type(error).__name__
        rank, text = processes.fail(own)
        if rank != processes.rank and text == own:
            raise OtherProcessError(text, told=True) from error
        raise
