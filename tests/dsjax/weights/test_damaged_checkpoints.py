"""Damaged input is refused in one line that names file and tensor, before anything is written."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dsjax.weights.safetensors as safetensors_io
from dsjax.weights import load_weights
from dsjax.weights.safetensors import INDEX_NAME, read_header
from tests.hf_folders import convert_quietly, make_folder
from tests.small_models import SMALL


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


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"


def pointer(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    path.write_text(LFS)
    return [path.name, "Git LFS pointer"]


def pointer_for_config(folder, names):
    (folder / "config.json").write_text(LFS)
    return ["config.json", "Git LFS pointer"]


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


def bytes_after_the_last(folder, names):
    path = folder / "model-00001-of-000003.safetensors"
    with path.open("ab") as file:
        file.write(b"rest")
    return [path.name, "4 bytes lie after the last tensor", names[-1]]


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


def rename_all(folder, rename):
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(rename(tensors), file)
    (folder / INDEX_NAME).unlink()


def base_model_without_prefix(folder, names):
    rename_all(folder, lambda t: {name.removeprefix("model."): x for name, x in t.items()})
    return [str(folder), "a base model without the prefix `model.`", "tensors are missing", "more"]


def scales_of_fp8(folder, names):
    def add(tensors):
        scales = {f"{name}_scale_inv": np.ones(1, np.float32) for name in tensors}
        return tensors | scales

    rename_all(folder, add)
    return [str(folder), "quantised weights (FP8", "weight_scale_inv", "and", "more"]


def adapter_beside_it(folder, names):
    (folder / INDEX_NAME).unlink()
    lora = {"base_model.model.lora_A.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(lora, folder / "adapter_model.safetensors")
    return ["adapter_model.safetensors", "a LoRA adapter", "base_model.model.lora_A"]


def weights_of_torch(folder, names):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for number in range(9):
        (folder / f"pytorch_model-{number}.bin").write_bytes(b"PK")
    return ["no safetensors files", "pytorch_model-0.bin", "and 4 more", "as safetensors"]


DAMAGES = [
    base_model_without_prefix,
    scales_of_fp8,
    adapter_beside_it,
    weights_of_torch,
    truncate,
    truncate_in_the_header,
    empty_file,
    pointer,
    pointer_for_config,
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
    bytes_after_the_last,
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
        assert len(message) < 1500, message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_lost_chunk_of_ours_is_named_and_not_read_as_zeros(tmp_path, sound_folder):
    convert_quietly(sound_folder, tmp_path / "ours")
    chunk = tmp_path / "ours" / "params" / "moe_layers.feed_forward.w_up.weight" / "c" / "1" / "4"
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


def test_sidecars_of_a_mac_are_no_weights(tmp_path, sound_folder):
    shutil.copytree(sound_folder, tmp_path / "hf")
    (tmp_path / "hf" / INDEX_NAME).unlink()
    for file in list((tmp_path / "hf").glob("*.safetensors")):
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    load_weights(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "ours")
