"""Tells Ray that the cloud will stop this spot machine, early enough to save its work. Run it beside `ray start`:

    python cluster/spot_notice.py aws
    python cluster/spot_notice.py gcp --notice 120

It polls the metadata service of the machine until there is a notice. Then it drains the node: the node gets no new
work, and a training sees the notice in ray.train.get_preemption_info(), writes a checkpoint and continues on another
node. It needs only the standard library and Ray. Ray's token, if one is needed, comes from the environment, as for
every `ray` command.
"""

import argparse
import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5  # interval that AWS recommends; its notice is two minutes
MARGIN_S = 10  # Ray Train stops its workers at the deadline, when the machine must still run
DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # no proxy: it would return the metadata of another machine


def log(text: str):
    print(f"{datetime.now().isoformat(timespec='seconds')} {text}", flush=True)


def fetch(url: str, headers: dict[str, str], method: str = "GET", timeout_s: float = 5):
    """The text and the headers of a response."""
    with DIRECT.open(urllib.request.Request(url, headers=headers, method=method), timeout=timeout_s) as answer:
        return answer.read().decode().strip(), answer.headers


def wait_aws(metadata: str, notice_s: float) -> float:
    """Wait for a notice from AWS (metadata service version 2). Returns when the machine stops, as Unix time."""
    token = None
    while True:
        try:
            if token is None:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                token, _ = fetch(f"{metadata}/latest/api/token", lifetime, "PUT")
            notice, _ = fetch(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
            try:
                return datetime.fromisoformat(json.loads(notice)["time"]).timestamp()
            except (ValueError, KeyError, TypeError):
                return time.time() + notice_s  # there is a notice, but it has no readable time
        except urllib.error.HTTPError as error:
            if error.code != 404:  # 404 means: no notice yet
                log(f"metadata: {error}")
                token = None  # tokens expire
        except (OSError, http.client.HTTPException) as error:
            log(f"metadata: {error}")
        time.sleep(POLL_S)


def wait_gcp(metadata: str, notice_s: float) -> float:
    """Wait for a notice from Google. Returns when the machine stops, as Unix time: notice_s after the notice."""
    etag = "0"  # matches no response, so the first one comes at once and later ones after a change
    while True:
        query = f"wait_for_change=true&timeout_sec=60&last_etag={etag}"
        url = f"{metadata}/computeMetadata/v1/instance/preempted?{query}"
        try:
            preempted, headers = fetch(url, {"Metadata-Flavor": "Google"}, timeout_s=90)
            if preempted == "TRUE":
                return time.time() + notice_s
            etag = headers["ETag"]
            time.sleep(1)
        except (OSError, http.client.HTTPException) as error:
            log(f"metadata: {error}")
            time.sleep(POLL_S)


def local_node_id() -> str:
    """Hex id of the Ray node on this machine."""
    from ray._private import services  # slow and large, so it is imported only after a notice
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    head = services.canonicalize_bootstrap_address_or_die(None)
    here = services.get_node_ip_address(head)
    nodes = GcsClient(address=head).get_all_node_info().values()
    found = [n for n in nodes if n.state == GcsNodeInfo.ALIVE and n.node_manager_address == here]
    if len(found) != 1:
        raise RuntimeError(f"there are {len(found)} Ray nodes at {here}, not one; set --node-id")
    return found[0].node_id.hex()


def drain_command(node_id: str, cloud: str, seconds: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "drain-node",
        f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message={cloud} stops this spot machine",
        f"--deadline-remaining-seconds={seconds}",
    ]


def drain(node_id: str | None, cloud: str, goes_at: float) -> bool:
    """Drain the node, with retries until the deadline. Returns whether it succeeded."""
    while True:
        left = max(0, int(goes_at - MARGIN_S - time.time()))
        try:
            command = drain_command(node_id or local_node_id(), cloud, left)
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                log(f"node drained, {left} s left")
                return True
            log(done.stderr.strip()[-1000:])
        except Exception as error:  # retry after any error; a retry costs nothing
            log(repr(error))
        if left == 0:
            return False
        time.sleep(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=METADATA)
    parser.add_argument(
        "--notice", type=float, default=120, help="seconds from the notice to the stop, if the notice has no time"
    )
    parser.add_argument("--node-id", help="id of the Ray node; default: found by the address of this machine")
    parser.add_argument("--metadata", help="address of another metadata service, for tests")
    given = parser.parse_args(arguments)
    with socket.socket(socket.AF_UNIX) as only_one:  # one process only: `ray up` repeats the start commands
        try:
            only_one.bind(f"\0mi_ray.spot_notice.{given.node_id or ''}")  # abstract socket: it ends with the process
        except OSError:
            log("already running")
            return 0
        wait = {"aws": wait_aws, "gcp": wait_gcp}[given.cloud]
        goes_at = wait((given.metadata or METADATA[given.cloud]).rstrip("/"), given.notice)
        log(f"{given.cloud} stops this machine in {goes_at - time.time():.0f} s")
        return 0 if drain(given.node_id, given.cloud, goes_at) else 1


if __name__ == "__main__":
    sys.exit(main())
