"""The door of an endpoint without a key: what browsers send for strange pages stays outside, the rest goes through."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.serve import front
from finetune.serve.address import listeners
from finetune.serve.front import Front, Refusal, admit, body_length
from tests.serve.conftest import ONCE
from tests.serve.test_server import Served, ask, openai, start, stop

GET = "GET /v1/models HTTP/1.1\r\nHost: {}\r\n\r\n"


def knock(port: int, host: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request that names a host."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Host": host, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()


# -- who may come in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LocalHost", "[::1]:8000", "legal.localhost:1"]
)
def test_names_of_this_machine_are_let_in(host: str) -> None:
    head = GET.format(host)
    assert admit(head.encode(), "k").startswith(b"GET /v1/models HTTP/1.1\r\nHost: ")
    origin = head.replace("\r\n\r\n", f"\r\nOrigin: http://{host}\r\n\r\n")
    assert f"\r\nOrigin: http://{host}\r\n".encode() in admit(origin.encode(), "k")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1",
        "192.168.1.5:8000",
        "0.0.0.0:8000",
        "2130706433",
        "",
        "[::1",
        "[evil.example]",
    ],
)
def test_other_names_are_not(host: str) -> None:
    with pytest.raises(Refusal) as caught:
        admit(GET.format(host).encode(), "k")
    assert caught.value.status == 403
    assert "FT_API_KEY" in str(caught.value)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://evil.example:8000", "null", "file://", "", "ftp://127.0.0.1", "127.0.0.1"],
)
def test_pages_of_others_are_not(origin: str) -> None:
    with pytest.raises(Refusal, match="asked by a page of"):
        admit(f"POST / HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\n\r\n".encode(), "k")


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1",
        "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        "GET / HTTP/1.1\r\nHost: localhost\nHost: evil.example",
        "GET / HTTP/1.1\nHost: evil.example\r\nHost: localhost",
        "GET / HTTP/1.1\r\nHost : localhost",
        "GET / HTTP/1.1\r\nHost: localhost\r\n folded: more",
        "GET / HTTP/1.1\r\nHost: localhost\r\nno colon",
        "GET / HTTP/1.1\r\nHost: localhost\r\n: no name",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(head: str) -> None:
    with pytest.raises(Refusal) as caught:
        admit(f"{head}\r\n\r\n".encode(), "k")
    assert caught.value.status == 400


def test_a_request_goes_on_with_our_key_and_alone_on_its_connection() -> None:
    head = (
        b"POST /v1/x HTTP/1.1\r\nhost: localhost:8000\r\nAUTHORIZATION: Bearer none\r\nX-Api-Key: none\r\n"
        b"Connection: keep-alive\r\nContent-Length: 3\r\n\r\n"
    )
    assert admit(head, "secret") == (
        b"POST /v1/x HTTP/1.1\r\nhost: localhost:8000\r\nContent-Length: 3\r\n"
        b"Connection: close\r\nAuthorization: Bearer secret\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Transfer-Encoding: chunked", 411),
        ("transfer-encoding: identity\r\nContent-Length: 3", 411),
        ("Content-Length: 3\r\nContent-Length: 4", 400),
        ("Content-Length: 3\r\ncontent-length: 3", 400),
        ("Content-Length: 3, 3", 400),
        ("Content-Length: -1", 400),
        ("Content-Length: 0x10", 400),
        ("Content-Length:", 400),
        ("Content-Length: \u00b3", 400),
        ("Content-Length: 33554433", 413),
        ("Content-Length: " + "9" * 5000, 413),
    ],
)
def test_a_body_says_once_how_long_it_is_and_is_not_too_long(headers: str, status: int) -> None:
    with pytest.raises(Refusal) as caught:
        body_length(f"POST / HTTP/1.1\r\n{headers}\r\n\r\n".encode())
    assert caught.value.status == status


def test_the_length_of_a_body() -> None:
    assert body_length(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") == 0
    assert body_length(b"POST / HTTP/1.1\r\nCONTENT-LENGTH:  33554432 \r\n\r\n") == 2**25


# -- the door itself, before something that keeps what it is told -------------------------------------------------


class Behind:
    """Answers each connection with `answer`, once it was sent `wanted` bytes; keeps them."""

    def __init__(self, wanted: int, answer: bytes) -> None:
        self.heard: list[bytes] = []
        self.left = threading.Event()
        self._wanted, self._answer = wanted, answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.place = ("127.0.0.1", int(self._listener.getsockname()[1]))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        heard = b""
        with self._listener, client:
            while len(heard) < self._wanted and (piece := client.recv(65536)):
                heard += piece
            self.heard.append(heard)
            client.sendall(self._answer)
            if not self._answer:
                while client.recv(65536):
                    pass
                self.left.set()


@contextlib.contextmanager
def before(behind: tuple[str, int]) -> Iterator[int]:
    opened = listeners("127.0.0.1", 0)
    with Front(opened, behind, "secret"):
        yield int(opened[0].getsockname()[1])


def test_large_bodies_and_answers_go_through_whole() -> None:
    body, answer = bytes(range(256)) * 8192, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(reversed(range(256))) * 8192
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    passed = admit(head, "secret") + body
    behind = Behind(len(passed), answer)
    with before(behind.place) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head[:9])
        client.sendall(head[9:] + body)
        told = b""
        while piece := client.recv(65536):
            told += piece
    assert told == answer
    assert behind.heard == [passed]


def test_a_client_that_leaves_is_gone_for_the_server_too() -> None:
    behind = Behind(1, b"")
    with before(behind.place) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(GET.format("localhost").encode())
            while not behind.heard:
                time.sleep(0.01)
            assert not behind.left.is_set()
        assert behind.left.wait(10)


def test_a_refusal_is_an_error_as_clients_know_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as behind, before(behind.getsockname()) as port:
        status, body = knock(port, "evil.example")
        assert status == 403
        assert "'evil.example'" in json.loads(body)["error"]["message"]
        assert knock(port, "localhost", **{"X-Long": "a" * 2**17})[0] == 431
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as sending:
            sending.request("POST", "/", b"a" * 2**22, {"Host": "evil.example"})  # is heard to its end
            assert sending.getresponse().status == 403
        behind.settimeout(0.1)
        with pytest.raises(TimeoutError):  # nothing came as far as the server
            behind.accept()


def told(port: int, *said: bytes) -> bytes:
    """The whole answer to what is said, piece by piece."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client, contextlib.suppress(ConnectionError):
        for piece in said:
            client.sendall(piece)
        while piece := client.recv(65536):
            heard += piece
    return heard


