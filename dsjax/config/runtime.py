"""How a model runs: what may change from run to run without changing what the model is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsjax.config.fitting import checked
from dsjax.config.model import require, require_positive
from dsjax.config.quantisation import QuantisationConfig

DType = Literal["float32", "bfloat16"]
DTYPES = ("float32", "bfloat16")
LatentDType = Literal["int8", "fp8"]
LATENT_DTYPES: dict[LatentDType, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}  # and JAX's names
RematPolicy = Literal["none", "full", "save_dots", "save_attention"]
Implementation = Literal["auto", "reference", "xla", "tpu", "hopper"]


@checked
@dataclass(frozen=True)
class KernelConfig:
    """Which kernels run; "auto" takes the fastest that the chip and the model's sizes allow.

    A kernel that is named here runs, or the model is refused: nothing falls back.

    Attributes:
        mla_attention: of attention in training and prefill.
        mla_decode: of absorbed decode.
        grouped_matmul: of the experts' products.
        quantised_products: how rows multiply weights that `quantisation` stores in float8. "widen"
            keeps rows in `dtype` and widens the weights. "fp8" rounds rows to float8 too, each 128
            columns by a scale of their own, and on Hopper multiplies many rows in float8: another
            result, which is to be asked for. Other weights are widened. Not on TPUs.
        router: of the experts' affinities. "float32" multiplies in full precision. For bfloat16
            tokens "bfloat16_terms" comes to as much by products that matrix units take.
        expert_exchange: how tokens move between devices that divide the experts. "ragged" (TPUs)
            and "ragged_parts" (GPUs) send what there is, "fixed" as much as there might be.
        latent_exchange: how latents reach the devices that divide a row (mesh axis context).
            "gather" sends all to all at once. "ring" hands them on while it attends to those that
            it has, and holds two devices' at a time; it sends more in a step.
        exchange_chunks: parts of a device's tokens that are exchanged one by one, so that one is
            computed while the next is under way.
        exchange_room: what a device has room to receive in one pass of an exchange, and rows that
            one pass over its experts has room for, over the mean. Where there is more, all devices
            take more passes; nothing is lost.
        unroll_decode: whether a decode step has every layer by itself. A GPU's compiler copies what
            a loop over the layers takes out of their stacked weights: 1.5 of 17.0 ms of a step of
            128 rows of V2-Lite on an H100. None: on GPUs, unless XLA multiplies quantised weights.
        unroll_layers: whether training has every layer by itself. A GPU's compiler first fills with
            zeros, then copies, what a loop over the layers keeps for the backward pass, and copies
            gradients into their stacks: of V2-Lite's 8-layer step for an H100 some 40 GB of traffic
            and 13 GiB of memory, read off its program. It takes longer to compile. None: on GPUs.
    """

    mla_attention: Implementation = "auto"
    mla_decode: Implementation = "auto"
    grouped_matmul: Implementation = "auto"
    quantised_products: Literal["widen", "fp8"] = "widen"
    router: Literal["auto", "float32", "bfloat16_terms"] = "auto"
    expert_exchange: Literal["auto", "fixed", "ragged", "ragged_parts"] = "auto"
    latent_exchange: Literal["gather", "ring"] = "gather"
    exchange_chunks: int = 1
    exchange_room: float = 1.25
    unroll_decode: bool | None = None
    unroll_layers: bool | None = None

    def __post_init__(self) -> None:
        require_positive(
            "runtime.kernels",
            exchange_chunks=self.exchange_chunks,
            exchange_room=self.exchange_room,
        )

    @classmethod
    def all_of(cls, implementation: Implementation) -> KernelConfig:
        """Names one implementation for the three ops that have several."""
        return cls(
            mla_attention=implementation, mla_decode=implementation, grouped_matmul=implementation
        )


@checked
@dataclass(frozen=True)
class RuntimeConfig:
    """How a model is run.

    Attributes:
        dtype: compute type of activations. Router, softmax, norms and loss stay float32.
        param_dtype: type that a model's parameters are created in and trained in.
        remat: what the backward pass keeps of a layer. "none" recomputes nothing, "full"
            recomputes all, "save_dots" keeps matmul outputs, "save_attention" keeps attention's.
        kernels: which kernels run.
        quantisation: weights that are kept in fewer bits, which are not trained; None for none.
        latent_dtype: type of the latents that generation keeps, each token's with a scale of its
            own: "int8" or "fp8" (e4m3), with rotary keys in `dtype`; not on TPUs. None keeps all
            in `dtype`.
    """

    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    remat: RematPolicy = "full"
    kernels: KernelConfig = field(default_factory=KernelConfig)
    quantisation: QuantisationConfig | None = None
    latent_dtype: LatentDType | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            require(
                value in DTYPES,
                f"runtime.{name}",
                value,
                "must be float32 or bfloat16 (float16 overflows on DeepSeek-V2)",
            )
        policies = ("none", "full", "save_dots", "save_attention")
        require(self.remat in policies, "runtime.remat", self.remat, f"must be one of {policies}")

    @property
    def cached_dtype(self) -> str:
        """The type of the latents in the cache, by JAX's name."""
        return self.dtype if self.latent_dtype is None else LATENT_DTYPES[self.latent_dtype]
