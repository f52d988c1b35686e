"""Speed of the engine as it serves, on random weights and tokens.

    python scripts/benchmark_engine.py configs/models/deepseek_v2_lite.py --requests 1000

With `--mesh expert=2` the experts are spread over two devices, and each has sequences and pages of
its own. Prints one JSON line a measurement: "start" (compiling), "single" (one request), "prefix"
(the time to the first token, cold, after a shared prefix and without it) and "load" (many requests
at once). Every text has its full length: end tokens are read on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from arguments import axis, command_line, one_line_errors, positive, real

from dsjax.config import EngineConfig, MeshConfig
from dsjax.config.load import load_model_and_runtime, override
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.engine import Engine, Request, TextPiece
from dsjax.inference.sampling import Sampling
from dsjax.kernels import ONE_DEVICE, choose_kernels
from dsjax.mesh import make_mesh, serving_rules
from dsjax.model import DeepSeekV2, create_model


class NumberTokenizer(ByteTokenizer):
    """As many ids as the model has; those past the bytes are spelled by their number."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._token_bytes += [f"<{i}>".encode() for i in range(len(self._token_bytes), vocab_size)]
        self.known_ids = np.ones(vocab_size, np.bool_)


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batch", type=positive, default=256, help="requests that run at once")
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--prompt", type=positive, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of each text")
    parser.add_argument("--chunk", type=positive, default=2048, help="prompt tokens a step")
    parser.add_argument("--prefix", type=positive, default=4000)
    parser.add_argument("--temperature", type=real, default=0.0)
    parser.add_argument(
        "--mesh", type=axis, nargs="+", default=(), metavar="AXIS=N", help="of a host's GPUs"
    )
    arguments = parser.parse_args()
    model = random_model(arguments.config, arguments.overrides, arguments.mesh)
    config = model.config
    longest = max(arguments.prompt + arguments.tokens, arguments.prefix + 64, 2048 + 256)
    begun = time.perf_counter()
    engine = Engine(
        model,
        NumberTokenizer(config.vocab_size),
        EngineConfig(
            max_batch=arguments.batch,
            max_length=min(config.max_length, longest),
            chunk_tokens=arguments.chunk,
            prompt_logprobs=False,
        ),
    )
    started = {"seconds": time.perf_counter() - begun, "num_pages": engine.figures().num_pages}
    report("start", started)
    rng = np.random.default_rng(0)

    def prompt(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, config.vocab_size, size).tolist())

    def sampling(tokens: int) -> Sampling:
        return Sampling(
            max_tokens=tokens, ignore_eos=True, temperature=arguments.temperature, top_p=0.95
        )

    def timed(request: Request) -> tuple[float, float]:
        """Seconds to the first token, and between the tokens after it."""
        times = [time.perf_counter()]

        def note(_: int, event: Any) -> None:
            if isinstance(event, TextPiece) and event.tokens:
                times.append(time.perf_counter())

        engine.generate([request], note)
        return times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2)

    timed(Request(prompt(64), sampling(4)))
    single = min(2048, config.max_length - 256)
    between = min(timed(Request(prompt(single), sampling(256)))[1] for _ in range(2))
    report("single", {"prompt": single, "tokens_per_second": 1 / between})
    shared, suffix = prompt(arguments.prefix), prompt(32)
    seconds = {
        "cold": timed(Request((*shared, *suffix), sampling(2)))[0],
        "shared": timed(Request((*shared, *prompt(32)), sampling(2)))[0],
        "suffix": timed(Request(prompt(32), sampling(2)))[0],
    }
    report("prefix", {"prefix": arguments.prefix} | seconds)
    requests = [
        Request(prompt(arguments.prompt), sampling(arguments.tokens))
        for _ in range(arguments.requests)
    ]
    before = engine.figures()
    begun = time.perf_counter()
    found = engine.generate(requests)
    seconds_taken = time.perf_counter() - begun
    tokens = sum(len(one.tokens) for one in found)
    figures = dataclasses.asdict(engine.figures())
    figures["steps"] -= before.steps
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    report(
        "load",
        {
            "requests": arguments.requests,
            "prompt": arguments.prompt,
            "tokens": arguments.tokens,
            "batch": arguments.batch,
            "seconds": seconds_taken,
            "tokens_per_second": tokens / seconds_taken,
            "peak_bytes": memory,
            "figures": figures,
        },
    )


def random_model(path: str, overrides: Sequence[str], mesh: Sequence[str]) -> DeepSeekV2:
    """Returns a model of random weights in the compute type, laid out over a mesh if there is one.

    Args:
        path: of the model's config.
        overrides: of the model's and the runtime's fields.
        mesh: sizes of axes, as `dsjax serve --mesh` takes them.
    """
    config, runtime = load_model_and_runtime(path, overrides)
    runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype)
    rules = ONE_DEVICE
    if mesh:
        rules = serving_rules(make_mesh(override(MeshConfig(fsdp=1), mesh)))
    kernels = choose_kernels(jax.devices()[0], config, runtime, rules)
    model = create_model(config, 0, runtime, rules, kernels)
    jax.block_until_ready(jax.tree.leaves(model))
    return model


def report(name: str, figures: dict[str, Any]) -> None:
    """Prints a measurement with the chip that it was made on."""
    about = {"measurement": name, "chip": jax.devices()[0].device_kind}
    print(json.dumps(about | figures), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
