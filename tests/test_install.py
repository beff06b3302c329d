"""The package works where it is installed: a wheel, unpacked into an empty folder, trains and plots a model."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vqvae

ROOT = Path(__file__).parent.parent
SMALL = "--limit 40 --batch-size 20 --hidden 8 --codes 16 --code-dim 4 --image-size 16 --device cpu"


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, because a build leaves files, and might find old ones."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vqvae", source / "vqvae", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target), str(source))
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_contains_every_module_and_the_marker_of_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "vqvae/py.typed" in names
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "vqvae").rglob("*.py")} <= names
    assert f"vqvae-{vqvae.__version__}.dist-info/METADATA" in names
    assert not [name for name in names if name.split("/")[0] not in ("vqvae", f"vqvae-{vqvae.__version__}.dist-info")]


def test_an_installed_package_trains_and_plots_without_the_repository(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(line: str) -> str:
        return run(sys.executable, "-m", "vqvae", *line.split())

    imported = run(sys.executable, "-c", "import vqvae.__main__; print(vqvae.__main__.__file__)").strip()
    assert Path(imported).is_relative_to(site)
    assert "commands" in command("--help")
    assert run(str(site / "bin" / "vqvae"), "--version") == f"vqvae {vqvae.__version__}\n"
    assert "examples" in command("train --help")
    command(f"train --dataset digits --max-steps 2 --name run {SMALL}")
    assert (empty / "logs" / "run" / "checkpoint.pt").is_file()
    command("visualize --checkpoint logs/run --only reconstructions.png usage.png --device cpu")
    assert {"reconstructions.png", "usage.png"} <= {p.name for p in (empty / "plots" / "run").iterdir()}
