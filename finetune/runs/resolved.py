"""The config of a run that was made, for every stage that starts from its folder."""

from __future__ import annotations

from finetune.config.load import load
from finetune.config.schema import Config, is_local_base
from finetune.errors import RunError
from finetune.runs.folder import RunFolder
from finetune.runs.log import stay_offline, without_compiler


def config_of(run: RunFolder) -> Config:
    """The resolved config that a run was made with, with the very commit of its base."""
    if not run.resolved.is_file():
        raise RunError("this run has no resolved.yaml", place=str(run.path), hint="restore it, or train with --fresh")
    config = load(run.resolved, references=False).config
    revision = run.read_manifest().get("revision")
    if isinstance(revision, str) and not is_local_base(config.base):
        config = config.model_copy(update={"revision": revision})
    stay_offline(config)
    without_compiler(config)
    return config
