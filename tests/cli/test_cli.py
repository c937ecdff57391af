"""The command line as a person meets it: real processes, their output and exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs
from flows.cli import main

ROOT = Path(__file__).resolve().parents[2]


def deepzero(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **environment},
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) without the price of a new process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    status = ended.value.code
    assert status is None or isinstance(status, int)
    return status or 0, captured.out, captured.err


def test_help_names_the_commands() -> None:
    done = deepzero("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "config", "data", "doctor"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"deepzero \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config", "demo"], ["run", "pipelin"], ["run", "--help"]], ids=" ".join
)
def test_what_must_be_quick_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'prefect', 'mlflow', 'distributed', 'sklearn', 'pyarrow'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_config_prints_yaml_that_feeds_back_in(tmp_path: Path) -> None:
    done = deepzero("config", "smoke", "--set", "training.optimizer.lr=1e-3", "--set", "seed=7")
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path / "resolved.yaml"
    file.write_text(done.stdout, encoding="utf-8")
    assert configs.load(str(file)) == configs.load("smoke", ["training.optimizer.lr=1e-3", "seed=7"])
    assert deepzero("config", str(file)).stdout == done.stdout


def test_a_closed_pipe_is_no_failure() -> None:
    done = subprocess.run(
        f"{sys.executable} -m flows.cli config paper | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.stdout == "name: paper\n"
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "pipelin"], "error: there is no flow 'pipelin'; did you mean 'pipeline'?\n"),
        (["config", "dmo"], "error: there is neither a file nor a preset called 'dmo'; did you mean 'demo'?\n"),
        (
            ["run", "classify", "--set", "training.epoch=3"],
            "error: --set training.epoch=3: training.epoch is not a known key; did you mean 'epochs'?\n",
        ),
        (["config", "demo", "--flow", "pipe"], "error: there is no flow 'pipe'; did you mean 'pipeline'?\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_sentence_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, *arguments) == (2, "", expected)


def test_two_mistakes_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "config", "demo", "--set", "data.name=x", "--set", "model.name=y")
    assert status == 2
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]


@pytest.mark.parametrize(
    "arguments", [["rum"], ["run"], ["run", "classify", "--fast"], ["config"], ["data"], []], ids=" ".join
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert "Usage" in out + err


def test_a_place_for_results_that_cannot_be_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(
        capsys, "run", "pipeline", "--config", "smoke", "--json", str(tmp_path / "no" / "result.json")
    )
    assert (status, err) == (
        2,
        f"error: --json {tmp_path / 'no' / 'result.json'}: the folder {tmp_path / 'no'} does not exist\n",
    )
    status, _, err = call(capsys, "run", "pipeline", "--config", "smoke", "--json", str(tmp_path))
    assert status == 2
    assert "name a file in it" in err


class _Broken:
    """Stands where `flows.run` would be: shows what becomes of failures that the real one must not have."""

    def __init__(self, behaviour: str) -> None:
        self.code = (
            "import sys, types\n"
            "from deepzero_core.errors import WorkError\n"
            "def execute(flow, experiment, *, json_file, dry_run):\n"
            f"    {behaviour}\n"
            "module = types.ModuleType('flows.run')\n"
            "module.execute = execute\n"
            "sys.modules['flows.run'] = module\n"
            "from flows.cli import main\n"
            "main(['run', 'classify', '--config', 'smoke'])\n"
        )

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", self.code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
        )


def test_the_status_of_the_flow_is_the_status_of_the_command() -> None:
    assert [_Broken(f"return {status}").run().returncode for status in (0, 1)] == [0, 1]


def test_failed_work_is_one_line_and_status_1() -> None:
    done = _Broken("raise WorkError('the loss is not finite at step 7')").run()
    assert (done.returncode, done.stderr) == (1, "error: the loss is not finite at step 7\n")


def test_an_unexpected_failure_leaves_its_traceback_in_a_log(home: Path) -> None:
    broken = _Broken("raise ValueError('two\\nlines')")
    done = broken.run()
    (log,) = (home / "logs").iterdir()
    assert (done.returncode, done.stderr) == (1, f"error: ValueError: two (unexpected; the traceback is in {log})\n")
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert "Traceback" in broken.run(DEEPZERO_DEBUG="1").stderr


def test_an_unexpected_failure_without_a_usable_home_is_logged_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = _Broken("raise ValueError('broken')").run(DEEPZERO_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    (log,) = tmp_path.glob("deepzero-failure-*.log")
    assert str(log) in done.stderr


def test_an_interrupt_is_one_line_and_status_130() -> None:
    code = _Broken("import time; print('ready', flush=True); time.sleep(60)").code
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_data_is_prepared_once_and_damage_is_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "data", "prepare", "digits")
    store = home / "data" / "digits"
    assert (status, out) == (0, f"digits: 1,437 train, 360 test images of 1x8x8, written to {store}\n")
    assert call(capsys, "data", "prepare", "digits")[1].endswith(f"already in {store}\n")
    assert f"prepared in {store}" in call(capsys, "data", "list")[1]
    assert call(capsys, "data", "verify", "digits")[0] == 0

    damaged = max(store.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    status, _, err = call(capsys, "data", "verify", "digits")
    assert status == 2
    assert damaged.name in err
    assert "deepzero data prepare digits --force" in err
    assert call(capsys, "data", "prepare", "digits", "--force")[0] == 0
    assert call(capsys, "data", "verify", "digits")[0] == 0


def test_data_that_is_not_there_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPZERO_DATA_ROOT", raising=False)
    status, _, err = call(capsys, "data", "verify", "digits")
    assert status == 2
    assert "deepzero data prepare digits" in err
    status, _, err = call(capsys, "data", "prepare", "cifar10")
    assert status == 2
    assert "data_batch_1" in err
    assert str(home / "raw") in err
    status, _, err = call(capsys, "data", "prepare", "digit")
    assert (status, "did you mean 'digits'?" in err) == (2, True)


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from infra import doctor

    # The real checks are tested beside the doctor; here it is their way to the screen.
    monkeypatch.setattr(doctor, "_CHECKS", (("python", doctor.check_python), ("cores", doctor.check_cores)))
    status, out, _ = call(capsys, "doctor", "--json")
    assert status == 0
    assert [finding["name"] for finding in json.loads(out)] == ["python", "cores"]
