"""What is to be talked to must be whole: found out from heads and small files, before anything is loaded."""

from __future__ import annotations

from finetune.base_files import check_weights, read_model_config, weight_files
from finetune.config.schema import is_local_base
from finetune.llamacpp.gguf_head import check_gguf
from finetune.runs.folder import RunFolder, check_adapter
from finetune.runs.resolved import config_of
from finetune.serve.artifact import Artifact


def check_artifact(run: RunFolder, artifact: Artifact) -> None:
    """Raise RunError, BaseError or StorageError for an artifact that is damaged, and for an adapter without its base.

    A base on the Hub is not looked at: whoever loads it fetches it, and checks it then.
    """
    if artifact.kind == "gguf":
        check_gguf(artifact.path)
        return
    if artifact.kind == "merged":
        read_model_config(artifact.path)
        check_weights(artifact.path)
        return
    check_adapter(run)
    config = config_of(run)
    if is_local_base(config.base):
        read_model_config(weight_files(config))
