"""The Kubernetes manifests: valid fields, and no access from outside."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

MANIFESTS = Path(__file__).parents[2] / "cluster" / "kubernetes"
KUBERAY = ("raycluster", "rayjob")


# ------------------------------------------------------------------------------------------ what KubeRay knows
def fields(required: str = "", **properties: dict) -> dict:
    """A schema of an object with exactly these fields."""
    known = {"properties": properties, "required": required.split(), "additionalProperties": False}
    return {"type": "object", **known}


INTEGER, NUMBER, STRING, BOOLEAN, OBJECT = (
    {"type": name} for name in ("integer", "number", "string", "boolean", "object")
)
STRINGS = {"type": "object", "additionalProperties": STRING}
# OBJECT: Kubernetes' own, or not used here.
POD_TEMPLATE = fields("spec", metadata=OBJECT, spec=OBJECT)
# The fields of ray.io/v1 that KubeRay 1.5.1 has, level by level as in its custom resource definitions
# (helm-chart/kuberay-operator/crds); RayCluster still has them in 1.7. A server drops what it does not know.
RAY_CLUSTER_SPEC = fields(
    "headGroupSpec",
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    autoscalerOptions=fields(
        env={"type": "array"},
        envFrom={"type": "array"},
        idleTimeoutSeconds=INTEGER,
        image=STRING,
        imagePullPolicy=STRING,
        resources=OBJECT,
        securityContext=OBJECT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        volumeMounts={"type": "array"},
    ),
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=OBJECT,
    headGroupSpec=fields(
        "template",
        enableIngress=BOOLEAN,
        headService=OBJECT,
        labels=STRINGS,
        rayStartParams=STRINGS,
        resources=STRINGS,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        template=POD_TEMPLATE,
    ),
    headServiceAnnotations=STRINGS,
    managedBy=STRING,
    rayVersion=STRING,
    suspend=BOOLEAN,
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName maxReplicas minReplicas template",
            groupName=STRING,
            idleTimeoutSeconds=INTEGER,
            labels=STRINGS,
            maxReplicas=INTEGER,
            minReplicas=INTEGER,
            numOfHosts=INTEGER,
            rayStartParams=STRINGS,
            replicas=INTEGER,
            resources=STRINGS,
            scaleStrategy=fields(workersToDelete={"type": "array", "items": STRING}),
            suspend=BOOLEAN,
            template=POD_TEMPLATE,
        ),
    },
)
SPECS = {
    "RayCluster": RAY_CLUSTER_SPEC,
    "RayJob": fields(
        activeDeadlineSeconds=INTEGER,
        backoffLimit=INTEGER,
        clusterSelector=STRINGS,
        deletionStrategy=OBJECT,
        entrypoint=STRING,
        entrypointNumCpus=NUMBER,
        entrypointNumGpus=NUMBER,
        entrypointResources=STRING,
        jobId=STRING,
        managedBy=STRING,
        metadata=STRINGS,
        rayClusterSpec=RAY_CLUSTER_SPEC,
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes=BOOLEAN,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=fields(backoffLimit=INTEGER),
        submitterPodTemplate=POD_TEMPLATE,
        suspend=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
    ),
}


def kuberay_faults(manifest: dict) -> list[str]:
    resource = fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind=STRING,
        metadata=OBJECT,
        spec=SPECS[manifest["kind"]],
    )
    return [error.message for error in jsonschema.Draft202012Validator(resource).iter_errors(manifest)]


def kubernetes_faults(manifest: dict) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


# ------------------------------------------------------------------------------------------ the manifests
def load(name: str) -> dict:
    return yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict:
    manifest = load(name)
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def templates(name: str) -> list[dict]:
    """The specs of all pods of a manifest; the submitter is last."""
    manifest, spec = load(name), cluster_spec(name)
    found = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return found + ([manifest["spec"]["submitterPodTemplate"]] if manifest["kind"] == "RayJob" else [])


def pod(template: dict) -> dict:
    metadata = {"name": "one", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_have_only_valid_fields(name):
    assert kuberay_faults(load(name)) == []
    assert [kubernetes_faults(pod(template)) for template in templates(name)] == [[]] * len(templates(name))


@pytest.mark.parametrize("name", ["networkpolicy", "serviceaccount"])
def test_kubernetes_manifests_have_only_valid_fields(name):
    manifest = load(name)
    assert kubernetes_faults(manifest) == []
    assert kubernetes_faults(manifest | {"specification": {}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.ttlSecondsAfterFinish", 600),
        ("spec.backoffLimit", "3"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spek", {}),
        ("spec.submitterPodTemplate.label", {}),
    ],
)
def test_unknown_kuberay_fields_are_found(path, value):
    manifest = load("rayjob")
    *above, last = path.split(".")
    place = manifest
    for step in above:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value
    assert len(kuberay_faults(manifest)) == 1


def test_unknown_pod_fields_are_found():
    for change in ({"terminationGracePeriod": 60}, {"tolerations": [{"keys": "nvidia.com/gpu"}]}, {"restartPolicy": 1}):
        template = templates("rayjob")[1]
        template["spec"] |= change
        assert kubernetes_faults(pod(template))


@pytest.mark.parametrize("name", KUBERAY)
def test_cluster_scales_from_zero_with_a_token_and_an_idle_head(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])


def test_rayjob_has_the_same_cluster_as_raycluster():
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_unprivileged_and_without_keys(name):
    for template in templates(name):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "env" not in container
    assert [t["spec"].get("automountServiceAccountToken", True) for t in templates(name)][:3] == [
        True,  # of the autoscaler
        *[False] * (len(templates(name)) - 1),
    ]


def test_network_policy_covers_every_pod_and_closes_all_ports():
    policy = load("networkpolicy")
    [(key, value)] = policy["spec"]["podSelector"]["matchLabels"].items()
    for name in KUBERAY:
        assert [template["metadata"]["labels"][key] for template in templates(name)[:2]] == [value] * 2
    submitter = {"podSelector": {"matchLabels": templates("rayjob")[2]["metadata"]["labels"]}}
    [rule] = [rule for rule in policy["spec"]["ingress"] if submitter in rule["from"]]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    assert "ipBlock" not in json.dumps(policy)
