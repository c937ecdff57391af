"""What `up` does not begin: one sentence for each, and nothing is started or left behind."""

import json
import os
import socket
from pathlib import Path

import pytest
from stacks import Command

from deepzero_core.errors import RequestError
from infra.stack import conditions, leftovers, lifecycle, ports, secrets, state, supervision

PREFECT_AUTH, MLFLOW_KEY = "PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_FLASK_SERVER_SECRET_KEY"
ALL = {
    PREFECT_AUTH: "user:password",
    "MLFLOW_TRACKING_USERNAME": "user",
    "MLFLOW_TRACKING_PASSWORD": "a-long-password",
    MLFLOW_KEY: "key",
}


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*secrets.variables(), *secrets.TLS):
        monkeypatch.delenv(name, raising=False)


def refusal(**options: object) -> str:
    with pytest.raises(RequestError) as raised:
        lifecycle.up(say=lambda _: None, **options)  # type: ignore[arg-type]
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_others_are_not_let_in_without_credentials(home: Path) -> None:
    said = refusal(host="0.0.0.0")
    for name in (*ALL, *secrets.TLS):
        assert f"${name}" in said
    assert "--insecure" in said
    assert state.running(home) is None
    assert leftovers.marked(home) == []


def test_the_command_says_so_and_exits_with_2(deepzero: Command) -> None:
    done = deepzero("up", "--host", "0.0.0.0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --host 0.0.0.0 lets others in")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ALL)
def test_each_credential_is_asked_for(
    missing: str, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in secrets.TLS:
        (tmp_path / name).write_text("-", encoding="utf-8")
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    assert secrets.read().missing() == []
    monkeypatch.delenv(missing)
    assert secrets.read().missing() == [f"${missing}"]
    said = refusal(host="0.0.0.0")
    assert f"${missing} must be set" in said
    assert "a-long-password" not in said


def test_tls_files_come_together(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPZERO_TLS_CA", str(tmp_path / "ca.pem"))
    assert "$DEEPZERO_TLS_CERT, $DEEPZERO_TLS_KEY is not set" in refusal()
    for name in secrets.TLS:
        monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    assert f"$DEEPZERO_TLS_CA names {tmp_path / 'ca.pem'}, which is no file" in refusal()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (PREFECT_AUTH, "no-colon", "user:password"),
        ("MLFLOW_TRACKING_PASSWORD", "short", "at least 12 characters"),
        ("DEEPZERO_MLFLOW_DATABASE", "mysql://canary@host/x", "PostgreSQL"),
    ],
)
def test_a_secret_that_cannot_be_right(
    name: str, value: str, said: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    text = refusal()
    assert said in text
    assert value not in text


def test_secret_files(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "auth"
    monkeypatch.setenv(f"{PREFECT_AUTH}_FILE", str(file))
    assert f"{file}, cannot be read: No such file or directory" in refusal()
    file.write_text("  \n", encoding="utf-8")
    assert f"{file}, is empty" in refusal()
    file.write_text("user:password\n", encoding="utf-8")
    assert secrets.read().values == {PREFECT_AUTH: "user:password"}
    assert "password" not in repr(secrets.read())
    monkeypatch.setenv(PREFECT_AUTH, "user:other")
    assert f"both ${PREFECT_AUTH} and ${PREFECT_AUTH}_FILE are set" in refusal()


def test_passwords_do_not_get_into_messages() -> None:
    given = secrets.Secrets({MLFLOW_KEY: "canary"}, ())
    said = given.hide("could not connect to postgresql+asyncpg://user:pass-word@host/db with canary")
    assert said == "could not connect to postgresql+asyncpg://user:…@host/db with …"


def test_a_taken_port_is_named_with_its_holder(home: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        said = refusal(fixed={"mlflow": port})
        assert f"port {port}, asked for mlflow, is taken by this process" in said
    assert state.running(home) is None


def test_ports_are_remembered_and_given_up_when_taken(home: Path) -> None:
    state.folder(home).mkdir(parents=True)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        wanted = holder.getsockname()[1]
    first = ports.choose(home, "127.0.0.1", {"prefect": wanted})
    assert first["prefect"] == wanted
    assert len(set(first.values())) == len(ports.CUSTOMARY)
    assert ports.choose(home, "127.0.0.1", {})["prefect"] == wanted
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", wanted))
        holder.listen()
        assert ports.choose(home, "127.0.0.1", {})["prefect"] != wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mlfow=5000"], "there is no port 'mlfow'"),
        (["mlflow=70000"], "a number from 1 to 65535"),
        (["mlflow"], "a number from 1 to 65535"),
        (["mlflow=5000", "prefect=5000"], "cannot share a port"),
    ],
)
def test_port_options(given: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ports.parse(given)
    assert ports.parse(["mlflow=5001", "dask=1"]) == {"mlflow": 5001, "dask": 1}


@pytest.mark.parametrize("host", ["198.51.100.7", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine(host: str, home: Path) -> None:
    assert f"--host {host}: this" in refusal(host=host, insecure=True)


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("DEEPZERO_HOME", str(tmp_path / "file" / "home"))
    assert f"the home {tmp_path / 'file' / 'home'} cannot be used: Not a directory" in refusal()
    monkeypatch.setenv("DEEPZERO_HOME", "/proc/deepzero")
    assert "the home /proc/deepzero cannot be used" in refusal()


def test_a_full_disk(home: Path) -> None:
    home.mkdir()
    with pytest.raises(RequestError, match=r"MiB are free at .* make room"):
        conditions.check_space(home, 2**62)
    conditions.check_space(home, 1)


def test_a_name_that_a_configuration_file_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "a;b"
    stack = state.Stack(home=base, host="127.0.0.1", ports=dict(ports.CUSTOMARY), workers=0, socket=base / "s")
    state.folder(base).mkdir(parents=True)
    with pytest.raises(RequestError, match="semicolon"):
        supervision.start(stack)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"home": 3}', json.dumps({"home": "/", "more": 1})])
def test_a_state_file_that_means_nothing(text: str, deepzero: Command) -> None:
    folder = state.folder(deepzero.home)
    folder.mkdir(parents=True)
    state.state_file(deepzero.home).write_text(text, encoding="utf-8")
    (folder / "supervisord.pid").write_text(str(os.getppid()), encoding="utf-8")
    assert state.running(deepzero.home) is None


def test_the_state_of_a_stack_that_is_gone(deepzero: Command) -> None:
    base = deepzero.home
    state.folder(base).mkdir(parents=True)
    stack = state.Stack(
        home=base, host="127.0.0.1", ports=dict(ports.CUSTOMARY), workers=1, socket=state.socket_path(base)
    )
    state.write(stack)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stack.socket))
    assert stack.socket.exists()
    assert state.recorded(base) == stack
    assert state.running(base) is None
    status = deepzero("status")
    assert (status.returncode, status.stdout) == (1, f"{base}: no stack is running; `deepzero up` starts one\n")
    assert deepzero("down").returncode == 0
    assert not state.state_file(base).exists()
    assert not stack.socket.exists()


def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    base = tmp_path / ("long" * 30)
    path = state.socket_path(base)
    assert len(os.fsencode(path)) <= 100
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path != state.socket_path(tmp_path / ("long" * 31))
