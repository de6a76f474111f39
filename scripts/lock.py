"""Write requirements/lock.txt (what a user runs) and requirements/lock-dev.txt (what tests need besides), with hashes.

    .venv/bin/python scripts/lock.py

pip resolves pyproject.toml; the package index tells the hashes of every file of each version, so that the lock holds on
every platform. torch and the CUDA libraries that its GPU builds bring are left out: requirements/torch.txt names the
version, and pip chooses the build for the machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINUX_ONLY = ("gpt4all", "mlx", "mlx-cpu", "mlx-lm")
"""Needed by tests alone, on the one platform that `pyproject.toml` names; their wheels are not for all others."""
MARKER = "sys_platform == 'linux' and platform_machine == 'x86_64'"
LEFT_OUT = re.compile(r"torch|triton|nvidia-.*|cuda-.*|finetune")
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")


def resolve(extras: list[str], constraints: dict[str, str]) -> dict[str, str]:
    """Every package that an install would bring → its version."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--constraint", str(ROOT / "requirements" / "torch.txt"), "--constraint", str(pins)]
        command += ["--report", str(report), f"{ROOT}[{','.join(extras)}]"]
        subprocess.run(command, check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    packages = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}
    return {name: version for name, version in sorted(packages.items()) if not LEFT_OUT.fullmatch(name)}


def hashes(name: str, version: str) -> list[str]:
    """The SHA-256 of every file of a version (PEP 691)."""
    request = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    spelled = re.sub(r"[-_.]+", "[-_.]+", re.escape(name).replace("\\-", "-"))
    of_version = re.compile(rf"{spelled}-{re.escape(version)}(-.*\.whl|\.tar\.gz|\.zip)", re.IGNORECASE)
    found = sorted({file["hashes"]["sha256"] for file in files if of_version.fullmatch(file["filename"])})
    if not found:
        raise SystemExit(f"the index knows no file of {name} {version}")
    return found


def write(path: Path, packages: dict[str, str]) -> None:
    lines = []
    for name, version in packages.items():
        pins = [f"    --hash=sha256:{digest}" for digest in hashes(name, version)]
        marker = f" ; {MARKER}" if name in LINUX_ONLY else ""
        lines.append(" \\\n".join([f"{name}=={version}{marker}", *pins]) + "\n")
    path.write_text("".join(lines))
    print(f"{path.relative_to(ROOT)}: {len(packages)} packages")


def main() -> None:
    everything = resolve(["build", "gguf", "wandb", "dev"], {})
    runtime = resolve(["build", "gguf"], everything)
    write(ROOT / "requirements" / "lock.txt", runtime)
    write(
        ROOT / "requirements" / "lock-dev.txt",
        {name: version for name, version in everything.items() if name not in runtime},
    )


if __name__ == "__main__":
    main()
