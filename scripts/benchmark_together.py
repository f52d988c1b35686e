"""How often a prompt gets another token beside other prompts than alone, greedily chosen.

    python scripts/benchmark_together.py quickstart_output/script/run
    python scripts/benchmark_together.py tiny hidden_dim=512

A model of a folder or a run reads pieces of Python's own argparse.py; a config has random weights
and reads random tokens. Prints a JSON line for each dtype: the texts that are equal to the end, and
of all tokens that were chosen after the same text (a text is compared up to its first difference)
the share that was another one, with the gap of the two best logits that most of these had.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from typing import Any

import numpy as np
from arguments import command_line, names_of, one_line_errors, positive
from benchmark_engine import NumberTokenizer

import dsjax
from dsjax.config.load import load_model_and_runtime, named_configs
from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import Generation, generate
from dsjax.inference.sampling import Sampling
from dsjax.model import DeepSeekV2, create_model

DTYPES = ("bfloat16", "float32")


def main() -> None:
    """Compares what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("model", help="a folder or a run, or a config's name")
    parser.add_argument("overrides", nargs="*", help="of a config")
    parser.add_argument("--dtypes", type=names_of(DTYPES), default=",".join(DTYPES))
    parser.add_argument("--prompts", type=positive, default=64, help="of them together")
    parser.add_argument("--length", type=positive, default=64, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of each text")
    arguments = parser.parse_args()
    for dtype in arguments.dtypes.split(","):
        model, tokenizer, known = make(arguments.model, arguments.overrides, dtype)
        prompts = draw_prompts(known, arguments.prompts, arguments.length)
        found = compare(model, tokenizer, prompts, arguments.tokens)
        print(json.dumps({"measurement": "together", "dtype": dtype} | found), flush=True)


def make(name: str, overrides: list[str], dtype: str) -> tuple[DeepSeekV2, Tokenizer, np.ndarray]:
    """Returns a model, its tokenizer, and the ids of which prompts are pieces."""
    if name in named_configs():
        config, runtime = load_model_and_runtime(name, [*overrides, f"runtime.dtype={dtype}"])
        runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype)
        known = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 16)
        return create_model(config, 0, runtime), NumberTokenizer(config.vocab_size), known
    if overrides:
        raise ValueError(f"{overrides[0]}: only a config takes other fields")
    model = dsjax.load(name, dtype=dtype)  # type: ignore[arg-type]
    if model.tokenizer is None:
        raise ValueError(f"{name}: holds no tokenizer.json")
    return model, model.tokenizer, np.array(model.tokenizer.encode(inspect.getsource(argparse)))


def draw_prompts(ids: np.ndarray, count: int, longest: int) -> list[list[int]]:
    """Returns pieces of uneven length."""
    rng = np.random.default_rng(1)
    starts = rng.integers(0, max(1, len(ids) - longest), count)
    lengths = rng.integers(max(1, longest // 4), longest + 1, count)
    return [ids[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]


def compare(
    model: DeepSeekV2, tokenizer: Tokenizer, prompts: list[list[int]], tokens: int
) -> dict[str, Any]:
    """Returns what differs between prompts together and each alone."""
    how = Sampling(max_tokens=tokens, ignore_eos=True, logprobs=2)
    together = generate(model, tokenizer, prompts, how)
    equal, compared, gaps = 0, 0, []
    for prompt, beside in zip(prompts, together, strict=True):
        (alone,) = generate(model, tokenizer, [prompt], how)
        first = first_difference(alone, beside)
        equal += first is None
        compared += len(alone.tokens) if first is None else first + 1
        if first is not None:
            assert alone.logprobs is not None  # they were asked for
            best = alone.logprobs[first].best
            gaps.append(best[0][1] - best[1][1])
    return {
        "texts": len(prompts),
        "equal_texts": equal,
        "tokens_compared": compared,
        "other_tokens": len(gaps),
        "other_share": round(len(gaps) / compared, 6),
        "median_gap_of_others": round(float(np.median(gaps)), 4) if gaps else None,
    }


def first_difference(one: Generation, other: Generation) -> int | None:
    """Returns the place of the first token that differs."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


if __name__ == "__main__":
    with one_line_errors():
        main()
