"""The door of an endpoint without a key: programs of this machine come in, web pages of others do not.

A browser is a program of this machine too, and runs what any page tells it to. It lets a page of evil.example send a
question to 127.0.0.1, though not read the answer; and where the name evil.example is made to mean 127.0.0.1 (DNS
rebinding), the browser takes our answers for the page's own. But it says in every request which name the person
went to (`Host`), and in every question from a page where the page is from (`Origin`), and no page can change either.
Both must name this machine. llama.cpp looks at neither, nor do the other servers: they listen on a port of their own,
with a key that is drawn for them and added here.

Every connection carries one request, as `Connection: close` tells the server behind, so each request is looked at.
Nobody can take up more than a few threads, some memory and half a minute with what is no request: the head, the body,
their time and the number of connections are bounded. An answer may take as long as the model needs.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from finetune.serve.address import KEY_VARIABLE, is_this_machine

_HEAD_BYTES = 2**16
_HEAD_SECONDS = 30.0
_BODY_BYTES = 2**25
"""32 MB: many times what a model's context holds."""
_BODY_SECONDS = 300.0
_STALL_SECONDS = 60.0
"""A client that takes nothing of its answer for so long has gone."""
_CONNECTIONS = 64
"""At a time. The server behind answers four, and lets the others wait."""
_LINGER_SECONDS = 2.0
_PIECE_BYTES = 2**16
_REPLACED = (b"connection", b"keep-alive", b"authorization", b"x-api-key")
"""Headers that are not handed on: a client's key means nothing here."""


