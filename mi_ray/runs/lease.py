"""One driver at a time: the lease of a run folder, its heartbeat, and the token that fences out who lost it.

A lease is a file `lease/<token>.json`, created once (`storage.create_bytes`), so of several drivers one gets the next
token. Its holder alone rewrites it, as a heartbeat. A driver whose token is not the highest any more has lost the run:
its actors' commits are refused, and it stops.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.runs import folder as run_folder

_held: dict[str, "Lease"] = {}  # by run folder: what this process holds
MAX_ERROR = 2000  # characters of an error that are logged
BEATS = 4  # in the time of a lease


class Lost(ConfigError):
    """Another driver has taken over the run."""


def _folder(run_dir: str) -> str:
    return storage.join(run_dir, "lease")


def _tokens(run_dir: str) -> list[int]:
    stems = [name.removesuffix(".json") for name in storage.list_names(_folder(run_dir))]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _uri(run_dir: str, token: int) -> str:
    return storage.join(_folder(run_dir), f"{token:08d}.json")


def superseded(run_dir: str, token: int | None) -> bool:
    """Whether someone took the run over from the driver with this token; None is a driver without a lease."""
    return token is not None and max(_tokens(run_dir), default=0) > token


def refuse_if_superseded(run_dir: str, token: int | None, what: str):
    """See, before `what` is written that a successor writes too, that there is none.

    Raises:
        Lost: someone has taken the run over.
    """
    if superseded(run_dir, token):
        raise Lost([f"{what} is not written: another driver has taken over {run_dir!r}"])


def current_token(run_dir: str) -> int | None:
    """The token under which this process holds the run; None if it does not."""
    return _held[run_dir].token if run_dir in _held else None


# ------------------------------------------------------------------------------------------ processes
def _machine() -> str:
    """Names the space in which a process id means something: this boot, and this container's processes."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip(), os.readlink(pids)] if boot.exists() and pids.is_symlink() else []
    return "/".join([platform.node(), *known])


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if it is none or a dead one's remains."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _lives(holder: dict) -> bool:
    if Path("/proc/self/stat").exists():
        return _start_of(holder["pid"]) == holder["process_start"] is not None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------------------ the lease
class Lease:
    """What the holder of a run has; get one by `held`."""

    def __init__(self, run_dir: str, seconds: float, token: int):
        self.run_dir, self.seconds, self.token = run_dir, seconds, token
        self.lost = False
        self._stop, self._beats = threading.Event(), 0

    @cached_property
    def _holder(self) -> dict:
        pid = os.getpid()
        who = {"host": platform.node(), "pid": pid, "process_start": _start_of(pid), "machine": _machine()}
        return {"token": self.token, **who, "since": round(time.time(), 3), "seconds": self.seconds}

    def content(self, released: bool = False) -> bytes:
        beat = {"beat": self._beats, "heartbeat": round(time.time(), 3), "released": released}
        return json.dumps(self._holder | beat, indent=2).encode()

    def keep(self):
        """Beat until stopped. A beat that fails is made up for by the next one."""
        while not self._stop.wait(self.seconds / BEATS):
            self._beats += 1
            try:
                if superseded(self.run_dir, self.token):
                    self.lost = True
                    return
                storage.write_bytes(_uri(self.run_dir, self.token), self.content())
            except (OSError, pa.ArrowException) as error:  # the latter for answers that Arrow has no OSError for
                print(f"warning: the lease of {self.run_dir} cannot be renewed now: {error}", file=sys.stderr)

    def confirm(self):
        """Raise `Lost` if the heartbeat has found another driver at the run."""
        if self.lost:
            raise Lost([f"run_dir: {self.run_dir!r} {_holding(self.run_dir)}, which took it over; this driver stops"])

    def stop(self):
        """Let the heartbeat end."""
        self._stop.set()

    def release(self):
        """Give the run back, once no beat is under way that would take it again. Where that cannot be written, the next
        driver finds out that this one is gone."""
        with suppress(OSError):
            if not superseded(self.run_dir, self.token):
                storage.write_bytes(_uri(self.run_dir, self.token), self.content(released=True))


def latest(run_dir: str) -> tuple[int, dict | None]:
    """The highest token and its holder; (0, None) if no one ever held the run."""
    for token in reversed(_tokens(run_dir)):
        try:
            return token, storage.read_json(_uri(run_dir, token))
        except FileNotFoundError:  # its successor has just tidied it away
            return latest(run_dir)
    return 0, None


def _holding(run_dir: str) -> str:
    _, holder = latest(run_dir)
    since = datetime.fromtimestamp(holder["since"], UTC).isoformat(" ", "seconds")
    heard = max(0, time.time() - holder["heartbeat"])
    return f"is held by process {holder['pid']} on {holder['host']} since {since} (heard of {heard:.0f} s ago)"


def _refuse_if_alive(run_dir: str, token: int, holder: dict, seconds: float):
    """Return once the holder is known to be gone: at once on its own machine, else after a lease without a heartbeat.

    No clocks are compared between machines: it is watched from here whether the heartbeat goes on.
    """
    advice = "wait for it, stop it, or give another --run-dir"
    refusal = ConfigError([f"run_dir: {run_dir!r} {_holding(run_dir)}; {advice}"])
    if holder["machine"] == _machine():
        if _lives(holder):
            raise refusal
        return
    patience = max(seconds, holder["seconds"])
    print(f"{run_dir} {_holding(run_dir)}: watching for up to {patience:.0f} s whether it still runs", file=sys.stderr)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 20))
        now, successor = latest(run_dir)
        if now == token and successor["released"]:
            return
        if now != token or successor["beat"] != holder["beat"]:
            raise ConfigError([f"run_dir: {run_dir!r} {_holding(run_dir)}; {advice}"])


def acquire(run_dir: str, seconds: float) -> Lease:
    """Take the run's lease, from no one or from a holder who is gone.

    Raises:
        ConfigError: another driver holds it; the message tells who.
    """
    while True:
        token, holder = latest(run_dir)
        if holder and not holder["released"]:
            _refuse_if_alive(run_dir, token, holder, seconds)
        lease = Lease(run_dir, seconds, token + 1)
        if storage.create_bytes(_uri(run_dir, lease.token), lease.content()):
            break
    for old in _tokens(run_dir):
        if old < lease.token:
            storage.delete(_uri(run_dir, old))
    return lease


@contextmanager
def held(run_dir: str, seconds: float) -> Iterator[Lease]:
    """Hold a run folder's lease, with a heartbeat `BEATS` times in `seconds`; what goes wrong meanwhile is logged.

    Raises:
        ConfigError: another driver holds it.
        Lost: at the end, instead of what went wrong because another driver had taken over.
    """
    lease = acquire(run_dir, seconds)
    heart = threading.Thread(target=lease.keep, name="lease", daemon=True)
    heart.start()
    _held[run_dir] = lease
    try:
        yield lease
    except Exception as error:
        lease.lost = lease.lost or superseded(run_dir, lease.token)
        lease.confirm()
        with suppress(OSError):  # of a disk that is full, or a store that is gone
            run_folder.log_event(run_dir, "run_failed", error=f"{type(error).__name__}: {error}"[:MAX_ERROR])
        raise
    finally:
        del _held[run_dir]
        lease.stop()
        heart.join(timeout=seconds)
        lease.release()


def confirm(run_dir: str):
    """Raise `Lost` if this process held the run and another driver has taken over."""
    if run_dir in _held:
        _held[run_dir].confirm()
