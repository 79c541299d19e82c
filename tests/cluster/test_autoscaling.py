"""Worker nodes exist only during the generation stage, as many as its pool needs."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import yaml

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import ShardPlan, write_prompts
from mi_ray.stages.generate import generate

ROOT = Path(__file__).parents[2]
WAIT_S = 300
CLUSTER = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 0.05,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        # With a launcher in the background Ray does not count the second node while it starts, and starts a third.
        "foreground_node_launch": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",  # its name in the fake provider
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A head without CPUs, with an autoscaler that starts nodes as processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"  # needed before the fake nodes start
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(CLUSTER | {"provider": CLUSTER["provider"] | {"gcs_address": address}}))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a token would have to be set before Ray is first used
    fast = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment = os.environ | fast | {"PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):  # if this is empty, no node with a declared GPU starts
        environment.pop(name, None)
    ray_command = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short: it contains sockets
        command = [ray_command, "start", "--head", "--num-cpus=0", "--include-dashboard=false", "--block"]
        command += [f"--port={address.partition(':')[2]}", f"--temp-dir={folder}", f"--autoscaling-config={file}"]
        with (tmp_path / "ray.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            started = Path(folder) / "ray_current_cluster"
            deadline = time.monotonic() + WAIT_S
            while not started.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert started.exists(), (tmp_path / "ray.log").read_text()[-3000:]
            ray.init(address=address, logging_level="error")
            yield
        finally:
            ray.shutdown()
            os.killpg(process.pid, signal.SIGKILL)  # the nodes are in the same process group
            process.wait()


def worker_nodes() -> int:
    return sum(node["Alive"] and node["Resources"].get("GPU", 0) == 1 for node in ray.nodes())


@pytest.mark.ray
@pytest.mark.slow
def test_autoscaler_starts_and_stops_nodes_with_the_pool(cluster, tiny_pipeline, tmp_path):
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "prompts": {"file": "unused"},
            "model": {"path": str(tiny_pipeline)},
            "sampler": {"solver": "ddim", "num_inference_steps": 4},
            "generate": {"candidates_per_prompt": 2},
            "resources": {"num_actors": (2, 2), "gpus_per_actor": 1},  # a declared GPU; the model is on the CPU
        }
    )
    prompts = [f"{number} stars" for number in range(6)]
    ids = [prompt_id(prompt) for prompt in prompts]
    rows = [{"prompt_id": i, "prompt": prompt} for i, prompt in zip(ids, prompts, strict=True)]
    table = str(tmp_path / "prompts.parquet")
    write_prompts(table, iter([pa.RecordBatch.from_pylist(rows, schema=PROMPTS)]))
    shards = ShardPlan(table, 1, "key")
    seen, over = [worker_nodes()], threading.Event()

    def watch():
        while not over.wait(0.2):
            seen.append(worker_nodes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    folder = str(tmp_path / "candidates")
    generate(config, shards, folder, 0, None, ["mitune"], [], prompts)
    deadline = time.monotonic() + WAIT_S
    while seen[-1] and time.monotonic() < deadline:
        time.sleep(0.2)
    over.set()
    watcher.join()
    assert seen[0] == 0
    assert max(seen) == 2
    assert seen[-1] == 0
    rows = storage.read_tables(folder).to_pandas()
    assert sorted(rows["prompt_id"]) == sorted(2 * ids)
    assert rows["error"].isna().all()
