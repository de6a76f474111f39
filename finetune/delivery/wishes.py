"""What a person may want otherwise, and what all ways out have in common: the base, and what is there already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.base_files import weight_files
from finetune.config.schema import Config
from finetune.console import Console
from finetune.errors import BaseError, ConfigError, ExportError, Problem, StorageError
from finetune.proving import Exported, Onto, prove, record_unproven, state_of
from finetune.runs.files import discard, partial_of
from finetune.runs.folder import RunFolder
from finetune.runs.resolved import config_of


@dataclass(frozen=True)
class Wishes:
    """What a person may want otherwise."""

    onto: str = "stored"
    """The weights that the adapter is put onto: `stored`, or `nf4` as training held them."""
    verify: bool = True
    system: str | None = None
    ollama_template: bool = False
    ollama_base: str | None = None
    """The name that Ollama knows the base by, for a Modelfile of base and adapter."""


def onto_of(wishes: Wishes, config: Config) -> Onto:
    if wishes.onto not in ("stored", "nf4"):
        raise ConfigError(f"--base is stored or nf4, not {wishes.onto!r}", hint="stored is the usual choice")
    if wishes.onto == "nf4" and config.quantization != "nf4":
        raise ConfigError(
            f"--base nf4: this run was trained with quantization: {config.quantization}",
            hint="leave --base out: the stored weights are those that training saw",
        )
    return "nf4" if wishes.onto == "nf4" else "stored"


def base_of(run: RunFolder) -> tuple[Config, Path]:
    """The run's config and the files of the very base that it was trained on."""
    from finetune.export.base_identity import check_base

    config = config_of(run)
    base = weight_files(config)
    check_base(run.read_manifest(), base)
    return config, base


_AGAIN = "remove it, and run the same command again"
"""What is there from before is not overwritten: a person may have put it there."""


@dataclass(frozen=True)
class Standing:
    """Which of the wanted files and folders are there."""

    missing: tuple[Exported, ...]
    """To be made. Their paths are those that they will have."""
    unproven: tuple[Exported, ...]
    """There, and still to be proven."""
    proven: tuple[Exported, ...]
    """There, and proven when they were made."""

    def words(self, one: Exported, wishes: Wishes) -> str:
        """Whether what has its name now is proven, for the person to read."""
        return "proven" if wishes.verify or one in self.proven else "not proven"


def standing(run: RunFolder, wanted: Sequence[Exported], onto: Onto, *, verify: bool) -> Standing:
    """Sort what is wanted by what is there. Raises ExportError for what is there and is something else, or wrong."""
    states = {one.name: state_of(run, one, onto) for one in wanted}
    refused = {"other": "is not what would be made now", "refuted": "was found not to be what was trained"}
    if not verify:  # a proof tells what nobody has a record of
        refused["unknown"] = refused["other"]
    problems = [
        Problem(f"this exists already, and {refused[states[one.name]]}", str(one.path), _AGAIN)
        for one in wanted
        if states[one.name] in refused
    ]
    if problems:
        raise ExportError(problems)
    return Standing(
        tuple(one for one in wanted if states[one.name] == "absent"),
        tuple(one for one in wanted if verify and states[one.name] in ("unknown", "not proven")),
        tuple(one for one in wanted if states[one.name] == "proven"),
    )


def clear(*finals: Path) -> None:
    """Remove what an earlier attempt left: files that were being written, and files that were not proven."""
    for final in finals:
        discard(partial_of(final))
        discard(partial_of(partial_of(final)))


def prove_or_record(
    run: RunFolder,
    config: Config,
    base: Path,
    exported: Sequence[Exported],
    onto: Onto,
    wishes: Wishes,
    console: Console,
) -> None:
    """Raise ExportError with everything that is wrong; new files keep their `.partial` names then."""
    if not exported:
        return
    if not wishes.verify:
        record_unproven(run, exported, onto)
        return
    from_before = {one.name: one.path for one in exported if one.path == run.path / one.name}
    try:
        found = prove(run, config, base, exported, onto, console)
    except (BaseError, ExportError, StorageError) as error:
        problems = [_with_way_out(problem, from_before.values()) for problem in error.problems]
        if problems == list(error.problems):
            raise
        raise ExportError(problems) from error
    paths, numbers = {one.name: str(one.path) for one in exported}, f"{run.verification} has the numbers"
    problems = [
        Problem(message, paths[name], f"{_AGAIN}; {numbers}" if name in from_before else numbers)
        for name in found
        for message in found[name]
    ]
    if problems:
        raise ExportError(problems)


def _with_way_out(problem: Problem, from_before: Iterable[Path]) -> Problem:
    """What cannot even be loaded is damaged: making it anew is the way out, if it is not what was just made."""
    place = Path(problem.place or "")
    if any(place.is_relative_to(path) for path in from_before):
        return replace(problem, hint=_AGAIN)
    return problem
