"""Test environments for benchmarks/faults.py: a store with failures, a disk that fills up, nodes that disappear."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from gates import ROOT
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

SHARE = 1 / 7  # share of the requests that fail, and share of those that are slow


# ------------------------------------------------------------------------------------------ a store that fails
class FlakyStore:
    """An S3 server with injected failures.

    One request in seven fails: with status 500 or 503, or with a lost connection before or after the request is done.
    Another one in seven is slow. The others succeed.
    """

    def __init__(self, application: Callable, seed: int):
        self.application, self.lots, self.lock = application, random.Random(seed), threading.Lock()
        self.refused, self.environment = 0, {}

    def __call__(self, environ, start_response):
        with self.lock:
            lot, how = self.lots.random(), self.lots.randrange(4)
        if lot > 1 - SHARE:
            time.sleep(0.3)
        if lot > SHARE or environ["PATH_INFO"] == "/runs":
            return self.application(environ, start_response)
        self.refused += 1
        if how == 3:  # the request is done, but the response is lost
            list(self.application(environ, lambda *arguments: None))
        if how >= 2:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("injected")
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = (("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError"))[how]
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]


@contextmanager
def flaky_store(seed: int) -> Iterator[FlakyStore]:
    """Run the server, with an empty bucket `runs`; needs the extra `test`."""
    try:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server
    except ImportError as error:
        raise ValueError(f"kinds: s3 needs moto ({error}); run pip install 'mi-ray[test]' or leave s3 out") from error
    store = FlakyStore(DomainDispatcherApplication(create_backend_app), seed)
    silent = type("Silent", (WSGIRequestHandler,), {"log": lambda self, *arguments: None})
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        import boto3

        given = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=store.environment["AWS_ENDPOINT_URL"], **given).create_bucket(Bucket="runs")
        yield store
    finally:
        server.shutdown()


# ------------------------------------------------------------------------------------------ a disk that fills up
@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of `kib` KiB in memory at `folder`. Yields a function that makes it large."""

    def mount(*options: str):
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"kinds: disk mounts a small tmpfs, which needs root ({done.stderr.strip()}); leave disk out"
            )

    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))
    try:
        yield lambda: mount("-o", "remount,size=1g", str(folder))
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ------------------------------------------------------------------------------------------ nodes that go
class Nodes:
    """A Ray cluster of processes on this machine: a head without CPUs and two nodes with one CPU each."""

    def __init__(self):
        os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that the nodes start
        os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = []
        self.mend()

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.cluster.address}

    def mend(self):
        """Start nodes until there are two again."""
        self.nodes = [node for node in self.nodes if not node.dead_processes()]
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1))

    def other_than(self, node_id: str):
        """A node with another id."""
        return next(node for node in self.nodes if node.node_id != node_id)

    def give_notice(self, node, seconds: float):
        """Announce that a node will be preempted, as the provider of a spot machine does."""
        deadline_ms = int(1000 * (time.time() + seconds))
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        ray._raylet.GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "", deadline_ms)

    def kill(self, node):
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        yield started
    finally:
        started.cluster.shutdown()


@contextmanager
def head(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Run a Ray instance that accepts jobs. Yields the command to submit a job, and the environment with its token."""
    ray_command, log = str(Path(sys.executable).with_name("ray")), folder / "head-log"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as sockets, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [ray_command, "start", "--head", "--block", "--num-cpus=2", "--port=0", f"--temp-dir={sockets}"]
        command += ["--dashboard-agent-listen-port=0"]  # jobs use this port; the default port is taken by other nodes
        closed = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | closed
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, f"--dashboard-port={port}"],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                nothing = [ray_command, "job", "submit", f"--address={address}", "--", "true"]
                if subprocess.run(nothing, capture_output=True, env=environment).returncode == 0:
                    break  # test with a real job: the job list works earlier than the agent that runs jobs
            else:
                raise RuntimeError(f"ray start failed:\n{log.read_text()[-3000:]}")
            yield [ray_command, "job", "submit", f"--address={address}", "--"], closed
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
