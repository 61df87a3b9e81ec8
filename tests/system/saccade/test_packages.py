"""The source archive and the wheel: they build, hold what runs and nothing else, and run by themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from saccade import __version__

ROOMS = ("rollout", "learner", "rewards", "weight_sync", "vlm", "saccade")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def build(kind: str, source: Path, output: Path) -> Path:
    """`kind`: sdist or wheel. The backend is called as pip calls it; nothing is downloaded."""
    command = [sys.executable, "-c", BUILD.format(kind=kind), str(output)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    (built,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: the backend writes into the folder that it builds from."""
    copy = tmp_path_factory.mktemp("clone")
    for folder in (*ROOMS, "deploy", "tests", "bench"):
        shutil.copytree(repository / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, copy)
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, which therefore has all that it takes."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"saccade-{__version__}", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, and this environment's other packages behind it."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True, timeout=120)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files, such as that of an editable install, do not run.
    beside = [sysconfig.get_paths()["purelib"]]
    if (Path(beside[0]) / "_saccade_torchvision_cpu.pth").exists():
        beside.append("import _saccade_torchvision_cpu")
    (packages / "zz_dependencies.pth").write_text("\n".join(beside) + "\n")
    return environment / "bin"


def run(command: list[str], folder: Path, timeout: float = 120) -> str:
    """In a folder where nothing of ours lies, without the import path of the tests."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    result = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"saccade-{__version__}.dist-info/METADATA").decode()
    files = [p for room in ROOMS for p in (repository / room).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert names == {str(p.relative_to(repository)) for p in files}
    assert {f"{room}/py.typed" for room in ROOMS} <= names
    assert "Requires-Dist: ray[default]" in metadata


def test_the_installed_command_and_package_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "demo" in run([str(installed / "saccade"), "--help"], tmp_path)
    assert run([str(installed / "saccade"), "--version"], tmp_path).strip() == f"saccade {__version__}"
    code = (
        "import json, saccade; saccade.Verdict; import rewards, vlm;"
        "print(json.dumps([m.__file__ for m in (saccade, rewards, vlm)]))"
    )
    found = json.loads(run([str(installed / "python"), "-c", code], tmp_path))
    assert all(Path(path).is_relative_to(installed.parent.resolve()) for path in found), found


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    run([str(installed / "saccade"), "demo", "--steps", "1", "--output-dir", "demo"], tmp_path, timeout=560)
    assert (tmp_path / "demo/run/model/model.safetensors").is_file()
    assert json.loads((tmp_path / "demo/summary.json").read_text())
