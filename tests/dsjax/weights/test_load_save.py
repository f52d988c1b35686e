"""Weights in and out of memory: every kind of source, sharded or not, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from dsjax.config import (
    BatchConfig,
    DataConfig,
    MeshConfig,
    SourceConfig,
    TrainConfig,
    from_json,
    to_json,
)
from dsjax.config.stored import run_to_json
from dsjax.data.tokenizer import load_tokenizer
from dsjax.data.tokenizer_files import write_byte_tokenizer
from dsjax.families import find_model_config, hf_table
from dsjax.families.tensors import params_to_hf
from dsjax.files import LockHeldError, locked
from dsjax.mesh import inference_rules, make_mesh, train_rules
from dsjax.weights import load_weights, locate, save_assets, save_weights
from dsjax.weights.checksums import sealed
from dsjax.weights.convert import convert
from tests.small_models import LOSS, SMALL, SMALL_LITE, random_model

TOKENIZER = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "README.md": "# é"}


def params_of(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def assert_same_weights(actual, expected) -> None:
    """Both models hold the same bits, of the same types."""
    for one, two in zip(
        jax.tree.leaves_with_path(params_of(actual)),
        jax.tree.leaves_with_path(params_of(expected)),
        strict=True,
    ):
        assert one[0] == two[0]
        assert one[1].dtype == two[1].dtype, one[0]
        np.testing.assert_array_equal(np.asarray(one[1]), np.asarray(two[1]), str(one[0]))


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


def make_run(folder, model, steps=(3, 12)) -> None:
    """Saves a run as training does; only the last step has the model's weights."""
    config = TrainConfig(
        directory=str(folder),
        model=model.config,
        data=DataConfig(sources=(SourceConfig("corpus"),), length=16),
        batch=BatchConfig(size=2),
        num_steps=20,
        loss=LOSS,
    )
    with ocp.training.Checkpointer(folder / "checkpoints") as checkpointer:
        for step in steps:
            params = params_of(model)
            if step != steps[-1]:
                params = jax.tree.map(jnp.zeros_like, params)
            optimizer = {"count": jnp.int32(step)}
            checkpointer.save_checkpointables(
                step,
                {"params": params, "optimizer": optimizer},
                force=True,
                custom_metadata=sealed({"data": [{}], "step": step}),
            )
    (folder / "run.json").write_text(json.dumps(run_to_json(config)))
    save_assets("bytes", "", folder)


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    """The same weights as a folder of every kind."""
    root = tmp_path_factory.mktemp("places")
    save_weights(model, root / "hf", format="hf")
    for name, text in TOKENIZER.items():
        (root / "hf" / name).write_text(text, encoding="utf-8")
    save_weights(model, root / "ours", assets=root / "hf")
    make_run(root / "run", model)
    return root


@pytest.mark.core
@pytest.mark.parametrize("place", ["hf", "ours", "run", "run/checkpoints/12"])
def test_weights_are_the_same_from_everywhere(places, model, place):
    loaded = load_weights(places / place)
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    # Nothing is lost of weights that are all float32.
    assert loaded.options.dtype == jnp.float32
    bf16 = load_weights(places / place, dtype="bfloat16")
    assert bf16.options.dtype == jnp.bfloat16
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    jax.tree.map(np.testing.assert_array_equal, params_of(bf16), expected)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("place", ["hf", "ours"])
def test_loading_leaves_no_file_open(places, place):
    folder = places / place
    load_weights(folder)
    opened = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    held = [os.readlink(link) for link in opened if link.is_symlink()]
    assert not [name for name in held if name.startswith(str(folder))]


