"""The cluster files: valid fields, and no access from outside."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from cfnlint.api import lint
from ray.autoscaler._private.aws.config import _check_ami
from ray.autoscaler._private.util import validate_config

from mi_ray.stages import metrics

CLUSTER = Path(__file__).parents[2] / "cluster"
VM = ("aws", "gcp")

EC2 = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def load(*parts: str) -> dict:
    return yaml.safe_load(CLUSTER.joinpath(*parts).read_text())


# ------------------------------------------------------------------------------------------ virtual machines
def completed(name: str) -> dict:
    """The config after `ray up` has added its defaults."""
    empty = {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_filter": []}
    commands = {f"{when}_commands": [] for when in ("initialization", "head_setup", "worker_setup")}
    return {**empty, **commands, **load(name, "cluster.yaml")}


@pytest.mark.parametrize("name", VM)
def test_cluster_files_match_the_schema_of_ray(name):
    validate_config(completed(name))


def test_schema_of_ray_refuses_wrong_files():
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(completed("aws") | {"idle_minutes": 5})


@pytest.mark.parametrize("name", VM)
def test_workers_are_spot_machines_that_scale_from_zero(name):
    nodes = load(name, "cluster.yaml")["available_node_types"]
    worker, head = (nodes[key]["node_config"] for key in ("gpu_spot", "head"))
    assert nodes["gpu_spot"]["min_workers"] == 0
    assert nodes["gpu_spot"]["resources"]["GPU"] == 1
    assert "spot" in json.dumps(worker).lower()
    assert "spot" not in json.dumps(head).lower()


def ec2_faults(node: dict) -> str:
    """The fields of RunInstances in EC2's API description."""
    request = {key: value for key, value in node.items() if key != "SubnetIds"}  # Ray converts one of them to SubnetId
    return ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, EC2).generate_report()


