"""The cluster's files say what their readers understand, and keep strangers out."""

import json
import re
from pathlib import Path

import pytest
import yaml
from cfnlint.api import lint
from ray.autoscaler._private.util import validate_config

from mi_ray.stages import metrics

CLUSTER = Path(__file__).parents[2] / "cluster"
VM = ("aws", "gcp")
KUBERAY = ("raycluster", "rayjob")

# The fields of ray.io/v1 that KubeRay 1.5 and 1.6 know, from its API reference; pod templates are Kubernetes' own.
FIELDS = {
    "RayCluster": {"apiVersion", "kind", "metadata", "spec"},
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "RayClusterSpec": {
        *("authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "headGroupSpec"),
        *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "rayVersion", "workerGroupSpecs", "upgradeStrategy"),
    },
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "AutoscalerOptions": {
        *("resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode"),
        *("version", "env", "envFrom", "volumeMounts"),
    },
    "HeadGroupSpec": {
        *("template", "headService", "enableIngress", "rayStartParams", "serviceType", "labels", "resources")
    },
    "WorkerGroupSpec": {
        *("suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams"),
        *("template", "scaleStrategy", "numOfHosts", "labels", "resources"),
    },
    "RayJobSpec": {
        *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "suspend"),
        *("clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML"),
        *("jobId", "submissionMode", "entrypointResources", "entrypointNumCpus", "entrypointNumGpus"),
        *("ttlSecondsAfterFinished", "shutdownAfterJobFinishes"),
    },
    "PodSpec": {
        *("serviceAccountName", "restartPolicy", "securityContext", "containers", "nodeSelector", "tolerations"),
        *("terminationGracePeriodSeconds", "volumes", "affinity", "initContainers"),
    },
    "Container": {
        *(
            "name",
            "image",
            "ports",
            "resources",
            "securityContext",
            "env",
            "envFrom",
            "volumeMounts",
            "command",
            "args",
        ),
        *("lifecycle", "imagePullPolicy"),
    },
}


def load(*parts: str) -> dict:
    return yaml.safe_load(CLUSTER.joinpath(*parts).read_text())


def cluster_spec(name: str) -> dict:
    manifest = load("kubernetes", f"{name}.yaml")
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def pods(name: str) -> list[dict]:
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def unknown_fields(manifest: dict) -> set[str]:
    """What no field of the resource is, as Kind.field."""
    spec = manifest["spec"]
    found = {(manifest["kind"], field) for field in manifest}
    if manifest["kind"] == "RayJob":
        found |= {("RayJobSpec", field) for field in spec}
        spec = spec["rayClusterSpec"]
    found |= {("RayClusterSpec", field) for field in spec}
    found |= {("AuthOptions", field) for field in spec["authOptions"]}
    found |= {("AutoscalerOptions", field) for field in spec["autoscalerOptions"]}
    for kind, group in [
        ("HeadGroupSpec", spec["headGroupSpec"]),
        *(("WorkerGroupSpec", g) for g in spec["workerGroupSpecs"]),
    ]:
        found |= {(kind, field) for field in group}
        found |= {("PodSpec", field) for field in group["template"]["spec"]}
        found |= {("Container", field) for container in group["template"]["spec"]["containers"] for field in container}
    return {f"{kind}.{field}" for kind, field in found if field not in FIELDS[kind]}


