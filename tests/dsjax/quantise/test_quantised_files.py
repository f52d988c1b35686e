"""Checkpoints quantised on the disk: the same numbers as quantised while loading."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.cli import main
from dsjax.config import QuantisationConfig, QuantisationRule
from dsjax.config.quantisation import RECIPES
from dsjax.weights import load_weights
from dsjax.weights.check import faults_of
from dsjax.weights.safetensors import read_header
from tests.dsjax.quantise.test_quantised_models import MIXED, arrays, assert_same
from tests.hf_folders import convert_quietly, make_folder
from tests.small_models import SMALL, SMALL_MOE


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "hf"
    make_folder(folder, SMALL)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("recipe", [*RECIPES, MIXED], ids=[*RECIPES, "mixed"])
def test_converted_is_what_loading_makes(hf, recipe, tmp_path, monkeypatch):
    convert_quietly(hf, tmp_path / "one", quantize=recipe)
    model = load_weights(tmp_path / "one")
    assert_same(model, load_weights(hf, quantize=recipe))
    assert list(faults_of(tmp_path / "one", progress=False)) == []
    # In smaller pieces, and from a checkpoint of ours.
    monkeypatch.setattr("dsjax.weights.quantised._PIECE_WEIGHTS", 300)
    convert_quietly(hf, tmp_path / "plain")
    convert_quietly(tmp_path / "plain", tmp_path / "two", quantize=recipe)
    assert_same(load_weights(tmp_path / "two"), model)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_conversion_goes_on_and_is_the_same_file_by_file(hf, tmp_path, monkeypatch):
    convert_quietly(hf, tmp_path / "whole", quantize="int4")
    monkeypatch.setattr("dsjax.weights.convert._COMMIT_BYTES", 4000)
    from dsjax.weights import convert as module

    quantise, calls = module.quantise_part, []

    def fail_late(*arguments):
        calls.append(arguments)
        if len(calls) == 60:
            raise OSError("the disk is full")
        return quantise(*arguments)

    monkeypatch.setattr(module, "quantise_part", fail_late)
    with pytest.raises(OSError, match="the disk is full"):
        convert_quietly(hf, tmp_path / "parts", quantize="int4")
    with pytest.raises(ValueError, match="unfinished conversion of something else"):
        convert_quietly(hf, tmp_path / "parts", quantize="int8")
    done = len(calls)
    convert_quietly(hf, tmp_path / "parts", quantize="int4")
    assert len(calls) - done < done  # it went on
    ours, theirs = (
        {
            name: text
            for name, text in files(tmp_path / folder).items()
            # orbax writes time and place into its own descriptions; the checksums follow them.
            if "_METADATA" not in name and name not in ("checksums.json", "commit_success.txt")
        }
        for folder in ("whole", "parts")
    )
    assert ours == theirs


def test_wrong_conversions_are_one_line(hf, tmp_path, monkeypatch, capsys):
    convert_quietly(hf, tmp_path / "int8", quantize="int8")
    recipe = tmp_path / "recipe.py"
    head = "from dsjax.config import QuantisationConfig, QuantisationRule\n"
    recipe.write_text(head + 'config = QuantisationConfig((QuantisationRule("heed", "int8"),))\n')
    for source, quantize, message in (
        (tmp_path / "int8", "int4", "int8: is quantised already"),
        (hf, "int3", "quantize='int3': must be one of int8, fp8, int4, or a Python file"),
        (hf, recipe, "quantisation.rules.weights='heed': matches no matrix of the model"),
    ):
        arguments = ["convert", source, tmp_path / "out", "--quantize", quantize]
        monkeypatch.setattr("sys.argv", ["dsjax", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        error = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2
        assert message in error[-1]
        assert not (tmp_path / "out").exists()


def test_a_byte_that_flips_is_found(hf, tmp_path):
    convert_quietly(hf, tmp_path / "one", quantize="int4")
    path = next(
        (tmp_path / "one" / "params" / "moe_layers.feed_forward.w_up.scales").rglob("c/0/1/*/*")
    )
    path = path if path.is_file() else next(p for p in path.rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    data[1] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"parameter moe_layers\.feed_forward\.w_up\.scales"):
        load_weights(tmp_path / "one")
    assert np.concatenate([a.ravel()[:1] for a in arrays(load_weights(hf)).values()]).size


WIDE = replace(
    SMALL,
    hidden_dim=128,
    intermediate_dim=192,
    attention=replace(
        SMALL.attention,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
    ),
    moe=replace(SMALL_MOE, intermediate_dim=64),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "hf"
    make_folder(folder, WIDE)
    (folder / "tokenizer.json").unlink()
    return folder


def read_export(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A folder's config, and its tensors, each as whoever follows the format's text widens it."""
    tensors: dict[str, np.ndarray] = {}
    dtypes = {"F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16", "F32": "float32"}
    dtypes |= {"I32": "int32", "I64": "int64"}
    for file in folder.glob("*.safetensors"):  # whose own library knows no float8 of NumPy's
        data = file.read_bytes()
        for name, stored in read_header(file).tensors.items():
            array = np.frombuffer(data[stored.start : stored.stop], jnp.dtype(dtypes[stored.dtype]))
            tensors[name] = array.reshape(stored.shape)
    config = json.loads((folder / "config.json").read_text())
    quantised = config.get("quantization_config", {})
    found = {}
    for name, array in tensors.items():
        base = name.removesuffix("weight_packed").removesuffix("weight")
        if name.endswith("weight_packed"):
            (group,) = (
                group["weights"]
                for group in quantised["config_groups"].values()
                if any(
                    re.fullmatch(target[3:], base[:-1])
                    if target[:3] == "re:"
                    else target == base[:-1]
                    for target in group["targets"]
                )
            )
            rows, columns = map(int, tensors[base + "weight_shape"])
            bits = group["num_bits"]
            places = np.arange(columns) * bits
            words = array.astype(np.int64)[:, places // 32]
            numbers = (words >> (places % 32)) & (2**bits - 1)
            scales = tensors[base + "weight_scale"].astype(np.float64)
            zeros = np.full(scales.shape, 2 ** (bits - 1))
            if not group["symmetric"]:
                packed = tensors[base + "weight_zero_point"].astype(np.int64)
                for row in range(rows):
                    zeros[row] = (packed[row // 8] >> (row % 8 * 4)) & 15
            each = group["group_size"] or columns
            scales, zeros = (np.repeat(array, each, axis=1) for array in (scales, zeros))
            found[base + "weight"] = (numbers - zeros) * scales
        elif array.dtype == jnp.float8_e4m3fn and base + "weight_scale" in tensors:
            found[name] = array.astype(np.float64) * tensors[base + "weight_scale"].astype(float)
        elif array.dtype == jnp.float8_e4m3fn:
            blocks: Any = tensors[name + "_scale_inv"].repeat(128, axis=0).repeat(128, axis=1)
            found[name] = array.astype(np.float64) * blocks[tuple(map(slice, array.shape))]
        elif name.endswith(("weight", "bias")):
            found[name] = array.astype(np.float64)
    return config, found


EXPORTS: dict[str, tuple[Any, str, float]] = {
    "int8": ("int8", "pack-quantized", 0.012),
    "int4": ("int4", "pack-quantized", 0.16),
    "fp8": ("fp8", "fp8", 0.05),
    "zero": ([("embed|.*gate", "bfloat16"), (".*w_.*", "int4_g32_zero")], "pack-quantized", 0.16),
    "column": ([(".*w_.*|lm_head", "fp8")], "float-quantized", 0.05),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_what_the_formats_say(wide, name, tmp_path, caplog):
    rules, method, most = EXPORTS[name]
    recipe = rules
    if not isinstance(rules, str):
        recipe = QuantisationConfig(tuple(QuantisationRule(*rule) for rule in rules))
    convert_quietly(wide, tmp_path / "ours", quantize=recipe)
    convert_quietly(tmp_path / "ours", tmp_path / "out")
    config, found = read_export(tmp_path / "out")
    quantised = config["quantization_config"]
    assert quantised.get("format", quantised["quant_method"]) == method
    _, plain = read_export(wide)
    assert found.keys() == plain.keys()
    convert_quietly(tmp_path / "ours", tmp_path / "widened", dtype="float32")
    whole, exact = read_export(tmp_path / "widened")
    assert "quantization_config" not in whole
    listed = set(quantised.get("ignore", quantised.get("modules_to_not_convert")))
    for tensor, values in found.items():
        module = tensor.removesuffix(".weight")
        same = "norm" in tensor or module in listed or "embed" in tensor
        # Bit for bit what is stored; bfloat16 where the format has no place for it.
        np.testing.assert_allclose(values, exact[tensor], rtol=2**-8 if same else 1e-6, atol=1e-30)
        error = np.linalg.norm(values - plain[tensor]) / np.linalg.norm(plain[tensor])
        assert error <= most, tensor
        if not same:
            assert error > 1e-3, tensor
    if name == "fp8":
        assert "written in bfloat16, as the format has no place for them" in caplog.text
        assert "model.layers.0.self_attn.q_b_proj" in listed
    if name == "int4":
        packed = 'experts.0.up_proj.weight_packed": '
        index = (tmp_path / "out" / "model.safetensors").read_bytes()[:400000]
        assert packed.encode()[:-2] in index


def test_what_no_other_software_reads_is_said(hf, tmp_path):
    convert_quietly(hf, tmp_path / "ours", quantize=MIXED)
    with pytest.raises(ValueError, match="no format of other software holds whole numbers and"):
        convert_quietly(tmp_path / "ours", tmp_path / "out")
    convert_quietly(tmp_path / "ours", tmp_path / "widened", dtype="bfloat16")
    model = load_weights(tmp_path / "widened")
    assert model.options.runtime.quantisation is None
    convert_quietly(hf, tmp_path / "int8", quantize="int8")
    convert_quietly(tmp_path / "int8", tmp_path / "packed")
    with pytest.raises(ValueError, match="the weights are quantised, which is not read"):
        load_weights(tmp_path / "packed")
