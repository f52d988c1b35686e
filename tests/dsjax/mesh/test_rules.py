"""The same step on 1 and on 8 devices, and what the sharding tables and meshes refuse."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import MeshConfig, TokenDropping
from dsjax.kernels import Kernels
from dsjax.layers.moe import Dropping
from dsjax.mesh import (
    BATCH_AXES,
    MESH_AXES,
    ShardingRules,
    check_divisible,
    inference_rules,
    make_mesh,
    serving_rules,
    train_rules,
)
from dsjax.model import abstract_model, create_model, param_dims, param_shardings
from tests.small_models import RUNTIME, SMALL, random_model

# Divisible over every mesh below: 8 experts, 4 heads; two documents a row, padding behind some.
CONFIG = replace(SMALL, attention=replace(SMALL.attention, num_heads=4), intermediate_dim=64)
BATCH, LENGTH = 16, 12
DROPPING = TokenDropping(capacity_factor=0.7, budget_rows=8)
MESHES = {  # data, fsdp, expert, tensor
    "fsdp": (1, 8, 1, 1),
    "expert": (1, 1, 8, 1),
    "data_expert": (2, 1, 4, 1),
    "fsdp_expert_tensor": (1, 2, 2, 2),
    "data_fsdp_tensor": (2, 2, 1, 2),
    "data_expert_tensor": (2, 1, 2, 2),
}


def mesh_config(sizes):
    data, fsdp, expert, tensor = sizes
    return MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor)


def make_batch():
    rng = np.random.default_rng(1)
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[:, 7:] = 2
    segments[::3, 10:] = 0
    positions = np.where(np.arange(LENGTH) < 7, np.arange(LENGTH), np.arange(LENGTH) - 7)
    return {
        "tokens": rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32),
        "positions": np.tile(positions, (BATCH, 1)).astype(np.int32),
        "segments": segments,
    }


@functools.partial(jax.jit, static_argnames="dropping")
def step(model, batch, dropping):
    """Loss, its gradients, and the router's statistics: what a training step computes."""

    def loss_of(model):
        exempt = jnp.arange(BATCH) % 5 == 0
        hidden, stats = model.hidden(
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            dropping and Dropping(exempt, dropping),
        )
        log_probs = jax.nn.log_softmax(model.lm_head.logits(hidden))
        nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        mask = batch["segments"] > 0
        loss = jnp.sum(nll * mask) / jnp.sum(mask)
        balance = jnp.mean(stats.expert + 0.7 * stats.device + 0.4 * stats.communication)
        return loss + 0.3 * balance, stats

    (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(model)
    return loss, stats, nnx.state(gradients)


@functools.cache
def on_one_device(dropping):
    return jax.tree.map(np.asarray, step(random_model(CONFIG), make_batch(), dropping))


def on_mesh(sizes, dropping, remat="none", **kernels):
    rules = train_rules(make_mesh(mesh_config(sizes)))
    batch = jax.device_put(make_batch(), rules.sharding("batch", "length"))
    runtime = replace(RUNTIME, remat=remat)
    model = random_model(CONFIG, runtime=runtime, rules=rules, kernels=Kernels(**kernels))
    return step(model, batch, dropping)


def assert_same_step(one, many):
    """Equal up to the order of float32 sums; counts exactly."""
    (loss, stats, gradients), (loss_8, stats_8, gradients_8) = one, many
    assert float(loss_8) == pytest.approx(float(loss), rel=2e-6)
    # Trap: a balance loss computed per shard and never summed over the mesh.
    for name in ("expert", "device", "communication"):
        np.testing.assert_allclose(getattr(stats_8, name), getattr(stats, name), rtol=2e-6)
    np.testing.assert_array_equal(stats_8.load_E, stats.load_E)
    np.testing.assert_allclose(stats_8.dropped, stats.dropped, rtol=1e-6)
    want, got = dict(nnx.to_flat_state(gradients)), dict(nnx.to_flat_state(gradients_8))
    assert want.keys() == got.keys()
    for path, variable in want.items():
        expected = np.asarray(variable[...])
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(
            np.asarray(got[path][...]),
            expected,
            atol=3e-5 * np.abs(expected).max(),
            err_msg=".".join(map(str, path)),
        )


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("fsdp", {}),
        ("expert", {}),  # a group's experts lie on two devices
        ("data_expert", {"exchange_chunks": 2}),  # a group's experts lie on one
        pytest.param("fsdp_expert_tensor", {}, marks=pytest.mark.core),
        ("data_fsdp_tensor", {}),
    ],
)
def test_a_step_on_8_devices_equals_one_on_1(name, kernels):
    assert_same_step(on_one_device(None), on_mesh(MESHES[name], None, **kernels))


