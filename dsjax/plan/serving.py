"""The plan of a step of the engine, which reads prompts or decodes, on chips that are not here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dsjax.config import EngineConfig, MeshConfig, ModelConfig, RuntimeConfig
from dsjax.counts import serving_flops
from dsjax.engine.programs import RowShape
from dsjax.engine.runner import Runner
from dsjax.engine.sizes import max_length, num_lanes, num_pages, page_bytes, page_tokens
from dsjax.engine.state import ChunkShape, Limits
from dsjax.kernels import choose_kernels
from dsjax.mesh import inference_rules, make_mesh
from dsjax.model import DeepSeekV2, abstract_model, param_shardings
from dsjax.plan.expected import Expected, share_of_experts
from dsjax.plan.figures import Target, compile_or_say_why, device_bytes, program_figures
from dsjax.plan.pods import Pod
from dsjax.plan.topology import tpu_devices

Use = Literal["prefill", "decode"]


def plan_serving(
    model: ModelConfig,
    runtime: RuntimeConfig,
    engine: EngineConfig,
    topology: str,
    use: Use,
    *,
    mesh: MeshConfig | None = None,
    num_slices: int = 1,
) -> dict[str, Any]:
    """Compiles a step of the engine for chips and returns what it needs of one, ready for JSON.

    Args:
        model: the model.
        runtime: how it is run, its quantisation with it.
        engine: its sizes. Every sequence of a decode is taken to hold `max_length` tokens.
        topology: libtpu's name of one slice, like "v6e:2x4".
        use: "decode" reads one token of each of `max_batch` sequences; "prefill" reads the longest
            chunk of a prompt on every device that has sequences of its own, with nothing before it.
        mesh: how the devices are divided; None divides the experts as far as they go.
        num_slices: slices that DCN joins.

    Returns:
        What `plan_training` returns of memory and time, and `cache_tokens`, which the pool of the
        compiled step holds, as the engine chooses it, and `cache_capacity_tokens`, for which
        there is room beside what the compiled step needs; both of all devices together.

    Raises:
        ValueError: as for `plan_training`; or the weights leave no room for one sequence.
    """
    pod = Pod.of(tpu_devices(topology, num_slices))
    shape = make_mesh(mesh or _usual_mesh(model, len(pod.devices)), list(pod.devices))
    pod = dataclasses.replace(pod, devices=tuple(shape.devices.flat))
    target = Target(topology, num_slices, pod, dict(shape.shape))
    began = time.perf_counter()
    abstract = _model_of_shapes(model, runtime, shape)
    weights = nnx.state(abstract)
    parameters, capacity = device_bytes(weights), pod.rates.capacity_bytes
    pages = num_pages(abstract, engine, (capacity, parameters))
    lanes, page_size = num_lanes(abstract), page_tokens(abstract, engine)
    length = min(max_length(abstract, engine), pages * page_size)
    chunks = tuple(ChunkShape(*chunk) for chunk in engine.chunk_shapes())
    limits = Limits(-(-engine.max_batch // lanes), length, chunks)
    runner = Runner(abstract, engine, limits, pages, np.ones(model.vocab_size, bool))
    row = largest_row(runner.shapes.rows(), use)
    compiled = compile_or_say_why(lambda: runner.program(row), target, {"parameters": weights})
    seconds = time.perf_counter() - began
    tokens = lanes * (row.num_decoding if row.chunk is None else row.chunk.row_tokens)
    work = _work(model, row, lanes, length)
    share = 1.0 if model.moe is None else share_of_experts(model.moe, _tokens_met(tokens, shape))
    # Of a sequence's tokens a device has those that it reads.
    cached = -(-length * engine.page_size // page_size) if use == "decode" else 0
    expected = Expected(runtime.kernels.exchange_room, cached, experts_read=share)
    figures = program_figures(target, compiled, expected)
    taken, page = figures["modelled_seconds"], page_bytes(abstract, engine)
    cache = pages * page
    room = max(0, capacity - (figures["peak_bytes"] - cache)) // page
    return {
        "for": use,
        **figures,
        "parameter_bytes": parameters,
        "cache_bytes": cache,
        "activation_bytes": figures["peak_bytes"] - parameters - cache,
        "cache_tokens": pages * page_size * lanes,
        "cache_capacity_tokens": room * page_size * lanes,
        "cache_bytes_per_token": page // engine.page_size,
        "sequences": lanes * row.num_decoding if use == "decode" else lanes,
        "tokens_of_a_sequence": length if use == "decode" else tokens // lanes,
        "share_of_experts_read": share,
        "model_flops": work / len(pod.devices),
        "modelled_mfu": work / len(pod.devices) / pod.flops_per_second / taken,
        "tokens_per_second": tokens / taken,
        "tokens_per_second_per_chip": tokens / len(pod.devices) / taken,
        "compile_seconds": seconds,
        "assumptions": pod.assumptions(),
    }


def _usual_mesh(model: ModelConfig, chips: int) -> MeshConfig:
    """Experts divided as far as the chips and their number allow, whole copies of that beyond."""
    shards = 1 if model.moe is None else math.gcd(chips, model.moe.num_experts)
    return MeshConfig(data=-1, fsdp=1, expert=shards)


def _model_of_shapes(
    config: ModelConfig, runtime: RuntimeConfig, mesh: jax.sharding.Mesh
) -> DeepSeekV2:
    """Returns a model laid out for generation whose arrays are shapes, types and shardings."""
    (first, *others) = mesh.devices.flat
    rules = inference_rules(mesh if others else None)
    kernels = choose_kernels(first, config, runtime, rules)
    graphdef, state = abstract_model(config, runtime, rules, kernels)
    if others:
        places = param_shardings(state, rules)
    else:
        places = jax.tree.map(lambda _: SingleDeviceSharding(first), state)
    laid_out = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        places,
    )
    return nnx.merge(graphdef, laid_out)


def largest_row(compiled: Sequence[RowShape], use: Use) -> RowShape:
    """Returns an engine's largest step without prompts, or that with the longest piece of one."""
    shapes = [shape for shape in compiled if not shape.prompt_logprobs]
    if use == "decode":
        decoding = [shape for shape in shapes if shape.chunk is None]
        if not decoding:
            raise ValueError("engine.batch_sizes: without any, no step only decodes")
        return max(decoding, key=lambda shape: shape.num_decoding)

    def size(shape: RowShape) -> tuple[int, int]:
        tokens = 0 if shape.chunk is None else shape.chunk.num_tokens
        return tokens, -shape.num_decoding

    return max(shapes, key=size)


def _work(model: ModelConfig, row: RowShape, lanes: int, length: int) -> int:
    """FLOPs of the model in a step of all devices."""
    if row.chunk is None:
        tokens = lanes * row.num_decoding
        return serving_flops(model, tokens, tokens, tokens * length, "absorbed")
    read, count = row.chunk.num_tokens, lanes * row.chunk.num_sequences
    return serving_flops(model, count * read, count, count * read * read // 2, "expanded")


def _tokens_met(tokens: int, mesh: jax.sharding.Mesh) -> int:
    """Tokens that may come to one expert: those of the devices that share the experts."""
    return tokens // (mesh.shape["data"] * mesh.shape["fsdp"])
