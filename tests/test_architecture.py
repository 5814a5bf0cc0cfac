"""The house: imports go one way, Triton comes lazily, files stay short, and every module says what is public."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fusedlr

PACKAGE = Path(fusedlr.__file__).parent
ROOT = PACKAGE.parent
KERNELS = ROOT / "kernels"

# Upward only: a module imports modules of a lower layer or of its own (families, backends, schedules among themselves).
LAYERS = [
    {"schedules", "rule", "flat"},
    {"clipping", "live", "precision", "scaling"},
    {"codecs"},
    {"conversion"},
    {"capture", "groups", "state"},
    {"gather", "registration"},
    {"backends"},
    {"checkpoint"},
    {"optimizer"},
    {"optimizers", "integrations"},
    {"comparison"},
    {"__init__", "__main__"},
]


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    """The module or subpackage of fusedlr that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def deferred(tree: ast.Module) -> set[ast.AST]:
    """The nodes that do not run when the module is imported: function bodies and TYPE_CHECKING blocks."""
    later: set[ast.AST] = set()
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if checking or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            later.update(ast.walk(node))
    return later


def imports(path: Path, *, at_import_time: bool = False) -> list[str]:
    """The absolute names of what a file imports."""
    tree = ast.parse(path.read_text())
    skipped = deferred(tree) if at_import_time else set()
    home = KERNELS if path.is_relative_to(KERNELS) else PACKAGE
    prefix = ["fusedlr", "kernels"] if home == KERNELS else ["fusedlr"]
    package = [*prefix, *path.relative_to(home).parent.parts]
    names: list[str] = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def targets(path: Path, **how: bool) -> set[str]:
    """The modules and subpackages of fusedlr that a file imports, its own left out."""
    found = set()
    for name in imports(path, **how):
        parts = name.split(".")
        if parts[0] == "fusedlr" and len(parts) > 1:
            inside = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
            found.add(parts[1] if inside or parts[1] == "kernels" else "__init__")
    return found - {part_of(path)}


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    mine = layer_of(part_of(path))
    upward = {name for name in targets(path, at_import_time=True) - {"kernels"} if layer_of(name) >= mine}
    assert upward == set()


def test_the_only_deferred_upward_imports_are_the_known_ones() -> None:
    """``lr_scheduler()`` imports the facade; types are not imports."""
    upward = set()
    for path in sources(PACKAGE):
        tree = ast.parse(path.read_text())
        typed = {
            n for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for n in ast.walk(node)
        }  # fmt: skip
        kept = ast.Module([n for n in tree.body if n not in typed], [])
        names = {
            node.module for node in ast.walk(kept) if isinstance(node, ast.ImportFrom) and node.level and node.module
        }
        for name in names:
            part = name.split(".")[0]
            if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file():
                here = part_of(path)
                if part != here and layer_of(part) > layer_of(here) and path.parent == PACKAGE:
                    upward.add((here, part))
    assert upward == {("optimizer", "integrations")}


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: path.name)
def test_kernels_never_import_fusedlr(path: Path) -> None:
    outside = {name for name in imports(path) if name.startswith("fusedlr") and not name.startswith("fusedlr.kernels")}
    assert outside == set()
    allowed = {"torch", "triton", "fusedlr", "__future__", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_only_the_triton_backend_imports_the_kernels_and_only_when_used() -> None:
    for path in sources(PACKAGE):
        at_import = {name.split(".")[0] for name in imports(path, at_import_time=True)}
        assert "triton" not in at_import, path
        assert "kernels" not in targets(path, at_import_time=True), path
        if path not in (PACKAGE / "backends" / "triton.py", PACKAGE / "backends" / "buckets.py"):
            assert "kernels" not in targets(path), path


def test_the_import_reader_sees_what_it_must(tmp_path: Path) -> None:
    probe = PACKAGE / "backends" / "triton.py"
    assert "kernels" in targets(probe)
    assert {"rule", "state"} <= targets(probe, at_import_time=True)
    assert "__init__" not in targets(PACKAGE / "optimizer.py")


def test_works_without_triton(tmp_path: Path) -> None:
    script = tmp_path / "without_triton.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys

            class Blocked:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "triton":
                        raise ImportError("blocked")  # or a ModuleNotFoundError, which is one

            sys.meta_path.insert(0, Blocked())
            import torch
            import fusedlr
            from fusedlr import schedules

            model = torch.nn.Linear(3, 2)
            before = model.weight.detach().clone()
            optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, clip=1.0, schedule=schedules.Cosine(10))
            for _ in range(2):
                model(torch.ones(4, 3)).sum().backward()
                optimizer.step()
            assert optimizer.steps_taken == 2
            assert not torch.equal(model.weight, before)
            assert not any(name.split(".")[0] == "triton" for name in sys.modules), "triton was imported"
            assert "fusedlr.kernels" not in sys.modules
            assert "because no Triton is installed" in repr(optimizer)
            try:
                fusedlr.AdamW(model.parameters(), backend="triton")
            except RuntimeError as error:
                assert "Triton is not installed" in str(error)
            else:
                raise AssertionError("there is no Triton")
            from fusedlr.__main__ import info

            assert "backend triton: Triton is not installed" in info()
            """
        )
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSEDLR_BACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["fusedlr", "kernels", "tests", "bench", "examples", "docs"])
def test_files_can_be_read_in_one_sitting(folder: str) -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in sources(ROOT / folder)}
    assert lengths
    assert {path: n for path, n in lengths.items() if n > 500} == {}


def test_no_file_is_called_utils() -> None:
    names = [path for folder in (PACKAGE, KERNELS, ROOT / "tests") for path in sources(folder) if "util" in path.stem]
    assert names == []


def public_names(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize(
    "path", [*sources(PACKAGE), *sources(KERNELS)], ids=lambda path: "-".join(path.parts[-2:]).removesuffix(".py")
)
def test_every_module_says_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what is in it"
    defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    if not defined and path.name == "__init__.py" and not any(isinstance(n, ast.ImportFrom) for n in tree.body):
        return  # a package that holds modules only
    names = public_names(path)
    assert names, "no __all__"
    assert len(set(names)) == len(names)
    bound = defined | {
        t.id for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
        for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)
    }  # fmt: skip
    bound |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert set(names) <= bound
