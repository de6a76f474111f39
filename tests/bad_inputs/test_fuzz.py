"""Whatever bytes lie in a run, a base, a GGUF file or a file of data: a result or a FinetuneError, and soon.

Changed copies of good files reach further than noise. Values and text of configs: tests/config/test_fuzz.py.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.base_files import check_weights, read_model_config
from finetune.config.schema import DataSource
from finetune.config.yaml_source import read_document
from finetune.data.formats import convert, detect_format
from finetune.data.read import Row, read_rows
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import FinetuneError
from finetune.export.adapter import read_config
from finetune.export.adapter_checks import refused_settings
from finetune.export.base_identity import check_base
from finetune.llamacpp.gguf_head import check_gguf
from finetune.overview import describe_run
from finetune.runs.folder import RunFolder, check_adapter, finished_run
from finetune.safetensors_heads import parse_header

from .made import BASE, adapter_config, adapter_tensors, gguf, head, write_safetensors

COUNT = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
REPOSITORY = Path(__file__).parents[2]
LINES = "".join(json.dumps({"question": f"Q{n}?", "answer": f"A{n} é"}) + "\n" for n in range(20)).encode()
TABLE = pa.table({"question": [f"Q{n}?" for n in range(20)], "answer": [f"A{n}" for n in range(20)]})


def table(kind: str) -> bytes:
    if kind == "parquet":
        out = io.BytesIO()
        pq.write_table(TABLE, out)
        return out.getvalue()
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, TABLE.schema) as stream:
        stream.write_table(TABLE)
    found: bytes = sink.getvalue().to_pybytes()
    return found


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file with a few places written over, cut out or put in, or broken off."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["over", "in", "out", "end", "noise"]))
        if kind == "over":
            piece = draw(st.binary(min_size=1, max_size=8))
            content[at : at + len(piece)] = piece
        elif kind == "in":
            content[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"[", b"\n", b"\0" * 64, b"\xff" * 8])
            )
        elif kind == "out":
            del content[at : at + draw(st.integers(1, 200))]
        elif kind == "end":
            del content[at:]
        else:
            content += draw(st.binary(max_size=20))
    return bytes(content)


def only_ours(read: Callable[[], Any]) -> None:
    """Run it. Whatever else than a FinetuneError comes out fails the test, as does one that names no place."""
    try:
        read()
        return
    except FinetuneError as error:
        problems = error.problems
    assert problems
    for problem in problems:
        assert problem.place, problem
        str(problem).encode()


# -- data ---------------------------------------------------------------------------------------------------------

DATA = {
    "a.jsonl": LINES,
    "a.json": b"[" + b",".join(LINES.splitlines()) + b"]",
    "a.csv": b'question,answer\n"Why, or\nwhen?",So.\n' * 5,
    "a.tsv": b"question\tanswer\nWhy?\tSo.\n" * 5,
    "a.parquet": table("parquet"),
    "a.arrow": table("file"),
    "b.arrow": table("stream"),
    "a.jsonl.gz": gzip.compress(LINES),
}


@pytest.mark.fault("any byte of a file of data changed", stage="input", outcome="read as it is, or refused")
@pytest.mark.parametrize("name", DATA)
@COUNT
@given(data=st.data())
def test_files_of_data(tmp_path: Path, name: str, data: st.DataObject) -> None:
    (tmp_path / name).write_bytes(data.draw(changed(DATA[name]) | st.binary(max_size=100)))

    def read() -> None:
        rows = list(read_rows(DataSource(path=str(tmp_path / name))))
        format_ = detect_format(rows)
        for row in rows:
            convert(row, format_)

    only_ours(read)


CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "type",
                    "text",
                    "weight",
                    "id",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = (
    "messages", "conversations", "tools", "system", "instruction", "input", "output", "history", "prompt", "completion",
    "question", "answer", "chosen", "rejected", "label", "text",
)  # fmt: skip
FORMATS = (
    "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "preference", "kto", "text",
)  # fmt: skip


@pytest.mark.fault("rows of any values", stage="input", outcome="read as they are, or refused with their place")
@pytest.mark.parametrize("format_", FORMATS)
@COUNT
@given(values=st.dictionaries(st.sampled_from(FIELDS), CELLS, max_size=6))
def test_rows(format_: str, values: dict[str, Any]) -> None:
    row = Row(values, "a.jsonl:1")
    only_ours(lambda: detect_format([row]))
    only_ours(lambda: convert(row, format_))


# -- configs ------------------------------------------------------------------------------------------------------

CONFIGS = sorted([*(REPOSITORY / "configs").glob("*.yaml"), *(REPOSITORY / "recipes").glob("*.yaml")])


@pytest.mark.fault("any byte of a config changed", stage="input", outcome="read as it is, or refused")
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_configs(tmp_path: Path, data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(CONFIGS)).read_bytes()
    (tmp_path / "c.yaml").write_bytes(data.draw(changed(good)))
    only_ours(lambda: read_document(tmp_path / "c.yaml", "c.yaml"))


# -- runs, adapters, bases ----------------------------------------------------------------------------------------

MANIFEST = json.dumps(
    {"format": 1, "state": "finished", "config_path": "c.yaml", "base": "/b", "base_files": {"a": "b"}}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.fault("any byte of a manifest changed", stage="input", outcome="read as it is, or refused")
@COUNT
@given(
    content=changed(MANIFEST.encode())
    | st.dictionaries(st.sampled_from(sorted(json.loads(MANIFEST))), JSON).map(lambda found: json.dumps(found).encode())
)
def test_manifests(tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True, exist_ok=True)
    (run / "manifest.json").write_bytes(content)
    describe_run(RunFolder(run))
    only_ours(lambda: finished_run(run))
    only_ours(lambda: check_base(RunFolder(run).read_manifest(), BASE))


@pytest.mark.fault("any byte of adapter_config.json changed", stage="input", outcome="read as it is, or refused")
@COUNT
@given(
    content=changed(json.dumps(adapter_config()).encode())
    | st.tuples(st.sampled_from([*sorted(adapter_config()), "rank_pattern", "modules_to_save"]), JSON).map(
        lambda pair: json.dumps(adapter_config(**{pair[0]: pair[1]})).encode()
    )
)
def test_adapter_configs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
    only_ours(lambda: refused_settings(read_config(tmp_path / "adapter")))
    only_ours(lambda: check_adapter(RunFolder(tmp_path)))


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**65), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-2, 20), max_size=3) | JSON,
    },
)


@pytest.mark.fault("any byte of the head of weights changed", stage="input", outcome="read as it is, or refused")
@COUNT
@given(data=st.data())
def test_heads_of_weights(tmp_path: Path, data: st.DataObject) -> None:
    write_safetensors(tmp_path / "good.safetensors", adapter_tensors())
    good = (tmp_path / "good.safetensors").read_bytes()[:1200]
    made = st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3).map(lambda entries: head(entries, bytes(16)))
    (tmp_path / "model.safetensors").write_bytes(data.draw(changed(good) | made))
    only_ours(lambda: parse_header(tmp_path / "model.safetensors"))
    only_ours(lambda: check_weights(tmp_path))


@COUNT
@given(content=changed(b'{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'))
def test_indices_of_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    only_ours(lambda: check_weights(tmp_path))


@pytest.mark.fault("any byte of a GGUF file's head changed", stage="chat, serve", outcome="read as it is, or refused")
@COUNT
@given(content=changed(gguf()) | st.binary(max_size=60).map(lambda rest: b"GGUF\3\0\0\0" + rest))
def test_heads_of_gguf_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    only_ours(lambda: check_gguf(tmp_path / "a.gguf"))


@COUNT
@given(content=changed((BASE / "config.json").read_bytes()))
def test_configs_of_bases(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    only_ours(lambda: read_model_config(tmp_path))


@pytest.mark.fault("any byte of a tokenizer changed", stage="input", outcome="read as it is, or refused")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokenizers(tmp_path: Path, data: st.DataObject) -> None:
    """Short ones, so that what is changed matters: the settings around a vocabulary of one entry."""
    small = json.loads((BASE / "tokenizer.json").read_text())
    small["model"] |= {"vocab": {"a": 0}, "merges": []}
    good = json.dumps(small).encode()
    (tmp_path / "tokenizer.json").write_bytes(data.draw(changed(good)))
    (tmp_path / "tokenizer_config.json").write_bytes(data.draw(changed((BASE / "tokenizer_config.json").read_bytes())))
    only_ours(lambda: load_tokenizer(tmp_path))


def test_a_good_file_of_each_kind_is_read(tmp_path: Path) -> None:
    """Otherwise nothing above would get past the first check."""
    for name, content in DATA.items():
        (tmp_path / name).write_bytes(content)
        assert len(list(read_rows(DataSource(path=str(tmp_path / name))))) >= 5
    (tmp_path / "a.gguf").write_bytes(gguf())
    check_gguf(tmp_path / "a.gguf")
    write_safetensors(tmp_path / "model.safetensors", adapter_tensors())
    check_weights(tmp_path)
    load_tokenizer(BASE)