def test_token_dropping_does_not_depend_on_the_mesh():
    one = on_one_device(DROPPING)
    assert 0.1 < one[1].dropped.min() < 0.5
    # Recomputed in the backward pass, as in training: the exchange is too. A budget's sequences lie
    # on two devices.
    assert_same_step(one, on_mesh(MESHES["data_expert_tensor"], DROPPING, remat="full"))


def test_a_budget_that_the_mesh_tears_apart_is_refused():
    with pytest.raises(ValueError, match="budget_rows=8: must divide the 2 sequences of a slice"):
        on_mesh(MESHES["fsdp"], DROPPING)


def test_inference_rules_give_the_same_logits():
    batch = make_batch()
    run = jax.jit(lambda model, tokens: model(tokens))
    want = run(random_model(CONFIG), batch["tokens"])
    rules = inference_rules(make_mesh(mesh_config((1, 1, 4, 2))))
    got = run(random_model(CONFIG, rules=rules), batch["tokens"])
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_mesh():
    small = replace(CONFIG, num_layers=2)
    rules = train_rules(make_mesh(mesh_config((1, 2, 2, 2))))
    one, many = create_model(small, 7, RUNTIME), create_model(small, 7, RUNTIME, rules)
    shardings = dict(nnx.to_flat_state(param_shardings(nnx.state(many), rules)))
    flat = dict(nnx.to_flat_state(nnx.state(many)))
    for path, variable in nnx.to_flat_state(nnx.state(one)):
        np.testing.assert_allclose(flat[path][...], variable[...], atol=1e-7)
        assert flat[path][...].sharding.is_equivalent_to(shardings[path].get_value(), variable.ndim)
    assert one.moe_layers is not None
    std = np.std(np.asarray(one.moe_layers.feed_forward.w_gate.stored()))
    assert std == pytest.approx(CONFIG.init_std, rel=0.1)
    # Layers and experts are drawn apart from one another.
    assert len(np.unique(np.asarray(one.moe_layers.feed_forward.w_up.stored()[..., 0, 0]))) == 8


def test_every_parameter_is_divided_as_its_dims_say():
    rules = train_rules(make_mesh(mesh_config((1, 2, 2, 2))))
    model = random_model(CONFIG, rules=rules)
    dims = param_dims(nnx.state(model))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = rules.spec(*dims[path])
        assert variable[...].sharding.spec == spec, path
    assert model.moe_layers is not None
    experts = model.moe_layers.feed_forward.w_gate.stored()
    assert isinstance(experts.sharding, NamedSharding)
    assert experts.sharding.spec == PartitionSpec(None, ("expert",), ("fsdp",), ("tensor",))
    assert experts.addressable_shards[0].data.size == experts.size // 8
    # Behind the norms, nothing is kept whole on every device.
    whole = [p for p, d in dims.items() if not any(rules.spec(*d)) and "norm" not in d]
    assert whole == []


def test_weights_are_gathered_along_one_mesh_axis_after_another():
    rules = train_rules(make_mesh(MeshConfig(fsdp=2, expert=4)))
    dims = ("param_embed", "mlp")

    @functools.partial(jax.jit, out_shardings=(rules.sharding(None, None), rules.sharding(*dims)))
    def gather(weight_DF):
        def whole(weight_DF):
            array = rules.gather_minor_axes(weight_DF, *dims)
            return rules.constrain(array, None, None)

        out_DF, pull = jax.vjp(whole, weight_DF)
        return out_DF, *pull(out_DF)

    weight_DF = jax.device_put(jnp.arange(64.0).reshape(16, 4), rules.sharding(*dims))
    compiled = gather.lower(weight_DF).compile()
    text = compiled.as_text()
    assert text is not None
    rows = re.findall(r"= f32\[(\d+),4\]\S* all-gather\(", text)
    assert rows == ["8", "16"]  # first of the 2 rows of each device those of 4, then of 2 x 4
    for array in compiled(weight_DF):
        np.testing.assert_array_equal(array, weight_DF)


