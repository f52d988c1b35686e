"""transformers' own DeepSeek-V2 on random weights, as benchmarks of ours run it beside them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from dsjax.config import ModelConfig
from dsjax.families import to_hf_config

NEEDED = ("torch", "transformers")


def missing() -> str | None:
    """Returns a package that a peer needs and that is not installed, or None."""
    return next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)


def peer_model(config: ModelConfig) -> Any:
    """Returns the model in bfloat16 on the GPU, or the CPU: grouped_mm and sdpa."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    hf_config = DeepseekV2Config.from_dict(
        to_hf_config(config, dtype="bfloat16", bos_id=0, eos_id=1)
    )
    hf_config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = DeepseekV2ForCausalLM(hf_config)
    torch.set_default_dtype(torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model.bfloat16()


class PeerSteps:
    """Prefill and decode of the peer, with its own cache of keys and values of each head."""

    def __init__(self, config: ModelConfig, embed_scale: float) -> None:
        import torch

        self._vocab_size = config.vocab_size
        self._torch = torch
        self._model = peer_model(config).eval()
        with torch.no_grad():
            self._model.model.embed_tokens.weight.mul_(embed_scale)

    def prefill(self, batch: int, length: int, repeats: int) -> dict[str, float]:
        """Times reading prompts, each time waited for: the median."""

        def read() -> None:
            self._read(self._tokens(batch, length))
            self._wait()

        read()
        seconds = sorted(_seconds(read) for _ in range(repeats))[repeats // 2]
        return {"seconds": seconds, "tokens_per_second": batch * length / seconds}

    def decode(self, batch: int, length: int, steps: int) -> dict[str, float]:
        """Times steps after prompts, which are not waited for one by one."""
        last, cache = self._read(self._tokens(batch, length))

        def run(count: int) -> None:
            nonlocal last, cache
            for _ in range(count):
                last, cache = self._read(last, cache)
            self._wait()

        run(2)
        seconds = _seconds(lambda: run(steps)) / steps
        return {"steps": steps, "seconds": seconds, "tokens_per_second": batch / seconds}

    def forget(self) -> None:
        """Gives memory back that no tensor holds."""
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    def chip(self) -> str:
        """Returns the device's name."""
        cuda = self._torch.cuda
        return str(cuda.get_device_name()) if cuda.is_available() else "cpu"

    def _tokens(self, batch: int, length: int) -> Any:
        shape = (batch, length)
        return self._torch.randint(0, self._vocab_size, shape, device=self._model.device)

    def _read(self, tokens: Any, cache: Any = None) -> tuple[Any, Any]:
        with self._torch.inference_mode():
            out = self._model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return out.logits[:, -1:].argmax(-1), out.past_key_values

    def _wait(self) -> None:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
