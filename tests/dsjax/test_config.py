"""Configs: model files against config.json, overrides, impossible sizes, and JSON round trips."""

import json
from dataclasses import replace

import pytest

from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    SourceConfig,
    TokenDropping,
    TrainConfig,
    YarnConfig,
    from_json,
    to_json,
)
from dsjax.config.load import (
    CONFIGS,
    load_config,
    load_model_config,
    load_train_config,
    named_configs,
    override,
)
from dsjax.configs.models import tiny
from dsjax.families import find_model_config, from_hf_config, to_hf_config
from dsjax.families.deepseek_v2_config import attention_factor
from tests.small_models import LOSS, SMALL, SMALL_LITE

pytestmark = pytest.mark.core

RUN = TrainConfig(
    directory="out",
    model=SMALL,
    data=DataConfig(sources=(SourceConfig("a"), SourceConfig("b", weight=2.0)), length=64),
    batch=BatchConfig(size=8),
    num_steps=10,
    loss=LOSS,
)


def hf_fields(repository, name="deepseek_v2"):
    return json.loads((repository / "tests" / "hf_configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_5", "deepseek_v2_lite"])
def test_model_file_equals_its_config_json(name, repository):
    config = load_model_config(repository / "configs" / "models" / f"{name}.py")
    assert config == find_model_config(repository / "tests" / "hf_configs" / f"{name}.json")


def test_tiny_has_every_feature_of_v2(repository):
    config = load_model_config(repository / "configs" / "models" / "tiny.py")
    assert config.attention.q_lora_rank
    assert config.attention.yarn is not None
    assert config.attention.yarn.factor > 1
    assert config.num_dense_layers == 1
    assert config.moe is not None
    assert config.moe.routing == "group_limited_greedy"
    assert 1 < config.moe.top_groups < config.moe.num_groups
    assert config.moe.num_shared_experts == 2


@pytest.mark.parametrize("config", [SMALL, SMALL_LITE], ids=["v2", "v2_lite"])
def test_config_json_there_and_back(config):
    hf = to_hf_config(config, dtype="float32", bos_id=0, eos_id=1)
    assert from_hf_config(json.loads(json.dumps(hf))) == config


def test_a_dense_model_there_and_back():
    dense = replace(SMALL, moe=None, num_dense_layers=SMALL.num_layers)
    hf = to_hf_config(dense, dtype="float32", bos_id=0, eos_id=1)
    assert from_hf_config(hf) == dense


