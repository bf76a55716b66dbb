"""Caches that somebody wrote who wants something else than to train: every checksum is right, and
what is behind it is not. They are refused with the file's name, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc

from fusedkd.cache import CacheError, Damaged, Job, Layout, Policy, TeacherCache, build, verify
from fusedkd.cache.layout import Answers
from fusedkd.cache.manifest import _render
from fusedkd.cache.packing import pack, pack_stairs, unpack_stairs

V, LENGTH, SHARD, INDEX = 301, 32, "shard-00000.arrow", "index.arrow"
SEQUENCES = [np.random.default_rng(n).integers(0, V, LENGTH) for n in range(6)]
FACTS = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "ab" * 32,
         "padded_vocab_size": V, "dtype": "float32"}  # fmt: skip
POLICIES = {
    "top": Policy("top", 20),  # a byte per code
    "stairs": Policy("top", 60),
    "counts": Policy("top", 20, 0.9),
    "sample": Policy("sample", 20),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each policy, of two shards."""
    root = tmp_path_factory.mktemp("caches")
    weight = 3 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    for name, policy in POLICIES.items():
        layout = Layout(policy, V, (1.0,) if name == "sample" else (1.0, 2.0))
        size = int(4 * LENGTH * layout.most_bytes_per_token)
        job = Job(SEQUENCES, layout, FACTS, 2, size)
        build(root / name, job, lambda ids: weight[ids])
        assert not verify(root / name)[1]
    return root


@pytest.fixture
def top(caches: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(caches / "top", tmp_path / "cache"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """A changed manifest, with the sums of the files as they are."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    schema = manifest.pop("schema")
    for entry in (manifest["index"], *manifest["shards"]):
        data = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    (folder / "manifest.json").write_bytes(_render(manifest, manifest.pop("schema", schema)))


def columns(folder: Path, name: str = SHARD) -> pa.RecordBatch:
    return ipc.open_file(pa.BufferReader((folder / name).read_bytes())).get_batch(0)


def write(path: Path, *batches: pa.RecordBatch, **options: Any) -> None:
    sink = pa.BufferOutputStream()
    how = ipc.IpcWriteOptions(**options)
    with ipc.new_file(sink, batches[0].schema, options=how) as writer:
        for batch in batches:
            writer.write_batch(batch)
    path.write_bytes(sink.getvalue())
    rewrite(path.parent)


def with_column(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    place = batch.schema.get_field_index(name)
    field = batch.schema.field(place).with_type(values.type)
    return batch.set_column(place, field, values)


def read_all(folder: Path) -> None:
    cache = TeacherCache(folder)
    for ids in SEQUENCES:
        for temperature in cache.layout.temperatures:
            found = cache.get(ids, temperature)
            assert found.ids.max() < V and found.ids.shape[0] == LENGTH
    cache.tail_masses()


def assert_refused(folder: Path, name: str, *words: str) -> None:
    """By what reads it, and by what looks it over; both name the file."""
    with pytest.raises(CacheError) as refusal:
        read_all(folder)
    for word in (name, *words):
        assert word in str(refusal.value)
    wrong = verify(folder)[1]
    assert wrong and all(name in line for line in wrong)


def in_child(work: Callable[[], Any]) -> str:
    """What becomes of it in a process of its own: "done", an exception's name, or a signal."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            work()
            said = "done"
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader) as pipe:
        return pipe.read() or f"signal {os.WTERMSIG(status)}"


# ---- Arrow -------------------------------------------------------------------------------------

OFFSETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "far": lambda old: np.arange(len(old)) * 2**20 + 2**30,
    "near": lambda old: old + 2**20,
    "one": lambda old: np.where(np.arange(len(old)) == len(old) - 1, old + 1, old),
    "negative": lambda old: np.arange(len(old)) * 80 - 2**30,
    "descending": lambda old: old[::-1],
    "first": lambda old: np.where(np.arange(len(old)) == 0, -8, old),
}


