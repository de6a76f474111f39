"""The door of an endpoint without a key: programs of this machine come in, web pages of others do not.

A browser is a program of this machine too, and runs what any page tells it to. It lets a page of evil.example send a
question to 127.0.0.1, though not read the answer; and where the name evil.example is made to mean 127.0.0.1 (DNS
rebinding), the browser takes our answers for the page's own. But it says in every request which name the person
went to (`Host`), and in every question from a page where the page is from (`Origin`), and no page can change either.
Both must name this machine. llama.cpp looks at neither, nor do the other servers: they listen on a port of their own,
with a key that is drawn for them and added here.

Every connection carries one request, as `Connection: close` tells the server behind, so each request is looked at.
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
            threading.Thread(target=self._meet, args=(client,), daemon=True).start()

    def _meet(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # whoever goes away ends their own request
            client.settimeout(_HEAD_SECONDS)
            try:
                head, body = _read_head(client)
                head = admit(head, self._key)
                client.settimeout(None)
                try:
                    server = socket.create_connection(self._behind)
                except OSError as error:
                    raise Refusal(502, "the model's server does not answer") from error
            except Refusal as refusal:
                client.sendall(_answer(refusal))
                _linger(client)
                return
            with server:
                _join(client, server, head + body)


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """The head of a request, and what of its body came along. Raises Refusal, or OSError if the client leaves."""
    read = b""
    while (end := read.find(b"\r\n\r\n")) < 0:
        if len(read) > _HEAD_BYTES:
            raise Refusal(431, "the head of this request is too long")
        piece = client.recv(_PIECE_BYTES)
        if not piece:
            raise ConnectionError
        read += piece
    return read[: end + 4], read[end + 4 :]


def _join(client: socket.socket, server: socket.socket, begun: bytes) -> None:
    """Hand bytes on in both directions until the server has said all; an end is handed on as well."""
    for side in (client, server):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token must not wait for the next
    asking = threading.Thread(target=_copy, args=(client, server, begun), daemon=True)
    asking.start()
    _copy(server, client, b"")
    asking.join(_LINGER_SECONDS)
    # Who sends on though the answer is complete is not heard any more, and who waits in recv is woken.
    for side in (client, server):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
    asking.join()


def _copy(source: socket.socket, target: socket.socket, begun: bytes) -> None:
    with contextlib.suppress(OSError):
        target.sendall(begun)
        while piece := source.recv(_PIECE_BYTES):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


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
