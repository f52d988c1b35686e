"""Python, as in a notebook: load a model, generate, train, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import jax
import numpy as np
from flax import nnx

from dsjax.config import KernelConfig, LatentDType, QuantisationConfig, TrainConfig
from dsjax.config.engine import memory_bytes
from dsjax.config.load import load_train_config
from dsjax.data.generation_defaults import GenerationDefaults, read_generation_defaults
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.engine import TextPiece, generate, stream
from dsjax.families.answer_parts import Answer
from dsjax.inference.prompts import check_tokens, encode_prompt, is_prompt, list_of_prompts
from dsjax.inference.sampling import Sampling, sampling_of
from dsjax.mesh import inference_rules
from dsjax.model import DeepSeekV2
from dsjax.processes import initialize_processes
from dsjax.serving.answering import answer
from dsjax.training.loop import FitResult, fit
from dsjax.weights import load_weights, locate, save_weights
from dsjax.weights.arguments import check_arguments
from dsjax.weights.host_experts import host_experts_of, set_host_experts

Message = dict[str, Any]

# What belongs to a model beside its graph, whose every attribute nnx sees. There they would be part
# of jit's keys; or, made to compare equal, nnx.jit would give a second model the first one's.
_TOKENIZERS: WeakKeyDictionary[LanguageModel, Tokenizer | None] = WeakKeyDictionary()
_SOURCES: WeakKeyDictionary[LanguageModel, Path | None] = WeakKeyDictionary()
_DEFAULTS: WeakKeyDictionary[LanguageModel, GenerationDefaults] = WeakKeyDictionary()


class LanguageModel(DeepSeekV2):
    """A model with its tokenizer: what `load` gives.

    Attributes:
        tokenizer: turns text into token ids and back, or None where none was found.
        source: the folder that the model came from.
        generation_defaults: of `generation_config.json`, with the tokenizer's end token.

    None is computed with, so none is part of what jit compares: a second model of the same
    config runs what was compiled for the first. A copy that nnx makes has none; set them.
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

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """How text is generated where a caller does not say; which ids end it."""
        defaults = _DEFAULTS.get(self, GenerationDefaults())
        return defaults if self.tokenizer is None else defaults.ending_at(self.tokenizer.eos_id)

    @generation_defaults.setter
    def generation_defaults(self, defaults: GenerationDefaults) -> None:
        _DEFAULTS[self] = defaults

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the logits of the token after each token; see `DeepSeekV2.__call__`.

        Raises:
            TypeError: the tokens are no array of whole numbers [B, T].
            ValueError: there are none, or, outside jit, an id is outside the model's table.
        """
        if host_experts_of(self) is not None:
            raise ValueError("model: its experts are in the host's memory, so it generates alone")
        check_tokens(tokens_BT, self.config.vocab_size)
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

    __str__ = __repr__  # nnx's own prints every array

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
        if (experts := host_experts_of(model)) is not None:
            set_host_experts(made, experts)
        made.tokenizer, made.source = tokenizer, source
        return made

    def generate(
        self,
        prompt: Any,
        *,
        chat: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        stop: str | Sequence[str] | None = (),
        parse_special: bool | None = None,
        on_text: Callable[[int, str], None] | None = None,
        details: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continues a prompt, or several at once.

        What is None is what the model's makers say (`generation_defaults`), or else greedy text of
        128 tokens.

        Args:
            prompt: a text, token ids (as the model reads them, BOS included), or one conversation
                (a list of messages, dicts with "role" and "content"); or a list of any of these.
            chat: whether a text is a user's message to which the answer is wanted.
            max_tokens: tokens generated at most.
            temperature: 0 takes the best token.
            top_k: keep the best so many tokens; 0 keeps all.
            top_p: keep the smallest set of best tokens with this probability.
            min_p: keep tokens of at least this share of the best one's probability.
            repetition_penalty: makes tokens that were there less likely; 1 changes nothing.
            seed: of the draws. Other prompts get other noise. Several seeds give a text each.
            n: texts of each prompt and seed, each with other noise.
            stop: a string that ends a text, or several.
            parse_special: whether special tokens written out in a prompt become their ids. None:
                in a text they do, in the messages of a conversation they stay text, so that no
                user can end a turn.
            on_text: called with a text's index and each new piece of it.
            details: whether tokens, finish reason and log-probabilities are returned too.
            **sampling: further fields of `Sampling`, such as `logprobs=5`.

        Returns:
            The generated text, or with `details` a `Generation`; a list of them where `n` or
            several seeds are given; a list of that where a list of prompts was given.

        Raises:
            TypeError: a prompt is none of these.
            ValueError: there is no tokenizer, or a prompt does not fit the context.
        """
        single = is_prompt(prompt)
        prompts = [prompt] if single else list_of_prompts(prompt)
        several_seeds = isinstance(seed, Sequence | np.ndarray)
        seeds: list[Any] = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed]
        for name, given, count in (("n", n, n), ("seed", seed, len(seeds))):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={given!r}: must be 1 or more")
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": stop,
            **sampling,
        }
        tokenizer, ids, samplings = self._prepare(prompts, chat, parse_special, options)
        texts = [
            (one, replace(how, seed=seed), sample)
            for one, how in zip(ids, samplings, strict=True)
            for seed in seeds
            for sample in range(n)
        ]
        found = generate(
            self,
            tokenizer,
            [text[0] for text in texts],
            [text[1] for text in texts],
            on_text,
            samples=[text[2] for text in texts],
            end_ids=self.generation_defaults.eos_ids,
        )
        results: list[Any] = list(found) if details else [one.text for one in found]
        if n > 1 or several_seeds:
            each = n * len(seeds)
            results = [results[at : at + each] for at in range(0, len(results), each)]
        return results[0] if single else results

    def stream(
        self,
        prompt: Any,
        *,
        chat: bool = False,
        parse_special: bool | None = None,
        **sampling: Any,
    ) -> Iterator[TextPiece]:
        """Continues one prompt, piece by piece: `for piece in model.stream(...): piece.text`.

        Whoever stops iterating stops the generation.

        Args:
            prompt: as in `generate`, one alone.
            chat: as in `generate`.
            parse_special: as in `generate`.
            **sampling: fields of `Sampling`; those left out are as in `generate`.
        """
        if not is_prompt(prompt):
            raise TypeError("prompt must be one text, token ids or one conversation")
        tokenizer, ids, samplings = self._prepare([prompt], chat, parse_special, sampling)
        ends = self.generation_defaults.eos_ids
        return stream(self, tokenizer, ids[0], samplings[0], end_ids=ends)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        response_format: dict[str, Any] | None = None,
        regex: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answers a conversation; arguments, answer and errors' fields are those of OpenAI's API.

        Args:
            messages: of the conversation.
            tools: and all that follows: see `Conversations.prepare`.
            tool_choice: likewise.
            parallel_tool_calls: likewise.
            response_format: likewise.
            regex: likewise.
            template_arguments: likewise.
            **sampling: fields of `Sampling`; those left out are as in `generate`.
        """
        return answer(
            self,
            self._prepare([], False, None, sampling)[0],
            lambda prompt, **more: self._prepare([prompt], False, None, sampling | more)[2][0],
            self.generation_defaults.eos_ids,
            messages,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            regex=regex,
            template_arguments=template_arguments,
        )

    def _prepare(
        self, prompts: list[Any], chat: bool, parse_special: bool | None, options: dict[str, Any]
    ) -> tuple[Tokenizer, list[list[int]], list[Sampling]]:
        """Returns the tokenizer, and each prompt's ids and sampling."""
        given = {name: value for name, value in options.items() if value is not None}
        sampling_of(given)  # what is wrong with them is said first
        if self.tokenizer is None:
            folder = self.source
            where = f"{folder}: holds no tokenizer.json" if folder else "no tokenizer is set"
            raise ValueError(f"{where}, so text cannot be generated")
        tokenizer, defaults = self.tokenizer, self.generation_defaults
        said = defaults.sampling_fields()
        ids = [encode_prompt(tokenizer, one, chat, parse_special) for one in prompts]
        samplings = []
        for one in ids:
            if "max_tokens" not in given:
                limit = defaults.max_tokens_after(len(one))
                said |= {} if limit is None else {"max_tokens": limit}
            samplings.append(sampling_of(said | given))
        return tokenizer, ids, samplings


