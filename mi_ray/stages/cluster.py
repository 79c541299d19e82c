"""Start Ray or connect to it, with a time limit and one message per fault; check the cluster's resources."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

from mi_ray.config import ResourcesConfig
from mi_ray.config.section import ConfigError

CONNECT_S, ANSWER_S = 5, 20  # time limits in seconds: of a TCP connection, and of Ray's health check


def start_ray():
    """Connect to the Ray of RAY_ADDRESS or of this machine, or start one: like `ray.init` without an address.

    Raises:
        ConfigError: no Ray answers at the address, or Ray cannot start.
    """
    if ray.is_initialized():
        return
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = os.environ[variable] if variable else "/tmp"
    source, address, file = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS"), Path(folder, "ray", "ray_current_cluster")
    try:
        if not address and os.path.exists(file):
            source, address = str(file), file.read_text().strip()
        if address and ":" in address and "://" not in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            # Check in a process that can be killed that this is Ray. Ray's client itself retries for minutes and cannot
            # be interrupted.
            command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
            subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        ray.init(logging_level="warning")  # with its dashboard: Ray Train asks it for the state of its actors
    except Exception as error:  # Ray raises many types
        text = (getattr(error, "stderr", None) or str(error) or type(error).__name__).strip()
        reason = f"no answer in {ANSWER_S} s" if isinstance(error, subprocess.TimeoutExpired) else text.splitlines()[-1]
        fault = f"cannot start with its files in {folder!r}, {variable or 'the default'}"
        advice = "try again, or set RAY_TMPDIR to a folder of your own with a short path"
        if address and address != "local":
            fault, advice = f"cannot be reached at {address!r}, the address in {source}", "start Ray there"
            advice += f", or {'unset' if source == 'RAY_ADDRESS' else 'remove'} {source} to start Ray here"
        raise ConfigError([f"Ray {fault} ({reason[:300]}); {advice}"]) from error


def room(each: dict[str, float]) -> float:
    """Number of processes with these resources each that fit on the cluster's nodes together."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [[node.get(name, 0) / amount for name, amount in each.items() if amount] for node in nodes]
    return sum(math.floor(min(share) + 1e-9) if share else math.inf for share in shares)


def check_room(resources: ResourcesConfig, train: bool, at_once: bool = False):
    """Check that the cluster has resources for one actor and, with `train`, for the minimum number of training workers.

    If the cluster has an autoscaler, a message is printed instead of an error, and the run waits for new nodes.

    Args:
        at_once: the workers run beside the actors, so the minimum number of actors must fit too. Judges always do.

    Raises:
        ConfigError: the cluster has too few resources and no autoscaler.
    """
    share = 1 if resources.gpus_per_actor == "auto" else resources.gpus_per_actor
    actors = resources.num_actors[0], {"CPU": resources.cpus_per_actor, "GPU": share}
    judges = resources.judge_actors, {"CPU": resources.judge_cpus, "GPU": resources.judge_gpus}
    workers = resources.train_workers[0], {"CPU": resources.train_cpus, "GPU": resources.train_gpus}
    asked = {"num_actors": (1, actors[1]), "judge_actors": judges} | ({"train_workers": workers} if train else {})
    together = {"actors": actors, "judges": judges, "training workers": workers if train and at_once else (0, {})}
    together = {name: asking for name, asking in together.items() if asking[0]}
    has = " and ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    faults = []
    for field, (count, each) in asked.items():
        if (there := room(each)) < count:
            needs = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
            fault = f"needs at least {count} times {needs}, but the cluster ({has}) has room for {there}"
            faults.append(f"resources.{field}: {fault}")
    for name in ("CPU", "GPU") if len(together) > 1 and not faults else ():
        needs = sum(count * each[name] for count, each in together.values())
        if needs > (there := ray.cluster_resources().get(name, 0)) + 1e-9:
            parts = " and ".join(f"{count} {what}" for what, (count, _) in together.items())
            fault = f"{'an online run' if at_once else 'the run'} needs {parts} together: {needs:g} {name}"
            faults.append(f"resources.num_actors: {fault}, but the cluster has {there:g}")
    if faults and not _autoscales():
        advice = "set a smaller number, or start Ray with more resources"
        raise ConfigError([f"{fault} and has no autoscaler; {advice}" for fault in faults])
    for fault in faults:
        print(f"{fault} now; waiting for its autoscaler", flush=True)


def _autoscales() -> bool:
    """Whether the cluster has an autoscaler. Without one, the types of all nodes are named node_<id>."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    types = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]  # v2
    report = json.loads(_internal_kv_get(b"__autoscaling_status") or "{}").get("autoscaler_report") or {}
    return any(not name.startswith("node_") for name in (*types, *report.get("active_nodes", {})))  # v1
