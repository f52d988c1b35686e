"""Conversion: bit by bit both ways, bounded in memory, resumed after a kill."""

import json
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1 as ocp

import dsjax.weights.convert as convert_module
from dsjax.families import hf_table, hf_tensor_shapes
from dsjax.families.tensors import params_from_hf
from dsjax.weights import load_weights, save_weights
from dsjax.weights.safetensors import INDEX_NAME
from tests.hf_folders import INV_FREQ, contents, convert_quietly, make_folder
from tests.small_models import SMALL, SMALL_LITE, SMALL_MOE, random_model


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "dtype", "num_files"),
    [(SMALL, jnp.bfloat16, 3), (SMALL_LITE, np.float32, 1), (SMALL, np.float32, 2)],
)
def test_there_and_back_gives_the_same_files(tmp_path, config, dtype, num_files):
    make_folder(tmp_path / "hf", config, dtype, num_files)
    convert_quietly(tmp_path / "hf", tmp_path / "ours")
    convert_quietly(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "ours"]


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_plain_orbax_and_load_weights_read_the_result(tmp_path, dtype):
    tensors = make_folder(tmp_path / "hf", SMALL, dtype)
    convert_quietly(tmp_path / "hf", tmp_path / "ours")
    expected = params_from_hf(hf_table(SMALL), tensors.__getitem__)
    plain = ocp.load_checkpointables(tmp_path / "ours", {"params": None})["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected
    )
    placed = ocp.load_checkpointables(tmp_path / "ours", {"params": abstract})["params"]
    model = load_weights(tmp_path / "ours")
    for loaded in (plain, placed, nnx.to_pure_dict(nnx.state(model))):
        same_type = jax.tree.map(lambda x, y: x.dtype == y.dtype, loaded, expected)
        assert all(jax.tree.leaves(same_type))
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_ours_becomes_hugging_face_and_comes_back(tmp_path):
    model = random_model(SMALL)
    save_weights(model, tmp_path / "ours")  # orbax's own layout on disk
    convert_quietly(tmp_path / "ours", tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "again")
    loaded = load_weights(tmp_path / "again")
    expected = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(loaded)), expected)


def test_a_large_checkpoint_is_divided_into_files_with_an_index(tmp_path, monkeypatch):
    save_weights(random_model(SMALL), tmp_path / "ours")
    monkeypatch.setattr("dsjax.weights.hf_export.MAX_FILE_BYTES", 100_000)
    convert_quietly(tmp_path / "ours", tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / INDEX_NAME).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) >= 3
    total = 0
    for file in files:
        size = sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / "hf" / file).values())
        assert size <= 100_000
        total += size
    assert index["metadata"]["total_size"] == total
    load_weights(tmp_path / "hf")


def test_a_cast_is_the_cast_of_every_tensor(tmp_path):
    tensors = make_folder(tmp_path / "hf", SMALL, np.float32)
    convert_quietly(tmp_path / "hf", tmp_path / "ours", dtype="bfloat16")
    convert_quietly(tmp_path / "ours", tmp_path / "back")
    found: dict[str, np.ndarray] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values.astype(jnp.bfloat16))
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (content["torch_dtype"], content["auto_map"]) == ("bfloat16", [1, "é"])


def test_tensors_that_follow_from_the_config_are_left_out(tmp_path):
    tensors = make_folder(tmp_path / "hf", SMALL, np.float32, num_files=1)
    file = next((tmp_path / "hf").glob("*.safetensors"))
    safetensors.numpy.save_file(tensors | {INV_FREQ: np.ones(4, np.float32)}, file)
    convert_quietly(tmp_path / "hf", tmp_path / "ours")
    convert_quietly(tmp_path / "ours", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values)


def test_memory_is_bounded_by_a_few_tensors(tmp_path, monkeypatch):
    config = replace(
        SMALL,
        hidden_dim=512,
        num_layers=5,
        moe=replace(SMALL_MOE, intermediate_dim=256, num_experts=16),
    )
    make_folder(tmp_path / "hf", config, np.float32)
    largest = max(int(np.prod(t.shape)) * 4 for t in hf_table(config).tensors.values())
    stacked = max(int(np.prod(p.shape)) * 4 for p in hf_table(config).params.values())
    assert stacked >= 32 * largest
    monkeypatch.setattr(convert_module, "_COMMIT_BYTES", 4 * largest)
    for src, dst in (("hf", "ours"), ("ours", "back")):
        tracemalloc.start()
        convert_quietly(tmp_path / src, tmp_path / dst)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Each worker holds a tensor twice, in either order of its dims.
        assert peak < (2 * convert_module._WORKERS + 2) * largest < stacked


