"""The lease of a run: one driver at a time, and what happens to a driver that lost the run."""

import json
import os
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.runs import lease


@pytest.fixture
def run_dir(tmp_path) -> str:
    return str(tmp_path / "run")


def write_holder(run_dir: str, **changes) -> dict:
    """The lease of another driver."""
    content = json.loads(lease.Lease(run_dir, 2.0, 5).content()) | changes
    storage.write_json(lease._uri(run_dir, 5), content)
    return content


def test_second_driver_is_refused_with_the_name_of_the_holder(run_dir):
    with lease.held(run_dir, 40), pytest.raises(ConfigError) as refused, lease.held(run_dir, 40):
        pass
    message = str(refused.value)
    for reported in (run_dir, f"process {os.getpid()}", lease.platform.node(), "--run-dir"):
        assert reported in message


def test_error_is_raised_even_if_the_release_fails(run_dir, monkeypatch):
    def fail(uri, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write_bytes", fail)  # not needed to take the lease
    with pytest.raises(ValueError, match="the reason"), lease.held(run_dir, 40):
        raise ValueError("the reason")


@pytest.mark.parametrize("error", [OSError, pa.ArrowException])
def test_failed_heartbeat_is_repeated(run_dir, error, monkeypatch, capsys):
    write, failed = storage.write_bytes, []

    def fail_once(uri, content):
        if not failed:
            failed.append(uri)
            raise error("Unknown error")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", fail_once)
    deadline = time.monotonic() + 20
    with lease.held(run_dir, 0.2):
        while lease.latest(run_dir)[1]["beat"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.latest(run_dir)[1]["beat"] >= 2
    assert "cannot be renewed now: Unknown error" in capsys.readouterr().err


def test_released_run_is_free_and_its_token_grows(run_dir):
    with lease.held(run_dir, 40) as first:
        assert lease.current_token(run_dir) == first.token == 1
    assert lease.current_token(run_dir) is None
    with lease.held(run_dir, 40) as second:
        assert second.token == 2
        assert storage.list_names(storage.join(run_dir, "lease")) == ["00000002.json"]


def test_dead_driver_of_this_machine_is_replaced_at_once(run_dir):
    code = f"from mi_ray.runs import lease; import os; lease.acquire({run_dir!r}, 1000); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    began = time.monotonic()
    with lease.held(run_dir, 1000) as mine:
        assert mine.token == 2
    assert time.monotonic() - began < 100


def test_process_with_a_reused_id_is_not_the_holder(run_dir):
    write_holder(run_dir, process_start="1")
    with lease.held(run_dir, 1000) as mine:
        assert mine.token == 6


def test_silent_driver_of_another_machine_is_replaced_after_its_lease(run_dir, capsys):
    write_holder(run_dir, machine="elsewhere", host="elsewhere", seconds=1.0)
    began = time.monotonic()
    with lease.held(run_dir, 1.0) as mine:
        assert mine.token == 6
    assert time.monotonic() - began >= 1.0
    assert "elsewhere" in capsys.readouterr().err


def test_live_driver_of_another_machine_keeps_the_run(run_dir):
    before = write_holder(run_dir, machine="elsewhere", host="elsewhere", seconds=60.0)
    beat = threading.Timer(0.3, lambda: write_holder(run_dir, **(before | {"beat": 1})))
    beat.start()
    with pytest.raises(ConfigError, match="elsewhere"), lease.held(run_dir, 60.0):
        pass
    beat.join()


def test_one_of_many_drivers_gets_the_run(run_dir):
    got, refused = [], []

    def drive():
        try:
            got.append(lease.acquire(run_dir, 40))
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_driver_that_lost_the_run_cannot_commit(run_dir):
    def drive():
        with lease.held(run_dir, 0.2) as mine:
            assert not lease.superseded(run_dir, mine.token)
            write_holder(run_dir)
            assert lease.superseded(run_dir, mine.token)
            assert not lease.superseded(run_dir, None)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                lease.confirm(run_dir)
                time.sleep(0.01)

    with pytest.raises(lease.Lost, match="has taken it over"):
        drive()
    assert json.loads(storage.read_bytes(lease._uri(run_dir, 5)))["released"] is False


def test_errors_are_in_the_events(run_dir):
    storage.write_json(storage.join(run_dir, "run.json"), {})
    with pytest.raises(ValueError, match="no hearts"), lease.held(run_dir, 40):
        raise ValueError("no hearts")
    [event] = storage.read_lines(storage.join(run_dir, "events.jsonl"))
    assert (event["event"], event["error"]) == ("run_failed", "ValueError: no hearts")


def test_run_that_did_not_start_leaves_nothing(run_dir):
    def refuse():
        assert len(os.listdir(os.path.join(run_dir, "lease"))) == 1
        raise ConfigError(["Ray cannot start"])

    with pytest.raises(ConfigError, match="Ray cannot start"), lease.held(run_dir, 40):
        refuse()
    assert os.listdir(run_dir) == []
    with lease.held(run_dir, 40) as mine:
        assert mine.token == 1


def test_slow_heartbeat_does_not_take_the_run_again(run_dir, monkeypatch):
    """The heartbeat is written while the holder releases the run."""
    write, beating = storage.write_bytes, threading.Event()

    def slow_write(uri: str, content: bytes):
        if threading.current_thread().name == "lease":
            beating.set()
            time.sleep(0.3)
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", slow_write)
    with lease.held(run_dir, 1.0):
        assert beating.wait(10)
    assert lease.latest(run_dir)[1]["released"]
