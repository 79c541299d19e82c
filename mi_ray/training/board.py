"""The shared state of generation and training in an online run: committed parts, and the newest policies.

This file does not need Ray: `stages.online` keeps a `Meeting` in an asynchronous actor, where many callers can wait. It
imports little, so that this actor starts quickly and needs little memory.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Policy = TypeVar("Policy")
POLL_S = 0.02  # seconds between two checks of a condition


class Meeting(Generic[Policy]):
    """The committed parts of the plan, and the last versions of the policy.

    The parts of an update are decided once, so that all workers, also restarted ones, get the same answer. An update
    that is not decided when the run ends is never trained, so that no worker continues alone.

    Args:
        keep: number of versions that are kept.
        put: what is done with a policy before it is kept, such as moving it to an object store.
    """

    def __init__(self, keep: int, put: Callable[[Policy], Policy] = lambda policy: policy):
        self.keep, self.put, self.ended = keep, put, False
        self.done: dict[int, float] = {}  # index of a part: when it was reported
        self.closed: dict[tuple[int, ...], list[int]] = {}
        self.policies: dict[int, Policy] = {}

    async def finished(self, indices: Iterable[int]):
        now = _now()
        for index in indices:
            self.done.setdefault(index, now)

    async def publish(self, version: int, policy: Policy):
        """Store a version of the policy. Only the last `keep` versions are kept."""
        self.policies[version] = self.put(policy)
        self.policies = {v: self.policies[v] for v in sorted(self.policies)[-self.keep :]}

    async def end(self):
        self.ended = True

    async def policy(self, version: int, timeout_s: float) -> tuple[str, Policy | None]:
        """Wait for a version of the policy, at most `timeout_s`.

        Returns:
            (state, policy). The state is here, past (the version is no longer kept), ended (the run ended), or wait
            (timeout). The policy is None unless the state is here.
        """
        until = _now() + timeout_s
        while True:
            if version in self.policies:
                return "here", self.policies[version]
            if self.policies and version < max(self.policies):
                return "past", None
            if self.ended:
                return "ended", None
            if _now() >= until:
                return "wait", None
            await asyncio.sleep(POLL_S)

    async def wait(self, indices: Iterable[int], deadline_s: float | None) -> list[int] | None:
        """Wait until all of these parts are committed, but at most `deadline_s` after the first one.

        Returns:
            The parts that are used, in rising order. None if the run ended first.
        """
        key = tuple(indices)
        while key not in self.closed:
            if self.ended:
                return None
            here = sorted(self.done.keys() & set(key))
            late = deadline_s is not None and here and _now() - self._first(here) >= deadline_s
            if len(here) == len(key) or late:
                self.closed[key] = here
            else:
                await asyncio.sleep(POLL_S)
        return self.closed[key]

    def _first(self, indices: list[int]) -> float:
        return min(self.done[index] for index in indices)


def _now() -> float:
    """The time of the event loop, in seconds."""
    return asyncio.get_running_loop().time()
