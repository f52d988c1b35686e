"""The paper's extension of DeepSeek-V2 to 128K of context: goes on from `v2_pretraining`.

Numbers are those of arXiv 2405.04434, §3.1.4, unless a comment says that they are ours.
"""

from dataclasses import replace

from dsjax.config import BatchConfig, CheckpointConfig, LogConfig, MeshConfig
from dsjax.configs.models import deepseek_v2
from dsjax.configs.runs import v2_pretraining

_first = v2_pretraining.config

config = replace(
    _first,
    directory="runs/v2_long_context",
    init_from=_first.directory,
    # Has the paper's YaRN, with s = 40, alpha = 1 and beta = 32, for a context of 160K; its mscale
    # of 0.707 is a length factor of sqrt(t) = 0.0707 ln s + 1.
    model=deepseek_v2.config,
    data=replace(_first.data, length=32_768),
    batch=BatchConfig(size=576),
    num_steps=1000,
    mesh=MeshConfig(data=9, fsdp=8, expert=8, tensor=2),  # ours: two chips for a sequence
    optimizer=replace(
        _first.optimizer,
        # Ours, as the paper names none: what pretraining ended with, once Adam has new moments.
        peak_learning_rate=2.4e-5,
        warmup_steps=50,
        decay_at=(),
    ),
    checkpoint=CheckpointConfig(every=100),  # ours, as is how often it is evaluated
    log=LogConfig(eval_every=100),
)
