"""Conversion: bit by bit both ways, resumed after a kill, refused where the input is damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1 as ocp

import dsjax.convert
import dsjax.safetensors_io as safetensors_io
from dsjax.config import ModelConfig
from dsjax.config.huggingface import to_hf_config
from dsjax.convert import convert
from dsjax.hf import hf_table, hf_tensor_shapes, params_from_hf
from dsjax.safetensors_io import INDEX_NAME, read_header
from dsjax.weights import load_weights, save_weights
from tests.small_models import SMALL, SMALL_LITE, random_model

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def make_folder(
    folder: Path, config: ModelConfig, dtype=jnp.bfloat16, num_files: int = 3, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes a checkpoint as other software does, with the format's own library."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in hf_tensor_shapes(config).items()
    }
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:06d}.safetensors"  # not our own pattern
        group = names[number::num_files]
        weight_map |= dict.fromkeys(group, file)
        part = {name: tensors[name] for name in group}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt", "made": "elsewhere"})
    if num_files > 1:
        content = {"weight_map": weight_map, "metadata": {"total_size": 7}}
        (folder / INDEX_NAME).write_text(json.dumps(content))
    dtype_name = jnp.dtype(dtype).name
    hf = to_hf_config(config, dtype=dtype_name, bos_id=1, eos_id=2) | {"unknown": [1, "é"]}
    (folder / "config.json").write_text(json.dumps(hf, indent=3))
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    (folder / "tokenizer.json").write_bytes(bytes(range(256)))
    (folder / "modeling_deepseek.py").write_text("raise SystemExit\n")
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def convert_quietly(src: Path, dst: Path, **options) -> None:
    convert(src, dst, progress=False, **options)


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
    expected = params_from_hf(SMALL, tensors.__getitem__)
    plain = ocp.load_checkpointables(tmp_path / "ours", {"params": None})["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected
    )
    placed = ocp.load_checkpointables(tmp_path / "ours", {"params": abstract})["params"]
    model = load_weights(tmp_path / "ours")
    assert model.config.param_dtype == jnp.dtype(dtype).name
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
    monkeypatch.setattr("dsjax.hf_export.MAX_FILE_BYTES", 100_000)
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
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values.astype(jnp.bfloat16))
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (content["torch_dtype"], content["unknown"]) == ("bfloat16", [1, "é"])


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
        moe=replace(SMALL.moe, intermediate_dim=256, num_experts=16),
    )
    make_folder(tmp_path / "hf", config, np.float32)
    largest = max(int(np.prod(t.shape)) * 4 for t in hf_table(config).tensors.values())
    stacked = max(int(np.prod(p.shape)) * 4 for p in hf_table(config).params.values())
    assert stacked >= 32 * largest
    monkeypatch.setattr(dsjax.convert, "_COMMIT_BYTES", 4 * largest)
    for src, dst in (("hf", "ours"), ("ours", "back")):
        tracemalloc.start()
        convert_quietly(tmp_path / src, tmp_path / dst)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Each worker holds a tensor twice, in either order of its dims.
        assert peak < (2 * dsjax.convert._WORKERS + 2) * largest < stacked


KILLED = """
import os, signal, sys
import dsjax.convert as module

module._COMMIT_BYTES = 20_000
add = module._Journal.add
count = 0

def add_and_die(self, names):
    global count
    add(self, names)
    count += bool(names)
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)

module._Journal.add = add_and_die
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
    run = dsjax.convert._run

    def run_and_count(tensors, dtype_of, write, *rest):
        def write_and_count(tensor):
            written.append(tensor.name)
            write(tensor)

        run(tensors, dtype_of, write_and_count, *rest)

    monkeypatch.setattr(dsjax.convert, "_run", run_and_count)
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
        dsjax.convert._Journal(tmp_path / "ours.partial", identity),
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
from dsjax.convert import convert

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


def edit_header(folder: Path, change, file: str = "model-00001-of-000003.safetensors") -> Path:
    """Rewrites the header of a file, with its bytes of data as they are."""
    path = folder / file
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return path


