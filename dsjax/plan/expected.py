"""What a compiled program is expected to run of what it holds, where its text does not say."""

from __future__ import annotations

from collections.abc import Mapping

from dsjax.plan.program import Instruction, Program

# Widths of a head that the TPU's attention kernels take: without and with position, and values.
_NOPE, _ROPE, _VALUE = 128, 64, 128
# Operands before the queries: a table of blocks.
_TABLE = 5
_KEYS = {"mla_attention_forward": _TABLE + 2, "mla_attention_backward": _TABLE + 3}
_KEY_WIDTHS = {
    "mla_attention_forward": (_NOPE + _ROPE) + _VALUE,
    "mla_attention_backward": 3 * (_NOPE + _ROPE) + 2 * _VALUE,
}


def without_further_passes(program: Program) -> Program:
    """Returns a program without the loops whose trips depend on data.

    Those are an exchange's passes after its first, which all devices take only where one has no
    room for what it gets. The first has `exchange_room` times the mean, so none is expected.
    """
    return Program(
        {
            name: tuple(each for each in body if not _depends_on_data(program, each))
            for name, body in program.bodies.items()
        }
    )


def _depends_on_data(program: Program, each: Instruction) -> bool:
    known = "known_trip_count" in each.attributes
    return each.op == "while" and not known and program.trips(each) == 1


def attention_flops(each: Instruction, named: Mapping[str, Instruction]) -> float:
    """FLOPs of one of the TPU's attention kernels, which carry no estimate of their own.

    Causal, over rows of one document: a query attends to half of the keys of its own row and to all
    before it. 2 (192 + 128) a pair and head forward, 2 (3 * 192 + 2 * 128) backward. 0 for others.
    """
    kernel = next((name for name in _KEYS if name in each.name), None)
    if kernel is None:
        return 0.0
    batch, queries, width = each.arrays[0].shape
    heads = width // (_VALUE if kernel.endswith("forward") else _NOPE)
    place = _KEYS[kernel]
    keys = named.get(each.operands[place]) if place < len(each.operands) else None
    num_keys = keys.arrays[0].shape[1] if keys is not None and keys.arrays else queries
    pairs = queries * (max(num_keys, queries) - queries / 2)
    return 2.0 * batch * heads * pairs * _KEY_WIDTHS[kernel]
