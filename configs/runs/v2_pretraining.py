"""The paper's pretraining of DeepSeek-V2, on 1,152 TPU v5p (v5p:8x12x12).

Numbers are those of arXiv 2405.04434, §3.1.2, unless a comment says that they are ours: the paper
trained on NVIDIA H800 in a pipeline, and does not say in which types parameters are kept.
"""

from dataclasses import replace

from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SourceConfig,
    TokenDropping,
    TrainConfig,
)
from dsjax.configs.models import deepseek_v2

config = TrainConfig(
    directory="runs/v2_pretraining",
    model=replace(
        deepseek_v2.config,  # its groups of experts are the paper's devices: D = 8 and M = 3
        max_length=4096,
        init_std=0.006,
        attention=replace(deepseek_v2.config.attention, yarn=None),  # comes with the extension
    ),
    data=DataConfig(
        sources=(SourceConfig("data/packed/train"),),
        eval_sources=(SourceConfig("data/packed/held_out"),),
        tokenizer="data/tokenizer",
        length=4096,
    ),
    batch=BatchConfig(
        size=9216,
        initial_size=2304,
        ramp_tokens=225_000_000_000,
        ramp_stages=4,  # ours: 2304, 4608, 6912 and 9216
        accumulate=4,  # ours: slices of 2304 sequences, two a chip
    ),
    num_steps=223_187,  # 8.1T tokens, by the sizes above
    mesh=MeshConfig(data=9, fsdp=16, expert=8),  # ours
    optimizer=OptimizerConfig(
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        peak_learning_rate=2.4e-4,
        warmup_steps=2000,
        decay_factor=0.316,
        decay_at=(0.6, 0.9),
        clip_norm=1.0,
    ),
    loss=LossConfig(
        balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02),
        # §2.2.4: the mean is a device's budget; of a tenth of the sequences nothing is dropped.
        dropping=TokenDropping(capacity_factor=1.0, undropped_fraction=0.1),
        router_entropy=True,  # ours
    ),
    checkpoint=CheckpointConfig(every=500, keep_every=10_000),  # ours
)
