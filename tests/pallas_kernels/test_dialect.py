"""What all ops of the package have alike: files, names, and no arrow from one op to another."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(pallas_kernels.__file__).parent
OPS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def imports_of(path):
    """Every module of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def other_ops(op, imports):
    """The ops among some imports that are not this one."""
    found = {name.split(".")[1] for name in imports if name.startswith("pallas_kernels.")}
    return found & {*OPS} - {op}


@pytest.mark.core
@pytest.mark.parametrize("op", OPS)
def test_an_op_needs_no_other(op):
    for path in (ROOT / op).glob("*.py"):
        assert not other_ops(op, imports_of(path)), path


@pytest.mark.core
def test_the_rule_finds_what_it_should():
    assert other_ops("mla_decode", ["pallas_kernels.mla_attention.tiles"]) == {"mla_attention"}
    assert other_ops("mla_decode", ["pallas_kernels.mla_attention"]) == {"mla_attention"}
    assert not other_ops("mla_decode", ["pallas_kernels.chips", "pallas_kernels.mla_decode.pages"])


@pytest.mark.core
def test_what_ops_share_imports_no_op():
    for path in ROOT.glob("*.py"):
        assert not other_ops("", imports_of(path)), path


@pytest.mark.core
@pytest.mark.parametrize("op", OPS)
def test_an_op_says_what_it_takes_and_has_its_cases(op):
    module = importlib.import_module(f"pallas_kernels.{op}")
    choice, *sizes = inspect.signature(module.supported).parameters.values()
    assert choice.name in ("implementation", "transport")
    assert all(size.kind is inspect.Parameter.KEYWORD_ONLY for size in sizes)
    assert sizes[-1].name == "chip"
    assert (ROOT / op / "cases.py").exists()
    for name in getattr(module, "IMPLEMENTATIONS", ()):
        assert (ROOT / op / f"{name}.py").exists()
    # Files with kernels are called after their chip.
    for path in (ROOT / op).glob("*.py"):
        for chip in ("tpu", "mosaic_gpu"):
            if any(name.startswith("jax.experimental.pallas." + chip) for name in imports_of(path)):
                prefix = "tpu" if chip == "tpu" else "hopper"
                assert path.name.startswith(prefix), path
