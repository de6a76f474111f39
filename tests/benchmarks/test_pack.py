"""The pack of wheels for a machine without a registry."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu.pack import Target, keep_one_cuda, listed, missing, needs

TARGET = Target(python="3.12", machine="x86_64", cuda="13.0")


def wheel(folder: Path, files: dict[str, bytes], metadata: str = "") -> Path:
    path = folder / "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"
    info = "bitsandbytes-0.50.2.dist-info"
    files = files | {f"{info}/METADATA": metadata.encode(), f"{info}/RECORD": b"as it was"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


LIBRARIES = {
    f"bitsandbytes/libbitsandbytes_{name}.so": name.encode()
    for name in ("cpu", "cuda124", "cuda130", "rocm70", "xpu2025")
}


def test_of_the_libraries_only_the_wanted_one_and_the_cpus_are_kept_and_the_record_is_true(tmp_path: Path) -> None:
    path = wheel(tmp_path, LIBRARIES | {"bitsandbytes/__init__.py": b"x = 1\n"})
    keep_one_cuda(path, "13.0")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        record = "bitsandbytes-0.50.2.dist-info/RECORD"
        libraries = {Path(name).name for name in names if name.endswith(".so")}
        assert libraries == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
        rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
        assert set(rows) == names
        for name in names - {record}:
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert rows[name] == [f"sha256={digest}", str(len(content))]
        assert rows[record] == ["", ""]


def test_a_cuda_version_that_the_wheel_lacks_is_said_with_those_that_it_has(tmp_path: Path) -> None:
    path = wheel(tmp_path, LIBRARIES)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"no libbitsandbytes_cuda128\.so, only libbitsandbytes_cuda124\.so"):
        keep_one_cuda(path, "12.8")
    assert path.read_bytes() == before


def test_needs_are_those_of_the_target_and_not_of_this_machine(tmp_path: Path) -> None:
    metadata = (
        "Name: bitsandbytes\nRequires-Dist: torch>=2\nRequires-Dist: tomli; python_version < '3.12'\n"
        "Requires-Dist: mlx; sys_platform == 'darwin'\nRequires-Dist: pytest; extra == 'test'\n"
    )
    assert [one.name for one in needs(wheel(tmp_path, {}, metadata), TARGET)] == ["torch"]


def test_what_is_there_in_a_version_that_will_not_do_is_carried(capsys: pytest.CaptureFixture[str]) -> None:
    there = listed("# pip list\ndill==0.3.9\nPyArrow == 20.0\nmine @ file:///x\ntorch==2.11.0+cu130\n\n")
    assert there == {"dill": "0.3.9", "pyarrow": "20.0", "mine": None, "torch": "2.11.0+cu130"}
    assert not missing(Requirement("dill>=0.3.0,<0.4.1"), there)
    assert missing(Requirement("dill>=0.4"), there)
    assert not missing(Requirement("pyarrow"), there)
    assert not missing(Requirement("mine>=7"), there)
    assert missing(Requirement("xxhash"), there)
    # The machine's own torch is never replaced, but somebody has to know.
    assert not missing(Requirement("torch>=2.12"), there)
    assert "the machine has torch 2.11.0+cu130, and torch>=2.12 is asked for" in capsys.readouterr().out
