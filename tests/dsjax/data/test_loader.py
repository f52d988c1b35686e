"""The loader: shares of hosts, mixtures, epochs, and going on from a state."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dsjax.config.data import DataConfig, SourceConfig
from dsjax.data.loader import make_eval_batches, make_loader
from dsjax.data.offline import pack
from dsjax.data.packed import PackedRows
from tests.dsjax.data.packing_oracle import check_rows, random_texts

LENGTH = 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, list[str]]:
    """Texts of two corpora, by folder; every piece of the second's holds a "#"."""
    root = tmp_path_factory.mktemp("corpora")
    corpora = {
        str(root / "small"): [text for text in random_texts(40, 60, 0) if text],
        str(root / "large"): ["#".join(text) + "#" for text in random_texts(150, 40, 1)],
    }
    for folder, texts in corpora.items():
        Path(folder).mkdir()
        for i, text in enumerate(texts):
            (Path(folder) / f"{i:04d}.txt").write_bytes(text.encode())
    return corpora


@pytest.fixture(scope="module")
def documents(corpora) -> DataConfig:
    small, large = (SourceConfig(folder, "text") for folder in corpora)
    return DataConfig(sources=(small,), eval_sources=(small, large), length=LENGTH)


@pytest.fixture(scope="module")
def packed(documents: DataConfig, tmp_path_factory) -> DataConfig:
    sources = []
    for source in documents.eval_sources:
        folder = tmp_path_factory.mktemp("packed")
        pack([source], folder, tokenizer="bytes", length=LENGTH, num_shards=2)
        sources.append(SourceConfig(str(folder)))
    return replace(documents, sources=(sources[0],), eval_sources=tuple(sources))


@pytest.fixture(params=["packed", "documents"])
def data(request, packed: DataConfig, documents: DataConfig) -> DataConfig:
    return packed if request.param == "packed" else documents


def take(loader, num_rows: int) -> list[bytes]:
    return [next(loader)["tokens"].tobytes() for _ in range(num_rows)]


def rows_in(data: DataConfig, source: int = 0) -> list[bytes]:
    rows = PackedRows(data.eval_sources[source].path)
    return [rows[i]["tokens"].tobytes() for i in range(len(rows))]


