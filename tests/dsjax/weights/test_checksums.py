"""A flipped byte is found: by loading where it matters, by `dsjax check` wherever it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import TrainConfig
from dsjax.weights import load_weights, save_weights
from dsjax.weights.check import faults_of
from tests.hf_folders import convert_quietly, make_folder
from tests.small_models import SMALL, random_model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    make_folder(root / "hf", SMALL)
    (root / "hf" / "tokenizer.json").unlink()  # not a real one
    convert_quietly(root / "hf", root / "converted")
    save_weights(random_model(SMALL), root / "saved")
    return root


def flip(file: Path, at: float = 0.5) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(at * len(raw))] ^= 4
    file.write_bytes(raw)


def data_files(folder: Path) -> list[Path]:
    """Files of chunks: orbax's, or one of those that a conversion wrote."""
    found = [f for f in folder.rglob("*") if f.is_file() and "d" in f.parent.parts[-1:]]
    return found or sorted(folder.rglob("c/1/3/*/*"))[:3]


@pytest.mark.parametrize("place", ["converted", "saved"])
def test_a_flipped_byte_of_the_weights_is_named(places, tmp_path, place):
    shutil.copytree(places / place, tmp_path / "x")
    for file in data_files(tmp_path / "x" / "params"):
        if file.stat().st_size < 1000 and place == "saved":
            continue
        sound = file.read_bytes()
        for at in (0.05, 0.5):  # orbax leaves what nobody reads at the end
            flip(file, at)
            for use in (load_weights, lambda path: convert_quietly(path, tmp_path / "hf")):
                with pytest.raises(ValueError, match=r"^[^\n]*params: parameter [^\n]*$"):
                    use(tmp_path / "x")
            assert any("params: parameter" in fault for fault in faults_of(tmp_path / "x", False))
            file.write_bytes(sound)
    assert list(faults_of(tmp_path / "x", False)) == []


@pytest.mark.parametrize(
    "name", ["dsjax.json", "safetensors_headers.json", "params/norm.weight/zarr.json"]
)
def test_a_changed_description_is_named(places, tmp_path, name):
    shutil.copytree(places / "converted", tmp_path / "x")
    file = tmp_path / "x" / name
    text = file.read_text()
    digit = next(i for i, c in enumerate(text) if c in "123456")
    file.write_text(text[:digit] + "7" + text[digit + 1 :])
    with pytest.raises(ValueError, match=name):
        load_weights(tmp_path / "x")
    assert any(name in fault for fault in faults_of(tmp_path / "x", False))
    if name == "safetensors_headers.json":
        (tmp_path / "x" / "checksums.json").unlink()  # a folder of an older version
        load_weights(tmp_path / "x")


def test_a_small_file_that_was_edited_is_said(places, tmp_path, caplog):
    shutil.copytree(places / "converted", tmp_path / "x")
    (tmp_path / "x" / "hf" / "generation_config.json").write_text('{"temperature": 0.4}')
    load_weights(tmp_path / "x")
    assert "generation_config.json: damaged, its checksum is not that in" in caplog.text


def test_all_of_a_hugging_face_folder_is_read(places, tmp_path):
    assert list(faults_of(places / "hf", False)) == []
    shutil.copytree(places / "hf", tmp_path / "x")
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    raw = bytearray(files[0].read_bytes())
    raw[-2:] = b"\x80\x7f"  # infinity in bfloat16
    files[0].write_bytes(raw)
    (fault,) = faults_of(tmp_path / "x", False)
    assert f"{files[0]}: tensor " in fault
    files[1].write_bytes(files[1].read_bytes()[:-7])
    files[2].write_bytes(b"")
    faults = list(faults_of(tmp_path / "x", False))
    assert [str(file) in fault for file, fault in zip(files[1:], faults, strict=True)] == [True] * 2


def test_all_steps_of_a_run_are_read(trained_run: TrainConfig, tmp_path):
    assert list(faults_of(Path(trained_run.directory), False)) == []
    run = tmp_path / "run"
    shutil.copytree(trained_run.directory, run)
    steps = run / "checkpoints"
    for file in (steps / "2" / "optimizer").rglob("d/*"):
        if file.stat().st_size > 5000:
            flip(file)
    path = steps / "4" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["data"][0]["shard"] = 1
    path.write_text(json.dumps(content))
    (steps / "6" / "params" / "manifest.ocdbt").unlink()
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b"\0\0\n")
    faults = list(faults_of(run, False))
    for named in ("metrics.jsonl: 1 damaged", "2/optimizer: ", "4/_CHECKPOINT", "6: lacks params"):
        assert any(named in fault for fault in faults), (named, faults)
    assert np.all([("\n" not in fault) for fault in faults])