@pytest.mark.parametrize("how", OFFSETS)
@pytest.mark.parametrize("column", ["ids", "codes", "entropy"])
def test_offsets_that_lead_elsewhere(top: Path, column: str, how: str) -> None:
    data = bytearray((top / SHARD).read_bytes())
    old = np.frombuffer(columns(top)[column].buffers()[1], np.int32).copy()
    place = bytes(data).find(old.tobytes())
    data[place : place + old.nbytes] = OFFSETS[how](old).astype(np.int32).tobytes()
    (top / SHARD).write_bytes(data)
    rewrite(top)
    assert in_child(lambda: read_all(top)) == "Damaged"
    assert in_child(lambda: assert_refused(top, SHARD)) == "done"


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_compression_is_refused(top: Path, name: str, codec: str) -> None:
    write(top / name, columns(top, name), compression=codec)
    assert_refused(top, name, "compressed")


def test_nothing_is_inflated(top: Path) -> None:
    """500 MB in 20 kB: there is room for a tenth of it."""
    batch = columns(top)
    zeros = pa.array([b"\0" * (500_000_000 // len(batch))] * len(batch), pa.binary())
    write(top / SHARD, with_column(batch, "ids", zeros), compression="zstd")
    assert (top / SHARD).stat().st_size < 200_000
    del zeros

    def poor() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000,) * 2)
        assert_refused(top, SHARD, "compressed")

    assert in_child(poor) == "done"


def _renamed(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.rename_columns([n.replace("codes", "Codes") for n in batch.schema.names])


def _typed(name: str, kind: pa.DataType) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    return lambda batch: with_column(batch, name, batch[name].cast(kind))


SCHEMAS: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "renamed": _renamed,
    "reordered": lambda b: b.select([*b.schema.names[:-2], *b.schema.names[-2:][::-1]]),
    "one less": lambda b: b.select(b.schema.names[:-1]),
    "one more": lambda b: b.append_column("more", pa.array([0] * len(b))),
    "twice": lambda b: b.append_column("ids", b["ids"]),
    "large": _typed("ids", pa.large_binary()),
    "view": _typed("ids", pa.binary_view()),
    "int64": _typed("tokens", pa.int64()),
    "float": _typed("tokens", pa.float32()),
    "any length": _typed("sequence", pa.binary()),
    "dictionary": lambda b: with_column(b, "codes", b["codes"].dictionary_encode()),
    "list": lambda b: with_column(b, "codes", pa.array([[1]] * len(b))),
    "null": lambda b: with_column(b, "codes", pa.nulls(len(b))),
    "nullable": lambda b: b.set_column(2, pa.field("counts", pa.binary()), b["counts"]),
    "metadata": lambda b: b.replace_schema_metadata({"a": "b"}),
    "fewer rows": lambda b: b.slice(1),
    "no rows": lambda b: b.slice(0, 0),
    "more rows": lambda b: pa.concat_batches([b, b]),
    "other order": lambda b: b.take(pa.array(range(len(b) - 1, -1, -1))),
    "other sequences": lambda b: with_column(
        b, "sequence", pa.array([bytes([n]) * 16 for n in range(len(b))], pa.binary(16))
    ),
    "other lengths": lambda b: with_column(b, "tokens", pa.array([2] * len(b), pa.int32())),
    "negative lengths": lambda b: with_column(b, "tokens", pa.array([-2] * len(b), pa.int32())),
    "nothing there": lambda b: with_column(
        b, "codes", pa.array([None, *b["codes"].to_pylist()[1:]], pa.binary())
    ),
}


@pytest.mark.parametrize("how", SCHEMAS)
def test_columns_and_rows_are_those_of_a_shard(top: Path, how: str) -> None:
    batch = columns(top)
    changed = SCHEMAS[how](batch)
    write(top / SHARD, changed)
    assert_refused(top, SHARD)


INDICES: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "one more": lambda b: b.append_column("more", pa.array([0] * len(b))),
    "fewer rows": lambda b: b.slice(1),
    "a sequence twice": lambda b: b.take(pa.array([0, 0, *range(2, len(b))])),
    "other sum": lambda b: with_column(b, "tokens", pa.array([1] * len(b), pa.int32())),
    "negative": lambda b: with_column(
        b, "tokens", pa.array([-LENGTH, 3 * LENGTH, *[LENGTH] * (len(b) - 2)], pa.int32())
    ),
    "other lengths": lambda b: with_column(
        b, "tokens", pa.array([LENGTH - 1, LENGTH + 1, *[LENGTH] * (len(b) - 2)], pa.int32())
    ),
}


