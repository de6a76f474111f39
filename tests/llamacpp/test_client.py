"""The wrapper around llama.cpp: it answers, streams, keeps quiet, ends, and says why it cannot."""

from __future__ import annotations

import importlib.util
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import ExportError, MissingExtraError, StorageError
from finetune.export.gguf import convert
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp, child
from finetune.llamacpp.logits import Scorer
from finetune.llamacpp.process import Endpoint, Process

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

STORIES = Path(__file__).parents[3] / "shared" / "assets" / "models" / "stories260K"
ONCE_UPON_A_TIME = [1, 403, 407, 261, 378]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not STORIES.is_dir():
        pytest.skip("the shared assets are not here")
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    convert(open_model(STORIES), path, quant="f32")
    return path


@pytest.fixture(scope="module")
def llama(gguf: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(gguf, context=256, gpu_layers=0, threads=1) as llama:
        yield llama


def test_text_becomes_tokens_with_and_without_special_ones(llama: LlamaCpp) -> None:
    assert llama.tokenize("Once upon a time", add_special=True) == ONCE_UPON_A_TIME
    assert llama.tokenize("Once upon a time") == ONCE_UPON_A_TIME[1:]
    assert llama.tokenize("</s>") == [2]
    assert len(llama.tokenize("</s>", parse_special=False)) > 1
    assert llama.tokenize("") == []


def test_greedy_continuations_are_the_same_every_time(llama: LlamaCpp) -> None:
    first = llama.generate_ids(ONCE_UPON_A_TIME, 20)
    llama.generate_ids(ONCE_UPON_A_TIME[:3], 5)
    assert llama.generate_ids(ONCE_UPON_A_TIME, 20) == first
    assert len(first) == 20


def test_a_chat_streams_the_same_text_as_it_gives_at_once(llama: LlamaCpp) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    pieces = list(llama.chat(messages, max_tokens=16, temperature=0.0))
    assert len(pieces) > 4
    assert list(llama.chat(messages, max_tokens=16, temperature=0.0, stream=False)) == ["".join(pieces)]


def test_an_answer_can_be_left_in_the_middle(llama: LlamaCpp) -> None:
    answer = llama.chat([{"role": "user", "content": "Hi"}], max_tokens=200, temperature=0.0)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert llama.generate_ids(ONCE_UPON_A_TIME, 3)


@pytest.mark.parametrize(("ids", "words"), [([], "empty"), ([1, 99999], "invalid tokens"), ([1] * 300, "context")])
def test_prompts_it_cannot_take_are_errors(llama: LlamaCpp, ids: list[int], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        llama.generate_ids(ids, 3)
    assert llama.generate_ids(ONCE_UPON_A_TIME, 3)


def test_nothing_is_printed_and_the_log_goes_where_it_is_told(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "llama.log"
    log.write_text("before\n")
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1, log=log) as llama:
        llama.tokenize("a")
    assert capfd.readouterr() == ("", "")
    assert log.read_text().startswith("before\n")
    assert "model loaded" in log.read_text()


def test_what_is_left_open_is_chosen(gguf: Path) -> None:
    with LlamaCpp(gguf, context=0, threads=1) as llama:
        assert len(llama.generate_ids([1] * 500, 3)) == 3  # the model was trained with 512


def test_files_it_cannot_load_are_explained(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf", context=64)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:500_000])
    with pytest.raises(ExportError, match="corrupted or incomplete"):
        LlamaCpp(cut, context=64)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ExportError, match="magic") as caught:
        LlamaCpp(other, context=64, log=tmp_path / "log")
    assert caught.value.problems[0].place == str(other)
    with pytest.raises(StorageError, match="log"):
        LlamaCpp(gguf, context=64, log=tmp_path)


def test_a_process_that_dies_is_an_error_and_no_more(gguf: Path) -> None:
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1) as llama:
        llama._process._child.kill()
        with pytest.raises(ExportError, match="stopped working: its process ended"):
            llama.tokenize("a")


def test_closing_ends_the_process(gguf: Path) -> None:
    llama = LlamaCpp(gguf, context=64, gpu_layers=0, threads=1)
    llama.close()
    llama.close()
    assert llama._process._child.poll() == 0


def test_modules_in_the_current_folder_are_not_taken(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("secrets", "xllamacpp"):
        (tmp_path / f"{name}.py").write_text("open('taken', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1) as llama:
        assert llama.tokenize("Once upon a time", add_special=True) == ONCE_UPON_A_TIME
    assert not (tmp_path / "taken").exists()


def test_the_log_of_an_endpoint_does_not_grow_with_its_requests(gguf: Path, tmp_path: Path) -> None:
    settings = {"context": 64, "gpu_layers": 0, "threads": 1, "exact": False, "lora": []}
    log = tmp_path / "llama.log"
    process = Process(gguf, settings, log, Endpoint("127.0.0.1", 0, "a-key", "stories", 4))
    try:
        loaded = log.read_text()
        assert "model loaded" in loaded
        for _ in range(5):
            process.ask("/completion", {"prompt": "Once upon a time", "n_predict": 4})
        assert log.read_text() == loaded
        with pytest.raises(ExportError, match="context"):
            process.ask("/completion", {"prompt": "Once upon a time " * 500, "n_predict": 4})
    finally:
        process.close()
    assert "exceeds the available context size" in log.read_text().removeprefix(loaded)  # errors are still there


ORPHAN = """
import os, sys
from pathlib import Path
from finetune.llamacpp import LlamaCpp, child
from finetune.llamacpp.logits import Scorer
llama = LlamaCpp(Path(sys.argv[1]), context=64, gpu_layers=0, threads=1)
print(llama._process._address, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process as POSIX systems do")
@pytest.mark.fault("kill -9", stage="chat, export", outcome="llama.cpp ends as well, and leaves nothing behind")
def test_the_process_ends_with_its_parent(gguf: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", ORPHAN, str(gguf)], capture_output=True, text=True)
    scheme, path = killed.stdout.strip().split("://")
    assert scheme == "unix"
    for _ in range(100):
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            assert not Path(path).parent.exists()
            return
        time.sleep(0.1)
    pytest.fail("llama.cpp outlived its parent")


def test_a_folder_whose_name_is_too_long_for_a_socket_means_a_port(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1) as llama:
        assert llama._process._address.startswith("http://127.0.0.1:")
        assert llama.tokenize("Once")
    assert list(deep.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows gets a port")
def test_it_listens_on_no_port_and_only_its_owner_can_ask_it(gguf: Path) -> None:
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1) as llama:
        path = Path(llama._process._address.removeprefix("unix://"))
        assert path.is_socket()
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()


def test_without_the_library_the_hint_names_the_extra(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        LlamaCpp(gguf, context=64)
    assert caught.value.problems[0].hint == 'pip install "finetune[gguf]"'


@pytest.mark.fault("no room for temporary files", stage="chat", outcome="refused with a hint; nothing is left behind")
def test_no_room_for_temporary_files(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    for name in ("mkdtemp", "TemporaryFile"):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, name, none)
            with pytest.raises(StorageError, match="No usable temporary directory"):
                LlamaCpp(gguf, context=64, gpu_layers=0, threads=1)
            if name == "TemporaryFile":
                with pytest.raises(StorageError, match="No usable temporary directory"):
                    Scorer(gguf, context=64)


def test_a_start_that_fails_leaves_nothing(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def interrupted(module: str, *_: object, **__: object) -> None:
        started.append(module)
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(child, "start", interrupted)
    for start in (LlamaCpp, Scorer):
        with pytest.raises(KeyboardInterrupt):
            start(gguf, context=64)
    assert started == ["process", "scoring"]
    assert list(tmp_path.iterdir()) == []
