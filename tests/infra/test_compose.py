"""infra/compose.yaml and its image, as far as they can be looked at without a Docker daemon."""

import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (INFRA / "docker" / "deepzero.Dockerfile").read_text(encoding="utf-8")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|CREDENTIAL|_KEY")


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def test_the_stack_is_complete() -> None:
    assert set(SERVICES) == {
        "prefect-db", "prefect", "mlflow-db", "mlflow", "dask-scheduler", "dask-worker", "prefect-worker",
    }  # fmt: skip


def test_nobody_is_root_and_nothing_can_be_gained(service: dict[str, Any]) -> None:
    user, _, group = service["user"].partition(":")
    assert int(user) > 0 and int(group) > 0
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "devices", "cap_add"} & set(service)


def test_every_service_says_whether_it_is_well(service: dict[str, Any]) -> None:
    check = service["healthcheck"]
    assert check["test"][0] == "CMD" and check["interval"] and check["timeout"] and check["retries"]
    assert service["restart"] == "unless-stopped"


def test_images_are_pinned(service: dict[str, Any]) -> None:
    name, _, tag = service["image"].rpartition(":")
    assert name and re.match(r"\d+\.\d+", tag), "a tag with a version, not latest"
    assert name != "deepzero" or tag == VERSION


def test_only_this_machine_reaches_a_port(service: dict[str, Any]) -> None:
    for port in service.get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    assert service["networks"]


def test_databases_have_a_network_of_their_own() -> None:
    for database in ("prefect-db", "mlflow-db"):
        assert COMPOSE["networks"][database]["internal"] is True
        inside = {name for name, service in SERVICES.items() if database in service["networks"]}
        assert inside == {database, database.removesuffix("-db")}
        assert "ports" not in SERVICES[database]


def test_secrets_come_as_files(service: dict[str, Any]) -> None:
    for name, value in service.get("environment", {}).items():
        if SECRET.search(name):
            assert name.endswith("_FILE"), f"{name} would hold a secret"
            secret = value.removeprefix("/run/secrets/")
            assert secret in service["secrets"] and secret in COMPOSE["secrets"]
    for url in re.findall(r"\w+://\S+", " ".join(map(str, [service.get("command"), service.get("environment")]))):
        assert not re.search(r"://[^/@]*:[^/@]*@", url), "a password in an address"


def test_all_that_is_named_is_there() -> None:
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"])
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"} and "healthcheck" in SERVICES[other]
        if "build" in service:
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_dask_is_started_with_options_that_it_has() -> None:
    from distributed.cli import dask_scheduler, dask_worker

    for name, command in (("dask-scheduler", dask_scheduler.main), ("dask-worker", dask_worker.main)):
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in SERVICES[name]["command"] if word.startswith("--")}
        assert used and used <= known


def test_the_image_is_pinned_small_and_not_root() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases and all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert "pip install -c constraints.txt" in DOCKERFILE
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] == SERVICES["prefect"]["user"]
    assert not re.search(r"^ADD |curl |wget |sudo |pip install(?! -c)", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"^(ENV|ARG) \w*(PASSWORD|SECRET|TOKEN)", DOCKERFILE, re.MULTILINE)
    assert "rm -rf /var/lib/apt/lists" in DOCKERFILE and "--no-install-recommends" in DOCKERFILE
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


def test_the_image_takes_nothing_that_it_need_not() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "**", "what is not named stays outside"
    assert "infra/docker/secrets" in lines


def run(*command: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(
        [*map(str, command)], env=path | environment, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell")
def test_secrets_are_made_once_and_for_the_owner(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = run("sh", INFRA / "docker" / "make-secrets.sh", folder)
    assert made.returncode == 0, made.stderr
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(found) == set(COMPOSE["secrets"]) and len(set(found.values())) == 3
    assert all(len(secret.removeprefix("deepzero:")) == 48 for secret in found.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    run("sh", INFRA / "docker" / "make-secrets.sh", folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == found


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell")
def test_a_secret_reaches_its_program_and_no_message(tmp_path: Path) -> None:
    """The entry point reads below /run/secrets alone: here it is told of another such place."""
    text = (INFRA / "docker" / "with-secrets.sh").read_text(encoding="utf-8")
    script = tmp_path / "with-secrets"
    script.write_text(text.replace("/run/secrets/", f"{tmp_path}/"))
    secret = "pass word $HOME `x` 'q'"
    (tmp_path / "one").write_text(secret)
    show = ["sh", script, "sh", "-c", 'printf %s "$PGPASSWORD"']
    assert run(*show, PGPASSWORD_FILE=str(tmp_path / "one")).stdout == secret
    assert run(*show, PGPASSWORD_FILE="/etc/hostname").stdout == ""
    missing = run(*show, PGPASSWORD_FILE=str(tmp_path / "none"))
    assert missing.returncode == 2 and "named by PGPASSWORD_FILE, cannot be read" in missing.stderr


def test_docker_compose_takes_the_file(tmp_path: Path) -> None:
    if shutil.which("docker") is None or run("docker", "compose", "version").returncode != 0:
        pytest.skip("docker and its compose plug-in are not installed: the file was read, but not by docker compose")
    run("sh", INFRA / "docker" / "make-secrets.sh", tmp_path)
    found = run("docker", "compose", "-f", INFRA / "compose.yaml", "config", "--quiet", DEEPZERO_SECRETS=str(tmp_path))
    assert found.returncode == 0, found.stderr
