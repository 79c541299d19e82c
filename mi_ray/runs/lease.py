"""The lease of a run folder, with its heartbeat and fencing token. It allows one driver at a time.

A lease is a file `lease/<token>.json`, created once (`storage.create_bytes`), so exactly one of several drivers gets
the next token. Only its holder rewrites it, as a heartbeat. If another driver has a higher token, this driver has lost
the run: commits of its actors are refused, and it stops.
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

_held: dict[str, "Lease"] = {}  # {run folder: lease that this process holds}
MAX_ERROR = 2000  # characters of an error in the log
BEATS = 4  # heartbeats in the duration of a lease


class Lost(ConfigError):
    """Another driver now owns the run."""


def _folder(run_dir: str) -> str:
    return storage.join(run_dir, "lease")


def _tokens(run_dir: str) -> list[int]:
    stems = [name.removesuffix(".json") for name in storage.list_names(_folder(run_dir))]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _uri(run_dir: str, token: int) -> str:
    return storage.join(_folder(run_dir), f"{token:08d}.json")


def superseded(run_dir: str, token: int | None) -> bool:
    """Whether another driver has taken over the run from the driver with this token. None: a driver without a lease."""
    return token is not None and max(_tokens(run_dir), default=0) > token


def refuse_if_superseded(run_dir: str, token: int | None, what: str):
    """Check that no other driver owns the run, before writing `what`, which that driver would write too.

    Raises:
        Lost: another driver has taken over the run.
    """
    if superseded(run_dir, token):
        raise Lost([f"{what} is not written: another driver has taken over the run {run_dir!r}"])


def current_token(run_dir: str) -> int | None:
    """The token of this process's lease of the run. None if it has no lease."""
    return _held[run_dir].token if run_dir in _held else None


# ------------------------------------------------------------------------------------------ processes
def _machine() -> str:
    """Identifies the place in which a process id is unique: host, boot, and PID namespace of the container."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip(), os.readlink(pids)] if boot.exists() and pids.is_symlink() else []
    return "/".join([platform.node(), *known])


def _process_start(pid: int) -> str | None:
    """Start time of a process of this machine, in kernel ticks. None if it does not run or is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _is_alive(holder: dict) -> bool:
    if Path("/proc/self/stat").exists():
        return _process_start(holder["pid"]) == holder["process_start"] is not None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------------------ the lease
class Lease:
    """The lease of a run folder. Get one with `held`."""

    def __init__(self, run_dir: str, seconds: float, token: int):
        self.run_dir, self.seconds, self.token = run_dir, seconds, token
        self.lost = False
        self._stop, self._beats = threading.Event(), 0

    @cached_property
    def _holder(self) -> dict:
        pid = os.getpid()
        who = {"host": platform.node(), "pid": pid, "process_start": _process_start(pid), "machine": _machine()}
        return {"token": self.token, **who, "since": round(time.time(), 3), "seconds": self.seconds}

    def content(self, released: bool = False) -> bytes:
        beat = {"beat": self._beats, "heartbeat": round(time.time(), 3), "released": released}
        return json.dumps(self._holder | beat, indent=2).encode()

    def keep(self):
        """Write heartbeats until stopped. If one fails, the next one replaces it."""
        while not self._stop.wait(self.seconds / BEATS):
            self._beats += 1
            try:
                if superseded(self.run_dir, self.token):
                    self.lost = True
                    return
                storage.write_bytes(_uri(self.run_dir, self.token), self.content())
            except (OSError, pa.ArrowException) as error:  # Arrow raises its own exception for some answers of a store
                print(
                    f"warning: the lease of {self.run_dir} cannot be renewed now: {error}; it is tried again",
                    file=sys.stderr,
                )

    def confirm(self):
        """Raise `Lost` if the heartbeat has found that another driver owns the run."""
        if self.lost:
            raise Lost(
                [f"run_dir: {self.run_dir!r} {_holder_text(self.run_dir)}, which has taken it over; this driver stops"]
            )

    def stop(self):
        """Stop the heartbeat."""
        self._stop.set()

    def release(self):
        """Release the lease. Call it after the heartbeat has ended, which would overwrite it. If the write fails, the
        next driver waits until the lease expires."""
        with suppress(OSError):
            if not superseded(self.run_dir, self.token):
                storage.write_bytes(_uri(self.run_dir, self.token), self.content(released=True))

    def remove(self):
        """Remove the lease of a run that was not started, and its local folder. A failure is as in `release`."""
        with suppress(OSError):
            storage.delete(_uri(self.run_dir, self.token))
            if "://" not in self.run_dir:
                Path(_folder(self.run_dir)).rmdir()


