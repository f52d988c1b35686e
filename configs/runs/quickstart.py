"""The quickstart: the tiny model on the running Python's own library, minutes on two CPU cores."""

from dataclasses import replace

from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    PrepareConfig,
    RuntimeConfig,
    SourceConfig,
    TrainConfig,
)
from dsjax.configs.models import tiny

config = TrainConfig(
    directory="quickstart_output/run",
    model=replace(tiny.config, vocab_size=4096, max_length=1024),
    data=DataConfig(
        sources=(SourceConfig("quickstart_output/packed/train"),),
        eval_sources=(SourceConfig("quickstart_output/packed/held_out"),),
        tokenizer="quickstart_output/tokenizer",
        length=256,
        prepare=PrepareConfig(
            corpus="python_library", folder="quickstart_output/corpus", vocab_size=4096
        ),
    ),
    batch=BatchConfig(size=8),
    num_steps=500,
    runtime=RuntimeConfig(dtype="float32", remat="none"),
    optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=50, decay_at=(0.6, 0.85)),
    loss=LossConfig(balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02)),
    checkpoint=CheckpointConfig(every=250),
    log=LogConfig(every=5, eval_every=125),
)