def test_what_follows_a_request_is_not_handed_on() -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n"
    passed = admit(head, "secret") + b"abc"
    behind = Behind(len(passed), b"HTTP/1.1 200 OK\r\n\r\n")
    with before(behind.place) as port:
        assert told(port, head + b"abcGET /admin HTTP/1.1\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
    assert behind.heard == [passed]


def test_a_head_that_comes_letter_by_letter_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_HEAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as behind, before(behind.getsockname()) as port:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(ConnectionError):
            client.settimeout(0.1)
            while time.monotonic() < began + 20:
                client.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    assert client.recv(1) == b""
                    break
        assert 0.4 < time.monotonic() - began < 15


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_BODY_SECONDS", 0.3)
    behind = Behind(10_000, b"HTTP/1.1 400 Bad\r\n\r\n")  # hears the end of what was said, and answers
    with before(behind.place) as port:
        said = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\nabc"
        assert told(port, said) == b"HTTP/1.1 400 Bad\r\n\r\n"


def test_more_connections_than_there_is_room_for_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_CONNECTIONS", 2)
    with socket.create_server(("127.0.0.1", 0)) as behind, before(behind.getsockname()) as port:
        with contextlib.ExitStack() as held:
            for _ in range(2):
                held.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert told(port).startswith(b"HTTP/1.1 503 ")
        until = time.monotonic() + 20
        while knock(port, "evil.example")[0] != 403:  # they have left, and there is room again
            assert time.monotonic() < until


def test_a_server_that_is_gone_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        place = gone.getsockname()
    with before(place) as port:
        assert knock(port, "localhost")[0] == 502


# -- the real thing -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(story_run: Path) -> Iterator[Served]:
    served = start(story_run)
    yield served
    stop(served)


def test_without_a_key_any_will_do_for_the_openai_client(served: Served) -> None:
    whole = ask(served.client("none"), max_tokens=24).choices[0].message.content
    chunks = [chunk for chunk in ask(served.client("x"), max_tokens=24, stream=True) if chunk.choices]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 4
    assert [model.id for model in served.client("none").models.list()] == ["stories"]


def test_errors_come_through(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(served.client(), "word " * 2000, max_tokens=4)


def post(served: Served, **headers: str) -> tuple[int, bytes]:
    body = json.dumps({"messages": [{"role": "user", "content": ONCE}], "max_tokens": 2})
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_page_whose_name_was_made_to_mean_this_machine_gets_nothing(served: Served) -> None:
    strange = f"evil.example:{served.port}"
    status, body = post(served, Host=strange, Origin=f"http://{strange}")
    assert status == 403
    assert b"choices" not in body


def test_a_question_of_another_page_makes_no_work(served: Served) -> None:
    """`text/plain` is what a browser sends to another site without asking first."""
    simple = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    assert post(served, **simple)[0] == 403
    assert post(served, **(simple | {"Origin": "http://localhost:3000"}))[0] == 200
    assert post(served)[0] == 200
