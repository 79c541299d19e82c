"""A preemption notice reaches Ray: from a metadata service like that of AWS or Google to a drained node."""

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"
WAIT_S = 300


@pytest.fixture
def spot_notice(monkeypatch):
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    return module


class Metadata(BaseHTTPRequestHandler):
    """The parts of both clouds' metadata services that spot machines use. The server has the state."""

    protocol_version = "HTTP/1.1"

    def answer(self, code: int, text: str = "", **headers: str):
        self.server.answered.append((self.path.partition("?")[0], code))
        self.send_response(code)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):
        if self.path != "/latest/api/token" or not self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            return self.answer(400)
        self.server.token = secrets.token_hex(8)
        self.answer(200, self.server.token)

    def do_GET(self):
        self.server.asked += 1
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
                return self.answer(401)
            return self.answer(200, self.server.notice) if self.server.notice else self.answer(404)
        if path != "/computeMetadata/v1/instance/preempted":
            return self.answer(404)
        if self.headers["Metadata-Flavor"] != "Google":
            return self.answer(403)
        etag = "after" if self.server.notice else "before"
        if query.get("wait_for_change") == ["true"] and query.get("last_etag") == [etag]:
            self.server.changed.wait(WAIT_S)
        text, etag = ("TRUE", "after") if self.server.notice else ("FALSE", "before")
        self.answer(200, text, ETag=etag)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.daemon_threads = True
    server.token, server.notice, server.changed = None, "", threading.Event()
    server.asked, server.answered = 0, []
    server.url = f"http://127.0.0.1:{server.server_port}"

    def give(notice: str):
        server.notice = notice
        server.changed.set()

    server.give = give
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.changed.set()
    server.shutdown()
    server.server_close()


def aws_notice(seconds: float) -> str:
    goes_at = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": goes_at.strftime("%Y-%m-%dT%H:%M:%SZ")})


def wait_until(ready):
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Commands(list):
    """Replaces subprocess: records the commands; the first ones fail."""

    def __init__(self, failing: int = 0):
        self.failing = failing

    def run(self, command, **options):
        self.append(command)
        return SimpleNamespace(returncode=int(len(self) <= self.failing), stderr="not now")


