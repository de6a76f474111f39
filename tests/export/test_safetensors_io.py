"""Reading what others wrote, damaged or hostile; writing what others can read."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import BaseError, FinetuneError, StorageError
from finetune.export.safetensors_io import CheckpointWriter, TensorInfo, open_checkpoint, open_file, reader

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.randn(5, 3).to(torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 7),
    "mask": torch.tensor([True, False, True]),
}


def test_every_tensor_comes_back_as_it_was(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(torch.cat([c.reshape(-1) for c in checkpoint.chunks(name)]), tensor.reshape(-1))


def test_a_large_tensor_comes_in_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 100)
    tensor = torch.randn(17, 9)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    pieces = list(open_checkpoint(tmp_path).chunks("x"))
    assert [len(piece) for piece in pieces] == [2, 2, 3, 2, 3, 2, 3]
    assert torch.equal(torch.cat(pieces), tensor)


def _file(path: Path, table: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _tensor(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


EMPTY = json.dumps(_tensor(0, 0, [0])).encode()
HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "not json": (b"{not json", b"", None),
    "not utf-8": (b'{"\xff\xfe": 1}', b"", None),
    "a list": ([], b"", None),
    "too deep": (b"[" * 50_000, b"", None),
    "a header longer than the file": ({}, b"", 1 << 20),
    "a header longer than memory": ({}, b"", (1 << 64) - 1),
    "twins": (b'{"a": %b, "a": %b}' % (EMPTY, EMPTY), b"", None),
    "half a character": (b'{"\\ud800": %b}' % EMPTY, b"", None),
    "an unknown type": ({"a": _tensor(0, 4, [1], "F128")}, bytes(4), None),
    "a negative size": ({"a": _tensor(0, 4, [-1])}, bytes(4), None),
    "a truth value as size": ({"a": _tensor(0, 4, [True])}, bytes(4), None),
    "an astronomical size": ({"a": _tensor(0, 0, [0, 1 << 200])}, b"", None),
    "backwards": ({"a": _tensor(4, 0, [1])}, bytes(4), None),
    "another size than the shape": ({"a": _tensor(0, 4, [2])}, bytes(4), None),
    "past the end": ({"a": _tensor(0, 8, [2])}, bytes(4), None),
    "left over": ({"a": _tensor(0, 4, [1])}, bytes(8), None),
    "a hole": ({"a": _tensor(4, 8, [1])}, bytes(8), None),
    "overlap": ({"a": _tensor(0, 8, [2]), "b": _tensor(4, 8, [1])}, bytes(8), None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None),
    "not an entry": ({"a": 3}, b"", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    table, data, length = HOSTILE[case]
    path = _file(tmp_path / "model.safetensors", table, data, length=length)
    with pytest.raises(StorageError) as caught:
        open_file(path)
    assert caught.value.problems[0].place == str(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_to_a_files_bytes_leads_past_a_finetune_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        checkpoint = open_file(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except FinetuneError:
        pass


# -- many files ---------------------------------------------------------------------------------------------------


def _index(folder: Path, placed: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "model.bin", 3, None]
)
def test_a_shard_cannot_lie_outside_the_folder(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model").mkdir()
    _index(tmp_path / "model", {"a": name})
    with pytest.raises(StorageError, match="not a file name"):
        open_checkpoint(tmp_path / "model")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    _index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"})
    with pytest.raises(StorageError, match=r"model-2\.safetensors, model-3\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    _index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(StorageError, match=r"`b` is not in model-1\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 50_000])
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StorageError):
        open_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BaseError, match="pickle"):
        open_checkpoint(tmp_path)


# -- writing ------------------------------------------------------------------------------------------------------


def _plan() -> list[TensorInfo]:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
    return [TensorInfo(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("shard_bytes", [10**9, 40, 1])
def test_what_is_written_the_reference_library_reads(tmp_path: Path, shard_bytes: int) -> None:
    with CheckpointWriter(tmp_path, _plan(), shard_bytes=shard_bytes) as writer:
        for tensor in writer.order:
            writer.write(tensor.name, [TENSORS[tensor.name]])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert writer.total_bytes == sum(file.stat().st_size for file in files)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)
    if len(files) > 1:
        assert [file.name for file in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_pieces_may_be_written_in_any_order_by_any_thread(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(40, 5) for number in range(20)}
    with (
        CheckpointWriter(tmp_path, [TensorInfo(name, "F32", (40, 5)) for name in tensors], shard_bytes=4000) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        for first in (30, 0, 10, 20):
            for name, tensor in reversed(tensors.items()):
                pool.submit(writer.write_at, name, first * 20, tensor[first : first + 10])
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_another_size_than_planned_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="planned"), CheckpointWriter(tmp_path, _plan()) as writer:
        writer.write(writer.order[0].name, [torch.ones(7)])
    with pytest.raises(AssertionError, match="not written"), CheckpointWriter(tmp_path, _plan()):
        pass


MEASURE = """
import resource, sys, torch
from pathlib import Path
from finetune.export.safetensors_io import CheckpointWriter, TensorInfo, open_checkpoint
source, target = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = open_checkpoint(source)
planned = [TensorInfo(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()]
with CheckpointWriter(target, planned) as writer:
    for tensor in writer.order:
        writer.write(tensor.name, checkpoint.chunks(tensor.name))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """256 MB go through; each tensor has 16 MB."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_file({f"t{i}": torch.zeros(2048, 2048) for i in range(16)}, source / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(source), str(target)]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True, env={**os.environ}).stdout) * 1024
    assert grown < 80e6