def test_rope_parameters_are_read_as_rope_scaling_is(repository):
    older = hf_fields(repository)
    newer = dict(older)
    scaling = newer.pop("rope_scaling")
    scaling["rope_type"] = scaling.pop("type")
    newer["rope_parameters"] = scaling | {"rope_theta": newer.pop("rope_theta")}
    assert from_hf_config(newer) == from_hf_config(older)
    plain = from_hf_config(older | {"rope_scaling": None})
    assert plain.attention.yarn is None
    default = {"rope_type": "default", "rope_theta": 500.0}
    newest = from_hf_config(newer | {"rope_parameters": default})
    assert (newest.attention.yarn, newest.attention.rope_theta) == (None, 500.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "config.json model_type='llama': must be deepseek_v2"),
        ({"scoring_func": "sigmoid"}, "config.json scoring_func='sigmoid'"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no': must be bool"),
        ({"topk_method": "noaux_tc"}, "config.json topk_method='noaux_tc'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type='linear'"),
        ({"rope_parameters": {"rope_type": "default"}}, "agree with rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "type='yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters=\\[1\\]: must be an object"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_theta": 5.0}},
            "config.json rope_theta=.*must be one number",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8'.*quantised"),
        ({"rope_scaling": {"type": "yarn"}}, "the field 'factor' is missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8: must be 128"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_attention_heads": 1.5}, "num_attention_heads=1.5"),
        ({"n_group": "8"}, "n_group='8': must be int"),
        ({"n_group": 8.5}, "n_group=8.5: must be int"),
        ({"sliding_window": 4096}, r"config.json: unknown fields \['sliding_window'\]"),
        ({"sliding_window": 0}, r"config.json: unknown fields \['sliding_window'\]"),
        ({"qk_head_dim": 128}, "qk_head_dim=128: must be 192"),
        ({"head_dim": 100}, "head_dim=100: must be 64"),
        ({"rope_scaling": {"type": "default", "llama_4_scale": 2}}, "unknown fields"),
        ({"n_group": 7}, "moe.num_groups=7: must divide moe.num_experts=160"),
        ({"num_experts_per_tok": 61}, "moe.top_k=61: must not exceed the 60 experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_json_that_is_not_this_model(change, message, repository):
    with pytest.raises(ValueError, match=message) as error:
        from_hf_config(hf_fields(repository) | change)
    assert "\n" not in str(error.value)


def test_two_spellings_of_one_rope_agree(repository):
    fields = hf_fields(repository)
    both = fields | {"rope_parameters": fields["rope_scaling"]}
    assert from_hf_config(both) == from_hf_config(fields)


def test_whole_numbers_as_floats_and_null_for_absent(repository):
    fields = hf_fields(repository)
    loose = fields | {"hidden_size": 5120.0, "rms_norm_eps": None, "topk_group": 3.0}
    loose |= {"head_dim": 64, "qk_head_dim": 192, "sliding_window": None}
    assert from_hf_config(loose) == from_hf_config(fields)


def test_a_fault_of_config_json_names_its_path(repository, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_fields(repository) | {"n_group": 7}))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: moe.num_groups=7"):
        find_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: the field"):
        find_model_config(tmp_path)


@pytest.mark.parametrize(("mscale", "all_dim"), [(0.8, 0.0), (0.0, 0.7), (0.8, 0.7), (1.0, 0.0)])
def test_exported_yarn_is_transformers_own(mscale, all_dim):
    """Which takes another factor than ours where there is one of the two scales."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    yarn = YarnConfig(factor=8, original_length=16, mscale=mscale, mscale_all_dim=all_dim)
    config = replace(SMALL, attention=replace(SMALL.attention, yarn=yarn))
    fields = to_hf_config(config, dtype="float32", bos_id=0, eos_id=1)
    assert from_hf_config(json.loads(json.dumps(fields))) == config
    theirs = transformers.DeepseekV2Config(**fields)
    _, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert factor == pytest.approx(attention_factor(yarn), rel=1e-6)


@pytest.mark.parametrize("extra", ["attention_factor", "partial_rotary_factor", "truncate"])
def test_rope_fields_that_would_be_ignored_are_refused(extra, repository):
    fields = hf_fields(repository)
    fields["rope_scaling"][extra] = 0.5
    with pytest.raises(ValueError, match=extra):
        from_hf_config(fields)


@pytest.mark.parametrize(
    "field", ["hidden_size", "q_lora_rank", "n_routed_experts", "n_shared_experts", "kv_lora_rank"]
)
def test_missing_field_of_config_json(field, repository):
    # transformers' defaults are another model's: a field that is not there is not guessed.
    fields = hf_fields(repository)
    del fields[field]
    with pytest.raises(ValueError, match=f"the field '{field}' is missing"):
        from_hf_config(fields)


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("model.moe.top_k=2", lambda c: c.model.moe.top_k, 2),
        ("model.attention.q_lora_rank=none", lambda c: c.model.attention.q_lora_rank, None),
        ("model.attention.q_lora_rank=16", lambda c: c.model.attention.q_lora_rank, 16),
        ("model.attention.yarn=None", lambda c: c.model.attention.yarn, None),
        ("model.attention.yarn.factor=8", lambda c: c.model.attention.yarn.factor, 8.0),
        ("runtime.dtype=bfloat16", lambda c: c.runtime.dtype, "bfloat16"),
        ("model.moe.normalize_weights=true", lambda c: c.model.moe.normalize_weights, True),
        ("optimizer.peak_learning_rate=1e-3", lambda c: c.optimizer.peak_learning_rate, 1e-3),
        ("optimizer.decay_at=(0.5, 0.75)", lambda c: c.optimizer.decay_at, (0.5, 0.75)),
        ("optimizer.decay_at=0.5", lambda c: c.optimizer.decay_at, (0.5,)),
        ("data.sources.1.weight=3", lambda c: c.data.sources[1].weight, 3.0),
        ("directory=123", lambda c: c.directory, "123"),
        ("loss.dropping.capacity_factor=1.5", lambda c: c.loss.dropping.capacity_factor, 1.5),
        ("loss.balance.expert=0.003", lambda c: c.loss.balance, BalanceConfig(0.003, 0, 0)),
    ],
)
def test_override(text, read, value):
    changed = override(RUN, [text])
    assert read(changed) == value
    assert type(read(changed)) is type(value)


def test_overrides_that_fit_only_together():
    changed = override(RUN, ["model.moe.num_experts=6", "model.moe.num_groups=2"])
    assert changed.model.moe is not None
    assert (changed.model.moe.num_experts, changed.model.moe.num_groups) == (6, 2)
    assert override(RUN, []) == RUN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.moe.topk=2", r"model.moe.topk: no such config field; did you mean model.moe.top_k"),
        ("modell.moe.top_k=2", r"modell: no such config field; did you mean model\?"),
        ("zzz=2", r"zzz: no such config field; fields are"),
        ("num_steps", "override 'num_steps': must be FIELD=VALUE"),
        ("num_steps=many", "num_steps=many: must be int"),
        ("num_steps=2.5", "num_steps=2.5: must be int"),
        ("num_steps=true", "num_steps=true: must be int"),
        ("num_steps=none", "num_steps=none: must be int"),
        ("runtime.dtype=float16", "runtime.dtype=float16: must be one of float32, bfloat16"),
        ("model.moe.routing=best", "model.moe.routing=best: must be one of greedy"),
        ("model.attention.q_lora_rank=x", "model.attention.q_lora_rank=x: must be int or none"),
        ("optimizer.decay_at=('a',)", "must be a tuple of float"),
        ("num_steps.x=2", "num_steps.x: num_steps=10 has no fields"),
        ("data.sources.5.path=x", "data.sources.5: data.sources has 2 entries"),
        ("model.moe.top_k=7", "moe.top_k=7: must not exceed the 4 experts"),
        ("num_steps=0", "num_steps=0: must be positive"),
        ("num_steps=99999999999", r"num_steps=99999999999: must be less than 2\*\*31"),
        ("model.hidden_dim=9" + "0" * 400, r"hidden_dim=.*: must be less than 2\*\*31"),
        ("seed=-1", r"seed=-1: must be in \[0, 2\*\*32\)"),
        ("data.seed=4294967296", r"data.seed=4294967296: must be in \[0, 2\*\*32\)"),
        ("directory=", "directory='': must name a folder"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0: must be finite and not neg"),
        ("optimizer.weight_decay=1e400", "optimizer.weight_decay=inf: must be finite and not neg"),
        ("loss.balance.expert=1e400", "loss.balance.expert=inf: must be finite and not negative"),
        ("batch.ramp_tokens=-1", "batch.ramp_tokens=-1: must be finite and not negative"),
        ("model.attention.yarn.mscale=1e400", "yarn.mscale=inf: must be finite"),
        ("data.length=512", "data.length=512: must not exceed model.max_length=256"),
    ],
)
def test_bad_override(text, message):
    with pytest.raises(ValueError, match=message) as error:
        override(RUN, [text])
    assert "\n" not in str(error.value)


def test_a_part_that_has_no_defaults_cannot_be_switched_on_by_one_field():
    dense = replace(SMALL, moe=None, num_dense_layers=3)
    with pytest.raises(ValueError, match=r"moe: .*top_k"):
        override(dense, ["moe.num_experts=8"])
    fields = ["num_experts=8", "top_k=2", "intermediate_dim=16", "num_shared_experts=1"]
    changed = override(dense, [f"moe.{field}" for field in fields])
    assert changed.moe == MoEConfig(8, 2, 16, 1)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (SMALL, {"vocab_size": 0}, "model.vocab_size=0: must be positive"),
        (SMALL, {"num_dense_layers": 4}, "model.num_dense_layers=4: must be between 0 and"),
        (SMALL, {"moe": None}, "model.moe=None: is needed unless all num_layers=3 are dense"),
        (SMALL, {"norm_eps": float("nan")}, "model.norm_eps=nan: must be positive"),
        (SMALL.attention, {"num_heads": 0}, "attention.num_heads=0"),
        (SMALL.attention, {"num_heads": -2}, "attention.num_heads=-2"),
        (SMALL.attention, {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7: must be even"),
        (SMALL.attention, {"q_lora_rank": 0}, "attention.q_lora_rank=0"),
        (SMALL.moe, {"num_groups": 3}, "moe.num_groups=3: must divide moe.num_experts=8"),
        (SMALL.moe, {"top_groups": 5}, "moe.top_groups=5: must not exceed moe.num_groups=4"),
        (SMALL.moe, {"top_k": 5}, "moe.top_k=5: must not exceed the 4 experts"),
        (SMALL_LITE.moe, {"top_k": 9}, "moe.top_k=9: must not exceed the 8 experts"),
        (SMALL.moe, {"num_shared_experts": -1}, "moe.num_shared_experts=-1"),
        (SMALL.attention.yarn, {"factor": 0.5}, "yarn.factor=0.5: must be at least 1"),
        (SMALL.attention.yarn, {"beta_fast": 1.0}, "yarn.beta_fast=1.0: must exceed"),
        (MeshConfig(), {"data": -1}, "at most one axis may be -1"),
        (MeshConfig(), {"tensor": 0}, "mesh.tensor=0: must be positive or -1"),
        (MeshConfig(), {"context": 0}, "mesh.context=0: must be positive or -1"),
        (OptimizerConfig(), {"beta2": 1.0}, "optimizer.beta2=1.0"),
        (OptimizerConfig(), {"decay_at": (0.9, 0.6)}, "optimizer.decay_at"),
        (BatchConfig(8), {"accumulate": 3}, "batch.accumulate=3: must divide batch.size=8"),
        (TokenDropping(), {"undropped_fraction": 1.5}, "undropped_fraction=1.5"),
        (LOSS.balance, {"device": -1.0}, "loss.balance.device=-1.0"),
        (TokenDropping(), {"budget_rows": 0}, "loss.dropping.budget_rows=0: must be positive"),
        # Without balance losses experts go unused: none is what a run must ask for.
        (RUN, {"loss": LossConfig()}, "loss.balance=None: must be chosen for a model with experts"),
        (RUN.data, {"sources": ()}, "data.sources=()"),
    ],
)
def test_impossible_sizes(part, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is compared below)
        replace(part, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [RUN, SMALL, SMALL_LITE, MeshConfig(), TokenDropping()])
def test_json_round_trip(config):
    again = from_json(type(config), json.loads(json.dumps(to_json(config))))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_dim": 3}, "ModelConfig: unknown fields"),
        ({"hidden_dim": "x"}, "hidden_dim"),
        ({"hidden_dim": 2.5}, "hidden_dim"),
        ({"moe": {"num_experts": 4}}, "moe"),
        ({"attention": 3}, "attention"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_bad_json(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(ModelConfig, to_json(SMALL) | change)


def test_files(repository, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py: no such config"):
        load_config(tmp_path / "nowhere.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty.py: must bind `config`"):
        load_config(empty)
    with pytest.raises(ValueError, match=r"tiny.py: describes a model"):
        load_train_config(repository / "configs" / "models" / "tiny.py")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"config.json:1: not JSON"):
        find_model_config(tmp_path)
    broken.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        find_model_config(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: no config file of ours"):
        load_config(tmp_path)
    (tmp_path / "run.py").write_text(
        "from dsjax.config import *\nfrom dsjax.configs.models.tiny import config as model\n"
        "data = DataConfig((SourceConfig('s'),), 64)\n"
        "loss = LossConfig(BalanceConfig(0.003, 0.05, 0.02))\n"
        "config = TrainConfig('d', model, data, BatchConfig(4), 5, loss=loss)\n"
    )
    assert load_model_config(tmp_path / "run.py", ["num_layers=2"]).num_layers == 2
    assert load_train_config(tmp_path / "run.py", ["num_steps=6"]).num_steps == 6


def test_models_and_runs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny") == tiny.config
    assert load_model_config("deepseek_v2_lite", ["num_layers=2"]).num_layers == 2
    assert load_train_config("quickstart").num_steps == 500
    assert load_model_config("quickstart").vocab_size == 4096
    (tmp_path / "tiny").mkdir()  # a name goes before a folder of the same name
    assert load_config("tiny") == tiny.config
    with pytest.raises(FileNotFoundError, match=r"tiny: is a folder .without config.json."):
        load_config(tmp_path / "tiny")
    with pytest.raises(FileNotFoundError, match="did you mean deepseek_v2_lite or deepseek_v2"):
        load_config("deepsek_v2_lit")
    with pytest.raises(FileNotFoundError, match=r"there are .*quickstart"):
        load_config("zzz")


def test_no_two_configs_share_a_name():
    files = list(CONFIGS.glob("*/*.py"))
    assert len(files) >= 5
    assert len(named_configs()) == len(files)


def test_every_config_file_of_the_project_loads(repository):
    files = sorted((repository / "configs").rglob("*.py"))
    assert len(files) >= 4
    for file in files:
        config = load_config(file)
        assert from_json(type(config), to_json(config)) == config


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        SMALL.num_layers = 4  # type: ignore[misc]
    assert hash(SMALL) == hash(replace(SMALL))
    assert MoEConfig(8, 2, 4).shared_intermediate_dim == 0
    assert YarnConfig().factor == 40
