"""Found by Python at its start, through PYTHONPATH: every use of a socket that leads anywhere is written down.

One line an event, into the file that SOCKETS names: process, event, its arguments. Children of Python have it as well.
"""

from __future__ import annotations

import os
import sys

_EVENTS = {
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.getnameinfo",
    "socket.sendmsg",
    "socket.sendto",
}


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in _EVENTS:
        told = arguments if event.startswith("socket.get") else arguments[1:]  # the first is the socket itself
        with open(os.environ["SOCKETS"], "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {event} {told!r}\n")


if "SOCKETS" in os.environ:
    sys.addaudithook(_note)