def latest(run_dir: str) -> tuple[int, dict | None]:
    """The highest token and its holder; (0, None) if there was no lease yet."""
    for token in reversed(_tokens(run_dir)):
        try:
            return token, storage.read_json(_uri(run_dir, token))
        except FileNotFoundError:  # the next holder has just deleted it
            return latest(run_dir)
    return 0, None


def _holder_text(run_dir: str) -> str:
    _, holder = latest(run_dir)
    since = datetime.fromtimestamp(holder["since"], UTC).isoformat(" ", "seconds")
    heard = max(0, time.time() - holder["heartbeat"])
    return f"is held by process {holder['pid']} on {holder['host']} since {since} (last heartbeat {heard:.0f} s ago)"


def _refuse_if_alive(run_dir: str, token: int, holder: dict, seconds: float):
    """Return when the holder is known to be dead: at once if it was on this machine, else when its lease has expired.

    Clocks of different machines are not compared: this process watches whether the heartbeat changes.
    """
    advice = "wait for it, stop it, or use another --run-dir"
    refusal = ConfigError([f"run_dir: {run_dir!r} {_holder_text(run_dir)}; {advice}"])
    if holder["machine"] == _machine():
        if _is_alive(holder):
            raise refusal
        return
    patience = max(seconds, holder["seconds"])
    print(
        f"{run_dir} {_holder_text(run_dir)}: waiting up to {patience:.0f} s to see whether it is alive", file=sys.stderr
    )
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 20))
        now, successor = latest(run_dir)
        if not successor or (now == token and successor["released"]):
            return
        if now != token or successor["beat"] != holder["beat"]:
            raise ConfigError([f"run_dir: {run_dir!r} {_holder_text(run_dir)}; {advice}"])


def acquire(run_dir: str, seconds: float) -> Lease:
    """Take the lease of a run, if it is free or its holder is dead.

    Raises:
        ConfigError: another driver holds it; the message says which one.
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
    """Hold the lease of a run folder, with `BEATS` heartbeats in `seconds`. An exception in the block is logged.

    If it is raised before the folder has a run.json, nothing was started: then nothing is logged, and the lease is
    removed.

    Raises:
        ConfigError: another driver holds the lease.
        Lost: another driver has taken over the run; raised in place of the exception that this caused.
    """
    lease, started = acquire(run_dir, seconds), True
    heart = threading.Thread(target=lease.keep, name="lease", daemon=True)
    heart.start()
    _held[run_dir] = lease
    try:
        yield lease
    except Exception as error:
        lease.lost = lease.lost or superseded(run_dir, lease.token)
        lease.confirm()
        with suppress(OSError):  # the disk may be full, or the store unreachable
            if started := storage.exists(storage.join(run_dir, "run.json")):
                run_folder.log_event(run_dir, "run_failed", error=f"{type(error).__name__}: {error}"[:MAX_ERROR])
        raise
    finally:
        del _held[run_dir]
        lease.stop()
        heart.join(timeout=seconds)
        lease.release() if started else lease.remove()


def confirm(run_dir: str):
    """Raise `Lost` if this process had the lease and another driver has taken over the run."""
    if run_dir in _held:
        _held[run_dir].confirm()
