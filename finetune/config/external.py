"""What a config points at: files must exist, other names must look like a Hub id. Nothing is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from finetune.config.files import KNOWN_ENDINGS, is_pattern, source_files
from finetune.config.problems import dotted_key, nearest_place
from finetune.config.schema import DATA_SUFFIXES, Config, data_kind, is_local_base, is_local_data
from finetune.config.yaml_source import Key, Place
from finetune.errors import DataError, Problem
from finetune.given_files import not_a_file

_HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
"""By the Hub's own rules (huggingface_hub's `validate_repo_id`)."""


def reference_problems(config: Config, places: Mapping[Key, Place | str], shown: str) -> Iterator[Problem]:
    """Files and ids that the config names: local ones must exist, others must look like a Hub id."""
    files: list[tuple[Key, str]] = [(("data", i, "path"), source.path) for i, source in enumerate(config.data)]
    if config.evaluation.path is not None:
        files.append((("evaluation", "path"), config.evaluation.path))
    for key, path in files:
        place = nearest_place(places, key, shown)
        if is_local_data(path):
            yield from _data_problems(dotted_key(key), path, place)
        elif not _HUB_ID.fullmatch(path):
            hint = f"a file ends in {', '.join(DATA_SUFFIXES)}; a Hub id is owner/name"
            yield Problem(f"{dotted_key(key)}: neither a file nor a dataset id: {path!r}", place, hint)
    if config.chat_template is not None and config.chat_template.endswith(".jinja"):
        place = nearest_place(places, ("chat_template",), shown)
        yield from _missing_file("chat_template", Path(config.chat_template), place)
    elif config.chat_template not in (None, "chatml", "plain"):
        place = nearest_place(places, ("chat_template",), shown)
        yield Problem(
            f"chat_template: expected chatml, plain or a .jinja file, got {config.chat_template!r}",
            place,
            "chatml suits a base that was never tuned to chat",
        )
    place = nearest_place(places, ("base",), shown)
    if is_local_base(config.base):
        folder = Path(config.base)
        if not os.path.isdir(folder):
            yield Problem(f"base: no such folder: {config.base}", place, "name a model folder, or a Hub id: owner/name")
        elif not os.path.isfile(folder / "config.json"):
            yield Problem(f"base: no config.json in {config.base}", place, "a model folder has config.json and weights")
    elif not _HUB_ID.fullmatch(config.base):
        yield Problem(f"base: neither a folder nor a model id: {config.base!r}", place, "a Hub id is owner/name")


def _data_problems(key: str, path: str, place: str) -> Iterator[Problem]:
    if os.path.isfile(path):
        if data_kind(path) is None:
            yield Problem(f"{key}: {Path(path).name} is of no known kind", place, KNOWN_ENDINGS)
    elif os.path.isdir(path) or is_pattern(path):
        try:
            source_files(path)
        except DataError as error:
            yield from (Problem(f"{key}: {problem}", place, problem.hint) for problem in error.problems)
    else:
        yield from _missing_file(key, Path(path), place)


def _missing_file(key: str, path: Path, place: str) -> Iterator[Problem]:
    # os.path answers False where Path raises, for instance for a name too long to be one.
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        yield Problem(f"{key}: {path} is a folder", place, "name one file in it")
        return
    if what := not_a_file(path):
        yield Problem(f"{key}: {path} is {what}, not a file", place, "name a file, which can be read more than once")
        return
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    close = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "paths are relative to the YAML file they are written in"
    yield Problem(f"{key}: no such file: {path}", place, hint)