def test_an_epoch_is_every_row_once_in_a_new_order(packed: DataConfig) -> None:
    everything = rows_in(packed)
    stream = take(make_loader(packed), 3 * len(everything))
    epochs = [stream[i * len(everything) : (i + 1) * len(everything)] for i in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(everything)
    assert len({tuple(epoch) for epoch in [everything, *epochs]}) == 4


def test_the_seed_decides_the_order(data: DataConfig) -> None:
    first = take(make_loader(data), 20)
    assert take(make_loader(data), 20) == first
    assert take(make_loader(replace(data, seed=1)), 20) != first


def test_documents_are_packed_whole_and_all(documents: DataConfig, corpora) -> None:
    """Over documents an epoch's texts are all there: the rows repeat their pieces evenly."""
    loader = make_loader(documents)
    texts = corpora[documents.sources[0].path]
    longest = max(texts, key=len).encode()[: LENGTH // 2]
    found = sum(
        next(loader)["tokens"].astype(np.uint8).tobytes().count(longest) for _ in range(200)
    )
    num_tokens = sum(len(text.encode()) + 2 for text in texts)
    assert abs(found - 200 * LENGTH / num_tokens) <= 2


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_hosts_share_the_stream(packed: DataConfig, num_hosts: int) -> None:
    whole = take(make_loader(packed), 60)
    shares = [
        take(make_loader(packed, process_index=p, process_count=num_hosts), 60 // num_hosts)
        for p in range(num_hosts)
    ]
    # Step by step, the hosts together read what one host would have read.
    assert [row for rows in zip(*shares, strict=True) for row in rows] == whole


def test_hosts_share_the_documents(documents: DataConfig, corpora) -> None:
    """Two hosts never read one document in the same epoch (long ones stand out by their text)."""
    documents = replace(documents, num_packing_bins=8)  # so few that no epoch ends meanwhile
    texts = [text.encode() for text in corpora[documents.sources[0].path] if len(text) > 12]
    seen = []
    for host in range(2):
        loader = make_loader(documents, process_index=host, process_count=2)
        data = b"|".join(next(loader)["tokens"].astype(np.uint8).tobytes() for _ in range(8))
        seen.append({text for text in texts if text in data})
    assert all(seen)
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("kinds", ["packed", "documents", "both"])
def test_mixtures_keep_their_proportions(packed, documents, kinds: str) -> None:
    small, large = (documents if kinds == "documents" else packed).eval_sources
    if kinds == "both":
        large = documents.eval_sources[1]
    data = replace(packed, sources=(replace(small, weight=3.0), replace(large, weight=1.0)))
    loader = make_loader(data)
    for _ in range(5):
        marked = [bool((next(loader)["tokens"] == ord("#")).any()) for _ in range(40)]
        assert abs(sum(marked) - 10) <= 1


def test_batches_may_change_their_size(data: DataConfig) -> None:
    rows = [next(loader) for loader in [make_loader(data)] for _ in range(9)]
    loader = make_loader(data)
    batches = [loader.next_batch(n) for n in (2, 4, 3)]
    shapes = {name: (value.shape, value.dtype.name) for name, value in batches[1].items()}
    names = ("tokens", "targets", "segment_ids", "positions")
    assert shapes == {
        **dict.fromkeys(names, ((4, LENGTH), "int32")),
        "weights": ((4, LENGTH), "float32"),
        "num_bytes": ((4,), "int32"),
    }
    for name in rows[0]:
        joined = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(joined, np.stack([row[name] for row in rows]))


def test_state_restores_exactly(data: DataConfig) -> None:
    loader = make_loader(data)
    states, stream = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(loader.get_state())))
        stream += take(loader, 1)
    other = make_loader(data)
    for i in (0, 1, 7, 8, 9, 23, 39, 2):  # also back again
        other.set_state(states[i])
        assert other.get_state() == states[i]
        assert take(other, 40 - i) == stream[i:]


def test_state_restores_with_workers(documents: DataConfig) -> None:
    """Workers change neither the order nor what a state means to a loader with as many."""
    stream = take(make_loader(documents), 24)
    data = replace(documents, num_workers=1)
    loader = make_loader(data)
    assert take(loader, 12) == stream[:12]
    state = loader.get_state()
    loader.close()
    other = make_loader(data)
    other.set_state(state)
    assert take(other, 12) == stream[12:]
    other.close()


def test_packed_state_restores_on_other_hosts(packed: DataConfig) -> None:
    whole = take(make_loader(packed), 24)
    two = [make_loader(packed, process_index=p, process_count=2) for p in range(2)]
    for loader in two:
        loader.next_batch(6)
    assert two[0].get_state() == two[1].get_state() == {"num_rows": 12}
    three = [make_loader(packed, process_index=p, process_count=3) for p in range(3)]
    for loader in three:
        loader.set_state(two[0].get_state())
    shares = [take(loader, 4) for loader in three]
    assert [row for rows in zip(*shares, strict=True) for row in rows] == whole[12:]
    with pytest.raises(ValueError, match="num_rows=13 must be a multiple of the 3 hosts"):
        three[0].set_state({"num_rows": 13})


def test_states_that_do_not_fit_are_refused(packed: DataConfig, documents: DataConfig) -> None:
    state = make_loader(documents).get_state()
    with pytest.raises(ValueError, match=r"state is of documents, data.sources are not"):
        make_loader(packed).set_state(state)
    with pytest.raises(ValueError, match=r"state is of packed data, data.sources are not"):
        make_loader(documents).set_state(make_loader(packed).get_state())
    with pytest.raises(ValueError, match="state is of 1 hosts, this run has 2"):
        make_loader(documents, process_count=2).set_state(state)


def test_orbax_saves_and_loads_the_state(data: DataConfig, tmp_path: Path) -> None:
    loader = make_loader(data)
    loader.next_batch(11)
    ocp.save_checkpointables(tmp_path / "step", {"data": loader})
    expected = take(loader, 10)
    other = make_loader(data)
    ocp.load_checkpointables(tmp_path / "step", {"data": other})
    assert take(other, 10) == expected


@pytest.mark.parametrize("num_hosts", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_evaluation_is_one_pass(data, corpora, num_hosts: int, batch_size: int) -> None:
    hosts = [
        make_eval_batches(data, batch_size, process_index=p, process_count=num_hosts)
        for p in range(num_hosts)
    ]
    passes = [list(host) for host in hosts]
    assert len({len(batches) for batches in passes}) == 1  # as many steps on every host
    batches = [batch for step in zip(*passes, strict=True) for batch in step]
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, LENGTH)}
    rows = [
        {name: np.asarray(value[i]) for name, value in batch.items()}
        for batch in batches
        for i in range(batch_size)
    ]
    real = [row for row in rows if row["segment_ids"].any()]
    assert len(rows) - len(real) < batch_size * num_hosts
    check_rows(rows, [text for texts in corpora.values() for text in texts], LENGTH)
    again = list(hosts[0])
    assert [b["tokens"].tobytes() for b in again] == [b["tokens"].tobytes() for b in passes[0]]


