"""The files in `deploy` are well-formed, agree with each other, and use options and paths that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from magistral_mlx.cli.serve import serve

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
OPTIONS = {name: option for option in serve.params for name in option.opts}
SERVER = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def instructions(name: str) -> list[str]:
    return re.findall(rf"(?m)^{name} +(.+)$", DOCKERFILE)


def options(command: list[str]) -> dict[str, str]:
    """The options of a `serve` command; checks that each exists and accepts its value."""
    assert command[0] == "serve"
    given = dict(zip(command[1::2], command[2::2], strict=True))
    for name, value in given.items():
        if name != "--api-key-file":  # its file exists only where it is deployed
            OPTIONS[name].type_cast_value(serve.make_context("serve", []), _as_parsed(name, value))
    return given


def _as_parsed(name: str, value: str) -> object:
    return (value,) if OPTIONS[name].multiple else value


IMAGE = options(json.loads(instructions("CMD")[-1]))


@pytest.mark.parametrize("given", [IMAGE, options(CONTAINER["args"])], ids=["image", "kubernetes"])
def test_reachable_server_reads_its_key_from_a_file(given):
    assert given["--host"] == "0.0.0.0"
    assert given["--api-key-file"].startswith("/run/secrets/")
    assert "--api-key" not in given


def test_image_runs_as_an_unprivileged_user():
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["magistral-mlx"]
    uid, gid = instructions("USER")[-1].split(":")
    assert int(uid) == int(gid) > 1000
    assert f"--uid {uid}" in DOCKERFILE
    assert instructions("EXPOSE") == [IMAGE["--port"]]


def test_image_has_a_health_check():
    probe = instructions("HEALTHCHECK")[-1]
    assert f"127.0.0.1:{IMAGE['--port']}/health" in probe
    compile(json.loads(probe[probe.index("[") :])[2], "probe", "exec")


def test_files_the_image_copies_exist_and_are_not_ignored():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    copied = [shlex.split(line)[:-1] for line in instructions("COPY") if not line.startswith("--from")]
    assert sorted(name for names in copied for name in names) == sorted(allowed)
    assert all((ROOT / name).exists() for name in allowed)


def test_image_has_a_supported_python():
    assert {line.split()[0] for line in instructions("FROM")} == {"python:3.12-slim-bookworm"}
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    assert ".[server,structured]" in DOCKERFILE


def test_compose_matches_the_image():
    build = SERVER["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert build["args"].keys() <= {name.split("=")[0] for name in instructions("ARG")}
    (model,) = SERVER["volumes"]
    assert (model["target"], model["read_only"]) == (IMAGE["--model"], True)
    (secret,) = SERVER["secrets"]
    assert f"/run/secrets/{secret}" == IMAGE["--api-key-file"]
    (port,) = SERVER["ports"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(f":{IMAGE['--port']}")


def test_kubernetes_probes_mounts_and_selectors_are_consistent():
    given = options(CONTAINER["args"])
    (port,) = CONTAINER["ports"]
    assert str(port["containerPort"]) == given["--port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    assert (mounts["model"]["mountPath"], mounts["model"]["readOnly"]) == (given["--model"], True)
    assert mounts["key"]["mountPath"] == str(Path(given["--api-key-file"]).parent)
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]
    assert given["--allow-host"] == SERVICE["metadata"]["name"]


def test_kubernetes_grants_no_unneeded_privileges():
    uid = int(instructions("USER")[-1].split(":")[0])
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["runAsUser"] == uid
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert CONTAINER["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False
