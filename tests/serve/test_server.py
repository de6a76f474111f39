"""`ft serve` as its users meet it: through the real openai client, through signals, and where it refuses."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.console import Console
from finetune.errors import ConfigError, WorldError
from finetune.runs.folder import RunFolder
from finetune.serve import address
from finetune.serve.address import check_address, check_free, listeners
from finetune.serve.server import without_key
from tests.conftest import RunFt
from tests.serve.conftest import ONCE

openai = pytest.importorskip("openai")

KEY = "k3y-of-the-test-9d41"
posix = pytest.mark.skipif(os.name == "nt", reason="signals as POSIX systems have them")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    process: subprocess.Popen[str]
    port: int
    said: list[str]

    def client(self, key: str = KEY) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)


def start(run: Path, *options: str, environment: dict[str, str] | None = None) -> Served:
    """Start `ft serve` and wait until it says that it serves."""
    port = free_port()
    command = [sys.executable, "-m", "finetune.cli", "serve", str(run), "--port", str(port), "--threads", "1", *options]
    process = subprocess.Popen(
        command, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if "stop it with" in line:
            return Served(process, port, said)
    pytest.fail(f"it did not start: {''.join(said)}")


def stop(served: Served, number: int = signal.SIGTERM) -> int:
    served.process.send_signal(number)
    status = served.process.wait(20)
    assert served.process.stderr is not None
    served.said += served.process.stderr.readlines()
    served.process.stderr.close()
    return status


@pytest.fixture(scope="module")
def served(story_run: Path) -> Iterator[Served]:
    served = start(story_run, environment={"FT_API_KEY": KEY})
    yield served
    stop(served)


def ask(client: Any, text: str = ONCE, **settings: Any) -> Any:
    return client.chat.completions.create(
        model="stories", messages=[{"role": "user", "content": text}], temperature=0, **settings
    )


def test_the_model_is_listed_under_the_name_of_the_run(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["stories"]


def test_an_answer_streams_the_text_that_it_is_at_once(served: Served) -> None:
    whole = ask(served.client(), max_tokens=24)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(served.client(), max_tokens=24, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 4
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24


def test_an_answer_is_what_llamacpp_gives_by_itself(served: Served, story_run: Path) -> None:
    from finetune.llamacpp import LlamaCpp

    with LlamaCpp(story_run / "gguf" / "stories-f32.gguf", context=512, gpu_layers=0, threads=1) as llama:
        expected = "".join(llama.chat([{"role": "user", "content": ONCE}], max_tokens=24, temperature=0.0))
    assert ask(served.client(), max_tokens=24).choices[0].message.content == expected


def test_it_stops_on_the_stop_token(served: Served) -> None:
    choice = ask(served.client(), max_tokens=480).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content.endswith('."')
    assert "</s>" not in choice.message.content


def test_plain_completions(served: Served) -> None:
    done = served.client().completions.create(model="stories", prompt=ONCE, max_tokens=8, temperature=0)
    assert done.choices[0].text.startswith(", there was")


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x"])
def test_a_wrong_key_is_turned_away(served: Served, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(served.client(key), max_tokens=1)
    assert caught.value.status_code == 401
    with pytest.raises(openai.AuthenticationError):
        served.client(key).models.list()


def test_health_needs_no_key_and_other_sites_get_no_permission(served: Served) -> None:
    address = f"http://127.0.0.1:{served.port}/health"
    asked = urllib.request.Request(address, headers={"Origin": "http://evil.example"})
    with urllib.request.urlopen(asked) as answer:
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers


def test_several_requests_at_once_get_the_answers_they_get_alone(served: Served) -> None:
    texts = [ONCE, "The little dog", "Lily and Tom", "One day", "She was", "A red ball"]
    alone = [ask(served.client(), text, max_tokens=16).choices[0].message.content for text in texts]
    assert len(set(alone)) == len(texts)
    gate = threading.Barrier(len(texts))

    def together(text: str) -> str:
        gate.wait()
        return str(ask(served.client(), text, max_tokens=16).choices[0].message.content)

    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(together, texts)) == alone


def test_a_client_that_leaves_does_not_keep_others_waiting(served: Served) -> None:
    stream = ask(served.client(), max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert ask(served.client(), max_tokens=2).usage.completion_tokens == 2


def test_a_conversation_longer_than_the_context_is_an_error_for_its_client_alone(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(served.client(), "word " * 2000, max_tokens=4)
    assert ask(served.client(), max_tokens=2).usage.completion_tokens == 2


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_its_child_and_frees_the_port(story_run: Path, number: int) -> None:
    served = start(story_run)
    children = children_of(served.process.pid)
    assert children
    stream = ask(served.client(), max_tokens=400, stream=True)
    next(iter(stream))  # in the middle of an answer
    assert stop(served, number) == 0
    assert served.said[-1] == "stopped\n"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    check_free("127.0.0.1", served.port)


@posix
def test_the_end_of_a_terminal_is_ignored_under_nohup(story_run: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; children inherit it
    try:
        served = start(story_run)
    finally:
        signal.signal(signal.SIGHUP, before)
    served.process.send_signal(signal.SIGHUP)
    for pid in children_of(served.process.pid):
        os.kill(pid, signal.SIGHUP)
    assert ask(served.client(), max_tokens=1).usage.completion_tokens == 1
    assert stop(served) == 0


@posix
def test_a_child_that_dies_is_an_error(story_run: Path) -> None:
    served = start(story_run)
    for pid in children_of(served.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert served.process.wait(20) == 1
    assert stop_words(served) == "its process ended with status -9"


def stop_words(served: Served) -> str:
    assert served.process.stderr is not None
    words = served.process.stderr.read()
    served.process.stderr.close()
    return str(words.strip().rpartition(": ")[2])


@posix
def test_a_key_on_the_command_line_is_neither_in_the_process_list_nor_on_disk(story_run: Path) -> None:
    served = start(story_run, f"--api-key={KEY}")
    try:
        listed = subprocess.run(["ps", "-ww", "-A", "-o", "args="], capture_output=True, text=True).stdout
        assert "serve" in listed
        assert KEY not in listed
        assert KEY not in "".join(served.said)
        assert ask(served.client(), max_tokens=1).usage.completion_tokens == 1
        with pytest.raises(openai.AuthenticationError):
            ask(served.client("wrong"), max_tokens=1)
    finally:
        assert stop(served) == 0
    for path in story_run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_the_key_is_taken_out_of_a_command_line() -> None:
    assert without_key(["ft", "serve", "r", "--api-key", "K", "--port", "1"]) == ["ft", "serve", "r", "--port", "1"]
    assert without_key(["ft", "--api-key=K", "serve"]) == ["ft", "serve"]
    assert without_key(["ft", "serve", "--api-key", "--api-key"]) == ["ft", "serve"]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine", ""])
def test_an_open_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="everybody who reaches") as caught:
        check_address(host, None)
    assert "FT_API_KEY" in str(caught.value.problems[0].hint)
    check_address(host, "a-key")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_none(host: str) -> None:
    check_address(host, None)


@pytest.mark.parametrize("key", ["", "two words", "käse", "line\nbreak"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="visible ASCII"):
        check_address("127.0.0.1", key)


def test_a_port_in_use_is_named(story_run: Path, run_ft: RunFt) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WorldError, match="in use"):
            check_free("127.0.0.1", port)
        result = run_ft("serve", story_run, "--port", str(port))
    assert result.code == 1
    assert f"127.0.0.1:{port}: cannot listen here: Address already in use" in result.stderr
    assert f"--port {port + 1}" in result.stderr


def test_every_address_of_a_name_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is often 127.0.0.1 and ::1: a client may take either."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        two = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: two)
        with pytest.raises(WorldError, match="in use"):
            check_free("localhost", port)


def test_an_address_of_a_name_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: two)
    opened = listeners("localhost", 0)
    assert [listener.getsockname()[0] for listener in opened] == ["127.0.0.1"]
    for listener in opened:
        listener.close()


@posix
@pytest.mark.parametrize("key", [None, KEY])
def test_a_port_that_is_taken_while_the_model_loads_is_named(
    story_run: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """The first look finds the port free, and then another program listens."""
    from finetune.serve import server

    settings = server.Settings("gguf", "127.0.0.1", 0, key, 64, 0, 1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = dataclasses.replace(settings, port=other.getsockname()[1])
        looks = iter([lambda *_: None, address.check_free])
        monkeypatch.setattr(server, "check_free", lambda *place: next(looks)(*place))
        with pytest.raises(WorldError, match="cannot listen here: Address already in use"):
            server.serve(RunFolder(story_run), taken, Console())


def test_an_address_that_is_not_of_this_machine_is_an_error() -> None:
    with pytest.raises(WorldError, match="cannot listen"):
        check_free("192.0.2.1", 8000)  # TEST-NET-1 belongs to nobody


def test_an_adapter_without_a_server_for_it_names_the_export(tmp_path: Path, story_model: Path, run_ft: RunFt) -> None:
    run = tmp_path / "stories"
    (run / "adapter").mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    (run / "resolved.yaml").write_text(f"base: {story_model}\ndata: [{{path: a/b}}]\n")
    (run / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    result = run_ft("serve", run, "--using", "adapter", "--port", str(free_port()))
    assert result.code == 2
    assert f"`ft export {run} --to gguf`" in result.stderr


def test_it_starts_within_a_moment(story_run: Path) -> None:
    """Nothing of torch or transformers is loaded to serve a GGUF file."""
    program = (
        "import sys, finetune.serve.server, finetune.serve.chat\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert time.monotonic() - began < 20
