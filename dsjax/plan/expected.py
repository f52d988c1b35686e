"""What a compiled program is expected to run of what it holds, where its text does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsjax.config import MoEConfig
from dsjax.plan.program import Instruction, Program


@dataclass(frozen=True)
class Expected:
    """What a program will meet when it runs.

    Attributes:
        exchange_room: how much more room a ragged exchange has than the rows that are expected.
        cached_tokens: of every sequence of a decode that a device holds.
        experts_read: share of a device's experts that its rows belong to, in generation: a product
            reads no others.
    """

    exchange_room: float = 1.0
    cached_tokens: int = 0
    experts_read: float = 1.0


AS_WRITTEN = Expected()


def share_of_experts(config: MoEConfig, tokens: int) -> float:
    """Returns the share of experts that so many tokens go to, where all are as likely."""
    return 1 - (1 - config.top_k / config.num_experts) ** tokens


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


_DECODE_QUERIES = 2  # after the table of pages and the lengths; then their rotary part, and pages
_GROUPED = ("grouped_swiglu", "grouped_matmul")


def decode_work(
    each: Instruction, named: Mapping[str, Instruction], cached_tokens: int
) -> tuple[float, float] | None:
    """FLOPs and bytes of the TPU's kernel for absorbed decode; None for others.

    Every sequence has so many cached tokens. Widths are those in memory: rotary keys of 64 take a
    lane's 128.
    """
    if each.op != "custom-call" or "mla_decode" not in each.name:
        return None
    arrays = [named[name].arrays[0] for name in each.operands[_DECODE_QUERIES:][:4]]
    latent_q, rope_q, latent, rope = arrays
    batch, rows, width = latent_q.shape
    scores = width + rope_q.shape[-1]
    stored = latent.bytes_of(width) + rope.bytes_of(rope.shape[-1])
    flops = 2.0 * batch * rows * cached_tokens * (scores + width)
    moved = sum(x.num_bytes for x in (latent_q, rope_q, *each.arrays))
    return flops, float(batch * cached_tokens * stored + moved)


def grouped_bytes(
    each: Instruction, named: Mapping[str, Instruction], estimate: float, experts_read: float
) -> float:
    """Bytes of a grouped product of the TPU's, which names those of all experts that it has."""
    if experts_read == 1 or not any(name in each.name for name in _GROUPED):
        return estimate
    # Numbers of groups have one dim, weights and scales three.
    operands = (array for name in each.operands if name in named for array in named[name].arrays)
    rows = (array for array in operands if len(array.shape) == 2)
    moved = sum(array.num_bytes for array in (*each.arrays, *rows))
    return moved + experts_read * max(0.0, estimate - moved)
