"""Fields of a run that another field switches off, so that nobody waits for what they ask for."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsjax.config.train import TrainConfig


def fields_without_effect(config: TrainConfig) -> list[str]:
    """Names the fields that a run gives a value of its own and that change nothing in it.

    A field that has its default is not named: most runs leave out what they do not use. These runs
    are not refused, as turning one thing off is no reason to take out all that belongs to it.

    Returns:
        A line for each: the field, its value, and the field that switches it off.
    """
    found: list[str] = []

    def unused(name: str, reason: str) -> None:
        """Adds a field of the config if it, or anything in it, differs from its default."""
        *path, last = name.split(".")
        owner: Any = config
        for part in path:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        value = getattr(owner, last)
        (field,) = (field for field in dataclasses.fields(owner) if field.name == last)
        if value and value != field.default:  # 0 asks for nothing
            found.append(f"{name}={value!r} has no effect: {reason}")

    if config.batch.initial_size is None:
        for name in ("ramp_tokens", "ramp_stages"):
            unused(f"batch.{name}", "without batch.initial_size the batch does not grow")
    if config.model.num_moe_layers == 0:
        reason = "the model has no layers of experts"
        unused(
            "model.moe", f"model.num_dense_layers={config.model.num_dense_layers} are all layers"
        )
        for name in ("balance", "dropping", "router_entropy"):
            unused(f"loss.{name}", reason)
    elif config.mesh.expert == 1:
        reason = "mesh.expert=1 exchanges nothing"
        for name in ("expert_exchange", "exchange_chunks"):
            unused(f"runtime.kernels.{name}", reason)
    if config.mesh.context == 1:
        unused("runtime.kernels.latent_exchange", "mesh.context=1 divides no row")
    for name in ("mla_decode", "unroll_decode"):
        unused(f"runtime.kernels.{name}", "training decodes nothing")
    if config.optimizer.warmup_steps >= config.num_steps:
        at = f"optimizer.warmup_steps={config.optimizer.warmup_steps}"
        found.append(
            f"optimizer.peak_learning_rate={config.optimizer.peak_learning_rate!r} is not reached: "
            f"num_steps={config.num_steps} end in the warm-up ({at})"
        )
    if not config.optimizer.decay_at:
        unused("optimizer.decay_factor", "optimizer.decay_at is empty")
    if not config.data.eval_sources:
        for name in ("eval_every", "eval_rows"):
            unused(f"log.{name}", "there are no data.eval_sources")
    if config.init_from:
        for name in ("seed", "model.init_std"):
            unused(name, "init_from gives the weights")
    if config.checkpoint.keep_every is not None:
        every, kept = config.checkpoint.every, config.checkpoint.keep_every
        if kept % every:
            found.append(
                f"checkpoint.keep_every={kept} is no multiple of checkpoint.every={every}: of its "
                "steps only those that are saved are kept"
            )
    if all(source.format == "arrayrecord" for source in config.data.sources):
        for name in ("num_packing_bins", "long_documents"):
            unused(f"data.{name}", "data.sources are packed already")
    for number, source in enumerate(config.data.sources):
        where = f"data.sources.{number}"
        if source.format in ("arrayrecord", "text"):
            unused(f"{where}.text_field", f"format={source.format} has no fields")
        if len(config.data.sources) == 1:
            unused(f"{where}.weight", "it is the only source")
    return found
