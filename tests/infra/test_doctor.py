"""The doctor on this healthy installation, and on installations that are really broken."""

import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import doctor
from infra.doctor import Check
from infra.home import home as state_home
from infra.requirements import examine_requirements

ROOT = Path(__file__).resolve().parents[2]


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes before the installed packages, here and in every process started."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def break_package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code, encoding="utf-8")


def pretend_version(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_nothing_is_wrong_with_this_installation(home: Path) -> None:
    checks = doctor.examine()
    assert [check for check in checks if check.status == "fail"] == []
    names = {check.name for check in checks}
    assert names >= {
        "python",
        "package versions",
        "prefect server",
        "torch",
        "torchvision",
        "mlflow store",
        "home",
        "disk",
    }
    assert names >= {"phiml", "memory", "cores", "port 4200", "port 5000", "DEEPZERO_DATA_ROOT", "data stores", "cuda"}
    assert names >= {"kernels", "peak"}
    assert not home.exists(), "looking must not create anything"


def test_a_fastapi_that_breaks_prefect_is_named(shadow: Path) -> None:
    pretend_version(shadow, "fastapi", "0.155.0")
    check = only(doctor.check_dependencies())
    assert (check.name, check.status) == ("package fastapi", "fail")
    assert check.found == "0.155.0 is installed, but deepzero needs fastapi<0.151,>=0.139"
    assert "constraints.txt" in check.mend


def test_a_server_that_does_not_import_is_named(shadow: Path) -> None:
    break_package(shadow, "fastapi", "raise TypeError(\"Body() got an unexpected keyword argument 'min_items'\")\n")
    check = only(doctor.check_prefect_server())
    assert check.status == "fail"
    assert "unexpected keyword argument 'min_items'" in check.found
    assert "fastapi>=0.139,<0.151" in check.mend


def test_a_broken_torchvision_is_named(shadow: Path) -> None:
    break_package(shadow, "torchvision", "raise OSError('libtorch_cuda.so: cannot open shared object file')\n")
    check = only(doctor.check_torchvision())
    assert check.status == "fail"
    assert "libtorch_cuda.so" in check.found


def test_a_broken_torch_is_named(shadow: Path) -> None:
    break_package(shadow, "torch", "import os; os._exit(9)\n")
    check = only(doctor.check_torch())
    assert (check.status, check.found) == ("fail", "cannot be imported: the interpreter died with status 9")


def test_the_kernels_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPZERO_NATIVE", "0")
    kernels, peak = doctor.check_kernels()
    assert (kernels.status, kernels.mend) == ("ok", "")
    assert kernels.found == "not in use, torch does it: switched off by DEEPZERO_NATIVE=0"
    assert re.fullmatch(r"\d+ GFLOP/s and \d+ GB/s, threads: \d+", peak.found)
    monkeypatch.delenv("DEEPZERO_NATIVE")
    monkeypatch.setenv("CXX", "false")
    kernels, _ = doctor.check_kernels()
    assert kernels.status == "warn" and "'false'" in kernels.found and "CXX" in kernels.mend


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_kernels_that_are_there_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    kernels, _ = doctor.check_kernels()
    assert kernels.status == "ok"
    assert re.fullmatch(
        r"compiled with g\+\+, (no )?bfloat16 instructions(, which are no faster and not used)?", kernels.found
    )


def test_the_command_reports_a_broken_installation_and_fails(shadow: Path, home: Path) -> None:
    break_package(shadow, "mlflow", "raise ImportError('half installed')\n")
    pretend_version(shadow, "phiml", "1.16.1")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor"],
        capture_output=True, text=True, timeout=280, check=False, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("fail  mlflow store") and "half installed" in line for line in lines)
    assert any(line.startswith("warn  phiml") for line in lines)
    assert done.stderr == ""


def test_versions_other_than_those_tested_are_a_warning(shadow: Path) -> None:
    pretend_version(shadow, "jinja2", "3.9.0")
    check = only(doctor.check_dependencies())
    assert (check.name, check.status) == ("package versions", "warn")
    assert "jinja2 3.9.0 instead of 3.1.6" in check.found


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["no-such-package>=2", "typer"]\n', encoding="utf-8"
    )
    outcome = examine_requirements(tmp_path)
    assert outcome.broken == {"no-such-package": "missing, but deepzero needs no-such-package>=2"}
    assert outcome.untested == {}


def test_a_check_that_breaks_down_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Check]:
        raise KeyError("broken")

    monkeypatch.setattr(doctor, "_CHECKS", (("cores", doctor.check_cores), ("strange", broken)))
    checks = doctor.examine()
    assert [(check.name, check.status) for check in checks][-1] == ("strange", "fail")
    assert "KeyError" in checks[-1].found
    assert doctor.report(checks) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_damaged_mlflow_store_is_named(home: Path) -> None:
    home.mkdir()
    (home / "mlflow.db").write_bytes(b"not a database, but as long as one page of it would have to be" * 100)
    check = only(doctor.check_mlflow())
    assert check.status == "fail"
    assert str(home / "mlflow.db") in check.found
    assert "move" in check.mend


def test_a_damaged_data_store_is_named(home: Path) -> None:
    from deepzero_core.data import prepare

    assert only(doctor.check_stores()).found == "none prepared yet"
    store = prepare("digits", home=home).path
    assert only(doctor.check_stores()).status == "ok"
    file = max(store.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    check = only(doctor.check_stores())
    assert (check.name, check.status) == ("data digits", "fail")
    assert file.name in check.found
    assert check.mend == "deepzero data prepare digits --force"


def test_a_home_that_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("DEEPZERO_HOME", str(file))
    monkeypatch.setattr(doctor, "_CHECKS", (("home", doctor.check_home),))
    check = only(doctor.examine())
    assert check.status == "fail"
    assert str(file) in check.found
    monkeypatch.setenv("DEEPZERO_HOME", str(file / "below"))
    assert doctor.check_home()[0].status == "fail"


def test_little_space_is_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOW_SPACE", 2**62)
    assert [check.status for check in doctor.check_home()] == ["ok", "warn"]
    assert only(doctor.check_memory()).status == "warn"


def test_the_data_root_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPZERO_DATA_ROOT", raising=False)
    assert only(doctor.check_data_root()).found == "not set"
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setenv("DEEPZERO_DATA_ROOT", str(tmp_path))
    assert "cifar-10-batches-py" in only(doctor.check_data_root()).found
    monkeypatch.setenv("DEEPZERO_DATA_ROOT", str(tmp_path / "nowhere"))
    assert only(doctor.check_data_root()).status == "warn"


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, format: str, *args: object) -> None:
        pass  # not into the output of the tests


@pytest.fixture
def healthy_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_ports_free_used_and_used_by_the_right_server(healthy_port: int) -> None:
    assert doctor._port("Prefect", healthy_port, "/api/health", b"true").found == "Prefect is running there"
    assert doctor._port("MLflow", healthy_port, "/health", b"OK").status == "warn"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert doctor._port("Prefect", port, "/api/health", b"true").found == "free for Prefect"
        silent.listen()
        assert doctor._port("Prefect", port, "/api/health", b"true").status == "warn"


def test_the_home_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPZERO_HOME", str(tmp_path / "a"))
    assert state_home() == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPZERO_HOME", "b")
    assert state_home() == tmp_path / "b"
    monkeypatch.delenv("DEEPZERO_HOME")
    assert state_home().is_absolute()
    assert state_home().name == "deepzero"
