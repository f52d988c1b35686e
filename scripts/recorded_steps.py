"""What an engine's steps read: noted while it serves, and its experts counted on the device after.

Between two steps the host only notes a time and which tokens are read. When the steps are over and
no other request has come, the pool still holds what they left there; so each of them is run again
over the same tokens, by a program that is the model's own decode and gives the number of experts
that at least one token of the step went to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import LatentPool, latent_bytes_per_token
from dsjax.engine import Engine
from dsjax.engine.compiled import compiled
from dsjax.engine.pending import Reading
from dsjax.engine.programs import ModelKey, RowShape, rows_of
from dsjax.engine.state import Sequence, Step
from dsjax.layers.moe import MoE
from dsjax.model import Block, DeepSeekV2
from dsjax.plan.expected import share_of_experts
from dsjax.weights.host_experts import stored_bytes


@dataclass(frozen=True)
class StepRead:
    """A step as it was launched.

    Attributes:
        begun: when, in seconds of `time.perf_counter`.
        decoding: of each sequence that decodes itself, its slot, and its tokens cached before.
        prompt_tokens: tokens of prompts beside them.
    """

    begun: float
    decoding: list[tuple[Sequence, int, int]]
    prompt_tokens: int


class Recorder:
    """Notes the steps of an engine of one lane, from when it is made on.

    Attributes:
        steps: the steps so far.
        on_step: called with each before it is launched.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[StepRead] = []
        self.on_step: Callable[[StepRead], None] = lambda _: None
        self._runner = engine._runner
        read = self._runner.read

        def noted(steps: Listing[Step], prompt_logprobs: Container[Sequence] = ()) -> Reading:
            (step,) = steps
            decoding = [(s, _slot(s), s.num_cached - 1) for s in step.decoding]
            prompts = sum(piece.num_tokens for piece in step.pieces)
            self.steps.append(StepRead(time.perf_counter(), decoding, prompts))
            self.on_step(self.steps[-1])
            return read(steps, prompt_logprobs)

        self._runner.read = noted  # type: ignore[method-assign]

    def full_decodes(self, batch: int, skipped: int = 4) -> list[StepRead]:
        """Returns the newest steps in a row that decode `batch` sequences and read no prompt.

        Without the first `skipped`, which follow steps of another kind, and without the last,
        which reads on texts that have ended.
        """
        newest: list[StepRead] = []
        for step in reversed(self.steps):
            if len(step.decoding) == batch and not step.prompt_tokens:
                newest.append(step)
            elif newest:
                break
        return newest[::-1][skipped:-1]

    def experts_read(self, steps: Listing[StepRead]) -> np.ndarray:
        """Returns how many experts of each sparse layer the tokens of each step went to.

        Args:
            steps: of the newest requests, which have ended and have no others after them.

        Returns:
            int32 [steps, sparse layers], counted on the device.
        """
        runner = self._runner
        assert runner._arrays is not None
        size = runner.shapes.decode_sizes[-1]
        shape = RowShape(size, None, size)
        nobody = runner._nobody
        counts = []
        program = None
        for step in steps:
            newest_S = np.zeros(nobody + 1, np.int32)
            described = np.zeros((3, size), np.int32)
            described[0] = nobody
            for index, (sequence, slot, cached) in enumerate(step.decoding):
                newest_S[slot] = sequence.tokens[cached]
                described[:, index] = slot, cached, 1
            integers_RK = np.zeros((1, shape.num_integers), np.int32)
            integers_RK[0, : described.size] = described.reshape(-1)
            arrays = runner._arrays
            newest, integers = runner._put(newest_S), runner._put(integers_RK)
            given = (runner._leaves, arrays.pool, newest, arrays.table_SP, integers)
            program = program or compiled(
                count_experts,
                (runner._key, shape),
                given,
                (1,),
                (runner._sharding, runner._pool_sharding),
            )
            found_L, pool = program(*given)
            runner._arrays = arrays._replace(pool=pool)
            counts.append(found_L)
        return np.stack(jax.device_get(counts))