KILLED = """
import os, signal, sys
import dsjax.weights.convert as module

module._COMMIT_BYTES = 20_000
add = module.Journal.add
count = 0

def add_and_die(self, names):
    global count
    add(self, names)
    count += bool(names)
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)

module.Journal.add = add_and_die
module.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to ours", "to hf"])
def test_a_killed_conversion_goes_on_and_gives_the_same(tmp_path, direction, monkeypatch):
    make_folder(tmp_path / "hf", SMALL)
    src, name = tmp_path / "hf", "ours"
    if direction == "to hf":
        convert_quietly(src, tmp_path / "ours")
        src, name = tmp_path / "ours", "back"
    dst, work = tmp_path / f"{name}", tmp_path / f"{name}.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, src, dst], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not dst.exists()
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        load_weights(work)
    done = (work / "journal").read_text().splitlines()[1:]
    total = len(hf_tensor_shapes(SMALL))
    assert 5 <= len(done) < total
    with (work / "journal").open("a") as journal:
        journal.write("model.layers.0.inp")  # a line that the kill cut short

    written = []
    run = convert_module._run

    def run_and_count(tensors, dtype_of, write, *rest):
        def write_and_count(tensor):
            written.append(tensor.name)
            write(tensor)

        run(tensors, dtype_of, write_and_count, *rest)

    monkeypatch.setattr(convert_module, "_run", run_and_count)
    convert_quietly(src, dst)
    assert len(written) == total - len(done)
    assert not set(written) & set(done)
    assert not work.exists()
    if direction == "to ours":
        convert_quietly(dst, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_an_unfinished_conversion_of_something_else_is_left_alone(tmp_path):
    make_folder(tmp_path / "hf", SMALL)
    work = tmp_path / "ours.partial"
    work.mkdir()
    (work / "journal").write_text('{"of": "another"}\nlm_head.weight\n')
    with pytest.raises(ValueError, match=r"ours\.partial: holds the unfinished conversion of some"):
        convert_quietly(tmp_path / "hf", tmp_path / "ours")
    assert (work / "journal").read_text().endswith("lm_head.weight\n")


def test_two_conversions_do_not_share_a_work_folder(tmp_path):
    make_folder(tmp_path / "hf", SMALL)
    (tmp_path / "ours.partial").mkdir()
    identity = {"of": "this"}
    with (
        convert_module.Journal(tmp_path / "ours.partial", identity),
        pytest.raises(BlockingIOError, match=r"ours\.partial: another process converts there"),
    ):
        convert_quietly(tmp_path / "hf", tmp_path / "ours")


def test_a_destination_that_exists_is_left_alone(tmp_path):
    make_folder(tmp_path / "hf", SMALL)
    (tmp_path / "ours").mkdir()
    with pytest.raises(FileExistsError, match="ours: exists already"):
        convert_quietly(tmp_path / "hf", tmp_path / "ours")


FULL = """
import resource, sys
from dsjax.weights.convert import convert

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    convert(sys.argv[1], sys.argv[2], progress=False)
except OSError as error:
    print(f"OSError: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to ours", "to hf"])
def test_a_file_that_cannot_be_written_is_named_and_a_rerun_goes_on(tmp_path, direction):
    # No file may grow past the limit: what a full disk gives, but for the number of the error.
    make_folder(tmp_path / "hf", replace(SMALL, vocab_size=512), np.float32)
    src, dst = tmp_path / "hf", tmp_path / "ours"
    named = f"{dst}.partial/out/params/"
    if direction == "to hf":
        convert_quietly(src, dst)
        src, dst = dst, tmp_path / "back"
        named = f"{dst}.partial/out/model-"
    limit = "40000"  # room for orbax's own files, not for the embedding or a whole file
    args = [sys.executable, "-c", FULL, src, dst, limit]
    failed = subprocess.run(args, capture_output=True, text=True)
    assert failed.stdout.startswith("OSError: "), failed.stderr
    assert failed.stdout.count("\n") == 1
    assert named in failed.stdout
    assert not dst.exists()
    convert_quietly(src, dst)
    if direction == "to ours":
        convert_quietly(dst, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


# Each damages a folder of three files and says what the error must name.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"normalize_weights": True}, "norm_topk_prob"),
        ({"normalize_weights": True, "top_k": 1, "top_groups": 1}, None),  # then nothing is normed
        ({"num_shared_experts": 0}, "shared experts of width 0"),
        ({}, None),
    ],
)
def test_an_export_that_other_software_runs_differently_is_said(tmp_path, caplog, fields, said):
    config = replace(SMALL, moe=replace(SMALL_MOE, **fields))
    save_weights(random_model(config), tmp_path / "hf", format="hf")
    if said is None:
        assert "differently" not in caplog.text
    else:
        assert said in caplog.text


def test_tensors_of_no_numbers_of_absent_shared_experts_are_taken(tmp_path):
    config = replace(SMALL, moe=replace(SMALL_MOE, num_shared_experts=0))
    tensors = make_folder(tmp_path / "hf", config, np.float32, num_files=1)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    prefix = "model.layers.1.mlp.shared_experts"
    empty = {
        f"{prefix}.gate_proj.weight": np.zeros((0, 32), np.float32),
        f"{prefix}.down_proj.weight": np.zeros((32, 0), np.float32),
    }
    safetensors.numpy.save_file(tensors | empty, file)
    load_weights(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "ours")
    convert_quietly(tmp_path / "ours", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
