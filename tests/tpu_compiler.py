"""Compiles programs for TPUs that are not there, and keeps what was found.

A program is always lowered. It is compiled where there is no record in `tests/tpu_records` of what
this compiler makes of that lowered text, so a record only ever stands for a result that the same
input had. `DSJAX_TEST_COMPILE` is `changed` (that), `all` (compile everything, and fail where a
record says otherwise or is missing) or `renew` (compile everything and write the records).

libtpu wants a process to itself, so a test calls `run_compiler` with a module whose `main` lowers
programs and prints `facts` of each.
"""

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "tpu_records"
RENEW = "scripts/test --renew"
# Who reads a compiled program, and who lays devices out, which its text does not say: where one of
# these changes, records are of no use.
READERS = ("tests/tpu_facts.py", "dsjax/mesh/axes.py")
# More of them, by the function of `tests/tpu_facts.py` that asks them.
READERS_OF = {
    "collectives_and_memory": ("dsjax/plan/collectives.py", "dsjax/plan/program.py"),
}
_compiled: list[str] = []


def run_compiler(module: str, *arguments: object) -> list[dict]:
    """Runs a module of programs in a process of its own; returns the JSON lines that it printed."""
    # What is compiled here is not of the CPU programs that the tests share.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    _compiled.extend(each["compiled"] for each in found if each.get("compiled"))
    return found


def abstract_layer(create: Callable[[], Any], rules: Any) -> tuple[Any, Any]:
    """Returns a layer's graph and its parameters' shapes in bfloat16, divided as the rules say."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.model import param_shardings

    graph, state = nnx.split(nnx.eval_shape(create))
    places = param_shardings(state, rules)
    return graph, jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place),
        state,
        places,
    )


def take_compiled() -> list[str]:
    """Returns the programs compiled since the last call because their record did not hold."""
    names = list(_compiled)
    _compiled.clear()
    return names


def facts(
    file: str,
    program: str,
    lowered: "jax.stages.Lowered",
    topology: str,
    describe: Callable[["jax.stages.Compiled"], dict[str, Any]],
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what `describe` says of the compiled program, from the record where that holds.

    Args:
        file: which of the files of records.
        program: its name there.
        lowered: the program.
        topology: libtpu's name of the chips that it is for.
        describe: says what the tests want to know, as JSON; a function of `tests/tpu_facts.py`.
        options: the compiler's.

    Raises:
        AssertionError: everything is to be compiled, and the record says otherwise.
    """
    path, mode = RECORDS / f"{file}.json", os.environ.get("DSJAX_TEST_COMPILE", "changed")
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = {
        "lowered": _digest(canonical(lowered.as_text()), topology, json.dumps(options)),
        "compiler": ", ".join(
            f"{package} {importlib.metadata.version(package)}" for package in ("libtpu", "jaxlib")
        ),
        "read_by": read_by(describe.__name__),
    }
    record = records.get(program, {})
    held = record.get("key") == key
    if held and mode == "changed":
        return record["facts"]
    found = json.loads(json.dumps(describe(lowered.compile(options))))
    if mode == "renew":
        records[program] = {"key": key, "facts": found}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n", "utf-8")
    elif mode == "all":
        assert held, f"{path.name} has no record of {program} as it is now; renew it: {RENEW}"
        assert record["facts"] == found, f"{path.name} is wrong about {program}; renew it: {RENEW}"
    return found | ({"compiled": f"{file}: {program}"} if mode == "changed" else {})


def canonical(text: str) -> str:
    """A lowered program without what the compiler makes nothing of: names and places in our files.

    Pallas puts a kernel into the text as encoded MLIR, with the file and line of each operation.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    def readable(body: re.Match[str]) -> str:
        context = mlir.make_ir_context()
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        with context:
            module = ir.Module.parse(base64.b64decode(body[2]))
            return body[1] + str(module.operation.get_asm(enable_debug_info=False))

    text = re.sub(r"^module @\S+", "module", text)
    # From jax 0.12 on those places are beside the kernel, encoded too.
    text = re.sub(r"(\\22debug_locations\\22: \\22)[A-Za-z0-9+/=]+", r"\1", text)
    return re.sub(r"(\\22body\\22: \\22)([A-Za-z0-9+/=]+)", readable, text)


def read_by(describe: str) -> str:
    """A digest of the code that reads a compiled program for a function of `tests/tpu_facts.py`."""
    return _digest(*map(_code, (*READERS, *READERS_OF.get(describe, ()))), describe)


def _code(file: str) -> str:
    return ast.dump(ast.parse((ROOT / file).read_text(encoding="utf-8")))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
