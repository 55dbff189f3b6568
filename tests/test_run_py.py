"""run.py without a network: a runner that writes down what it is asked to do."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("run_py", ROOT / "run.py")
run_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_py)


class Recorder:
    """Pretends to run commands. A command that holds a word of `failing` exits with 1."""

    def __init__(self, *failing: str):
        self.failing = failing
        self.commands: list[list[str]] = []

    def __call__(self, command):
        self.commands.append(list(command))
        if "venv" in command:
            python = run_py.venv_python(Path(command[-1]))
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text("")
        return int(any(word in " ".join(command) for word in self.failing))

    @property
    def said(self) -> list[str]:
        return [" ".join(command) for command in self.commands]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.0\ntorch==2.13.0\n")
    have = {"pip": "25.0"}
    monkeypatch.setattr(run_py, "installed", lambda python, package: have.get(package))
    monkeypatch.setattr(run_py, "wants_cpu_build", lambda: True)
    return tmp_path


def test_first_run_makes_the_environment_and_installs(clone):
    run = Recorder()
    python = run_py.prepare(clone, ("dev", "data"), run)
    assert python == run_py.venv_python(clone / ".venv")
    venv, torch, package = run.said
    assert "-m venv" in venv
    assert "download.pytorch.org/whl/cpu" in torch and torch.endswith("torch==2.13.0")
    assert package.endswith(f"-c {clone / 'constraints.txt'} -e {clone}[data,dev]")


def test_second_run_starts_at_once(clone):
    run_py.prepare(clone, ("dev",), Recorder())
    run = Recorder()
    run_py.prepare(clone, ("dev",), run)
    run_py.prepare(clone, (), run)
    assert run.commands == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_installs_again_and_keeps_the_extras(clone, name):
    run_py.prepare(clone, ("dev",), Recorder())
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert not any("-m venv" in said for said in run.said)
    assert run.said[-1].endswith(f"-e {clone}[dev]")


def test_more_extras_install_again_and_line_ends_do_not(clone):
    run_py.prepare(clone, (), Recorder())
    for name in ("pyproject.toml", "constraints.txt"):
        path = clone / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert run.commands == []
    run_py.prepare(clone, ("dev",), run)
    assert run.said[-1].endswith("[dev]")


def test_an_interrupted_installation_is_repeated(clone):
    run_py.prepare(clone, (), Recorder())
    with pytest.raises(run_py.Advice, match="pip could not install tinychat"):
        run_py.prepare(clone, ("dev",), Recorder("-e"))
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert run.commands


def test_an_environment_without_pip_gets_one(clone, monkeypatch):
    # What Ctrl-C in the first seconds of `python -m venv` leaves.
    python = run_py.venv_python(clone / ".venv")
    python.parent.mkdir(parents=True)
    python.write_text("")
    monkeypatch.setattr(run_py, "installed", lambda python, package: None)
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert run.said[0] == f"{python} -m ensurepip" and run.said[-1].endswith(f"-e {clone}")
    (clone / ".venv" / run_py.STAMP).unlink()
    with pytest.raises(run_py.Advice, match="delete that folder"):
        run_py.prepare(clone, (), Recorder("ensurepip"))


def test_a_venv_that_fails_is_advice(clone):
    with pytest.raises(run_py.Advice, match="a full disk"):
        run_py.prepare(clone, (), Recorder("-m venv"))


def test_a_clone_that_lacks_a_file_gets_one_sentence(clone, monkeypatch, capsys):
    (clone / "constraints.txt").unlink()
    monkeypatch.setattr(run_py, "ROOT", clone)
    assert run_py.main(["chat"]) == 2
    said = capsys.readouterr().err
    assert "constraints.txt" in said and said.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_broken_stamp_means_install(clone, content):
    run_py.prepare(clone, (), Recorder())
    (clone / ".venv" / run_py.STAMP).write_text(content)
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert run.commands
    assert json.loads((clone / ".venv" / run_py.STAMP).read_text())["extras"] == []


def test_cpu_index_first_then_the_standard_one(clone):
    run = Recorder("download.pytorch.org")
    run_py.prepare(clone, (), run)
    small, plain = run.said[1:3]
    assert "--no-deps --index-url https://download.pytorch.org/whl/cpu" in small
    assert "--timeout 15" in small
    assert "pytorch.org" not in plain and plain.endswith("torch==2.13.0")


def test_no_torch_at_all_is_advice(clone):
    with pytest.raises(run_py.Advice, match=r"could not install torch 2\.13\.0"):
        run_py.prepare(clone, (), Recorder("torch=="))


def test_with_a_gpu_the_standard_torch(clone, monkeypatch):
    monkeypatch.setattr(run_py, "wants_cpu_build", lambda: False)
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert not any("pytorch.org" in said for said in run.said)


def test_torch_of_the_right_version_is_kept(clone, monkeypatch):
    monkeypatch.setattr(run_py, "installed", lambda python, package: "2.13.0")
    run = Recorder()
    run_py.prepare(clone, (), run)
    assert not any("torch==" in said for said in run.said)


@pytest.mark.parametrize(
    ("platform", "gpu", "cpu_build"),
    [("linux", False, True), ("linux", True, False), ("darwin", False, False), ("win32", 0, False)],
)
def test_who_wants_the_cpu_build(monkeypatch, platform, gpu, cpu_build):
    monkeypatch.setattr(run_py.sys, "platform", platform)
    monkeypatch.setattr(run_py, "has_nvidia_gpu", lambda: gpu)
    assert run_py.wants_cpu_build() is cpu_build


def test_a_gpu_is_what_nvidia_smi_lists(monkeypatch):
    monkeypatch.setattr(run_py.shutil, "which", lambda *args, **options: None)
    assert not run_py.has_nvidia_gpu()
    monkeypatch.setattr(run_py.shutil, "which", lambda *args, **options: "nvidia-smi")
    for status, printed, found in [(0, "GPU 0: H100\n", True), (0, "", False), (9, "GPU 0", False)]:
        done = subprocess.CompletedProcess([], status, printed)
        monkeypatch.setattr(run_py.subprocess, "run", lambda *a, done=done, **k: done)
        assert run_py.has_nvidia_gpu() is found


def test_installed_ignores_the_build():
    from importlib.metadata import version

    assert run_py.installed(Path(sys.executable), "torch") == version("torch").partition("+")[0]
    assert run_py.installed(Path(sys.executable), "no-such-package-here") is None
    assert run_py.installed(Path("/no/such/python"), "torch") is None


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_without_venv_the_advice_names_the_package(clone, monkeypatch, module):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        run_py.importlib.util, "find_spec", lambda name: None if name == module else real(name)
    )
    run = Recorder()
    with pytest.raises(run_py.Advice) as raised:
        run_py.prepare(clone, (), run)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert f"`{module}`" in str(raised.value) and version in str(raised.value)
    assert run.commands == []


def test_advice_is_printed_without_a_traceback(monkeypatch, capsys):
    def refuse(*arguments):
        raise run_py.Advice("do this")

    monkeypatch.setattr(run_py, "prepare", refuse)
    assert run_py.main(["chat"]) == 2
    assert capsys.readouterr().err == "do this\n"


def test_a_lost_pin_is_advice(clone):
    (clone / "constraints.txt").write_text("numpy==2.0\n")
    with pytest.raises(run_py.Advice, match="torch==VERSION"):
        run_py.prepare(clone, (), Recorder())


def test_an_older_python_gets_one_sentence(tmp_path):
    text = (ROOT / "run.py").read_text().replace("OLDEST = (3, 11)", "OLDEST = (99, 0)")
    (tmp_path / "run.py").write_text(text)
    answer = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), "chat"], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("tinychat needs Python 3.11") and answer.stderr.count("\n") == 1


def test_windows_layout_and_commands():
    home = Path("somewhere")
    assert run_py.venv_python(home, "nt") == home / "Scripts" / "python.exe"
    assert run_py.venv_python(home, "posix") == home / "bin" / "python"
    python = home / "bin" / "python"
    assert run_py.command_line(python, "chat", ["--seed", "1"])[1:] == [
        *("-m", "tinychat", "chat", "--seed", "1")
    ]
    assert run_py.command_line(python, "test", ["--", "-k", "x"])[1:] == ["-m", "pytest", "-k", "x"]


def test_help_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(run_py, "prepare", None)
    assert run_py.main([]) == 0
    assert "python3 run.py chat" in capsys.readouterr().out


def test_the_pins_are_plain_versions():
    text = (ROOT / "constraints.txt").read_text()
    assert "+cpu" not in text.replace("(+cpu)", "")
    assert run_py.torch_version(ROOT / "constraints.txt")
