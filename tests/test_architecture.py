"""House rules that a program can check: imports go down, files are short, names say something."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The rooms of dsjax from the top floor down. A file imports its own room and rooms below it, so
# that no two rooms import each other.
FLOORS = (
    "__main__",
    "cli",
    "api",
    "serving",
    "evaluation",
    "plan",
    "training",
    "engine",
    "inference",
    "weights",
    "counts",
    "model",
    "layers",
    "cache",
    "kernels",
    "quantise",
    "processes",
    "mesh",
    "data",
    "families",
    "config",
    "files",
    "progress",
    "chips",
    "xla_options",
)
MAX_LINES, MAX_KERNEL_LINES = 400, 600
KERNEL_FILES = ("tpu", "hopper")  # and what a kernel's second file is called after
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
SOURCES = sorted(
    path
    for folder in ("dsjax", "pallas_kernels", "configs", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
assert len(SOURCES) > 40


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(module: str) -> str | None:
    """The room of `dsjax.room.file`; None for other packages."""
    package, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if package == "dsjax" else None


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, inside functions too, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from dsjax import model` names the room in the alias.
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def upward_imports(room: str, imports: list[tuple[int, str]]) -> list[str]:
    """What a file of this room must not import."""
    floor = FLOORS.index(room)
    faults = []
    for line, module in imports:
        target = room_of(module)
        # What is no room is a public name of the package itself, which gives what `api` has.
        target = target if target is None or target in FLOORS else "api"
        if target is not None and target != room and FLOORS.index(target) < floor:
            faults.append(f"line {line}: {room} imports {module}")
    return faults


@pytest.mark.core
def test_every_room_has_a_floor_and_every_floor_is_a_room():
    rooms = {path.relative_to(ROOT / "dsjax").parts[0] for path in (ROOT / "dsjax").rglob("*.py")}
    assert {room.removesuffix(".py") for room in rooms} - {"__init__"} == {*FLOORS}
    assert len(FLOORS) == len({*FLOORS})


@pytest.mark.core
def test_imports_go_down_only():
    faults = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        if parts[:2] == ("dsjax", "__init__.py") or parts[0] != "dsjax":
            continue
        room = parts[1].removesuffix(".py")
        faults += [f"{name_of(path)}, {fault}" for fault in upward_imports(room, imports_of(path))]
    assert not faults, "\n".join(faults)


@pytest.mark.core
def test_the_rule_finds_what_it_should():
    assert upward_imports("layers", [(3, "dsjax.model.DeepSeekV2")])
    assert upward_imports("inference", [(3, "dsjax.training.loop.fit")])
    assert upward_imports("inference", [(3, "dsjax.training")])
    assert upward_imports("model", [(3, "dsjax.load")])
    assert upward_imports("config", [(3, "dsjax.data.tokenizer.load_tokenizer")])
    assert not upward_imports(
        "model", [(3, "dsjax.layers.attention.MLA"), (4, "dsjax.model"), (5, "jax")]
    )


@pytest.mark.core
def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    faults = [
        f"{name_of(path)}:{line}: {module}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == "pallas_kernels"
        for line, module in imports_of(path)
        if module.partition(".")[0] not in allowed
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.core
def test_configs_import_config_alone():
    files = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "configs"]
    assert len(files) >= 5
    assert all((ROOT / "dsjax" / path.relative_to(ROOT)).samefile(path) for path in files)
    rooms = {module.split(".")[1] for path in files for _, module in imports_of(path)}
    assert rooms <= {"config", "configs", "replace"}  # the last is of dataclasses


@pytest.mark.core
def test_files_are_short():
    faults = []
    for path in SOURCES:
        is_kernel = "pallas_kernels" in path.parts and path.name.startswith(KERNEL_FILES)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_LINES
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > limit:
            faults.append(f"{name_of(path)}: {lines} lines, the limit is {limit}")
    assert not faults, "\n".join(faults)


@pytest.mark.core
def test_no_room_is_called_after_nothing():
    faults = [name_of(p) for p in SOURCES if {*p.with_suffix("").parts} & VAGUE_NAMES]
    assert not faults


IMPORT_ALL = """
import importlib, pkgutil, sys
import jax
from jax._src import xla_bridge
before = set(sys.modules)
for package in ("dsjax", "pallas_kernels"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.rpartition(".")[2].startswith(("tpu", "hopper", "__main__")):
            importlib.import_module(info.name)
assert not xla_bridge.backends_are_initialized(), "importing looked for devices"
heavy = {"torch", "transformers", "tensorflow", "wandb", "matplotlib"} & set(sys.modules)
assert not heavy, f"importing pulled in {heavy}"
print(len([m for m in sys.modules if m.startswith(("dsjax", "pallas_kernels"))]))
"""


@pytest.mark.core
def test_importing_looks_for_no_device_and_no_torch():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 25
