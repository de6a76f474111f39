"""What of a run is talked to: the artifact that was written last, or the kind that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import RunError
from finetune.runs.folder import RunFolder

Kind = Literal["adapter", "merged", "gguf"]

USING = ("auto", "adapter", "merged", "gguf")


@dataclass(frozen=True)
class Artifact:
    kind: Kind
    path: Path
    """A folder, or a GGUF file."""


def newest_artifact(run: RunFolder, using: str, command: str) -> Artifact:
    """The newest artifact of a run, of one kind if `using` is not `auto`. `command` (`chat`, `serve`) is for messages.

    Raises RunError for an unknown kind, and where there is none.
    """
    if using not in USING:
        raise RunError(
            f"--using is one of {', '.join(USING)}, not {using!r}", hint=f"`ft {command} {run.path} --using adapter`"
        )
    present = [artifact for artifact in artifacts(run) if using in ("auto", artifact.kind)]
    if not present:
        how = {"merged": f"`ft merge {run.path}`", "gguf": to_gguf(run)}.get(using, "`ft train`")
        raise RunError(f"this run has no {using}", place=str(run.path), hint=f"{how} makes it")
    return max(present, key=lambda artifact: artifact.path.stat().st_mtime)


def artifacts(run: RunFolder) -> list[Artifact]:
    """All that is there. An adapter as a GGUF file (`<run>-lora….gguf`) is no model by itself and is left out."""
    found: list[Artifact] = []
    if run.adapter.exists():
        found.append(Artifact("adapter", run.adapter))
    if run.merged.exists():
        found.append(Artifact("merged", run.merged))
    models = [path for path in sorted(run.gguf.glob("*.gguf")) if not path.stem.startswith(f"{run.name}-lora")]
    return found + [Artifact("gguf", path) for path in models]


def to_gguf(run: RunFolder) -> str:
    return f"`ft export {run.path} --to gguf`"