@pytest.mark.parametrize("how", INDICES)
def test_an_index_fits_the_manifest(top: Path, how: str) -> None:
    write(top / INDEX, INDICES[how](columns(top, INDEX)))
    assert_refused(top, ".arrow" if how == "other lengths" else INDEX)  # of each file by itself


@pytest.mark.parametrize("name", [SHARD, INDEX])
@pytest.mark.parametrize(
    "data",
    [b"", b"ARROW1", b"\0" * 4096, b"x" * 5000, b"ARROW1\0\0" + b"\xff" * 600 + b"ARROW1"],
    ids=["nothing", "magic", "zeros", "text", "ends"],
)
def test_no_arrow_file(top: Path, name: str, data: bytes) -> None:
    (top / name).write_bytes(data)
    rewrite(top)
    assert_refused(top, name)


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_one_batch(top: Path, name: str) -> None:
    batch = columns(top, name)
    write(top / name, batch, batch)
    assert_refused(top, name, "2 batches")
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, batch.schema):
        pass
    (top / name).write_bytes(sink.getvalue())
    rewrite(top)
    assert_refused(top, name, "0 batches")


def test_single_bytes_anywhere(caches: Path, tmp_path: Path) -> None:
    """With the sum put right each time, it is read, or refused; no signal, no other exception, and
    never an id outside the vocabulary (:func:`read_all` looks)."""

    def work() -> None:
        chance = random.Random(0)
        for name in caches.iterdir():
            folder = Path(shutil.copytree(name, tmp_path / name.name))
            for _ in range(60):
                path = folder / chance.choice([SHARD, INDEX])
                whole = path.read_bytes()
                batch = bytes(columns(folder, path.name)["tokens"].buffers()[1])
                head = whole.find(batch)  # the metadata before it are what can hurt
                place = chance.randrange(chance.choice([head, len(whole)]))
                changed = chance.choice([0, 1, 127, 128, 255])
                path.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
                rewrite(folder)
                try:
                    read_all(folder)
                except CacheError as error:
                    assert str(folder) in str(error)
                path.write_bytes(whole)
                rewrite(folder)

    assert in_child(work) == "done"


# ---- what is in the columns --------------------------------------------------------------------


