"""Whole models against transformers on random weights, float32 (live torch on the CPU).

transformers ignores `norm_topk_prob` and returns no balance loss for DeepSeek-V2: those are tested
against the oracle, in test_model.py and layers/test_router.py. transformers before 5.15 lacks the
square of mscale_all_dim in the softmax scale, and short prompts cannot see rotary mistakes, so the
prompts here have more than 600 tokens and cross the length that YaRN extends.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.families import from_hf_config, hf_table
from dsjax.families.tensors import params_from_hf
from dsjax.model import abstract_model
from tests.conftest import require_module
from tests.dsjax.sequences import Sequences
from tests.small_models import RUNTIME

# Shapes of the three released models with narrow layers, on their own YaRN factors.
SHRUNK = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
SMALLER_V2 = SHRUNK | {"q_lora_rank": 48, "n_routed_experts": 32}
SMALLER_LITE = SHRUNK | {"n_routed_experts": 16}
CASES = {
    # name: released config, changes, YaRN's original length (None: as released)
    "v2": ("deepseek_v2", SMALLER_V2, 256),
    "v2_5": ("deepseek_v2_5", SMALLER_V2, 256),
    "v2_lite": ("deepseek_v2_lite", SMALLER_LITE | {"rms_norm_eps": 1e-4}, 256),
    "v2_released_yarn": ("deepseek_v2", SMALLER_V2, None),
    "v2_5_without_shared_experts": ("deepseek_v2_5", SMALLER_V2 | {"n_shared_experts": 0}, 300),
    "v2_lite_plain_rope": ("deepseek_v2_lite", SMALLER_LITE | {"rope_scaling": None}, None),
    "two_mscales": ("deepseek_v2_5", SMALLER_V2 | {"num_hidden_layers": 2}, 200),
    "dense": ("deepseek_v2_lite", SMALLER_LITE | {"first_k_dense_replace": 3}, 256),
}


@functools.cache
def torch_model(name, repository):
    """A transformers model with random weights of order one in their outputs, and its config."""
    for module in ("torch", "transformers"):
        require_module(module)
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.set_num_threads(1)
    released, changes, original_length = CASES[name]
    text = (repository / "tests" / "hf_configs" / f"{released}.json").read_text()
    fields = json.loads(text) | changes
    if original_length is not None:
        fields["rope_scaling"] |= {"original_max_position_embeddings": original_length}
    if name == "two_mscales":
        fields["rope_scaling"] |= {"mscale": 1.2, "mscale_all_dim": 0.6}
    fields["max_position_embeddings"] = 8192
    # transformers writes into what it is given.
    given = json.loads(json.dumps(fields)) | {"attn_implementation": "eager"}
    config = DeepseekV2Config(**given)
    with torch.device("cpu"):
        model: Any = DeepseekV2ForCausalLM(config)
        model = model.to(torch.float32).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("layernorm.weight", "norm.weight")):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                fan_in = 1 if "embed_tokens" in key else parameter.shape[-1]
                scale = 1.3 * max(fan_in, 1) ** -0.5
                if ".experts." in key:  # the gates are small: let the experts still matter
                    scale *= 1.5
                parameter.normal_(0, scale, generator=generator)
    return model, fields


def our_model(hf_model, fields, folder):
    """The same model in JAX, from the files that transformers writes."""
    from safetensors.numpy import load_file

    hf_model.save_pretrained(folder)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    written = json.loads((folder / "config.json").read_text())
    config = from_hf_config(fields)
    # Newer writers put rope_parameters where older files have rope_scaling: both are read alike.
    assert from_hf_config(written) == config
    graph, state = abstract_model(config, RUNTIME)
    nnx.replace_by_pure_dict(state, params_from_hf(hf_table(config), tensors.__getitem__))
    return nnx.merge(graph, state)


def torch_logits(hf_model, tokens, lengths):
    """Logits of a right-padded batch."""
    import torch

    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = hf_model(torch.tensor(tokens), attention_mask=mask.long(), use_cache=False)
    return out.logits.numpy()


def largest_difference(got, want, lengths):
    valid = np.arange(want.shape[1]) < np.asarray(lengths)[:, None]
    assert want[valid].std() > 0.5  # large enough to see a mistake
    return np.abs(np.asarray(got) - want)[valid].max()


# torch says so of the shared experts that the model does not have.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, repository, tmp_path, rng):
    hf_model, fields = torch_model(name, repository)
    model = our_model(hf_model, fields, tmp_path)
    lengths = [640, 611, 37]
    tokens = rng.integers(0, fields["vocab_size"], (3, 640))
    want = torch_logits(hf_model, tokens, lengths)
    got = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens, jnp.int32))
    assert got.dtype == jnp.float32
    assert largest_difference(got, want, lengths) <= 1e-4


@pytest.mark.slow
def test_a_prompt_that_crosses_the_released_length(repository, tmp_path, rng):
    """4,096 tokens and more on the released YaRN settings, unchanged."""
    hf_model, fields = torch_model("v2_released_yarn", repository)
    model = our_model(hf_model, fields, tmp_path)
    tokens = rng.integers(0, fields["vocab_size"], (1, 4200))
    want = torch_logits(hf_model, tokens, [4200])
    got = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens, jnp.int32))
    assert largest_difference(got, want, [4200]) <= 1e-4


@pytest.mark.slow
def test_generation_through_the_latent_cache_equals_transformers(repository, tmp_path, rng):
    """Prefill of 600 tokens, then decoding, against the one long pass of transformers."""
    hf_model, fields = torch_model("v2", repository)
    model = our_model(hf_model, fields, tmp_path)
    tokens = rng.integers(0, fields["vocab_size"], (2, 612))
    prompts = [600, 341]
    want = torch_logits(hf_model, tokens, [612, 612])
    sequences = Sequences(model, 2, 640, page_size=64)
    logits = sequences.step(tokens, prompts, is_first=True)
    rows = np.arange(2)
    logits = logits[rows, np.array(prompts) - 1]
    worst = np.abs(logits - want[rows, np.array(prompts) - 1]).max()
    for step in range(12):
        at = np.array(prompts) + step
        logits = sequences.step(tokens, [1, 1])
        worst = max(worst, np.abs(logits[:, 0] - want[rows, at]).max())
    assert worst <= 1e-4
