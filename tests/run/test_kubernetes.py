"""The files for Kubernetes, without a cluster: what belongs together in them is equal."""

import os
from pathlib import Path

import yaml

from tests.helpers.run.scripts import LAUNCHERS, launch


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCHERS / "kubernetes" / name).read_text(encoding="utf-8")))


def check_pod(pod: dict, container: str) -> dict:
    """Check the needs of both kinds of pod; returns the container."""
    (found,) = pod["containers"]
    assert found["name"] == container
    assert {mount["name"] for mount in found["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert {mount["mountPath"] for mount in found["volumeMounts"]} == {"/runs", "/dev/shm"}
    assert found["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["terminationGracePeriodSeconds"] >= 300
    return found


def test_the_plain_job_of_kubernetes(tmp_path: Path) -> None:
    service, job = documents("job.yaml")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    rules = {rule["action"]: rule for rule in reversed(spec["podFailurePolicy"]["rules"])}
    assert rules["FailJob"]["onExitCodes"]["values"] == [1, 2, 3]
    assert rules["Ignore"]["onExitCodes"]["values"] == [75]
    container = check_pod(pod, rules["FailJob"]["onExitCodes"]["containerName"])
    # Its words, as the launcher reads them on host 3 of so many as there are pods.
    (host_rank,) = container["env"]
    path = host_rank["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["command"] == ["bash", "launchers/ranks.sh"]
    words = [word.replace("$(HOST_RANK)", "3") for word in container["args"]]
    shown = launch(
        "ranks.sh", "--dry-run", *words, environment={"PATH": os.environ["PATH"]}, folder=tmp_path
    )
    ranks = container["resources"]["limits"]["nvidia.com/gpu"]
    lines = shown.stdout.splitlines()
    assert len(lines) == ranks and spec["completions"] == spec["parallelism"]
    first = f"{name}-0.{service['metadata']['name']}"
    assert lines[0].startswith(
        f"env RANK={3 * ranks} LOCAL_RANK=0 WORLD_SIZE={ranks * spec['completions']} "
        f"MASTER_ADDR={first} "
    )


def test_the_pytorchjob_of_kubernetes() -> None:
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, elastic = job["spec"], job["spec"]["elasticPolicy"]
    (replicas,) = spec["pytorchReplicaSpecs"].values()
    assert elastic["rdzvBackend"] == "c10d" and elastic["maxRestarts"] > 0
    assert elastic["minReplicas"] <= replicas["replicas"] <= elastic["maxReplicas"]
    container = check_pod(replicas["template"]["spec"], "pytorch")
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert container["command"][:4] == ["torchrun", "-m", "megagrow", "train"]
    (waits,) = [int(variable["value"]) for variable in container["env"]]
    assert waits < replicas["template"]["spec"]["terminationGracePeriodSeconds"]
