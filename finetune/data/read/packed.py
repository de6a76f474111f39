"""The bytes of a file, unpacked on the way if its name says .gz or .zst, and never more of them at once than needed."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from finetune.config.schema import PACKED_SUFFIXES
from finetune.errors import DataError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file

MAX_LINE = 100_000_000
"""No line is longer, in bytes. Also what keeps a few kB of archive from unpacking into all the memory there is."""

_MAGIC = {".gz": (b"\x1f\x8b",), ".zst": (b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18")}
"""What an archive begins with; for .zst also, from its second byte on, a frame to be skipped (RFC 8878, 3.1.2)."""

_BLOCK = 1 << 20


def is_packed(path: Path) -> bool:
    return path.name.lower().endswith(PACKED_SUFFIXES)


@contextlib.contextmanager
def opened(path: Path, shown: str) -> Iterator[io.BufferedReader]:
    """A file to read, unpacked. Whatever is wrong with the file or the archive is a DataError."""
    if what := not_a_file(path):
        raise DataError(f"is {what}, not a file", place=shown, hint="name a file, which can be read more than once")
    try:
        with contextlib.ExitStack() as stack:
            file: io.BufferedReader = stack.enter_context(open(path, "rb"))
            if is_lfs_pointer(file.peek(60)):
                raise DataError(LFS_MESSAGE, place=shown, hint=LFS_HINT)
            name = path.name.lower()
            while name.endswith(PACKED_SUFFIXES):
                name, suffix = os.path.splitext(name)
                file = stack.enter_context(contextlib.closing(_unpacking(file, suffix, shown)))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        if is_packed(path) and getattr(error, "errno", None) is None:
            # EOFError is gzip's word for an archive that breaks off, "Truncated" the beginning of pyarrow's.
            cut = isinstance(error, EOFError) or "Truncated" in str(error)
            raise DataError(
                "the archive breaks off before its end" if cut else "the archive is damaged",
                place=shown,
                hint="copy or download it again; what it held may be incomplete",
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot be read: {reason}", place=shown, hint="check the file's permissions") from error


def _unpacking(file: io.BufferedReader, suffix: str, shown: str) -> io.BufferedReader:
    """What an open archive holds, as a stream."""
    first = file.peek(4)[:4]
    if not first.startswith(_MAGIC[suffix]) and not (suffix == ".zst" and first[1:] == _MAGIC[suffix][1]):
        raise DataError(
            f"not a {suffix} archive, which its name says it is",
            place=shown,
            hint=f"remove {suffix} from its name if it is not packed; otherwise copy or download it again",
        )
    if suffix == ".gz":
        # gzip's own readline is a Python function; the buffer's is not, and four times as fast.
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BLOCK)
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), _BLOCK)


@contextlib.contextmanager
def unpacked(path: Path, shown: str) -> Iterator[Path]:
    """A file that can be read from any place in it: itself, or what an archive holds, for as long as it is needed."""
    if not is_packed(path):
        with opened(path, shown):
            pass  # so that a file that cannot be opened at all is not called damaged
        yield path
        return
    with _scratch(shown) as (file, whole):
        with opened(path, shown) as source:
            _write(source, file, shown)
        yield whole


@contextlib.contextmanager
def _scratch(shown: str) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file, to be written, and where it can be read. On Linux it has no name in any folder, so that nothing of
    it is left however this process ends."""
    try:
        nameless = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    except OSError as error:  # tempfile itself has looked for a folder that can be written
        raise _no_room(f": {error.strerror}", shown) from error
    with nameless:
        path = Path(f"/proc/self/fd/{nameless.fileno()}")
        if path.exists():
            yield nameless, path
            return
    with tempfile.TemporaryDirectory(prefix="ft-unpacked-") as folder, open(Path(folder) / "file", "wb") as file:
        yield file, Path(file.name)


def _write(source: io.BufferedReader, target: IO[bytes], shown: str) -> None:
    block = b" "
    while block:
        block = source.read(_BLOCK)
        try:
            target.write(block)
            target.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            raise _no_room(f" into {folder}: {error.strerror} ({free:,} bytes are free)", shown) from error


def _no_room(why: str, shown: str) -> DataError:
    return DataError(
        f"cannot be unpacked{why}",
        place=shown,
        hint="set TMPDIR to a folder with more room, or unpack the file yourself",
    )


def lines(file: io.BufferedReader, shown: str) -> Iterator[bytes]:
    """The lines of a text file, each with its end. Only a line feed ends one."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise too_long(f"{shown}:{number}")
        yield line


def too_long(place: str) -> DataError:
    """A line, or a row over several, that no memory should be spent on."""
    return DataError(
        f"goes on for more than {MAX_LINE:,} bytes without an end",
        place=place,
        hint="nothing so long can be a row: check the line ends and the quotes",
    )