def test_ec2_fields_are_valid_and_the_image_is_kept():
    cluster = load("aws", "cluster.yaml")
    as_written = copy.deepcopy(cluster)
    _check_ami(cluster)
    assert cluster == as_written
    for node in cluster["available_node_types"].values():
        assert ec2_faults(node["node_config"]) == ""
        assert node["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
        assert "ImageID" in ec2_faults(node["node_config"] | {"ImageID": "ami-0"})
        del node["node_config"]["ImageId"]
    _check_ami(cluster)  # without this line Ray uses an old image
    assert all(node["node_config"]["ImageId"].startswith("ami-") for node in cluster["available_node_types"].values())


def test_gcp_machines_have_a_valid_disk_driver_and_account():
    cluster = load("gcp", "cluster.yaml")
    zone, nodes = cluster["provider"]["availability_zone"], cluster["available_node_types"]
    for name, node in nodes.items():
        [disk] = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
        assert int(disk["initializeParams"]["sourceImage"].rpartition("-nvidia-")[2]) >= 580
        [account] = node["node_config"]["serviceAccounts"]
        assert account["email"].startswith("mi-ray-head@" if name == "head" else "mi-ray-worker@")
    scheduling = nodes["gpu_spot"]["node_config"]["scheduling"]
    assert (scheduling["provisioningModel"], scheduling["onHostMaintenance"]) == ("SPOT", "TERMINATE")


@pytest.mark.parametrize("name", VM)
def test_spot_workers_run_the_preemption_watcher(name):
    cluster = load(name, "cluster.yaml")
    start, notice = cluster["worker_start_ray_commands"][-2:]
    assert start.startswith("ray start ")
    [script, *options] = re.fullmatch(r"nohup python (.+?) < /dev/null >> \S+ 2>&1 &", notice)[1].split()
    [(mounted, local)] = [(there, here) for there, here in cluster["file_mounts"].items() if script.startswith(there)]
    assert (local, options[0]) == (".", name)
    script = CLUSTER.parent / Path(script).relative_to(mounted)
    subprocess.run([sys.executable, script, *options, "--help"], check=True, capture_output=True)
    if name == "gcp":
        given = cluster["available_node_types"]["gpu_spot"]["node_config"]["scheduling"]["preemptionNoticeDuration"]
        assert options[1:] == ["--notice", given["seconds"]]


def test_installed_extras_exist():
    extras = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in ("Dockerfile", "gcp/cluster.yaml"):
        [extra] = re.findall(r'pip install .*"\.\[(\w+)\]"', (CLUSTER / file).read_text())
        assert extra in extras


@pytest.mark.parametrize("name", VM)
def test_machines_need_the_token_and_hide_the_dashboard(name):
    cluster = load(name, "cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    mounts = cluster["file_mounts"]
    assert any(
        f"RAY_AUTH_TOKEN_PATH={path}" in option for path in mounts for option in cluster["docker"]["run_options"]
    )
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start


def test_aws_admits_only_ssh_from_one_network():
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


def test_aws_head_changes_only_its_own_machines():
    text = (CLUSTER / "aws" / "account.yaml").read_text()
    plain = yaml.load(re.sub(r"!(Ref|Sub|GetAtt)", "", text), yaml.SafeLoader)
    [policy] = plain["Resources"]["HeadRole"]["Properties"]["Policies"]
    statements = policy["PolicyDocument"]["Statement"]
    for statement in statements:
        changing = {"ec2:CreateTags", "ec2:DeleteTags", "ec2:TerminateInstances"} & set(statement["Action"])
        if changing:
            [(_, condition)] = statement["Condition"].items()
            assert condition.keys() <= {"ec2:CreateAction", "aws:ResourceTag/ray-cluster-name"}
    tags = [s["Condition"] for s in statements if "ec2:CreateTags" in s["Action"]]
    assert len(tags) == 2


def test_cfn_lint_finds_faults_in_the_template():
    text = (CLUSTER / "aws" / "account.yaml").read_text()
    assert lint(text.replace("FromPort: 22", "FromPort: ssh"), regions=["us-east-1"])
    assert lint(text.replace("!GetAtt Runs.Arn", "!GetAtt Run.Arn"), regions=["us-east-1"])


GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/asked"
[[ "$*" != *" describe "* || -e "$(dirname "$0")/there" ]]
"""


def asked_of_gcloud(folder: Path, *arguments: str) -> list[str]:
    """The commands of account.sh that change something, without common options."""
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    (folder / "asked").write_text("")
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    script = CLUSTER / "gcp" / "account.sh"
    subprocess.run([script, *arguments], check=True, capture_output=True, env=environment)
    asked = (folder / "asked").read_text().splitlines()
    assert all(line.startswith("--project=p --quiet ") for line in asked)
    return [line.removeprefix("--project=p --quiet ") for line in asked if " describe " not in line]


def test_gcp_accounts_have_only_the_needed_roles(tmp_path):
    asked = asked_of_gcloud(tmp_path, "p", "b", "203.0.113.7/32")
    head, worker = (f"--member=serviceAccount:mi-ray-{who}@p.iam.gserviceaccount.com" for who in ("head", "worker"))
    granted = [line for line in asked if "add-iam-policy-binding" in line]
    roles = {who: sorted(re.search(r"--role=(\S+)", x)[1] for x in granted if who in x) for who in (head, worker)}
    assert roles[worker] == ["roles/storage.legacyBucketReader", "roles/storage.objectUser"]
    assert roles[head] == ["projects/p/roles/miRayHead", "roles/iam.serviceAccountUser", *roles[worker]]
    assert all(line.startswith("storage buckets add-iam-policy-binding gs://b ") for line in granted if worker in line)
    [acts_as] = [line for line in granted if "serviceAccountUser" in line]
    assert acts_as.startswith("iam service-accounts add-iam-policy-binding mi-ray-worker@p.")
    assert "iam service-accounts disable ray-autoscaler-sa-v1@p.iam.gserviceaccount.com" in asked
    [bucket] = [line for line in asked if line.startswith("storage buckets create")]
    assert "--public-access-prevention" in bucket
    rules = [line for line in asked if line.startswith("compute firewall-rules create")]
    assert {re.search(r"--source-ranges=(\S+)", rule)[1] for rule in rules} == {"10.10.0.0/20", "203.0.113.7/32"}


def test_gcp_account_script_can_be_repeated(tmp_path):
    (tmp_path / "there").touch()
    asked = asked_of_gcloud(tmp_path, "p", "b", "203.0.113.8/32")
    assert not [line for line in asked if " create " in line]
    assert "compute firewall-rules update mi-ray-ssh --source-ranges=203.0.113.8/32" in asked
    with pytest.raises(subprocess.CalledProcessError):
        asked_of_gcloud(tmp_path, "p", "b", "0.0.0.0/0")


# ------------------------------------------------------------------------------------------ image, metrics, secrets
def hadolint(dockerfile: Path) -> subprocess.CompletedProcess:
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    return subprocess.run([command, "--no-color", dockerfile], capture_output=True, text=True)


def test_hadolint_accepts_the_dockerfile(tmp_path):
    done = hadolint(CLUSTER / "Dockerfile")
    assert done.returncode == 0, done.stdout
    text = (CLUSTER / "Dockerfile").read_text()
    broken = tmp_path / "Dockerfile"
    for old, new, rule in [
        ("USER 1000", "USER root", "DL3002"),
        ("--no-cache-dir ", "", "DL3042"),
        ("rayproject/ray:${RAY_VERSION}-${PYTHON}-${VARIANT}", "rayproject/ray", "DL3006"),
    ]:
        assert old in text
        broken.write_text(text.replace(old, new))
        assert rule in hadolint(broken).stdout


def test_dockerfile_base_and_copied_files_exist():
    lines = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    arguments = dict(value.split("=") for step, value in steps if step == "ARG")
    base = next(value for step, value in steps if step == "FROM")
    assert re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base) == "rayproject/ray:2.60.0-py311-cpu"
    copied = [source for step, value in steps if step == "COPY" for source in value.split()[1:-1]]
    assert all((CLUSTER.parent / source).exists() for source in copied)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in copied} <= set(ignored)


def test_ray_version_is_the_same_in_all_files():
    constraints = (CLUSTER.parent / "constraints.txt").read_text()
    version = re.search(r"^ray==(.+)$", constraints, re.MULTILINE)[1]
    for file in ("Dockerfile", "aws/cluster.yaml", "gcp/cluster.yaml", "kubernetes/raycluster.yaml"):
        assert version in (CLUSTER / file).read_text(), file


def test_dashboard_shows_exactly_the_metrics():
    dashboard = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    expected = {f"ray_{name}_total" for name in metrics.COUNTERS} | {f"ray_{name}" for name in metrics.GAUGES}
    assert set(re.findall(r"ray_mi_ray_\w+", shown)) == expected


def test_no_file_contains_a_secret():
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN \w* ?PRIVATE KEY|auth_token: [0-9a-f]{16}", file.read_text())
