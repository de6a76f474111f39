"""Trackers besides the run folder: only the one that the config names, and never with a prompt."""

from __future__ import annotations

import importlib.util
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from finetune.config.schema import Config
from finetune.errors import MissingExtraError, WorldError
from finetune.runs.folder import RunFolder

_NUMBERS_ALONE = {
    "WANDB_PROJECT": "finetune",
    "WANDB_SILENT": "true",
    # By itself, wandb also takes what is printed, the command line, the addresses of git's remotes, the names of the
    # machine and of its user, and reports its own errors. Metrics, settings and how busy the machine was are enough.
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def check_tracking(config: Config) -> None:
    """Everything the tracker needs must be there before training starts: it would otherwise ask, and nobody answers."""
    if config.tracking == "none":
        return
    if importlib.util.find_spec("wandb") is None:
        raise MissingExtraError("tracking: wandb is not installed", hint='pip install "finetune[wandb]"')
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return
    if not _has_login(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        raise WorldError(
            "tracking: wandb has no login", hint="`wandb login` once, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )


def prepare_tracking(config: Config, run: RunFolder) -> None:
    """What wandb writes goes into the run folder, and it is told no more than numbers. A person's own settings win."""
    if config.tracking == "wandb":
        for name, value in {"WANDB_DIR": str(run.path), **_NUMBERS_ALONE}.items():
            os.environ.setdefault(name, value)


def _has_login(url: str) -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
