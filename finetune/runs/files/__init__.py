"""Writing files: whole or not at all (`whole.py`), and what is said when there is no room (`room.py`)."""

from finetune.runs.files.room import FULL, require_space, storage_errors, temporary_storage
from finetune.runs.files.whole import (
    copy_file,
    discard,
    partial_file,
    partial_folder,
    partial_of,
    promote,
    refuse_existing,
    replace_folder,
    sync,
    sync_folder,
    write_json,
    write_text,
)

__all__ = [
    "FULL",
    "copy_file",
    "discard",
    "partial_file",
    "partial_folder",
    "partial_of",
    "promote",
    "refuse_existing",
    "replace_folder",
    "require_space",
    "storage_errors",
    "sync",
    "sync_folder",
    "temporary_storage",
    "write_json",
    "write_text",
]
