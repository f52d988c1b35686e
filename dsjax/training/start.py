"""Where a run begins: what its folder says of it, and the state that its steps go on from."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from dsjax.config import ModelConfig, TrainConfig
from dsjax.config.run_file import RUN_FILE
from dsjax.config.serialize import differing_fields
from dsjax.config.stored import run_from_json
from dsjax.config.unused import fields_without_effect
from dsjax.data.loader import Loader
from dsjax.data.tokenizer import load_tokenizer
from dsjax.files import read_json
from dsjax.kernels import Kernels, choose_kernels
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from dsjax.model import create_model
from dsjax.processes import HostShard
from dsjax.training.checkpoints import (
    RunCheckpoints,
    check_stored_forms,
    optimizer_to_dict,
    state_from_dict,
)
from dsjax.training.data_place import check_data, restore_place
from dsjax.training.dropping import with_budget
from dsjax.training.step import TrainState, init_train_state
from dsjax.weights import load_weights, locate
from dsjax.weights.checksums import require_checksums

_LOG = logging.getLogger(__name__)


class LaidOut(NamedTuple):
    """A run on its devices.

    Attributes:
        config: the run, with what its folder or the mesh settles filled in.
        stored: what its folder says that it is, or None.
        mesh: the devices.
        rules: where its arrays live.
        kernels: which run.
    """

    config: TrainConfig
    stored: TrainConfig | None
    mesh: Mesh
    rules: ShardingRules
    kernels: Kernels


def lay_out(config: TrainConfig, devices: Sequence[jax.Device] | None) -> LaidOut:
    """Lays a run out on devices, by default all of every process; says what has no effect.

    Raises:
        ValueError: a field of the config does not fit the devices, or the folder's run.
    """
    mesh = make_mesh(config.mesh, None if devices is None else list(devices))
    rules = train_rules(mesh if mesh.size > 1 else None)
    kernels = choose_kernels(mesh.devices.flat[0], config.model, config.runtime, rules)
    check_batch(config, rules)
    stored = stored_config(Path(config.directory).absolute())
    if jax.process_index() == 0:
        for line in fields_without_effect(config):
            _LOG.warning("%s", line)
    return LaidOut(with_budget(config, rules, stored), stored, mesh, rules, kernels)


def check_stored(stored: TrainConfig, config: TrainConfig, run: Path) -> None:
    """Refuses to go on with another model, other stored types or other data than a folder's run."""
    where = f"directory={str(run)!r}"
    check_same(stored.model, config.model, where)
    check_stored_forms(stored, config, where)
    check_data(stored.data, config.data, str(run))
    for name in ("seed", "init_from"):
        old, new = getattr(stored, name), getattr(config, name)
        if old != new:
            _LOG.warning(
                "%s=%r has no effect: %s goes on with the weights that it has (%s=%r)",
                *(name, new, run, name, old),
            )


def check_batch(config: TrainConfig, rules: ShardingRules) -> None:
    """Refuses slices of a batch, or rows, that the mesh does not divide."""
    slice_size = config.batch.size // config.batch.accumulate
    if slice_size % rules.num_batch_shards():
        raise ValueError(
            f"batch.size={config.batch.size}: its slices of {slice_size} sequences must be "
            f"divisible by the {rules.num_batch_shards()} batch shards of the mesh"
        )
    stripes = rules.num_shards("length")
    if config.data.length % stripes:
        raise ValueError(
            f"data.length={config.data.length}: must be divisible by mesh.context={stripes}"
        )
    kernel = config.runtime.kernels.mla_attention
    if stripes > 1 and kernel == "reference":
        raise ValueError(
            f"runtime.kernels.mla_attention={kernel!r}: must see a row's keys at once, so not with "
            f"mesh.context={stripes}"
        )


def check_vocabulary(config: TrainConfig) -> None:
    """Refuses a tokenizer with more ids than the model has rows for."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the "
            f"{tokenizer.vocab_size} of data.tokenizer={config.data.tokenizer!r}"
        )


def stored_config(run: Path) -> TrainConfig | None:
    """Returns what the run's folder says that it is; None where it says nothing."""
    path = run / RUN_FILE
    if not path.exists():
        return None
    try:
        require_checksums(run, RUN_FILE)
        content = read_json(path)
    except ValueError as error:
        # The steps' own shapes are checked in any case, and the file is written anew.
        _LOG.warning("%s: damaged, so this run's config is not compared with it", error)
        return None
    return run_from_json(content, str(path))


def check_start(config: TrainConfig) -> None:
    """Compares with the model to start from, before any weight is read.

    What fine-tuning changes is said and taken from the run; all else must be the same.
    """
    here, there = config.model, locate(config.init_from).config
    as_here = dataclasses.replace(
        there,
        **{name: getattr(here, name) for name in ("max_length", "norm_eps", "init_std")},
        attention=dataclasses.replace(
            there.attention, yarn=here.attention.yarn, rope_theta=here.attention.rope_theta
        ),
    )
    check_same(as_here, here, f"init_from={config.init_from!r}")
    for field in differing_fields(there, here, "model."):
        _LOG.warning("init_from=%r: %s; going on with this run's", config.init_from, field)


def check_same(there: ModelConfig, here: ModelConfig, where: str) -> None:
    """Refuses another model; names the fields in which it differs."""
    # How long a context may be is a limit of use: it changes no parameter.
    there = dataclasses.replace(there, max_length=here.max_length)
    if there != here:
        fields = "; ".join(differing_fields(there, here, "model."))
        raise ValueError(f"{where}: holds a model of another config: {fields}")


def fresh_state(
    config: TrainConfig, abstract: TrainState, rules: ShardingRules, kernels: Kernels
) -> TrainState:
    """Returns the state before the first step: of random weights, or of those to start from."""
    if config.init_from:
        check_start(config)
        model = load_weights(
            config.init_from,
            dtype=config.runtime.param_dtype,
            runtime=config.runtime,
            rules=rules,
            kernels=kernels,
        )
    else:
        model = create_model(config.model, config.seed, config.runtime, rules, kernels)
    create = functools.partial(init_train_state, config.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, donate_argnums=0, out_shardings=shardings)(nnx.state(model))


def restored_state(
    abstract: TrainState,
    checkpoints: RunCheckpoints,
    loader: Loader | None,
    shard: HostShard,
    step: int | None = None,
) -> TrainState | None:
    """Returns the state of a checkpoint, with the loader put there; None where none is.

    Args:
        abstract: shapes and shardings.
        checkpoints: the run's.
        loader: is put where the checkpoint was; None leaves it.
        shard: which of the loaders' places is this process's.
        step: the one to go on from; None takes the newest that is not damaged.
    """
    optimizer = optimizer_to_dict(abstract)
    if step is None:
        found = checkpoints.restore_newest(abstract.params, optimizer)
    else:
        found = checkpoints.restore_chosen(step, abstract.params, optimizer)
    if found is None:
        return None
    params, optimizer, data_states = found
    if loader is not None:
        restore_place(loader, data_states, shard.index)
    return state_from_dict(optimizer, params, abstract)
