"""The kernel's own view of what a process writes: a seccomp filter that asks us before each such system call.

A preloaded library would be simpler and would not do: safetensors renames its files with system calls of its own, which
never pass through the C library. A filter sees every call of every thread, whoever makes it, and we may let it happen,
answer in its place, or end the process while it waits. See seccomp_unotify(2). Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import platform
import struct
import subprocess
import sys
from pathlib import Path

from tests.faults.calls import CALLS, Waiting

ROOT = Path(__file__).parents[2]

# Numbers of <linux/seccomp.h>, <linux/filter.h>, <linux/audit.h>, <sys/prctl.h>.
_SECCOMP = 317
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_NO_NEW_PRIVS = 38
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_ARGUMENTS = 16
"""Where the arguments begin in `struct seccomp_data`: eight bytes each."""


def missing() -> str | None:
    """Why this machine cannot do it, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are watched on Linux on x86-64 only"
    code = "import os; from tests.faults.seccomp import install; install(); os._exit(0)"
    tried = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    return "this system does not let a process watch another's system calls" if tried.returncode else None


def install() -> int:
    """Put this process, and all that it starts, under the filter; the descriptor that its calls are announced on.

    From here on every call in CALLS waits until somebody answers. Raises OSError where the system does not allow it.
    """

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    code = _program()
    program = Program(len(code) // 8, code)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    descriptor: int = libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return descriptor


def _program() -> bytes:
    """The filter, in the kernel's byte code: ask about what is in CALLS, let the rest pass."""
    code = [(_LOAD, 0, 0, 0)]
    for number, call in CALLS.items():
        if call.bits is None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOTIFY)]
        else:
            argument, bits = call.bits
            look = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), (_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, _NOTIFY)]
            code += [(_EQUAL, 0, 4, number), *look, (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def receive(listener: int) -> Waiting | None:
    """The next call that waits; None if its process has been killed meanwhile."""
    data = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, data)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    identity, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", data)
    return Waiting(identity, thread, CALLS[number], tuple(arguments))


def let_happen(listener: int, waiting: Waiting) -> None:
    _answer(listener, struct.pack("QqiI", waiting.id, 0, 0, _CONTINUE))


def refuse(listener: int, waiting: Waiting, number: int) -> None:
    """Let the call fail with this errno; it does not happen."""
    _answer(listener, struct.pack("QqiI", waiting.id, 0, -number, 0))


def pretend(listener: int, waiting: Waiting, value: int) -> None:
    """Let the call return this value; it does not happen."""
    _answer(listener, struct.pack("QqiI", waiting.id, value, 0, 0))


def _answer(listener: int, data: bytes) -> None:
    try:
        fcntl.ioctl(listener, _SEND, bytearray(data))
    except OSError as error:
        if error.errno != errno.ENOENT:  # it was killed while it waited
            raise