# ------------------------------------------------------------------------------------------ virtual machines
def completed(name: str) -> dict:
    """As `ray up` fills it in before it checks it."""
    empty = {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_filter": []}
    commands = {f"{when}_commands": [] for when in ("initialization", "head_setup", "worker_setup")}
    return {**empty, **commands, **load(name, "cluster.yaml")}


@pytest.mark.parametrize("name", VM)
def test_ray_takes_the_cluster(name):
    validate_config(completed(name))


def test_ray_would_refuse_a_wrong_one():
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(completed("aws") | {"idle_minutes": 5})


@pytest.mark.parametrize("name", VM)
def test_workers_come_from_zero_on_spot_and_the_head_stays(name):
    nodes = load(name, "cluster.yaml")["available_node_types"]
    worker, head = (nodes[key]["node_config"] for key in ("gpu_spot", "head"))
    assert nodes["gpu_spot"]["min_workers"] == 0
    assert nodes["gpu_spot"]["resources"]["GPU"] == 1
    assert "spot" in json.dumps(worker).lower()
    assert "spot" not in json.dumps(head).lower()


@pytest.mark.parametrize("name", VM)
def test_machines_ask_for_the_token_and_show_no_dashboard(name):
    cluster = load(name, "cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    mounts = cluster["file_mounts"]
    assert any(
        f"RAY_AUTH_TOKEN_PATH={path}" in option for path in mounts for option in cluster["docker"]["run_options"]
    )
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start


def test_aws_lets_nothing_in_but_ssh_from_one_network():
    text = (CLUSTER / "aws" / "account.yaml").read_text()
    assert [str(match) for match in lint(text, regions=["us-east-1"])] == []
    plain = yaml.load(re.sub(r"!(Ref|Sub|GetAtt)", "", text), yaml.SafeLoader)
    [ssh] = plain["Resources"]["Nodes"]["Properties"]["SecurityGroupIngress"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["CidrIp"]) == (22, 22, "AdminCidr")
    assert "CidrIp" not in plain["Resources"]["NodesAmongThemselves"]["Properties"]
    pattern = re.compile(plain["Parameters"]["AdminCidr"]["AllowedPattern"])
    assert pattern.match("203.0.113.7/32")
    assert not pattern.match("0.0.0.0/0")
    for node in load("aws", "cluster.yaml")["available_node_types"].values():
        assert {"SecurityGroupIds", "IamInstanceProfile"} <= set(node["node_config"])
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


# ------------------------------------------------------------------------------------------ Kubernetes
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name):
    assert unknown_fields(load("kubernetes", f"{name}.yaml")) == set()


def test_a_field_that_kuberay_does_not_know_is_found():
    manifest = load("kubernetes", "raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert unknown_fields(manifest) == {"WorkerGroupSpec.minReplica"}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_scales_from_zero_with_the_token_and_no_work_on_the_head(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])


def test_the_job_has_the_cluster_of_the_other_manifest():
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_as_nobody_special_and_carry_no_keys(name):
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "env" not in container


def test_the_network_policy_covers_every_pod_and_opens_no_port_to_all():
    policy = load("kubernetes", "networkpolicy.yaml")
    [(key, value)] = policy["spec"]["podSelector"]["matchLabels"].items()
    for name in KUBERAY:
        spec = cluster_spec(name)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["metadata"]["labels"][key] == value
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    assert "ipBlock" not in json.dumps(policy)


# ------------------------------------------------------------------------------------------ image, metrics, secrets
def test_the_dockerfile_is_sound():
    """What hadolint would look for, as far as it applies: known steps, a pinned base, no root, no cache."""
    lines = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER"}
    assert {step for step, _ in steps} <= known
    arguments = dict(value.split("=") for step, value in steps if step == "ARG")
    base = next(value for step, value in steps if step == "FROM")
    assert re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base) == "rayproject/ray:2.60.0-py311-cpu"
    assert [value for step, value in steps if step == "USER"][-1] == "ray"
    copied = [source for step, value in steps if step == "COPY" for source in value.split()[1:-1]]
    assert all((CLUSTER.parent / source).exists() for source in copied)
    assert all("--no-cache-dir" in value for step, value in steps if step == "RUN" and "pip install" in value)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in copied} <= set(ignored)


def test_ray_is_the_same_everywhere():
    constraints = (CLUSTER.parent / "constraints.txt").read_text()
    version = re.search(r"^ray==(.+)$", constraints, re.MULTILINE)[1]
    for file in ("Dockerfile", "aws/cluster.yaml", "gcp/cluster.yaml", "kubernetes/raycluster.yaml"):
        assert version in (CLUSTER / file).read_text(), file


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    expected = {f"ray_{name}_total" for name in metrics.COUNTERS} | {f"ray_{name}" for name in metrics.GAUGES}
    assert set(re.findall(r"ray_mi_ray_\w+", shown)) == expected


def test_no_file_holds_a_secret():
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN \w* ?PRIVATE KEY|auth_token: [0-9a-f]{16}", file.read_text())