@pytest.mark.parametrize(("config", "rules"), [(SMALL, train_rules), (SMALL_LITE, inference_rules)])
def test_eight_devices_hold_the_same_weights(tmp_path, config, rules):
    model = random_model(config)
    save_weights(model, tmp_path / "hf", format="hf")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    sharded = load_weights(tmp_path / "hf", dtype="float32", rules=rules(mesh))
    assert_same_weights(sharded, model)
    assert sharded.moe_layers is not None
    gate = sharded.moe_layers.feed_forward.w_gate.stored()
    assert isinstance(gate.sharding, NamedSharding)
    assert gate.sharding.spec == rules(mesh).spec("layers", "experts", "expert_embed", "mlp")
    assert gate.addressable_shards[0].data.size < gate.size
    # And out again, from eight devices to one and to eight.
    save_weights(sharded, tmp_path / "ours")
    assert_same_weights(load_weights(tmp_path / "ours"), model)
    assert_same_weights(load_weights(tmp_path / "ours", rules=rules(mesh)), model)
    save_weights(sharded, tmp_path / "hf2", format="hf")
    file = "model.safetensors"
    assert (tmp_path / "hf2" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_large_arrays_cross_between_host_and_devices_in_parts(places, model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dsjax.weights.to_devices.HOST_BYTES", 6000
    )  # a third of the experts' arrays
    assert_same_weights(load_weights(places / "ours"), model)
    mesh = make_mesh(MeshConfig(fsdp=1, expert=2), devices=jax.devices()[:2])
    sharded = load_weights(places / "hf", dtype="float32", rules=train_rules(mesh))
    assert_same_weights(sharded, model)
    save_weights(sharded, tmp_path / "hf", format="hf")
    file = "model.safetensors"
    assert (tmp_path / "hf" / file).read_bytes() == (places / "hf" / file).read_bytes()


def test_other_software_reads_the_hugging_face_folder(places, model):
    with safetensors.safe_open(places / "hf" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = safetensors.numpy.load_file(places / "hf" / "model.safetensors")
    expected = dict(params_to_hf(hf_table(model.config), params_of(model)))
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values)
    assert find_model_config(places / "hf").moe == SMALL.moe


def test_plain_orbax_reads_the_checkpoint(places, model):
    loaded = ocp.load_checkpointables(places / "ours", {"params": params_of(model)})["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(model))


def test_a_cast_on_the_way_out_is_the_cast_of_the_weights(tmp_path, model):
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    for format in ("hf", "dsjax"):
        save_weights(model, tmp_path / format, format=format, dtype="bfloat16")
        loaded = load_weights(tmp_path / format)
        jax.tree.map(np.testing.assert_array_equal, params_of(loaded), expected)
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["torch_dtype"] == "bfloat16"


def test_small_files_go_along_byte_by_byte(places, model, tmp_path):
    for name, text in TOKENIZER.items():
        assert (places / "ours" / "hf" / name).read_text(encoding="utf-8") == text
    save_weights(model, tmp_path / "hf", assets=places / "ours", format="hf")
    names = sorted(file.name for file in (places / "hf").iterdir())
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (places / "hf" / name).read_bytes()


def test_a_changed_model_gets_its_own_config_json(places, tmp_path):
    longer = replace(SMALL, max_length=512)
    save_weights(random_model(longer), tmp_path / "hf", assets=places / "hf", format="hf")
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 512
    )
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == TOKENIZER["tokenizer.json"]


def test_locate_says_what_is_there(places):
    found = locate(places / "ours")
    assert found.config == SMALL
    assert found.tokenizer == str(places / "ours" / "hf" / "tokenizer.json")
    assert locate(places / "hf").config.moe == SMALL.moe


def test_bytes_become_a_tokenizer_with_the_same_ids(places):
    spec = locate(places / "run").tokenizer
    assert spec is not None
    tokenizer, plain = load_tokenizer(spec), load_tokenizer("bytes")
    text = "".join(map(chr, range(1, 256))) + " def f():\n\treturn 'é€😀'\r\n"
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.decode(plain.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (plain.bos_id, plain.eos_id)
    assert tokenizer.vocab_size == plain.vocab_size


def test_a_run_made_into_hugging_face_names_its_bos_and_eos(places, model, tmp_path):
    save_weights(model, tmp_path / "hf", assets=places / "run", format="hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (content["bos_token_id"], content["eos_token_id"]) == (256, 257)


@pytest.mark.parametrize("place", ["run", "run/checkpoints/12"])
def test_a_run_converts_to_a_hugging_face_folder(places, model, tmp_path, place):
    convert(places / place, tmp_path / "hf", progress=False)
    assert_same_weights(load_weights(tmp_path / "hf"), model)
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"config.json", "model.safetensors"} | tokenizer
    spec = locate(tmp_path / "hf").tokenizer
    assert spec is not None
    assert load_tokenizer(spec).bos_id == 256


def test_a_step_of_a_run_is_chosen_for_conversion(places, model, tmp_path):
    convert(places / "run", tmp_path / "hf", progress=False, step=3)  # zeros, by `make_run`
    zeros = jax.tree.leaves(params_of(load_weights(tmp_path / "hf")))
    assert not any(leaf.any() for leaf in zeros)
    with pytest.raises(ValueError, match=r"step=4: .* has no such step; it has 3, 12"):
        convert(places / "run", tmp_path / "other", progress=False, step=4)


def test_a_hub_name_is_downloaded_and_loaded(places, model, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(places / "hf")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_weights(load_weights("deepseek-ai/DeepSeek-V2-Lite"), model)
    assert asked[0][0] == "deepseek-ai/DeepSeek-V2-Lite"
    assert {"*.safetensors", "*.json"} <= set(asked[0][1])


def test_a_run_that_starts_from_a_model_keeps_its_files_but_not_its_tokenizer(places, tmp_path):
    save_assets("bytes", str(places / "hf"), tmp_path)
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert names == {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(str(tmp_path / "hf")).eos_id == 257


def test_another_tokenizer_leaves_no_ids_of_the_old_one_in_generation_config(places, tmp_path):
    shutil.copytree(places / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "generation_config.json"
    file.write_text('{"eos_token_id": [5, 6], "pad_token_id": 5, "temperature": 0.3}')
    save_assets("bytes", str(tmp_path / "hf"), tmp_path / "other")
    content = json.loads((tmp_path / "other" / "hf" / file.name).read_text())
    assert content == {"temperature": 0.3, "bos_token_id": 256, "eos_token_id": 257}
    write_byte_tokenizer(tmp_path / "hf")
    save_assets("bytes", str(tmp_path / "hf"), tmp_path / "same")
    assert (tmp_path / "same" / "hf" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_float16_is_refused(places, model, tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}': must be float32 or bfloat16"):
        load_weights(places / "hf", dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype='{dtype}'"):
        save_weights(model, tmp_path / "x", dtype=dtype)
    assert not (tmp_path / "x").exists()


def test_what_is_no_model_is_refused_in_one_line(places, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, and no name"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder, and not to be"):
        load_weights("nobody/nothing")
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        load_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text((places / "run" / "run.json").read_text())
    with pytest.raises(ValueError, match="checkpoints: holds no complete step"):
        load_weights(tmp_path)


def test_a_path_with_dots_is_read_like_any_other(places, model):
    for place in ("ours", "run"):
        assert_same_weights(load_weights(places / "hf" / ".." / place), model)


def test_saving_removes_nothing_but_what_a_save_left(model, tmp_path):
    kept = ["new.partial", "new.partial-notes", "new.saving-mine"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "new.saving" / "out").mkdir(parents=True)  # of a save that was killed
    (tmp_path / "new.saving" / "save.lock").touch()
    save_weights(model, tmp_path / "new", format="hf")
    assert {file.name for file in tmp_path.iterdir()} == {"new", *kept}


@pytest.mark.parametrize("format", ["hf", "dsjax"])
def test_a_folder_of_the_users_own_is_not_cleared(model, tmp_path, format):
    thesis = tmp_path / "new.saving" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("text")
    with pytest.raises(FileExistsError, match=r"new\.saving: is in the way, and no save made it"):
        save_weights(model, tmp_path / "new", format=format)
    assert thesis.read_text() == "text"
    assert not (tmp_path / "new").exists()


def test_two_saves_do_not_share_a_folder(model, tmp_path):
    (tmp_path / "new.saving").mkdir()
    with (
        locked(tmp_path / "new.saving" / "save.lock"),
        pytest.raises(LockHeldError, match=r"new\.saving: in use by process"),
    ):
        save_weights(model, tmp_path / "new", format="hf")
    assert [file.name for file in tmp_path.iterdir()] == ["new.saving"]


def test_saving_never_overwrites(places, model):
    with pytest.raises(FileExistsError, match="hf: exists already"):
        save_weights(model, places / "hf", format="hf")
    with pytest.raises(ValueError, match="format='gguf'"):
        save_weights(model, places / "new", format="gguf")  # type: ignore[arg-type]


FULL = """
import resource, sys
from dsjax.weights import load_weights, save_weights

model = load_weights(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, resource.RLIM_INFINITY))
for format in ("hf", "dsjax"):
    try:
        save_weights(model, sys.argv[2], format=format)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_save_that_fails_names_the_file_and_leaves_nothing(places, tmp_path):
    # No file may grow past the limit: what a full disk gives, but for the number of the error.
    args = [sys.executable, "-c", FULL, places / "hf", tmp_path / "new"]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    of_hf, of_ours = done.stdout.splitlines()
    assert f"{tmp_path}/new.saving/out/model.safetensors" in of_hf
    assert f"{tmp_path}/new.saving/out/params: cannot be written: " in of_ours
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_of_ours_is_named(places, model, tmp_path):
    shutil.copytree(places / "ours", tmp_path / "ours")
    file = tmp_path / "ours" / "dsjax.json"
    content = json.loads(file.read_text())
    (tmp_path / "ours" / "checksums.json").unlink()  # as for whoever means to edit a file

    file.write_text(json.dumps(content | {"format": 9}))
    with pytest.raises(ValueError, match=r"dsjax\.json: format=9: this version reads 1"):
        load_weights(tmp_path / "ours")

    wider = to_json(replace(from_json(type(SMALL), content["model"]), vocab_size=50))
    file.write_text(json.dumps(content | {"model": wider}))
    message = r"params: parameter embed.weight: shape \[48, 32\] must be \[50"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "ours")

    file.write_text(json.dumps(content | {"model": to_json(SMALL_LITE)}))
    with pytest.raises(
        ValueError, match=r"dense_layers.attention.wq_a.weight is not of this model"
    ):
        load_weights(tmp_path / "ours")

    file.unlink()  # what is not complete is no checkpoint
    with pytest.raises(ValueError, match="neither"):
        load_weights(tmp_path / "ours")
