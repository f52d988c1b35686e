"""DeepSeek-V2.5: V2's architecture with a YaRN length correction of 1."""

from dataclasses import replace

from dsjax.config import YarnConfig
from dsjax.configs.models import deepseek_v2

config = replace(
    deepseek_v2.config,
    attention=replace(
        deepseek_v2.config.attention,
        yarn=YarnConfig(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    ),
)
