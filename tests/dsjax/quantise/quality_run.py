"""Trains a small model and quantises it; run as a module, in a process that optimises its programs.

    python -m tests.dsjax.quantise.quality_run FOLDER [wide]

prints one JSON line: of each recipe, of fp8 with rows in float8 too, of int4 whose numbers are
searched for, and of plain weights with a cache of 8 bits, the mean divergence of the next token's
distribution from the plain model's on held-out text, in nats a token; and nats a byte of the plain
model and of each.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import Part, View, allocate_pool
from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    KernelConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    RuntimeConfig,
    SourceConfig,
    TrainConfig,
)
from dsjax.config.quantisation import RECIPES
from dsjax.config.runtime import LATENT_DTYPES
from dsjax.configs.models import tiny
from dsjax.kernels import PAGE_SIZE
from dsjax.model import DeepSeekV2
from dsjax.training.loop import fit
from dsjax.weights import calibration_text, load_weights
from dsjax.weights.convert import convert

HELD_OUT = (49, 16, 128)  # 100,352 bytes
STEPS = 400
_SMALL = replace(tiny.config, vocab_size=264, num_layers=2, init_std=0.06)
_MOE = tiny.config.moe
assert _MOE is not None
MODELS = {
    "small": _SMALL,
    # As wide as takes some twenty minutes: whole groups of 64 in every matrix.
    "wide": replace(
        _SMALL,
        hidden_dim=512,
        num_layers=4,
        intermediate_dim=1536,
        init_std=0.04,
        attention=replace(tiny.config.attention, num_heads=8, q_lora_rank=256, kv_lora_rank=128),
        moe=replace(_MOE, intermediate_dim=256),
    ),
}
SEARCHED = "int4 searched"
IN_FLOAT8 = "fp8 products"


def main(folder: str, size: str = "small") -> None:
    """Trains on half of Python's own library, and prints figures of the other half."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = Path(folder) / "text"
    text.mkdir()
    for path in files[::2]:
        (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
    run = TrainConfig(
        directory=str(Path(folder) / "run"),
        model=MODELS[size],
        data=DataConfig((SourceConfig(str(text), format="text", glob="*.txt"),), length=128),
        batch=BatchConfig(size=8),
        num_steps=STEPS,
        runtime=RuntimeConfig(dtype="float32", remat="none"),
        optimizer=OptimizerConfig(
            peak_learning_rate=4e-3 if size == "small" else 1e-3, warmup_steps=20
        ),
        loss=LossConfig(BalanceConfig(0.003, 0.05, 0.02)),
        checkpoint=CheckpointConfig(every=STEPS),
        log=LogConfig(every=100, eval_every=0),
    )
    fit(run)
    text_after = np.frombuffer(b"".join(path.read_bytes() for path in files[1::2]), np.uint8)
    held_out: np.ndarray = text_after[: np.prod(HELD_OUT)].reshape(HELD_OUT).astype(np.int32)
    plain = log_probabilities(load_weights(run.directory))
    others = {
        name: log_probabilities(load_weights(run.directory, quantize=name)) for name in RECIPES
    }
    in_float8 = KernelConfig(quantised_products="fp8")
    others[IN_FLOAT8] = log_probabilities(
        load_weights(run.directory, quantize="fp8", kernels=in_float8)
    )
    searched = Path(folder) / "searched"
    calibration_text.NUM_ROWS = 24
    convert(run.directory, searched, quantize="int4", calibrate=text, progress=False)
    others[SEARCHED] = log_probabilities(load_weights(searched))
    for kept in LATENT_DTYPES:
        model = load_weights(run.directory, latent_dtype=kept)
        others[f"{kept} latents"] = cached_log_probabilities(model)
    divergence, nats = dict.fromkeys(others, 0.0), dict.fromkeys(("plain", *others), 0.0)
    for tokens in held_out:
        before = plain(tokens)
        nats["plain"] += nats_of(before, tokens)
        for name, other in others.items():
            after = other(tokens)
            divergence[name] += float(jnp.sum(jnp.exp(before) * (before - after)))
            nats[name] += nats_of(after, tokens)
    for sums in (divergence, nats):
        sums.update({name: total / held_out.size for name, total in sums.items()})
    print(json.dumps({"divergence": divergence, "nats": nats}))


def log_probabilities(model: DeepSeekV2) -> Callable[[np.ndarray], jax.Array]:
    """Returns a compiled function of tokens."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens)))
    return lambda tokens: run(state, tokens)


def cached_log_probabilities(model: DeepSeekV2) -> Callable[[np.ndarray], jax.Array]:
    """Returns the same of a model that reads rows into the cache."""
    graphdef, state = nnx.split(model)
    rows, length = HELD_OUT[1:]
    table = jnp.arange(rows * length // PAGE_SIZE, dtype=jnp.int32).reshape(rows, -1)
    nothing, full = (jnp.full(rows, number, jnp.int32) for number in (0, length))
    view = View((Part(table, nothing, full, length, is_first=True),))
    latent_dtype, rope_dtype = model.options.latent_dtype, model.options.dtype

    def run(state: nnx.State, tokens: jax.Array) -> jax.Array:
        pool = allocate_pool(model.config, table.size, latent_dtype, rope_dtype=rope_dtype)
        places = jnp.arange(tokens.size)
        logits, _ = nnx.merge(graphdef, state).extend(tokens.reshape(-1), pool, view, places)
        return jax.nn.log_softmax(logits.reshape(*tokens.shape, -1))

    compiled = jax.jit(run)
    return lambda tokens: compiled(state, tokens)


def nats_of(log_probabilities: Any, tokens: np.ndarray) -> float:
    """Sums what the tokens after the first of each row cost."""
    wanted = jnp.asarray(tokens[:, 1:, None])
    return -float(jnp.take_along_axis(log_probabilities[:, :-1], wanted, -1).sum())


if __name__ == "__main__":
    main(*sys.argv[1:])
