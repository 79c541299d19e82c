"""Tells Ray that the cloud takes this spot machine back, in time for its work to be saved. Beside `ray start`, run

    python cluster/spot_notice.py aws
    python cluster/spot_notice.py gcp --notice 120

It asks the machine's metadata service until that says so, and then drains the node: no new work comes to it, and a
training sees it in ray.train.get_preemption_info(), writes a checkpoint and goes on elsewhere. Standard library and Ray
only; Ray's token, where one is asked for, comes from the environment as for every `ray` command.
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
POLL_S = 5  # as often as AWS advises; a notice there is two minutes
MARGIN_S = 10  # Ray Train ends its workers at the deadline, which the machine has to live to see
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has another machine's metadata


def log(text: str):
    print(f"{datetime.now().isoformat(timespec='seconds')} {text}", flush=True)


def fetch(url: str, headers: dict[str, str], method: str = "GET", timeout_s: float = 5):
    """Text and headers of an answer."""
    with DIRECT.open(urllib.request.Request(url, headers=headers, method=method), timeout=timeout_s) as answer:
        return answer.read().decode().strip(), answer.headers


def wait_aws(metadata: str, notice_s: float) -> float:
    """When the machine goes, as Unix time, once AWS has said it; by the second version of its metadata service."""
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
                return time.time() + notice_s  # a notice all the same
        except urllib.error.HTTPError as error:
            if error.code != 404:  # which means: nothing to say
                log(f"metadata: {error}")
                token = None  # they expire
        except (OSError, http.client.HTTPException) as error:
            log(f"metadata: {error}")
        time.sleep(POLL_S)


def wait_gcp(metadata: str, notice_s: float) -> float:
    """When the machine goes, as Unix time, once Google has said it, which is notice_s before."""
    etag = "0"  # no answer's: the first comes at once, the others when something changed
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
    """Hex id of this machine's node."""
    from ray._private import services  # seconds and memory that only a notice is worth
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    head = services.canonicalize_bootstrap_address_or_die(None)
    here = services.get_node_ip_address(head)
    nodes = GcsClient(address=head).get_all_node_info().values()
    found = [n for n in nodes if n.state == GcsNodeInfo.ALIVE and n.node_manager_address == here]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} nodes of Ray at {here}; --node-id says which one")
    return found[0].node_id.hex()


def drain_command(node_id: str, cloud: str, seconds: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "drain-node",
        f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message={cloud} takes the machine back",
        f"--deadline-remaining-seconds={seconds}",
    ]


def drain(node_id: str | None, cloud: str, goes_at: float) -> bool:
    """Tell Ray, again while it does not hear and there is time; whether it heard."""
    while True:
        left = max(0, int(goes_at - MARGIN_S - time.time()))
        try:
            command = drain_command(node_id or local_node_id(), cloud, left)
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                log(f"node drained, {left} s left")
                return True
            log(done.stderr.strip()[-1000:])
        except Exception as error:  # whatever it is, another try costs nothing
            log(repr(error))
        if left == 0:
            return False
        time.sleep(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=METADATA)
    parser.add_argument("--notice", type=float, default=120, help="seconds from notice to end, where it does not say")
    parser.add_argument("--node-id", help="this node's; else found by the machine's address")
    parser.add_argument("--metadata", help="another metadata service than the cloud's, for tests")
    given = parser.parse_args(arguments)
    with socket.socket(socket.AF_UNIX) as only_one:  # `ray up` runs the start commands again
        try:
            only_one.bind(f"\0mi_ray.spot_notice.{given.node_id or ''}")  # abstract: gone with the process
        except OSError:
            log("already running")
            return 0
        wait = {"aws": wait_aws, "gcp": wait_gcp}[given.cloud]
        goes_at = wait((given.metadata or METADATA[given.cloud]).rstrip("/"), given.notice)
        log(f"{given.cloud} takes the machine in {goes_at - time.time():.0f} s")
        return 0 if drain(given.node_id, given.cloud, goes_at) else 1


if __name__ == "__main__":
    sys.exit(main())
