"""What lies in launch/ to be copied says what the code says. tests/cluster starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dstrain.cli.run import command as run_command
from dstrain.errors import RESUMABLE
from dstrain.launch.batch_script import Job, batch_script
from dstrain.launch.hosts import read_hostfile

# What stands in both scripts from here on.
TRAPS = "stopped_by=\n"


@pytest.fixture
def manifests(repository: Path) -> dict[str, Any]:
    text = (repository / "launch" / "kubernetes.yaml").read_text()
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def option(arguments: list[str], name: str) -> str:
    [value] = [word.partition("=")[2] for word in arguments if word.startswith(f"--{name}=")]
    return value


def test_the_hostfile_can_be_read(repository: Path) -> None:
    assert [host.slots for host in read_hostfile(repository / "launch" / "hostfile")] == [8, 8]


def test_the_batch_scripts_end_alike(repository: Path, tmp_path: Path) -> None:
    """But for the command that they run."""
    template = (repository / "launch" / "slurm.sbatch").read_text()
    written = batch_script(Job(tmp_path, 2, 8, gpus=8, options=("--time=04:00:00",)))
    ends = [re.sub(r"\n.* &\n", "\nCOMMAND &\n", text[text.index(TRAPS) :]) for text in (template, written)]
    assert ends[0] == ends[1]
    for text in (template, written):
        asked = {line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH ")}
        assert len(asked) == 9


def test_kubernetes_says_each_number_and_name_alike(manifests: dict[str, Any]) -> None:
    service, job = manifests["Service"], manifests["Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    arguments = container["args"]
    nodes, gpus = int(option(arguments, "nodes")), int(option(arguments, "processes"))
    assert spec["completions"] == spec["parallelism"] == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    name = job["metadata"]["name"]
    assert (
        service["spec"] | {"clusterIP": "None", "selector": {"batch.kubernetes.io/job-name": name}}
        == service["spec"]
    )
    assert service["metadata"]["name"] == pod["subdomain"]
    assert option(arguments, "master-addr") == f"{name}-0.{pod['subdomain']}"
    assert option(arguments, "node-rank") == "$(JOB_COMPLETION_INDEX)" and spec["completionMode"] == "Indexed"


def test_kubernetes_lets_the_pods_of_the_job_reach_each_other_alone(manifests: dict[str, Any]) -> None:
    policy, pod = manifests["NetworkPolicy"]["spec"], manifests["Job"]["spec"]["template"]["spec"]
    ours = {"matchLabels": {"batch.kubernetes.io/job-name": manifests["Job"]["metadata"]["name"]}}
    assert policy == {
        "podSelector": ours,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": ours}]}],
    }
    assert pod["automountServiceAccountToken"] is False


def test_kubernetes_knows_the_exit_codes(manifests: dict[str, Any]) -> None:
    """What can't work ends the job; what left in order is replaced, and not counted. Needs restartPolicy Never."""
    spec = manifests["Job"]["spec"]
    rules = {
        (rule["action"], *rule["onExitCodes"]["values"])
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {("FailJob", 2), ("Ignore", RESUMABLE)}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    [container] = spec["template"]["spec"]["containers"]
    names = {
        rule["onExitCodes"]["containerName"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert names == {container["name"]}


def test_kubernetes_fits_the_image(manifests: dict[str, Any], repository: Path) -> None:
    """No command of its own: the image's entry point is dstrain; the volume lies where the image works, as its user."""
    dockerfile = (repository / "Dockerfile").read_text()
    pod = manifests["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    said = {
        line.split()[0]: line.split(maxsplit=1)[1] for line in dockerfile.splitlines() if line[:1].isupper()
    }
    assert json.loads(said["ENTRYPOINT"]) == ["dstrain"] and "command" not in container
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {said["WORKDIR"], "/tmp", "/dev/shm"} and container["workingDir"] == said["WORKDIR"]
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    assert str(pod["securityContext"]["runAsUser"]) == said["USER"]


def test_kubernetes_types_what_the_command_line_takes(
    manifests: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first thing that it lacks here: the config file."""
    monkeypatch.chdir(tmp_path)
    [container] = manifests["Job"]["spec"]["template"]["spec"]["containers"]
    program, *arguments = container["args"]
    assert program == "run"
    typed = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in arguments]
    result = CliRunner().invoke(run_command, typed)
    assert "there is no file train.yaml" in str(result.exception)
