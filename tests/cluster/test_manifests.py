"""The files under configs/cluster say what their tools accept, and agree with each other and with the pins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jacray
import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from jacray.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "cluster"
KUBERNETES = "1.34"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def pods(name: str) -> Iterator[dict[str, Any]]:
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_rays_launcher_accepts_its_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    [config] = documents("aws.yaml")
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kubernetes_accepts_every_pod(name: str) -> None:
    for spec in pods(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_kubernetes_accepts_the_volume_that_the_pods_name() -> None:
    [claim] = [document for document in documents("raycluster.yaml") if document["kind"] == "PersistentVolumeClaim"]
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    named = {
        volume["persistentVolumeClaim"]["claimName"]
        for name in ("raycluster.yaml", "rayjob.yaml")
        for spec in pods(name)
        for volume in spec["volumes"]
    }
    assert named == {claim["metadata"]["name"]}


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_manifests_ask_for_a_token_and_for_the_pinned_ray(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == pinned("ray")


def test_every_file_names_one_image_of_this_version() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*FOLDER.iterdir(), ROOT / "docs" / "cluster.md")]
    images = {image for text in texts for image in re.findall(r"REGISTRY/jacray:([\w.]+)", text)}
    assert images == {jacray.__version__}
    assert f"ARG RAY={pinned('ray')}\n" in (FOLDER / "Dockerfile").read_text(encoding="utf-8")


def test_the_jobs_entry_point_is_a_run_that_the_command_line_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    [job] = [document for document in documents("rayjob.yaml") if document["kind"] == "RayJob"]
    command = job["spec"]["entrypoint"].replace("/home/ray/jacray", str(ROOT)).split()
    assert command[:2] == ["jacray", "run"]
    assert main(["plan", *command[2:]]) == 0, capsys.readouterr().err
    assert "1,797" in capsys.readouterr().out


def test_the_images_steps_copy_what_there_is() -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line