def edit_index(folder: Path, change) -> None:
    content = json.loads((folder / INDEX_NAME).read_text())
    change(content["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(content))


def first_names(folder: Path) -> list[str]:
    """The tensors of the first file, in the order of their bytes."""
    return list(read_header(folder / "model-00001-of-000003.safetensors").tensors)


def truncate(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    return [path.name, names[-1], "truncated"]


def truncate_in_the_header(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    os.truncate(path, 100)
    return [path.name, "truncated"]


def empty_file(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    os.truncate(path, 0)
    return [path.name, "truncated"]


def no_json(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    path.write_bytes((10).to_bytes(8, "little") + b"not json at all")
    return [path.name, "damaged header"]


def wrong_shape(folder, names):
    def change(header):
        header[names[0]]["shape"].reverse()

    name = next(n for n in names if len(read_shape(folder, n)) == 2)
    names = [name]
    return [edit_header(folder, change).name, name, "shape", "must be"]


def read_shape(folder, name):
    return read_header(folder / "model-00001-of-000003.safetensors").tensors[name].shape


def wrong_dtype(folder, names):
    return [edit_header(folder, lambda h: h[names[0]].update(dtype="I16")).name, names[0], "I16"]


def float16(folder, names):
    path = edit_header(folder, lambda h: h[names[1]].update(dtype="F16"))
    return [path.name, names[1], "F16 is refused"]


def unknown_dtype(folder, names):
    return [edit_header(folder, lambda h: h[names[1]].update(dtype="Q4")).name, names[1], "Q4"]


def one_of_another_dtype(folder, names):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    file = json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]
    tensors = safetensors.numpy.load_file(folder / file)
    tensors[name] = tensors[name].astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / file)
    return [file, name, "dtype float32 differs from that of the other tensors"]


def size_that_does_not_fit_the_shape(folder, names):
    def change(header):
        header[names[0]]["shape"][0] += 1

    return [edit_header(folder, change).name, names[0], "data_offsets", "needs"]


def overlap(folder, names):
    def change(header):
        header[names[1]]["data_offsets"] = [x - 2 for x in header[names[1]]["data_offsets"]]

    return [edit_header(folder, change).name, names[1], "overlaps", names[0]]


def gap(folder, names):
    def change(header):
        header[names[1]]["data_offsets"] = [x + 2 for x in header[names[1]]["data_offsets"]]

    return [edit_header(folder, change).name, names[1], "gap", names[0]]


def beyond_the_end(folder, names):
    def change(header):
        header[names[-1]]["data_offsets"] = [
            10**12,
            10**12 + 2 * np.prod(read_shape(folder, names[-1])).item(),
        ]

    return [edit_header(folder, change).name, names[-1], "leaves a gap"]


def negative_offset(folder, names):
    def change(header):
        header[names[0]]["data_offsets"][0] = -2

    return [edit_header(folder, change).name, names[0], "no sizes"]


def entry_without_offsets(folder, names):
    path = edit_header(folder, lambda h: h[names[0]].pop("data_offsets"))
    return [path.name, names[0], "damaged header entry"]


def bytes_behind_the_last(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    with path.open("ab") as file:
        file.write(b"rest")
    return [path.name, "4 bytes lie behind the last tensor", names[-1]]


def missing_tensor(folder, names):
    def change(header):
        del header[names[-1]]

    path = edit_header(folder, change)
    os.truncate(path, read_end(path))
    edit_index(folder, lambda weight_map: weight_map.pop(names[-1]))
    return [str(folder), names[-1], "missing"]


def read_end(path: Path) -> int:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = [e for n, e in json.loads(raw[8 : 8 + size]).items() if n != "__metadata__"]
    return 8 + size + max(entry["data_offsets"][1] for entry in entries)


def extra_tensor(folder, names):
    def change(header):
        header["model.layers.9.mystery"] = header.pop(names[0])

    edit_header(folder, change)

    def rename(weight_map):
        weight_map["model.layers.9.mystery"] = weight_map.pop(names[0])

    edit_index(folder, rename)
    return [str(folder), "model.layers.9.mystery", "not of this model", names[0], "missing"]


def tensor_twice(folder, names):
    shutil.copy(folder / "model-00001-of-000003.safetensors", folder / "model-x.safetensors")
    (folder / INDEX_NAME).unlink()
    return ["model-x.safetensors", "is also in model-00001-of-000003.safetensors"]


def index_names_an_absent_file(folder, names):
    (folder / "model-00001-of-000003.safetensors").unlink()
    return [INDEX_NAME, "model-00001-of-000003.safetensors", "which is not there"]


def index_names_the_wrong_file(folder, names):
    other = "model-00002-of-000003.safetensors"
    edit_index(folder, lambda weight_map: weight_map.update({names[0]: other}))
    return [INDEX_NAME, names[0], other]


def index_lacks_a_tensor(folder, names):
    edit_index(folder, lambda weight_map: weight_map.pop(names[0]))
    return [INDEX_NAME, "does not list tensor", names[0]]


def index_leads_out_of_the_folder(folder, names):
    edit_index(folder, lambda weight_map: weight_map.update({names[0]: "../x.safetensors"}))
    return [INDEX_NAME, names[0], "outside"]


def damaged_index(folder, names):
    (folder / INDEX_NAME).write_text('{"weight_map": ')
    return [INDEX_NAME, "damaged index"]


def no_weights(folder, names):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return [str(folder), "no safetensors files"]


DAMAGES = [
    truncate,
    truncate_in_the_header,
    empty_file,
    no_json,
    wrong_shape,
    wrong_dtype,
    float16,
    unknown_dtype,
    one_of_another_dtype,
    size_that_does_not_fit_the_shape,
    overlap,
    gap,
    beyond_the_end,
    negative_offset,
    entry_without_offsets,
    bytes_behind_the_last,
    missing_tensor,
    extra_tensor,
    tensor_twice,
    index_names_an_absent_file,
    index_names_the_wrong_file,
    index_lacks_a_tensor,
    index_leads_out_of_the_folder,
    damaged_index,
    no_weights,
]


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "hf"
    make_folder(folder, SMALL)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_input_is_named_in_one_line_before_anything_is_written(
    tmp_path, sound_folder, damage
):
    folder = tmp_path / "hf"
    shutil.copytree(sound_folder, folder)
    expected = damage(folder, first_names(folder))
    for use in (lambda: convert_quietly(folder, tmp_path / "ours"), lambda: load_weights(folder)):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as info:
            use()
        message = str(info.value)
        assert [part for part in expected if part not in message] == [], message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_lost_chunk_of_ours_is_named_and_not_read_as_zeros(tmp_path, sound_folder):
    convert_quietly(sound_folder, tmp_path / "ours")
    chunk = tmp_path / "ours" / "params" / "moe_layers.feed_forward.w_up" / "c" / "1" / "4"
    shutil.rmtree(chunk)
    for use in (
        lambda: convert_quietly(tmp_path / "ours", tmp_path / "hf"),
        lambda: load_weights(tmp_path / "ours"),
    ):
        with pytest.raises(ValueError, match=r"^\S+params: parameter moe_layers.feed_forward.w_up"):
            use()
    assert not (tmp_path / "hf").exists()


def test_every_header_that_the_library_writes_is_read_alike(tmp_path, rng):
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2, np.float32),
        "é": rng.standard_normal(7).astype(jnp.bfloat16),
        "ids": np.arange(5),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    folder = safetensors_io.SafetensorsFolder(tmp_path)
    assert folder.headers["x.safetensors"].metadata == {"k": "v"}
    for name in ("a", "empty", "scalar", "é"):
        flat = folder.read(name, 0, tensors[name].size)
        np.testing.assert_array_equal(flat, tensors[name].reshape(-1))
    np.testing.assert_array_equal(folder.read("a", 4, 9), tensors["a"].reshape(-1)[4:9])
    with pytest.raises(ValueError, match=r"x.safetensors: tensor ids: dtype I64 must be one of"):
        folder.read("ids", 0, 5)
    folder.close()