def count_experts(
    key: ModelKey,
    shape: RowShape,
    leaves: tuple[jax.Array, ...],
    pool: LatentPool,
    newest_S: jax.Array,
    table_SP: jax.Array,
    integers_RK: jax.Array,
) -> tuple[jax.Array, LatentPool]:
    """Decodes as `programs.read_row` does; returns the experts used of each layer, and the pool."""
    model = key.model(leaves)
    rows = rows_of(shape, newest_S, table_SP, integers_RK)
    view, found = rows.view, []

    def run(
        carry: tuple[jax.Array, LatentPool], xs: tuple[Block, jax.Array]
    ) -> tuple[tuple[jax.Array, LatentPool], jax.Array]:
        (x_BTD, pool), (block, layer) = carry, xs
        out_BTD, pool = block.attention.extend(block.attention_norm(x_BTD), pool, view, layer)
        x_BTD, stats = block._feed_forward(x_BTD + out_BTD, view.mask(), None, None)
        used = 0 if stats is None else jnp.sum(stats.load_E > 0, dtype=jnp.int32)
        return (x_BTD, pool), jnp.int32(used)

    carry = (model.embed.rows(rows.tokens_RT), pool)
    for stack in model.stacks():
        numbers = stack.first + jnp.arange(stack.num_layers, dtype=jnp.int32)
        carry, counts_L = jax.lax.scan(run, carry, (stack.layers, numbers))
        if isinstance(stack.layers.feed_forward, MoE):
            found.append(counts_L)
    return jnp.concatenate([jnp.zeros(0, jnp.int32), *found]), carry[1]


def seconds_a_step(steps: Listing[StepRead]) -> float:
    """Returns the time from one step's launch to the next one's, the mean of steps in a row."""
    return (steps[-1].begun - steps[0].begun) / (len(steps) - 1)


def step_bytes(
    model: DeepSeekV2, rows: float, cached: float, experts_of_layers: float
) -> dict[str, float]:
    """Returns the bytes that a decode step has to read at least.

    Args:
        model: the model, whose arrays say how wide they are.
        rows: tokens of the step.
        cached: tokens whose latents it attends to, of all sequences.
        experts_of_layers: experts that it uses, summed over the layers.
    """
    config = model.config
    found = {"experts": 0.0, "embedding": 0.0, "other_weights": 0.0}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = variable[...]
        size = stored_bytes(array.shape, array.dtype)
        if path[0] == "embed":
            found["embedding"] += rows * size / config.vocab_size
        elif path[0] == "moe_layers" and path[-3] == "feed_forward":  # the router lies deeper
            assert config.moe is not None
            each = size / (config.num_moe_layers * config.moe.num_experts)
            found["experts"] += experts_of_layers * each
        else:
            found["other_weights"] += size
    width = jnp.dtype(model.options.runtime.cached_dtype).itemsize
    found["latents"] = cached * latent_bytes_per_token(config, width)
    return found


def decode_figures(
    recorder: Recorder, model: DeepSeekV2, batch: int, read_rate: float, most: int
) -> dict[str, Any]:
    """Returns the speed of the newest steps that decode `batch` sequences, beside their bound.

    Args:
        recorder: of an engine that is at rest.
        model: the engine's.
        batch: sequences.
        read_rate: bytes a second of a plain read in this run.
        most: of the steps are timed.

    Raises:
        ValueError: fewer than two such steps followed one another.
    """
    steps = recorder.full_decodes(batch)[: most + 1]
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} steps in a row had {batch} sequences: let texts be longer")
    seconds = seconds_a_step(steps)
    steps = steps[:-1]  # the last one's launch ends the time of the one before
    used = recorder.experts_read(steps)
    cached = float(np.mean([sum(c for _, _, c in step.decoding) for step in steps]))
    least = step_bytes(model, batch, cached, float(used.sum(axis=1).mean()))
    bound = sum(least.values()) / read_rate
    figures: dict[str, Any] = {
        "batch": batch,
        "steps": len(steps),
        "cached_a_sequence": cached / batch,
        "seconds": seconds,
        "tokens_per_second": batch / seconds,
        "bytes": least,
        "bound_seconds": bound,
        "of_bound": bound / seconds,
    }
    if (moe := model.config.moe) is not None:
        even = moe.num_experts * share_of_experts(moe, batch)
        figures["distinct_experts"] = float(used.mean())
        figures["distinct_by_layer"] = [round(float(x), 2) for x in used.mean(axis=0)]
        figures["distinct_if_even"] = even
        figures["of_even_routing"] = float(used.mean()) / even
    return figures


def spread_tokens(model: DeepSeekV2, factor: float) -> None:
    """Makes routing near-uniform: scales the embedding, so that a token's own row leads its stream.

    The router's weights are random, so tokens whose streams have nothing in common go anywhere.
    """
    model.embed.weight[...] = model.embed.weight[...] * factor


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
