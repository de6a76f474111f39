"""What of a run is talked to: the artifact that was written last, or the kind that is asked for.

One that was made of the adapter as it was before the run was trained on is taken only where there is no other, and the
person is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.console import Console
from finetune.errors import RunError
from finetune.runs.folder import RunFolder
from finetune.runs.verification import of_another_adapter

Kind = Literal["adapter", "merged", "gguf"]

USING = ("auto", "adapter", "merged", "gguf")


@dataclass(frozen=True)
class Artifact:
    kind: Kind
    path: Path
    """A folder, or a GGUF file."""
    of_another: bool = False
    """Whether it was made of another adapter than the run has now."""


def newest_artifact(run: RunFolder, using: str, command: str) -> Artifact:
    """The newest artifact of a run, of one kind if `using` is not `auto`. `command` (`chat`, `serve`) is for messages.

    What was made of the adapter that the run has now goes before what was not, however new that is.

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
    return max(present, key=lambda artifact: (not artifact.of_another, artifact.path.stat().st_mtime))


def warn_of_another(run: RunFolder, artifact: Artifact, console: Console) -> None:
    """Say so where the answers are not those of the run as it is now."""
    if artifact.of_another:
        again = f"`ft merge {run.path}`" if artifact.kind == "merged" else to_gguf(run)
        console.warn(
            f"{artifact.path} was made of another adapter than this run has now: remove it, and {again} makes it anew"
        )


def artifacts(run: RunFolder) -> list[Artifact]:
    """All that is there. An adapter as a GGUF file (`<run>-lora….gguf`) is no model by itself and is left out."""
    found: list[tuple[Kind, Path]] = [("merged", run.merged)] if run.merged.exists() else []
    models = [path for path in sorted(run.gguf.glob("*.gguf")) if not path.stem.startswith(f"{run.name}-lora")]
    found += [("gguf", path) for path in models]
    others = of_another_adapter(run, [path for _, path in found])
    adapter = [Artifact("adapter", run.adapter)] if run.adapter.exists() else []
    return adapter + [Artifact(kind, path, path in others) for kind, path in found]


def to_gguf(run: RunFolder) -> str:
    return f"`ft export {run.path} --to gguf`"
