"""Where the generation and the training of an online run meet: what is committed, and the newest policies.

Without Ray: `stages.online` holds a `Meeting` in an asynchronous actor, in which all may wait at once.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

Policy = TypeVar("Policy")
POLL_S = 0.02  # between two looks at what is known


class Meeting(Generic[Policy]):
    """Parts of the plan that are committed, and the last versions of the policy.

    What an update trains is decided once: every worker, and a worker that starts again, gets the same answer. An
    update that is not decided when the run ends is never trained, so that no worker goes on alone.

    Args:
        keep: number of versions that are kept.
    """

    def __init__(self, keep: int):
        self.keep, self.ended = keep, False
        self.done: dict[int, float] = {}  # index of a part: when it was reported
        self.closed: dict[tuple[int, ...], list[int]] = {}
        self.policies: dict[int, Policy] = {}

    async def finished(self, indices: Iterable[int]):
        now = time.monotonic()
        for index in indices:
            self.done.setdefault(index, now)

    async def publish(self, version: int, policy: Policy):
        """Keep a version of the policy; older ones than the last `keep` are dropped."""
        self.policies[version] = policy
        self.policies = {v: self.policies[v] for v in sorted(self.policies)[-self.keep :]}

    async def end(self):
        self.ended = True

    async def policy(self, version: int, timeout_s: float) -> tuple[str, Policy | None]:
        """The policy of a version, behind one word: here, past (it is kept no more), ended, or wait."""
        until = time.monotonic() + timeout_s
        while True:
            if version in self.policies:
                return "here", self.policies[version]
            if self.policies and version < max(self.policies):
                return "past", None
            if self.ended:
                return "ended", None
            if time.monotonic() >= until:
                return "wait", None
            await asyncio.sleep(POLL_S)

    async def wait(self, indices: Iterable[int], deadline_s: float | None) -> list[int] | None:
        """Wait until all of these parts are committed, or, `deadline_s` after the first of them, some.

        Returns:
            Those that count, in rising order; None: the run ended before that.
        """
        key = tuple(indices)
        while key not in self.closed:
            if self.ended:
                return None
            here = sorted(self.done.keys() & set(key))
            late = deadline_s is not None and here and time.monotonic() - self._first(here) >= deadline_s
            if len(here) == len(key) or late:
                self.closed[key] = here
            else:
                await asyncio.sleep(POLL_S)
        return self.closed[key]

    def _first(self, indices: list[int]) -> float:
        return min(self.done[index] for index in indices)