# ------------------------------------------------------------------------------------------ to the command
@pytest.mark.parametrize(("cloud", "notice"), [("aws", aws_notice), ("gcp", lambda seconds: "TRUE")])
def test_notice_runs_the_drain_command(spot_notice, metadata, monkeypatch, cloud, notice):
    commands = Commands()
    monkeypatch.setattr(spot_notice, "subprocess", commands)
    node_id = secrets.token_hex(28)
    returned = []
    daemon = threading.Thread(
        daemon=True,
        target=lambda: returned.append(
            spot_notice.main([cloud, "--notice", "120", "--node-id", node_id, "--metadata", metadata.url])
        ),
    )
    daemon.start()
    wait_until(lambda: metadata.asked >= 2)
    time.sleep(0.1)
    assert commands == []  # no notice, no drain
    metadata.give(notice(120))
    daemon.join(WAIT_S)
    assert returned == [0]
    [command] = commands
    assert Path(command[0]).name == "ray"
    assert command[1:4] == ["drain-node", f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    name, _, value = command[-1].partition("=")
    assert name == "--deadline-remaining-seconds"
    assert 100 <= int(value) <= 110  # ten seconds less than the remaining time
    if cloud == "gcp":
        assert metadata.asked == 2  # the second request waited


def test_ray_has_the_drain_command_with_these_options(spot_notice):
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    command = spot_notice.drain_command("00", "aws", 5)
    done = CliRunner().invoke(cli, [*command[1:], "--address=127.0.0.1:1"])
    assert "Invalid hex ID" in done.output  # all options were accepted, and the id was checked
    done = CliRunner().invoke(cli, [*command[1:], "--deadline=5"])
    assert "No such option" in done.output


def test_expired_token_is_renewed(spot_notice, metadata, monkeypatch):
    waiting = []
    thread = threading.Thread(daemon=True, target=lambda: waiting.append(spot_notice.wait_aws(metadata.url, 120)))
    thread.start()
    wait_until(lambda: metadata.answered.count(("/latest/meta-data/spot/instance-action", 404)) >= 2)
    metadata.token = "another"
    metadata.give(aws_notice(60))
    thread.join(WAIT_S)
    assert 55 < waiting[0] - time.time() <= 60
    assert metadata.answered.count(("/latest/api/token", 200)) == 2


def test_unreadable_notice_counts_as_a_notice(spot_notice, metadata):
    metadata.give("something new")
    assert 115 < spot_notice.wait_aws(metadata.url, 120) - time.time() <= 120


def test_polling_continues_without_a_metadata_service(spot_notice, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        asked = []

        def pause(seconds):
            asked.append(seconds)
            if len(asked) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(spot_notice.time, "sleep", pause)
        for wait in (spot_notice.wait_aws, spot_notice.wait_gcp):
            asked.clear()
            with pytest.raises(KeyboardInterrupt):
                wait(url, 120)


def test_drain_is_retried_until_the_deadline(spot_notice, monkeypatch):
    monkeypatch.setattr(spot_notice.time, "sleep", lambda seconds: None)
    commands = Commands(failing=2)
    monkeypatch.setattr(spot_notice, "subprocess", commands)
    assert spot_notice.drain("00", "aws", time.time() + 100)
    assert len(commands) == 3
    commands = Commands(failing=100)
    monkeypatch.setattr(spot_notice, "subprocess", commands)
    assert not spot_notice.drain("00", "aws", time.time() + 5)
    assert commands[-1][-1] == "--deadline-remaining-seconds=0"


def test_only_one_process_runs(spot_notice, metadata):
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0mi_ray.spot_notice.{name}")
        assert spot_notice.main(["aws", "--node-id", name, "--metadata", metadata.url]) == 0
    assert metadata.asked == 0


# ------------------------------------------------------------------------------------------ to Ray
LOOK = """
import importlib.util, json, sys
from ray._raylet import GcsClient
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.core.generated.gcs_pb2 import GcsNodeInfo
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
found = {"nodes": {}}
for node in nodes:
    alive = node.state == GcsNodeInfo.ALIVE
    found["nodes"][node.node_id.hex()] = "alive" if alive else NodeDeathInfo.Reason.Name(node.death_info.reason)
if len(nodes) == 1:
    spec = importlib.util.spec_from_file_location("spot_notice", sys.argv[2])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found["here"] = module.local_node_id()
print(json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_node_is_drained_with_token_authentication(metadata, tmp_path):
    """Also after the signal that Kubernetes sends to a pod, with Ray started like by KubeRay."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray_command = str(Path(sys.executable).with_name("ray"))
    started = []

    def start(*command: str):
        with (tmp_path / f"{len(started)}.log").open("wb") as log:
            options = {"stdout": log, "stderr": log, "env": environment, "start_new_session": True}
            started.append(subprocess.Popen(command, **options))
        return started[-1]

    def look() -> dict:
        command = [sys.executable, "-c", LOOK, address, str(SCRIPT)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(done.stderr)  # the output contains the reason if there is no head
        return json.loads(done.stdout) if done.returncode == 0 else {"nodes": {}}

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
        probe.close()
        address = environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        small = ["--num-cpus=0", "--object-store-memory=80000000", "--block"]
        try:
            head = start(
                *(ray_command, "start", "--head", f"--port={port}", f"--temp-dir={folder}", *small),
                "--include-dashboard=false",
            )
            wait_until(lambda: head.poll() is None and len(look()["nodes"]) == 1)
            alone = look()
            assert list(alone["nodes"]) == [alone["here"]]
            signalled = start(
                "bash", "-c", f"ulimit -n 4096; {ray_command} start --address={address} {' '.join(small)}"
            )
            wait_until(lambda: len(look()["nodes"]) == 2)
            [first] = set(look()["nodes"]) - set(alone["nodes"])
            start(ray_command, "start", f"--address={address}", *small)
            wait_until(lambda: len(look()["nodes"]) == 3)
            [second] = set(look()["nodes"]) - {first, *alone["nodes"]}
            daemon = start(
                *(sys.executable, str(SCRIPT), "aws", "--node-id", second, "--metadata", metadata.url),
            )
            metadata.give(aws_notice(120))
            signalled.send_signal(signal.SIGTERM)
            assert daemon.wait(WAIT_S) == 0, (tmp_path / "3.log").read_text()
            # A drained idle node stops without further commands.
            taken = {alone["here"]: "alive"} | dict.fromkeys((first, second), "AUTOSCALER_DRAIN_PREEMPTED")
            wait_until(lambda: look()["nodes"] == taken)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