def test_rules_are_part_of_the_jit_key():
    mesh = make_mesh(mesh_config((1, 2, 2, 2)))
    assert hash(train_rules(mesh)) == hash(train_rules(mesh))
    assert train_rules(mesh) == train_rules(mesh)
    assert train_rules(mesh) != inference_rules(mesh)
    sharded = jax.jit(lambda x, rules: rules.constrain(x, "batch", None), static_argnames="rules")
    x = jnp.zeros((8, 4))
    # A second table must not silently reuse the first one's layout.
    assert sharded(x, train_rules(mesh)).sharding.spec[0] == ("fsdp", "expert")
    assert not any(sharded(x, inference_rules(mesh)).sharding.spec)


def test_batch_is_divided_over_every_data_axis():
    rules = train_rules(make_mesh(mesh_config((2, 2, 2, 1))))
    assert rules.num_batch_shards() == 8
    assert train_rules(make_mesh(mesh_config((1, 2, 1, 4)))).num_batch_shards() == 2
    assert inference_rules(make_mesh(mesh_config((1, 2, 1, 4)))).num_batch_shards() == 1
    assert ShardingRules().num_batch_shards() == 1
    assert rules.spec("batch", "length", "embed")[0] == BATCH_AXES


@pytest.mark.core
def test_errors_of_the_table():
    rules = train_rules(make_mesh(mesh_config((1, 2, 2, 2))))
    with pytest.raises(ValueError, match=r"logical dim 'batchs'.*did you mean 'batch'"):
        rules.spec("batchs", None)
    with pytest.raises(ValueError, match="mesh axis 'tensor' divides both 'heads' and 'mlp'"):
        rules.spec("heads", "mlp")
    with pytest.raises(ValueError, match=r"'vocab': no mesh axis 'tensro'; did you mean 'tensor'"):
        ShardingRules(None, (("vocab", ("tensro",)),))
    with pytest.raises(ValueError, match="'expert' divides both 'batch' and 'experts'"):
        rules.sharding("batch", "experts")


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3, fsdp=1), r"'data': 3.*does not fit the 8 devices"),
        (MeshConfig(data=3), r"'data': 3.*does not fit the 8 devices"),
        (MeshConfig(data=16, fsdp=1), "does not fit the 8 devices"),
        (MeshConfig(fsdp=4), "does not fit the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


@pytest.mark.core
def test_mesh_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(expert=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    two = make_mesh(MeshConfig(), devices=jax.devices()[:2])
    assert two.shape["fsdp"] == 2


@pytest.mark.core
def test_devices_that_divide_rows_divide_parameters_too():
    rules = train_rules(make_mesh(MeshConfig(fsdp=2, context=4)))
    _, state = abstract_model(CONFIG)
    shardings = dict(nnx.to_flat_state(param_shardings(state, rules)))
    for path, variable in nnx.to_flat_state(state):
        if variable.get_metadata("dims") == ("norm",) or path[-3:-1] == ("router", "gate"):
            continue
        part = shardings[path].get_value().shard_shape(variable.shape)
        assert np.prod(variable.shape) == 8 * np.prod(part), path


@pytest.mark.core
def test_generation_refuses_a_mesh_that_divides_rows():
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    for rules in (inference_rules, serving_rules):
        with pytest.raises(ValueError, match=r"^mesh.context=2: must be 1 for generation"):
            rules(mesh)


@pytest.mark.core
def test_dims_that_the_mesh_does_not_divide_are_all_named():
    rules = train_rules(make_mesh(mesh_config((1, 1, 2, 4))))
    odd = replace(CONFIG, vocab_size=47, attention=replace(CONFIG.attention, num_heads=3))
    _, state = abstract_model(odd)
    with pytest.raises(ValueError, match="is not divisible by mesh") as error:
        param_shardings(state, rules)
    message = str(error.value)
    assert "embed.weight: vocab=47 is not divisible by mesh ('tensor',)=4" in message
    assert "moe_layers.attention.wo.weight: heads=3 is not divisible" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="vocab=47"):
        create_model(odd, 0, RUNTIME, rules)
    check_divisible(ShardingRules(), {"anything": ((7,), ("vocab",))})
