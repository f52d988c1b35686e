"""Time of a step's masks for many constrained requests, on the host alone: no model, no device.

    python scripts/benchmark_masks.py TOKENIZER

Each request follows one of a few JSON schemas, forms or regular expressions and stands somewhere in
its answer; one that ends begins anew. Tokens are drawn from those allowed, each as likely, and the
shortest of `--draws` is taken, as a model's answers are made of common ones. Prints one JSON line a
number of threads: "masks", with p50, p90, p99 and the most milliseconds of wall time that a step's
tokens and masks took, and the CPU's milliseconds, of all threads together.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np
from arguments import command_line, one_line_errors, positive

from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.engine.request import compute_masks
from dsjax.serving.grammars import GrammarMask, Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "北京"]}, "maxItems": 4},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
TEXTS = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("title", "summary", "answer")},
    "required": ["title", "summary", "answer"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]( [A-Za-z ]{1,40})?"


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("tokenizer", help="a folder with a tokenizer.json")
    parser.add_argument("--vocab-size", type=positive, default=102_400)
    parser.add_argument("--requests", type=positive, default=256)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--draws", type=positive, default=32, help="of these the shortest counts")
    parser.add_argument("--threads", type=positive, nargs="+", default=[os.cpu_count() or 1])
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    for threads in arguments.threads:
        found = measure(tokenizer, arguments, threads)
        print(json.dumps({"measurement": "masks", "threads": threads} | found), flush=True)


def measure(tokenizer: Tokenizer, arguments: Any, threads: int) -> dict[str, float]:
    """Returns the milliseconds of a step's masks."""
    grammars = Grammars(tokenizer, arguments.vocab_size, num_threads=threads)
    makers = [
        lambda: grammars.json_schema(PERSON),
        lambda: grammars.json_schema(TREE),
        lambda: grammars.json_schema(TEXTS),
        grammars.json_object,
        lambda: grammars.regex(DATE),
    ]
    rng = np.random.default_rng(0)
    lengths = np.array([len(tokenizer.bytes_of(i)) for i in range(arguments.vocab_size)])
    masks: list[GrammarMask] = [makers[i % len(makers)]() for i in range(arguments.requests)]
    times, cpu, ended = [], 0.0, 0
    # In the first steps states are made that later ones find, as in a server that runs.
    warm = arguments.steps // 4
    for step in range(warm + arguments.steps):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        compute_masks(masks)
        if step >= warm:
            times.append(time.perf_counter() - begun)
            cpu += time.process_time() - begun_cpu
        for index, mask in enumerate(masks):
            bits = np.unpackbits(mask.allowed().view(np.uint8), bitorder="little")
            (allowed,) = np.nonzero(bits[: arguments.vocab_size])
            drawn = rng.choice(allowed, min(arguments.draws, len(allowed)), replace=False)
            token = int(drawn[lengths[drawn].argmin()])
            if token == tokenizer.eos_id:
                masks[index] = makers[index % len(makers)]()
                ended += 1
            else:
                mask.advance(token)
    quantiles = np.quantile(np.array(times) * 1e3, (0.5, 0.9, 0.99, 1.0))
    named = dict(zip(("p50_ms", "p90_ms", "p99_ms", "most_ms"), quantiles, strict=True))
    found = named | {"cpu_ms": 1e3 * cpu / len(times)}
    about = {"requests": arguments.requests, "steps": arguments.steps, "ended": ended}
    return about | {name: round(float(value), 3) for name, value in found.items()}


if __name__ == "__main__":
    with one_line_errors():
        main()