def first_row(folder: Path, **changed: bytes) -> None:
    batch = columns(folder)
    for name, value in changed.items():
        values = [value, *batch[name].to_pylist()[1:]]
        batch = with_column(batch, name, pa.array(values, pa.binary()))
    write(folder / SHARD, batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_fit_the_tokens(caches: Path, tmp_path: Path, policy: str) -> None:
    folder = Path(shutil.copytree(caches / policy, tmp_path / "cache"))
    for column in TeacherCache(folder).layout.columns:
        old = columns(caches / policy)[column][0].as_py()
        for wrong in (old + b"\0", old[:-1], old + old, b"") if old else (b"\1",):
            shutil.copytree(caches / policy, folder, dirs_exist_ok=True)
            first_row(folder, **{column: wrong})
            assert_refused(folder, SHARD, "bytes")


@pytest.mark.parametrize("policy", POLICIES)
def test_ids_are_of_the_vocabulary_and_distinct(caches: Path, tmp_path: Path, policy: str) -> None:
    folder = Path(shutil.copytree(caches / policy, tmp_path / "cache"))
    size = len(columns(folder)["ids"][0].as_py())
    first_row(folder, ids=b"\xff" * size)
    assert_refused(folder, SHARD, "id 511")
    first_row(folder, ids=b"\0" * size)
    assert_refused(folder, SHARD, "twice")


def test_counts_codes_and_draws_are_what_is_written(caches: Path, tmp_path: Path) -> None:
    for policy, words, changed in (
        ("counts", "31 entries", {"counts": pack(np.full(LENGTH, 31), 5).tobytes()}),
        ("top", "ascend from 0", {"codes": bytes([0, *range(19, 0, -1)] * LENGTH)}),
        ("top", "ascend from 0", {"codes": b"\1" * (20 * LENGTH)}),
        ("sample", "first draw", {"draws": b"\0" * (20 * LENGTH // 8)}),
        ("stairs", "steps", {"codes": b"\0" * (LENGTH * (60 + 255) // 8)}),
    ):
        folder = Path(shutil.copytree(caches / policy, tmp_path / policy, dirs_exist_ok=True))
        first_row(folder, **changed)
        assert_refused(folder, SHARD, words)


def test_stairs_have_as_many_steps_in_each_row() -> None:
    def packed(bits: np.ndarray) -> np.ndarray:
        return np.packbits(bits, bitorder="little")

    bits = np.unpackbits(
        np.frombuffer(pack_stairs(np.array([[0, 9], [0, 0]]), 255), np.uint8), bitorder="little"
    )
    assert unpack_stairs(packed(bits), 2, 2, 255).tolist() == [[0, 9], [0, 0]]
    for clear, put in ((10, 260), (257, 20)):  # one row has three, the other one
        moved = bits.copy()
        moved[clear], moved[put] = 0, 1
        with pytest.raises(ValueError, match="does not have 2 steps"):
            unpack_stairs(packed(moved), 2, 2, 255)
    with pytest.raises(ValueError, match="steps"):
        unpack_stairs(np.zeros_like(packed(bits)), 2, 2, 255)
    with pytest.raises(ValueError, match="bytes"):
        unpack_stairs(packed(bits)[:-1], 2, 2, 255)


def test_what_a_layout_writes_it_reads() -> None:
    """The checks are not stricter than what teachers say."""
    layout = Layout(Policy("top", 3), 5)
    ids = np.array([[4, 0, 1], [2, -1, -1], [-1, -1, -1]])
    values = np.array([[-0.5, -0.5, -64.25], [0.0, -np.inf, -np.inf], [-np.inf] * 3])
    odds = np.array([[np.inf], [3.0], [-np.inf]])
    found = layout.decode(layout.encode(Answers(ids, values, odds, np.zeros(3))), 3, 1.0)
    assert found.ids.tolist() == ids.tolist()


# ---- the manifest ------------------------------------------------------------------------------

HUGE = 10**30
FIELDS: dict[str, list[Any]] = {
    "teacher": [None, 7, ["t"], {"a": 1}, "\x1b]0;title\x07", "a\nb", "\ud800"],
    "teacher_hash": [7, "", "ab", "AB" * 32, "x" * 64, True, ["ab" * 32]],
    "tokenizer_hash": [None, 7, "", "ab", "g" * 64, "ab" * 33, "AB" * 32],
    "vocab_size": [None, "301", 301.0, True, -1, 0, 1, 302, HUGE, float("nan"), [301]],
    "padded_vocab_size": [None, "301", 301.0, False, -1, 300, HUGE, float("inf")],
    "temperatures": [
        None, 1.0, "1", [], {}, [None], ["1"], [True], [0], [-1.0], [float("nan")],
        [float("inf")], [1e-300], [1e300], [HUGE], [1.0, 1.0], [[1.0]],
    ],
    "policy": [
        None, "top", [], {}, {"kind": "top"}, {"kind": "top", "k": 20, "top_p": None, "more": 1},
        {"kind": "all", "k": 20, "top_p": None}, {"kind": 7, "k": 20, "top_p": None},
        {"kind": ["top"], "k": 20, "top_p": None}, {"kind": "top", "k": "20", "top_p": None},
        {"kind": "top", "k": 20.0, "top_p": None}, {"kind": "top", "k": True, "top_p": None},
        {"kind": "top", "k": 0, "top_p": None}, {"kind": "top", "k": HUGE, "top_p": None},
        {"kind": "top", "k": 20, "top_p": "0.9"}, {"kind": "top", "k": 20, "top_p": True},
        {"kind": "top", "k": 20, "top_p": float("nan")}, {"kind": "top", "k": 20, "top_p": -1},
        {"kind": "sample", "k": 20, "top_p": 0.9},
    ],
    "source": [None, 7, [], "\x9b31m"],
    "sequences": [None, "6", 6.0, True, -6, 0, 5, 7, HUGE, float("nan")],
    "tokens": [None, "192", 192.0, -192, 0, 191, 193, HUGE],
    "per_shard": [None, "4", 4.0, True, -4, 0, 3, 5, 6, HUGE],
    "index": [None, "index.arrow", [], {}, {"name": INDEX}],
    "shards": [None, {}, "shards", [None], [{}], [[]], 7],
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_manifest(top: Path, field: str) -> None:
    for value in FIELDS[field]:
        rewrite(Path(shutil.copytree(top, top.parent / "copy", dirs_exist_ok=True)))
        rewrite(top.parent / "copy", lambda m, v=value: m.update({field: v}))
        with pytest.raises(CacheError) as refusal:
            read_all(top.parent / "copy")
        assert str(top.parent / "copy") in str(refusal.value), value
        assert len(str(refusal.value)) < 1000 and str(refusal.value).isprintable()


@pytest.mark.parametrize("part", ["manifest", "policy", "index", "shard"])
def test_keys_of_a_manifest(top: Path, part: str) -> None:
    def within(manifest: dict[str, Any]) -> dict[str, Any]:
        inner = {"manifest": manifest, "shard": manifest["shards"][0]}
        return inner[part] if part in inner else manifest[part]

    before = (top / "manifest.json").read_bytes()
    rewrite(top, lambda m: within(m).update(more=1))
    assert_refused(top, "manifest.json", "more")
    for key in within(json.loads(before)).keys() - ({"sha256", "schema"} & {*json.loads(before)}):
        (top / "manifest.json").write_bytes(before)
        rewrite(top, lambda m, k=key: within(m).pop(k))
        assert_refused(top, "manifest.json", key)


@pytest.mark.parametrize("value", [None, "2", 2.0, True, HUGE, -1, [], "x" * 9999])
def test_schemas(top: Path, value: Any) -> None:
    rewrite(top, lambda m: m.update(schema=value))
    with pytest.raises(CacheError, match="schema") as refusal:
        TeacherCache(top)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "name",
    ["../precious", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "shard-00001.arrow", "x\0y",
     "manifest.json", "shard-0.arrow", "CON", "shard-00000.arrow/", 7, None, ["a"]],
)  # fmt: skip
@pytest.mark.parametrize("part", ["index", "shards"])
def test_files_have_their_own_names(top: Path, part: str, name: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        (manifest["index"] if part == "index" else manifest["shards"][0])["name"] = name

    (top.parent / "precious").write_bytes((top / INDEX).read_bytes())
    rewrite(top, change)
    assert_refused(top, "manifest.json")


@pytest.mark.parametrize("key", ["bytes", "sha256"])
@pytest.mark.parametrize("value", [None, "9", 9.0, True, -1, HUGE, float("nan"), [], {}])
def test_sums_are_sums(top: Path, key: str, value: Any) -> None:
    rewrite(top, lambda m: m["shards"][0].update({key: value}))
    assert_refused(top, "manifest.json", key)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"7", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe",
     b"9" * 5000, b'{"sha256": 1, "schema": 2}', b"NaN"],
    ids=lambda data: data[:8].decode("latin-1"),
)  # fmt: skip
def test_no_manifest(top: Path, data: bytes) -> None:
    (top / "manifest.json").write_bytes(data)
    assert_refused(top, "manifest.json")


def test_a_huge_manifest_is_not_read(top: Path) -> None:
    with (top / "manifest.json").open("r+b") as file:
        file.truncate(10**12)  # with nothing in it
    assert_refused(top, "manifest.json", "bytes")


@pytest.mark.parametrize("name", [SHARD, INDEX, "manifest.json"])
def test_links_pipes_and_folders_are_not_read(top: Path, name: str) -> None:
    elsewhere = top.parent / "elsewhere"
    os.rename(top / name, elsewhere)
    os.symlink(elsewhere, top / name)
    assert_refused(top, name, "a link")
    (top / name).unlink()
    os.mkfifo(top / name)
    assert_refused(top, name, "no file")
    (top / name).unlink()
    (top / name).mkdir()
    assert_refused(top, name, "no file")


# ---- writing -----------------------------------------------------------------------------------


def again(folder: Path) -> None:
    layout = Layout(POLICIES["top"], V, (1.0, 2.0))
    weight = 3 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    job = Job(SEQUENCES, layout, FACTS, 2, int(4 * LENGTH * layout.most_bytes_per_token))
    build(folder, job, lambda ids: weight[ids])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NAMES = [INDEX, "manifest.json", SHARD, "shard-00001.arrow"]


@pytest.mark.parametrize("ending", ["", ".tmp", ".0123abcd.tmp"])
@pytest.mark.parametrize("whole", [True, False], ids=["to a file", "to nothing"])
def test_planted_links_are_not_followed(
    caches: Path, tmp_path: Path, ending: str, whole: bool
) -> None:
    """In a new folder, and in a cache that is gone on with."""
    precious = tmp_path / "precious"
    for begun in (False, True):
        for name in NAMES:
            folder = tmp_path / f"{begun}-{name}"
            folder.mkdir()
            if begun:
                shutil.copytree(caches / "top", folder, dirs_exist_ok=True)
                (folder / name).unlink(missing_ok=not ending)
            if whole:
                precious.write_text("precious")
            os.symlink(precious, folder / f"{name}{ending}")
            try:
                again(folder)
            except CacheError as error:
                assert name in str(error)
            else:
                assert content(folder) == content(caches / "top")
                assert not any(path.is_symlink() for path in folder.iterdir())
            assert precious.read_text() == "precious" if whole else not precious.exists()


def test_what_killed_runs_left_goes_and_what_others_left_stays(
    caches: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(caches / "top", tmp_path / "cache"))
    (folder / f"{SHARD}.tmp").write_bytes(b"half")
    (folder / "shard-00009.arrow.89abcdef.tmp").write_bytes(b"half")
    (folder / "thesis.tmp").write_bytes(b"whole")
    (folder / "manifest.json.tmp").mkdir()
    again(folder)
    assert {path.name for path in folder.iterdir()} - {path.name for path in
            (caches / "top").iterdir()} == {"thesis.tmp", "manifest.json.tmp"}  # fmt: skip


def test_a_shard_with_a_right_sum_and_wrong_rows_is_made_anew(caches: Path, top: Path) -> None:
    batch = columns(top)
    write(top / SHARD, batch.take(pa.array(range(len(batch) - 1, -1, -1))))
    again(top)
    assert content(top) == content(caches / "top")


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        again(tmp_path / "cache")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()} == {0o640}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_an_error_that_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CacheError, match=r"cannot be written.*No space left"):
            again(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    again(tmp_path / "cache")


def test_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="cannot be written to"):
            again(folder)


def test_the_layout_of_a_flatbuffer_is_known() -> None:
    """What the refusal of compression rests on."""
    from fusedkd.cache.shard import _is_compressed

    for codec in (None, "zstd", "lz4"):
        sink = pa.BufferOutputStream()
        batch = pa.record_batch({"a": [1, 2]})
        how = ipc.IpcWriteOptions(compression=codec)
        with ipc.new_stream(sink, batch.schema, options=how) as writer:
            writer.write_batch(batch)
        messages = ipc.MessageReader.open_stream(sink.getvalue())
        messages.read_next_message()
        assert _is_compressed(messages.read_next_message().metadata) == (codec is not None)
    with pytest.raises(struct.error):
        _is_compressed(pa.py_buffer(b"\xff\xff\xff\x7f"))


def test_damage_is_an_error_of_caches() -> None:
    assert issubclass(Damaged, CacheError) and issubclass(CacheError, ValueError)
