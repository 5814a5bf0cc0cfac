"""What gets installed, from a wheel and in editable mode, and how `make` decides which PyTorch to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fusedlr

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    environment = {**os.environ, **env}
    ran = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that building leaves nothing in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("fusedlr", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", out, tree, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


def sources(tree: Path) -> set[str]:
    """Every module, under the name that it is to be installed with."""
    installed = {path.relative_to(tree).as_posix() for path in (tree / "fusedlr").rglob("*.py")}
    return installed | {f"fusedlr/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}


def test_wheel_holds_every_module_and_nothing_at_top_level_but_fusedlr(tree, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"fusedlr-{fusedlr.__version__}.dist-info/"
    modules = {name for name in names if not name.startswith(info)}
    assert modules == sources(tree) | {"fusedlr/py.typed"}
    assert any(name.startswith(info) and name.endswith("/LICENSE") for name in names)


def test_wheel_metadata(wheel):
    info = f"fusedlr-{fusedlr.__version__}.dist-info/METADATA"
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(info).decode())
    assert (metadata["Name"], metadata["Version"]) == ("fusedlr", fusedlr.__version__)
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {"test", "bench", "examples", "dev"}
    lines = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    required = {re.sub(r"\s", "", line).replace('"', "'") for line in lines}
    assert required == {"torch>=2.7", "numpy", "triton>=3.3;sys_platform=='linux'"}
    assert metadata.get_payload().startswith("# fusedlr")


def where(python: str | Path, cwd: Path, **env: str) -> list[Path]:
    """The files that fusedlr and fusedlr.kernels are imported from."""
    code = """
from importlib.util import find_spec
for name in ("fusedlr", "fusedlr.kernels"):
    print(find_spec(name).origin)
"""
    return [Path(line).resolve() for line in run(python, "-c", code, cwd=cwd, **env).splitlines()]


def test_wheel_imports_as_fusedlr_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert where(sys.executable, tmp_path, PYTHONPATH=str(site)) == [
        (site / "fusedlr/__init__.py").resolve(),
        (site / "fusedlr/kernels/__init__.py").resolve(),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="the environment's python lies elsewhere there")
def test_editable_install_imports_the_sources(tree, tmp_path):
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=tmp_path)
    python = env / "bin" / "python"
    # The new environment sees what this one has installed (torch, setuptools), and installs nothing but fusedlr.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "-e", tree, cwd=tmp_path)
    assert where(python, tmp_path, PYTHONPATH="") == [
        (tree / "fusedlr/__init__.py").resolve(),
        (tree / "kernels/__init__.py").resolve(),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("gpu", "index_answers", "expected"),
    [
        (False, False, "install torch==2.13.0"),
        (False, True, "install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0"),
        (True, True, "install torch>=2.7"),
    ],
)
def test_which_pytorch_is_installed(gpu, index_answers, expected, tmp_path):
    def script(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    log = tmp_path / "log"
    script("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'" if gpu else "exit 9")
    script("uname", "echo Linux")
    # This python writes down what pip is asked for; its -c answers whether the index can be reached, or torch works.
    answer = 0 if index_answers else 1
    python = script("python", f'case "$1" in -m) shift 3; echo "$@" >>{log};; -c) exit {answer};; esac')
    run(ROOT / ".ci" / "install-torch", python, cwd=tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert log.read_text().splitlines() == [expected]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_without_a_target_lists_the_targets():
    targets = ["help", "demo", "test", "bench", "report", "lint", "clean"]
    listed = run("make", "--no-print-directory", cwd=ROOT)
    assert re.findall(r"^  make (\w+)", listed, re.MULTILINE) == targets
