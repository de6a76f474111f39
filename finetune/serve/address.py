"""Where `ft serve` listens: which addresses are allowed, and whether one is free."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from finetune.errors import ConfigError, WorldError

KEY_VARIABLE = "FT_API_KEY"


def check_address(host: str, key: str | None) -> None:
    """Refuse a key that no header can carry, and an address beyond this machine without a key."""
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            "a key is one word of visible ASCII characters", place="--api-key", hint="`openssl rand -hex 16` makes one"
        )
    if key is None and not is_this_machine(host):
        raise ConfigError(
            "without a key, everybody who reaches this address could use the model",
            place=f"--host {host}",
            hint=f"put a key into the environment as {KEY_VARIABLE} (or give --api-key), or leave --host out",
        )


def is_this_machine(host: str) -> bool:
    """Whether only this machine can be meant by a name or an IP address, whatever any name server says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_free(host: str, port: int) -> None:
    """Raise WorldError unless this address can be listened on."""
    for listener in listeners(host, port):
        listener.close()


def listeners(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a name (`localhost` is often two, one of which may be unusable).

    Raises WorldError if another program has one of them, or if none can be used.
    """
    opened: list[socket.socket] = []
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            opened.append(_listener(family, address))
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem is not None and (not opened or problem.errno == errno.EADDRINUSE):
        for listener in opened:
            listener.close()
        raise _cannot_listen(host, port, problem) from problem
    return opened


def free_port() -> int:
    """A port of this machine that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _listener(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # what ended a moment ago does not count; on Windows this would allow a second one
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # or `::` would have the port of 0.0.0.0 as well
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def _cannot_listen(host: str, port: int, error: Exception) -> WorldError:
    reason = getattr(error, "strerror", None) or str(error)
    return WorldError(
        f"cannot listen here: {reason}",
        place=f"{host}:{port}",
        hint=f"choose another port (--port {port + 1}) or end the program that uses it",
    )
