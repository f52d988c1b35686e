"""`generation_config.json` as transformers reads it, and its faults by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsjax.data.generation_defaults import GenerationDefaults, read_generation_defaults

# What the makers of released models write, and its relatives.
FILES: dict[str, dict[str, Any]] = {
    "v2": {"_from_model_config": True, "do_sample": True, "temperature": 0.3, "top_p": 0.95}
    | {"bos_token_id": 100000, "eos_token_id": 100001, "transformers_version": "4.39.3"},
    "v3": {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1},
    "several_ends": {"eos_token_id": [7, 3, 9], "pad_token_id": 3, "repetition_penalty": 1.05},
    "sampling_unless_greedy": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "do_sample": False},
    "sampled_alone": {"do_sample": True},
    "all_of_it": {"do_sample": True, "temperature": 1, "top_k": 0, "min_p": 0.1}
    | {"max_new_tokens": 64.0, "eos_token_id": None, "num_beams": 1, "typical_p": 1.0},
    "length": {"max_length": 512, "eos_token_id": 2},
    "empty": {},
}


def read(folder: Path, content: object) -> GenerationDefaults:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(content))
    return read_generation_defaults({file.name: file})


@pytest.mark.parametrize("name", FILES)
def test_defaults_are_those_of_transformers_own_call(name, tmp_path: Path):
    from transformers import GenerationConfig

    ours = read(tmp_path, FILES[name])
    theirs = GenerationConfig.from_pretrained(str(tmp_path))
    # What `generate` fills in there (`GenerationMixin._prepare_generation_config`).
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    ends = theirs.eos_token_id
    assert ours.eos_ids == tuple(ends if isinstance(ends, list) else [ends] if ends else [])
    assert (ours.temperature or 0) == (theirs.temperature if theirs.do_sample else 0)
    if theirs.do_sample:
        assert ours.top_k == theirs.top_k
        assert (ours.top_p or 1) == theirs.top_p
        assert (ours.min_p or 0) == (theirs.min_p or 0)
    assert (ours.repetition_penalty or 1) == theirs.repetition_penalty
    assert ours.max_tokens == theirs.max_new_tokens
    assert ours.max_length == FILES[name].get("max_length")
    assert ours.ignored == ()


def test_a_caller_who_samples_gets_the_files_top_k_and_top_p(tmp_path: Path):
    ours = read(tmp_path, FILES["sampling_unless_greedy"])
    assert (ours.temperature, ours.top_k, ours.top_p) == (0.0, 20, 0.8)


def test_what_is_not_done_here_is_listed(tmp_path: Path):
    asked = {"num_beams": 4, "no_repeat_ngram_size": 3, "mystery": "x", "suppress_tokens": [5]}
    nothing = {
        "num_return_sequences": 1,
        "bad_words_ids": None,
        "min_length": 0,
        "use_cache": False,
    }
    assert read(tmp_path, asked | nothing).ignored == tuple(asked)


def test_length_of_prompt_and_text_together(tmp_path: Path):
    both = read(tmp_path, {"max_length": 20})
    assert both.max_tokens_after(15) == 5
    with pytest.raises(ValueError, match=r"max_length=20: the prompt has 20 tokens already"):
        both.max_tokens_after(20)
    assert read(tmp_path, {"max_length": 20, "max_new_tokens": 30}).max_tokens_after(25) == 30
    assert read(tmp_path, {}).max_tokens_after(25) is None


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("do_sample", "yes", "must be bool"),
        ("do_sample", 1, "must be bool"),
        ("temperature", "0.3", "must be float"),
        ("temperature", True, "must be float"),
        ("temperature", -1, "must be finite and not negative"),
        ("temperature", float("nan"), "must be finite and not negative"),
        ("temperature", float("inf"), "must be finite and not negative"),
        ("top_k", 2.5, "must be int"),
        ("top_k", -2, r"must be in \[0, 2\*\*31\)"),
        ("top_k", 3_000_000_000, r"must be in \[0, 2\*\*31\)"),
        ("top_p", 0, r"must be in \(0, 1\]"),
        ("top_p", 1.5, r"must be in \(0, 1\]"),
        ("min_p", -0.1, r"must be in \[0, 1\]"),
        ("repetition_penalty", 0, "must be finite and positive"),
        ("max_new_tokens", 0, "must be positive"),
        ("max_length", [20], "must be int"),
        ("eos_token_id", "2", "must be a tuple of int"),
        ("eos_token_id", [[2]], "must be a tuple of int"),
        ("eos_token_id", [2, -1], r"must be in \[0, 2\*\*31\)"),
        ("eos_token_id", True, "must be a tuple of int"),
    ],
)
def test_faults_name_file_and_field(field, value, fault, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"generation_config.json: {field}=.*: {fault}") as caught:
        read(tmp_path, {field: value})
    assert "\n" not in str(caught.value)


def test_what_is_no_object_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"generation_config.json: holds a list, not an object"):
        read(tmp_path, [1])


def test_without_the_file_the_models_config_says_what_ends_a_text(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text('{"eos_token_id": [4, 5]}')
    assert read_generation_defaults({file.name: file}) == GenerationDefaults(eos_ids=(4, 5))
    assert read_generation_defaults({}) == GenerationDefaults()