def load(
    path_or_hub_name: str | Path,
    dtype: Literal["bfloat16", "float32"] | None = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    kernels: KernelConfig | None = None,
    step: int | None = None,
    allow_nonfinite: bool = False,
    quantize: str | QuantisationConfig | None = None,
    device_memory: str | int | None = None,
    ema: bool = False,
    latent_dtype: LatentDType | None = None,
) -> LanguageModel:
    """Loads a model.

    Args:
        path_or_hub_name: a Hugging Face folder, a checkpoint or run of ours, or a name on the Hub.
        dtype: of parameters and computation; None keeps the stored one.
        mesh: devices to divide the model over; None uses one.
        kernels: implementations to run; None, like "auto" in its fields, chooses for the devices.
        step: of a training run; None takes the newest that is not damaged.
        allow_nonfinite: whether NaN and infinite weights are loaded like others.
        quantize: "int8", "fp8" or "int4", or a recipe or its file: stores weights in fewer bits
            while they are read; None keeps them as they are, quantised or not.
        device_memory: what the model may take of the device, as "16GiB"; routed experts that do
            not fit stay in the host's memory, and such a model generates and does nothing else.
        ema: of a training run: loads the moving average of its weights (`optimizer.ema_decay`).
        latent_dtype: "int8" or "fp8": latents in 8 bits, nearly twice the context; not on TPUs.

    Raises:
        TypeError: an argument is another kind of object.
        ValueError: no model, a damaged one, NaN or infinite weights, or a recipe that does not fit.
    """
    check_arguments(model_path=path_or_hub_name, mesh=mesh, kernels=kernels, quantize=quantize)
    source = locate(path_or_hub_name, step)
    # First what is small: its faults should not wait for minutes of reading weights.
    tokenizer = None if source.tokenizer is None else load_tokenizer(source.tokenizer)
    defaults = read_generation_defaults(source.assets)
    weights = load_weights(
        source.path,
        dtype=dtype,
        rules=inference_rules(mesh),
        kernels=kernels,
        allow_nonfinite=allow_nonfinite,
        quantize=quantize,
        device_memory=None if device_memory is None else memory_bytes(device_memory),
        ema=ema,
        latent_dtype=latent_dtype,
    )
    model = LanguageModel.of(weights, tokenizer, source.path)
    model.generation_defaults = defaults
    return model


def save(
    model: DeepSeekV2,
    path: str | Path,
    *,
    format: Literal["dsjax", "hf"] = "dsjax",
    dtype: Literal["bfloat16", "float32"] | None = None,
) -> None:
    """Saves a model as a checkpoint of ours or as a Hugging Face folder.

    Args:
        model: the model; what is none is a TypeError.
        path: a folder that does not exist yet; one that does is a FileExistsError.
        format: which of the two; another is a ValueError.
        dtype: of the tensors written; None keeps the model's. Another is a ValueError.
    """
    check_arguments(model=model, path=path)
    save_weights(model, path, assets=getattr(model, "source", None), format=format, dtype=dtype)


def train(
    config: TrainConfig | str | Path, overrides: Sequence[str] = (), step: int | None = None
) -> FitResult:
    """Trains a model, going on from where the run stopped if it was started before.

    Args:
        config: the run, its name ("quickstart") or its file.
        overrides: dotted fields such as "model.moe.top_k=2", for a name or a file.
        step: the checkpoint to go on from, as `fit` takes it; None takes the newest.

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
    return fit(config, step=step)