def test_evaluation_stops_at_max_rows(data: DataConfig) -> None:
    for max_rows, full in ((5, [4, 1]), (8, [4, 4]), (1, [1])):
        batches = list(make_eval_batches(data, 4, max_rows=max_rows))
        assert [int((b["segment_ids"][:, 0] > 0).sum()) for b in batches] == full


def test_a_part_of_the_held_out_rows_is_close_to_all(tmp_path) -> None:
    """One long document at the start is no sample: the part holds its share of every one."""
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(("a" if i == 0 else "z") * (2000 if i == 0 else 200))
    source = SourceConfig(str(tmp_path), "text")
    data = DataConfig(sources=(source,), eval_sources=(source,), length=LENGTH)
    folder = tmp_path / "packed"
    pack([source], folder, tokenizer="bytes", length=LENGTH, num_shards=1)

    def share(data: DataConfig, max_rows: int) -> float:
        batches = list(make_eval_batches(data, 4, max_rows=max_rows))
        tokens = np.concatenate([batch["tokens"] for batch in batches])
        return (tokens == ord("a")).sum() / np.isin(tokens, [ord("a"), ord("z")]).sum()

    for kind in (data, replace(data, eval_sources=(SourceConfig(str(folder)),))):
        assert share(kind, 0) == pytest.approx(2000 / 5800, abs=0.01)
        assert share(kind, 16) == pytest.approx(2000 / 5800, abs=0.07)


def test_evaluation_of_a_part_is_the_same_on_any_hosts_each_time(data: DataConfig) -> None:
    batches = make_eval_batches(data, 4, max_rows=8)
    first = [batch["tokens"].tobytes() for batch in batches]
    assert [batch["tokens"].tobytes() for batch in batches] == first
    hosts = [
        make_eval_batches(data, 2, max_rows=8, process_index=p, process_count=2) for p in (0, 1)
    ]
    steps = zip(*hosts, strict=True)
    assert [b"".join(b["tokens"].tobytes() for b in step) for step in steps] == first


def test_packed_rows_are_a_sequence(packed: DataConfig) -> None:
    rows = PackedRows(packed.sources[0].path)
    listed = [row["tokens"].tobytes() for row in rows]
    assert len(list(rows)) == len(rows) == len(listed)
    assert rows[-1]["tokens"].tobytes() == rows[np.int64(len(rows) - 1)]["tokens"].tobytes()
    assert [row["tokens"].tobytes() for row in rows[1:-1:2]] == listed[1:-1:2]
    assert [row["tokens"].tobytes() for row in reversed(rows)] == listed[::-1]
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=f"row {beyond} of"):
            rows[beyond]
    for wrong in (1.0, "1"):
        with pytest.raises(TypeError):
            rows[cast(Any, wrong)]


def test_data_that_does_not_fit_is_named(packed: DataConfig, documents: DataConfig, tmp_path):
    path = packed.sources[0].path
    with pytest.raises(ValueError, match=f"data.length=64 must be the 32 that {path} was packed"):
        make_loader(replace(packed, length=64))
    manifest = json.loads((Path(path) / "dataset.json").read_text())
    manifest["tokenizer"] = {"spec": "some/where", "sha256": "0"}
    for shard in manifest["shards"]:
        (tmp_path / shard["file"]).write_bytes((Path(path) / shard["file"]).read_bytes())
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"data.tokenizer='bytes' must be .* 'some/where'"):
        make_loader(replace(packed, sources=(SourceConfig(str(tmp_path)),)))
    with pytest.raises(ValueError, match=r"data.eval_sources is empty"):
        make_eval_batches(replace(documents, eval_sources=()), 4)
    with pytest.raises(ValueError, match=r"no dataset.json"):
        make_loader(replace(packed, sources=(SourceConfig(str(tmp_path / "missing")),)))
