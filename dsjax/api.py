"""Python, as in a notebook: load a model, generate, train, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import jax
import numpy as np
from flax import nnx

from dsjax.config import KernelConfig, TrainConfig
from dsjax.config.load import load_train_config
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.inference.generate import generate
from dsjax.inference.sampler import Sampling
from dsjax.mesh import inference_rules
from dsjax.model import DeepSeekV2
from dsjax.processes import initialize_processes
from dsjax.training.loop import FitResult, fit
from dsjax.weights import load_weights, locate, save_weights

Message = dict[str, Any]


# What belongs to a model beside its graph, whose every attribute nnx sees. There they would be part
# of jit's keys; or, made to compare equal, nnx.jit would give a second model the first one's.
_TOKENIZERS: WeakKeyDictionary[LanguageModel, Tokenizer | None] = WeakKeyDictionary()
_SOURCES: WeakKeyDictionary[LanguageModel, Path | None] = WeakKeyDictionary()


class LanguageModel(DeepSeekV2):
    """A model with its tokenizer: what `load` gives.

    Attributes:
        tokenizer: turns text into token ids and back, or None where none was found.
        source: the folder that the model came from.

    Neither is computed with, so neither is part of what jit compares: a second model of the same
    config runs what was compiled for the first. A copy that nnx makes has neither; set them.
    """

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns text into token ids and back."""
        return _TOKENIZERS.get(self)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        _TOKENIZERS[self] = tokenizer

    @property
    def source(self) -> Path | None:
        """The folder that the model came from."""
        return _SOURCES.get(self)

    @source.setter
    def source(self, source: Path | None) -> None:
        _SOURCES[self] = source

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the logits of the token after each token; see `DeepSeekV2.__call__`.

        Raises:
            ValueError: an id is outside the model's table. Inside jit ids are not known yet, so
                this is not checked there.
        """
        if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.size > 0:
            vocab_size = self.config.vocab_size
            for token in (int(tokens_BT.min()), int(tokens_BT.max())):
                if not 0 <= token < vocab_size:
                    raise ValueError(f"token {token} is outside model.vocab_size={vocab_size}")
        return super().__call__(tokens_BT, positions, segment_ids)

    def __repr__(self) -> str:
        c = self.config
        leaves = jax.tree.leaves(nnx.state(self, nnx.Param))
        size = sum(math.prod(leaf.shape) for leaf in leaves)
        kind = leaves[0].dtype if leaves else "no parameters"
        return (
            f"{type(self).__name__}({size:,} parameters in {kind}, {c.num_layers} layers, "
            f"hidden_dim={c.hidden_dim}, vocab_size={c.vocab_size}, "
            f"max_length={c.max_length}, source={str(self.source)!r})"
        )

    @classmethod
    def of(cls, model: DeepSeekV2, tokenizer: Tokenizer | None, source: Path) -> LanguageModel:
        """Gives a model its tokenizer; shares its arrays."""
        options = model.options
        made: LanguageModel = nnx.eval_shape(
            lambda: cls(
                model.config,
                nnx.Rngs(0),
                runtime=options.runtime,
                rules=options.rules,
                kernels=options.kernels,
            )
        )
        nnx.update(made, nnx.state(model))
        made.tokenizer, made.source = tokenizer, source
        return made

    def generate(
        self,
        prompt: Any,
        *,
        chat: bool = False,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        parse_special: bool | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Any:
        """Continues a prompt, or several at once.

        Args:
            prompt: a text, token ids (as the model reads them, BOS included), or one conversation
                (a list of messages, dicts with "role" and "content"); or a list of any of these.
            chat: whether a text is a user's message to which the answer is wanted.
            max_tokens: tokens generated at most.
            temperature: 0 takes the best token.
            top_k: keep the best so many tokens; 0 keeps all.
            top_p: keep the smallest set of best tokens with this probability.
            seed: of the draws.
            stop: a string that ends a text, or several.
            parse_special: whether special tokens written out in a prompt become their ids. None:
                in a text they do, in the messages of a conversation they stay text, so that no
                user can end a turn.
            on_text: called with a prompt's index and each new piece of its text.

        Returns:
            The generated text, or a list of them where a list of prompts was given.

        Raises:
            TypeError: a prompt is none of these.
            ValueError: there is no tokenizer, or a prompt does not fit the context.
        """
        if self.tokenizer is None:
            where = (
                f"{self.source}: holds no tokenizer.json" if self.source else "no tokenizer is set"
            )
            raise ValueError(f"{where}, so text cannot be generated")
        single = _is_prompt(prompt)
        prompts = [prompt] if single else _list_of_prompts(prompt)
        ids = [self._encode(self.tokenizer, one, chat, parse_special) for one in prompts]
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,  # type: ignore[arg-type]
        )
        texts = [g.text for g in generate(self, self.tokenizer, ids, sampling, on_text)]
        return texts[0] if single else texts

    @staticmethod
    def _encode(
        tokenizer: Tokenizer, prompt: Any, chat: bool, parse_special: bool | None
    ) -> list[int]:
        if _is_ids(prompt):
            return [int(token) for token in prompt]
        if isinstance(prompt, str) and chat:
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            return tokenizer.encode_chat(prompt, parse_special=bool(parse_special))
        return tokenizer.encode_prompt(prompt, parse_special=parse_special is not False)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(
        value, str | bytes
    )


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and bool(np.issubdtype(value.dtype, np.integer))
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in value)
    )


def _is_conversation(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or _is_ids(value) or _is_conversation(value)


def _list_of_prompts(value: Any) -> list[Any]:
    """Returns the prompts of a list; a TypeError names what is none."""
    allowed = "a text, token ids, one conversation (a list of messages) or a list of any of these"
    if not _is_list(value):
        raise TypeError(f"prompt must be {allowed}, not {type(value).__name__}")
    for index, one in enumerate(value):
        if not _is_prompt(one):
            shown = repr(one)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise TypeError(f"prompt {index}: must be {allowed}, not {shown}")
    return list(value)


def load(
    path_or_hub_name: str | Path,
    dtype: Literal["bfloat16", "float32"] | None = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    kernels: KernelConfig | None = None,
    step: int | None = None,
) -> LanguageModel:
    """Loads a model.

    Args:
        path_or_hub_name: a Hugging Face folder, a checkpoint of ours, a training run, or a name
            on the Hugging Face Hub.
        dtype: of parameters and computation; None keeps the stored one.
        mesh: devices to divide the model over; None uses one.
        kernels: implementations to run; None, like "auto" in its fields, chooses for the devices.
        step: of a training run; None takes the newest that is not damaged.

    Raises:
        ValueError: there is no model there, or it is damaged; names the file.
    """
    source = locate(path_or_hub_name, step)
    model = load_weights(source.path, dtype=dtype, rules=inference_rules(mesh), kernels=kernels)
    tokenizer = None if source.tokenizer is None else load_tokenizer(source.tokenizer)
    return LanguageModel.of(model, tokenizer, source.path)


def save(
    model: DeepSeekV2,
    path: str | Path,
    *,
    format: Literal["dsjax", "hf"] = "dsjax",
    dtype: Literal["bfloat16", "float32"] | None = None,
) -> None:
    """Saves a model as a checkpoint of ours or as a Hugging Face folder.

    Args:
        model: the model.
        path: a folder that does not exist yet.
        format: which of the two.
        dtype: of the tensors written; None keeps the model's.
    """
    source = getattr(model, "source", None)
    save_weights(model, path, assets=source, format=format, dtype=dtype)


def train(config: TrainConfig | str | Path, overrides: Sequence[str] = ()) -> FitResult:
    """Trains a model, going on from where the run stopped if it was started before.

    Args:
        config: the run, its name ("quickstart") or its file.
        overrides: dotted fields such as "model.moe.top_k=2", for a name or a file.

    Under SLURM, MPI or JAX's own variables it joins the run's other processes first, which JAX
    allows before its first use only.

    Raises:
        ValueError: a field of the config does not fit the devices, the data or the checkpoint.
        RuntimeError: another run is going on in the folder, JAX was used too early to join, or a
            checkpoint could not be saved.
    """
    if not isinstance(config, TrainConfig):
        config = load_train_config(config, overrides)
    initialize_processes()
    return fit(config)