class Refusal(Exception):
    """A request that is not handed on. `status` is HTTP's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def admit(head: bytes, key: str) -> bytes:
    """The head of a request (up to its empty line) as the server behind is to read it. Raises Refusal.

    Host and Origin are defined in RFC 9110, 7.2 and RFC 6454, 7.
    """
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    headers = []
    # What two programs might read in two ways is read by neither.
    if b"\n" in first or b"\r" in first:
        raise Refusal(400, "this is no HTTP request")
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or name.split() != [name] or b"\n" in line or b"\r" in line:
            raise Refusal(400, "this is no HTTP request")
        headers.append((name.lower(), value.strip().decode("latin-1"), line))
    hosts = [value for name, value, _ in headers if name == b"host"]
    origins = [value for name, value, _ in headers if name == b"origin"]
    if len(hosts) != 1:
        raise Refusal(400, "a request must say, once, which host it is for")
    if not _names_this_machine(f"http://{hosts[0]}"):
        raise _stranger("asked for by the name", hosts[0])
    for origin in origins:
        if not _names_this_machine(origin):
            raise _stranger("asked by a page of", origin)
    kept = [line for name, _, line in headers if name not in _REPLACED]
    ours = [b"Connection: close", b"Authorization: Bearer " + key.encode()]
    return b"\r\n".join([first, *kept, *ours]) + b"\r\n\r\n"


def body_length(head: bytes) -> int:
    """How many bytes follow the head. Raises Refusal for too many, and where that is not said in one plain number.

    Content-Length and Transfer-Encoding are defined in RFC 9112, 6.
    """
    _, *lines = head.lower().removesuffix(b"\r\n\r\n").split(b"\r\n")
    fields = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    if any(name == b"transfer-encoding" for name, _ in fields):
        raise Refusal(411, "say how long the body is, with Content-Length: it is not taken in pieces")
    lengths = [value for name, value in fields if name == b"content-length"]
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit():
        raise Refusal(400, "this is no HTTP request")
    if len(lengths[0]) > 18 or int(lengths[0]) > _BODY_BYTES:
        raise Refusal(413, f"a question may have {_BODY_BYTES:,} bytes")
    return int(lengths[0])


def _names_this_machine(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    # Browsers keep names below localhost on this machine (RFC 6761, 6.3).
    here = is_this_machine(host) or host.endswith(".localhost")
    return here and parts.scheme in ("http", "https") and parts.username is None


def _stranger(how: str, name: str) -> Refusal:
    return Refusal(
        403,
        f"without a key, this endpoint answers programs and pages of its own machine alone; it was {how} {name!r}. "
        f"Give `ft serve` a key ({KEY_VARIABLE}), and the same to whoever asks.",
    )


class Front:
    """Listens, and hands what is admitted to the server behind. Use as a context manager, or call `close`.

    listeners  sockets that listen already (`address.listeners`); they are closed in the end
    behind     host and port of the server
    key        what that server asks for
    """

    def __init__(self, listeners: Sequence[socket.socket], behind: tuple[str, int], key: str) -> None:
        self._listeners, self._behind, self._key = listeners, behind, key
        self._closed = False
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        for listener in listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Stop listening. Requests that came in go on until the server behind ends. May be called twice."""
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
            listener.close()

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                client, _ = listener.accept()
            except OSError:
                time.sleep(0.1)  # too many open files, for instance: that passes
                continue
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._meet, args=(client,), daemon=True).start()
                continue
            with client, contextlib.suppress(OSError):
                client.settimeout(1)
                client.sendall(_answer(Refusal(503, "too many requests at a time")))

    def _meet(self, client: socket.socket) -> None:
        try:
            self._hand_on(client)
        finally:
            self._places.release()

    def _hand_on(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # whoever goes away ends their own request
            try:
                head, begun = _read_head(client)
                admitted, length = admit(head, self._key), body_length(head)
                try:
                    server = socket.create_connection(self._behind)
                except OSError as error:
                    raise Refusal(502, "the model's server does not answer") from error
            except Refusal as refusal:
                client.sendall(_answer(refusal))
                _linger(client)
                return
            with server:
                _join(client, server, admitted + begun[:length], max(0, length - len(begun)))


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """The head of a request, and what of its body came along. Raises Refusal, or OSError if the client leaves."""
    read = b""
    until = time.monotonic() + _HEAD_SECONDS
    while (end := read.find(b"\r\n\r\n")) < 0:
        if len(read) > _HEAD_BYTES:
            raise Refusal(431, "the head of this request is too long")
        read += _piece(client, _PIECE_BYTES, until)
    return read[: end + 4], read[end + 4 :]


def _piece(client: socket.socket, most: int, until: float) -> bytes:
    """What comes next. Raises OSError if nothing does until then, or the client leaves."""
    client.settimeout(max(until - time.monotonic(), 0.001))
    piece = client.recv(most)
    if not piece:
        raise ConnectionError
    return piece


def _join(client: socket.socket, server: socket.socket, begun: bytes, left: int) -> None:
    """Hand on what was begun and `left` more bytes, and the answer until the server has said all."""
    for side in (client, server):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token must not wait for the next
    asking = threading.Thread(target=_ask, args=(client, server, begun, left), daemon=True)
    asking.start()
    with contextlib.suppress(OSError):
        while piece := server.recv(_PIECE_BYTES):
            client.sendall(piece)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_WR)
    asking.join(_LINGER_SECONDS)
    # Who sends on though the answer is complete is not heard any more, and who waits in recv is woken.
    for side in (client, server):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
    asking.join()


def _ask(client: socket.socket, server: socket.socket, begun: bytes, left: int) -> None:
    """Hand the request on, and then the end of the client, however long the answer takes until then."""
    until = time.monotonic() + _BODY_SECONDS
    with contextlib.suppress(OSError):
        server.sendall(begun)
        while left:
            piece = _piece(client, min(left, _PIECE_BYTES), until)
            server.sendall(piece)
            left -= len(piece)
        client.settimeout(_STALL_SECONDS)  # for what is sent to it; that it says nothing more is as it should be
        while _says_something(client):
            pass
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_WR)


def _says_something(client: socket.socket) -> bool:
    """False once the client has left. What else it says belongs to no request."""
    try:
        return bool(client.recv(_PIECE_BYTES))
    except TimeoutError:
        return True


def _linger(client: socket.socket) -> None:
    """Read what the client is still sending: closing at once would take the answer back that is on its way."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(_LINGER_SECONDS)
    until = time.monotonic() + _LINGER_SECONDS
    while time.monotonic() < until and client.recv(_PIECE_BYTES):
        pass


def _answer(refusal: Refusal) -> bytes:
    """A refusal in the form of OpenAI's errors."""
    error = {"message": str(refusal), "type": "permission_error", "code": refusal.status}
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 {refusal.status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
