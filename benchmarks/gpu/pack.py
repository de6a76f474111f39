"""Gather the wheels that a bare GPU machine lacks, so that the suite runs there without a registry.

    .venv/bin/python -m benchmarks.gpu.pack --out wheels --there packages.txt
    .venv/bin/python -m benchmarks.gpu.pack --out wheels --peer unsloth

The machine has Python, torch, transformers, PEFT and accelerate; `--there` names a file with all that it has, as
`pip list --format=freeze` prints it there. What is asked for, and whatever that asks for in turn and is not there, is
fetched for its Python and platform with pip: nothing is built. Of bitsandbytes only the library for its CUDA version is
kept, which is what makes the pack small. A pack of more than 60 MB is refused; `--drop` leaves something out.

There: `python -m pip install --no-index --no-deps --target site wheels/*.whl`, then PYTHONPATH=site. unsloth wants
other versions of TRL and datasets than ft: it goes into a folder and a site of its own, for `--only unsloth` of run.py.
"""

from __future__ import annotations

import argparse
import base64
import email
import fnmatch
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIMIT_MB = 60

OURS = ("bitsandbytes", "trl", "datasets", "liger-kernel", "pydantic")
"""What ft and the suite need beside what is taken for granted."""

PEERS = {"unsloth": ("unsloth", "unsloth-zoo", "trl<=1.15", "datasets<4.4", "bitsandbytes")}
"""What others need, for the comparison; their own limits on versions."""

GRANTED = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pip",
    "setuptools",
    "wheel",
)
"""Always taken to be there: the machine's own torch fits its GPU, and what belongs to it comes with it."""

TOO_BIG = ("xformers", "torchao", "diffusers")
"""What unsloth names but does without for a language model (xformers is one of several kinds of attention to it)."""

MACHINES = {"x86_64": (39, 35, 34, 31, 28, 27, 24, 17), "aarch64": (39, 35, 34, 31, 28, 27, 17)}
"""Versions of glibc that wheels are built for; pip takes no older one by itself."""


@dataclass(frozen=True)
class Target:
    """What the wheels are for."""

    python: str
    """Such as 3.12."""
    machine: str
    cuda: str
    """Such as 13.0."""


def needs(wheel: Path, target: Target) -> list[Requirement]:
    """What a wheel asks for on the target, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if fnmatch.fnmatch(one, "*.dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    there = {
        "python_version": target.python,
        "python_full_version": f"{target.python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": target.machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    requirements = [Requirement(text) for text in found]
    return [one for one in requirements if one.marker is None or one.marker.evaluate(there)]


There = Mapping[str, str | None]
"""What the machine has: name → version, None where that is not known."""


def missing(requirement: Requirement, there: There) -> bool:
    """Whether it has to be carried: it is not there, or there in a version that will not do.

    Of what belongs to the machine's own torch (`GRANTED`) no other version is ever carried, but it is said.
    """
    name = canonicalize_name(requirement.name)
    if name not in there:
        return True
    version = there[name]
    if version is None or requirement.specifier.contains(version, prereleases=True):
        return False
    if name in GRANTED:
        print(f"the machine has {name} {version}, and {requirement} is asked for: it may not work", flush=True)
        return False
    return True


def gather(wanted: Iterable[str], there: There, out: Path, target: Target) -> list[Path]:
    """Fetch what is wanted and, in turn, what that needs and is not there. Says which wheels there are."""
    waiting, have = [Requirement(text) for text in wanted], dict[str, Path]()
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in have or not missing(requirement, there):
            continue
        have[name] = _fetch(requirement, out, target)
        print(f"{have[name].name}  {_mb(have[name]):.1f} MB", flush=True)
        waiting += needs(have[name], target)
    return list(have.values())


def _fetch(requirement: Requirement, out: Path, target: Target) -> Path:
    """One wheel, by pip, without what it needs."""
    platforms = [f"manylinux_2_{version}_{target.machine}" for version in MACHINES[target.machine]]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", target.python, "--implementation", "cp"]
    for platform in [*platforms, f"manylinux2014_{target.machine}"]:
        command += ["--platform", platform]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        bare = f"{requirement.name}{requirement.specifier}"
        done = subprocess.run([*command, "--dest", folder, bare], capture_output=True, text=True, check=False)
        fetched = list(Path(folder).glob("*.whl"))
        if done.returncode or len(fetched) != 1:
            raise SystemExit(
                f"{bare} cannot be fetched: {done.stderr.strip()[-600:]}\n--drop {requirement.name} leaves it out"
            )
        return fetched[0].replace(out / fetched[0].name)


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Write a bitsandbytes wheel anew with the libraries for the CPU and for one CUDA version alone.

    Its RECORD is written anew too, so that pip installs it without complaint.
    """
    kept = f"libbitsandbytes_cuda{cuda.replace('.', '')}.so"
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        names = old.namelist()
        if not any(name.endswith("/" + kept) for name in names):
            known = sorted(Path(name).name for name in names if "libbitsandbytes_cuda" in name)
            raise SystemExit(f"{wheel.name} has no {kept}, only {', '.join(known)}: give one of these as --cuda")
        record, lines = next(name for name in names if name.endswith(".dist-info/RECORD")), []
        for name in names:
            library = re.search(r"/libbitsandbytes_(?!cpu)\w+\.so$", name)
            if name == record or (library and not name.endswith("/" + kept)):
                continue
            content = old.read(name)
            new.writestr(old.getinfo(name), content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        new.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    partial.replace(wheel)


def listed(text: str) -> dict[str, str | None]:
    """Names and versions, one a line, as pip prints them; None where there is a place in the version's stead."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:==\s*(\S+))?", line.strip()):
            found[canonicalize_name(match[1])] = match[2]
    return found


def _mb(path: Path) -> float:
    return path.stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the wheels, empty or not there yet")
    parser.add_argument("--there", type=Path, help="what the machine has, a name or name==version a line")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--machine", choices=MACHINES, default="x86_64")
    parser.add_argument("--cuda", default="13.0", help="the CUDA version of the machine's torch")
    parser.add_argument("--peer", choices=PEERS, help="gather another trainer instead of what ft needs")
    parser.add_argument("--drop", action="append", default=[], metavar="NAME")
    chosen = parser.parse_args()
    if chosen.out.exists() and any(chosen.out.iterdir()):
        raise SystemExit(f"{chosen.out} is not empty: two versions of one package would stop the installation")
    chosen.out.mkdir(parents=True, exist_ok=True)
    target = Target(chosen.python, chosen.machine, chosen.cuda)
    wanted = PEERS[chosen.peer] if chosen.peer else OURS
    there = dict.fromkeys(GRANTED) | (listed(chosen.there.read_text("utf-8")) if chosen.there else {})
    # What is asked for by name is carried even where the machine has some version of it.
    for text in wanted:
        there.pop(canonicalize_name(Requirement(text).name), None)
    there |= {canonicalize_name(name): None for name in (*TOO_BIG, *chosen.drop)}
    wheels = gather(wanted, there, chosen.out, target)
    for wheel in wheels:
        if wheel.name.startswith("bitsandbytes-"):
            before = _mb(wheel)
            keep_one_cuda(wheel, target.cuda)
            print(f"{wheel.name}: {before:.1f} MB → {_mb(wheel):.1f} MB")
    total = sum(map(_mb, wheels))
    print(f"{len(wheels)} wheels, {total:.1f} MB")
    if total > LIMIT_MB:
        raise SystemExit(f"more than {LIMIT_MB} MB: leave the largest out with --drop NAME")


if __name__ == "__main__":
    main()
