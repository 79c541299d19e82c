"""Start of Ray and check of the cluster's resources: messages for each fault, within a time limit."""

import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from mi_ray.config import ResourcesConfig
from mi_ray.config.section import ConfigError
from mi_ray.stages import cluster


@pytest.fixture
def free_port():
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Ray uses the test's folder for temporary files."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return tmp_path


def fault() -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        cluster.start_ray()
    assert time.monotonic() - began < 30
    (message,) = caught.value.faults
    assert "\n" not in message
    return message


def test_start_reports_an_address_without_a_server(environment, monkeypatch, free_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    message = fault()
    assert f"cannot be reached at '127.0.0.1:{free_port}', the address in RAY_ADDRESS" in message
    assert "refused" in message
    assert "unset RAY_ADDRESS to start Ray here" in message


def test_start_reports_an_address_file_of_a_dead_ray(environment, free_port):
    (environment / "ray").mkdir()
    file = environment / "ray" / "ray_current_cluster"
    file.write_text(f"127.0.0.1:{free_port}\n")
    assert f"the address in {file}" in (message := fault())
    assert f"remove {file} to start Ray here" in message


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:1", "127.0.0.1:port"])
def test_start_reports_an_invalid_address(environment, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"cannot be reached at {address!r}" in fault()


def test_start_reports_a_server_that_is_not_ray(environment, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        assert "(no answer in 1 s)" in fault()


@pytest.mark.parametrize("address", ["", "local"])
def test_start_reports_a_temporary_path_that_is_too_long(environment, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(environment / ("d" * 80)))
    message = fault()
    assert "AF_UNIX path length" in message
    assert message.endswith("set RAY_TMPDIR to a folder of your own with a short path")


def test_start_reports_a_temporary_folder_of_another_user(environment, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied", f"{environment}/ray/session_1")

    monkeypatch.setattr(ray, "init", refuse)
    assert f"cannot start with its files in '{environment}', RAY_TMPDIR ([Errno 13] Permission denied" in fault()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(environment))
    assert ", TMPDIR (" in fault()


# ------------------------------------------------------------------------------------------ resources
@pytest.fixture
def nodes(monkeypatch):
    """A cluster with these nodes. `autoscaled`: the nodes have the names that an autoscaler gives them."""

    def make(*resources: dict[str, float], autoscaled: bool = False):
        names = ["head" if autoscaled else f"node_{number}" for number, _ in enumerate(resources)]
        of_type = [SimpleNamespace(ray_node_type_name=name) for name in names]
        status = SimpleNamespace(active_nodes=of_type, idle_nodes=[])
        total = {name: sum(node.get(name, 0) for node in resources) for node in resources for name in node}
        dead = {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}
        monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": r} for r in resources)])
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
        monkeypatch.setattr(cluster, "get_cluster_status", lambda _: status)
        monkeypatch.setattr(cluster, "_internal_kv_get", lambda _: None)

    return make


@pytest.mark.parametrize(
    ("each", "expected"),
    [({"CPU": 1}, 6), ({"CPU": 4}, 1), ({"GPU": 0.5}, 4), ({"CPU": 1, "GPU": 1}, 2), ({"CPU": 0}, float("inf"))],
)
def test_room_is_the_sum_over_the_nodes(nodes, each, expected):
    nodes({"CPU": 4, "GPU": 2}, {"CPU": 2})
    assert cluster.room(each) == expected


@pytest.mark.parametrize(
    ("resources", "train", "faults"),
    [
        ({}, True, []),
        ({"num_actors": 8}, True, []),  # at least 1 and at most 8
        ({"gpus_per_actor": 1}, True, ["num_actors: needs at least 1 times 1 CPU and 1 GPU"]),
        ({"gpus_per_actor": "auto"}, False, ["num_actors: needs at least 1 times 1 CPU and 1 GPU"]),
        ({"cpus_per_actor": 3}, False, ["num_actors: needs at least 1 times 3 CPU"]),
        ({"train_workers": 5}, True, ["train_workers: needs at least 5 times 1 CPU"]),
        ({"train_workers": 5}, False, []),
        ({"train_workers": (1, 8)}, True, []),
        ({"train_gpus": 1}, True, ["train_workers: needs at least 1 times 1 CPU and 1 GPU"]),
    ],
)
def test_check_room_reports_missing_resources(nodes, resources, train, faults, capsys):
    nodes({"CPU": 2}, {"CPU": 2})
    config = ResourcesConfig.model_validate(resources)
    if faults:
        with pytest.raises(ConfigError) as caught:
            cluster.check_room(config, train)
        for found, expected in zip(caught.value.faults, faults, strict=True):
            assert expected in found
            assert "the cluster (4 CPU and 0 GPU) has room for" in found
    else:
        cluster.check_room(config, train)
    nodes({"CPU": 2}, {"CPU": 2}, autoscaled=True)
    cluster.check_room(config, train)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(faults)
    assert all(line.endswith("waiting for its autoscaler") for line in lines)


@pytest.mark.parametrize(
    ("resources", "fault"),
    [
        ({"num_actors": 3}, None),
        ({"num_actors": (1, 8)}, None),
        ({"num_actors": 4}, "needs 4 actors and 1 training workers together: 5 CPU, but the cluster has 4"),
        ({"num_actors": 4, "train_cpus": 0}, None),
        ({"num_actors": 3, "judge_actors": 1}, "needs 3 actors and 1 judges and 1 training workers together: 5 CPU"),
        ({"num_actors": 3, "judge_actors": 2, "judge_cpus": 0}, None),
    ],
)
def test_check_room_of_an_online_run_adds_actors_and_workers(nodes, resources, fault):
    nodes({"CPU": 2}, {"CPU": 2})
    config = ResourcesConfig.model_validate(resources)
    cluster.check_room(config, True)
    with pytest.raises(ConfigError, match=fault) if fault else nullcontext():
        cluster.check_room(config, True, at_once=True)


@pytest.mark.ray
@pytest.mark.slow
def test_run_on_a_ray_with_another_working_directory(tmp_path, ray_head):
    """A relative run folder is resolved in the driver's working directory."""
    root = Path(__file__).parents[2]
    job = [sys.executable, f"{root}/jobs/score.py", "--input", "pairs", "--run-dir", "runs/here"]
    (tmp_path / "pairs").symlink_to(f"{root}/jobs/configs/pairs")
    done = subprocess.run(job, cwd=tmp_path, env=ray_head, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "here" / "audit" / "index.html").is_file()


@pytest.mark.parametrize(
    ("resources", "fault"),
    [
        ({"num_actors": 3, "judge_actors": 1}, None),
        ({"num_actors": 3, "judge_actors": 2}, "the run needs 3 actors and 2 judges together: 5 CPU, but the cluster"),
        ({"judge_actors": 1, "judge_gpus": 1}, "judge_actors: needs at least 1 times 1 CPU and 1 GPU"),
    ],
)
def test_check_room_adds_judges(nodes, resources, fault):
    nodes({"CPU": 2}, {"CPU": 2})
    with pytest.raises(ConfigError, match=fault) if fault else nullcontext():
        cluster.check_room(ResourcesConfig.model_validate(resources), True)
