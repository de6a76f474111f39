"""Which files a data path names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.files import source_files
from finetune.config.load import LoadedConfig
from finetune.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, path: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in source_files(str(folder / path))]


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        source_files(str(path), path.name)
    (problem,) = caught.value.problems
    return f"{problem} | {problem.hint}"


def test_a_file_is_itself_whether_it_exists_or_not(tmp_path: Path) -> None:
    assert found(tmp_path, "a.jsonl") == ["a.jsonl"]
    touch(tmp_path, "a.txt")
    assert found(tmp_path, "a.txt") == ["a.txt"]


def test_a_folder_is_searched_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "d/b.CSV.gz", "d/a/z.jsonl", "d/a.jsonl", "d/c.arrow", "d/notes.txt", "d/x.tar.gz", "e/y.jsonl")
    touch(tmp_path, "d/.hidden.jsonl", "d/.git/x.jsonl", "d/a/.b/c.jsonl")
    assert found(tmp_path, "d") == ["d/a/z.jsonl", "d/a.jsonl", "d/b.CSV.gz", "d/c.arrow"]


def test_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "d/10.jsonl", "d/2.jsonl", "d/a/3.jsonl", "d/.4.jsonl", "d/5.txt", "d/6.jsonl/7.csv")
    assert found(tmp_path, "d/*.jsonl") == ["d/10.jsonl", "d/2.jsonl"]
    assert found(tmp_path, "d/[0-9].*") == ["d/2.jsonl"]
    assert found(tmp_path, "d/?0.jsonl") == ["d/10.jsonl"]
    assert found(tmp_path, "*/*/[0-9].*") == ["d/6.jsonl/7.csv", "d/a/3.jsonl"]
    assert found(tmp_path, "**/*.jsonl") == ["d/10.jsonl", "d/2.jsonl", "d/a/3.jsonl"]
    assert found(tmp_path, "d/**") == ["d/10.jsonl", "d/2.jsonl", "d/6.jsonl/7.csv", "d/a/3.jsonl"]


@pytest.mark.parametrize("name", ["rows[1].jsonl", "what?.jsonl", "a*.jsonl"])
def test_a_file_of_just_that_name_wins(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "rows1.jsonl", "whats.jsonl", "ab.jsonl")
    assert found(tmp_path, name) == [name]


def test_a_folder_of_just_that_name_wins(tmp_path: Path) -> None:
    touch(tmp_path, "[x]/a.jsonl", "x/b.jsonl")
    assert found(tmp_path, "[x]") == ["[x]/a.jsonl"]


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.jsonl", "d/.store/b.jsonl", "d/sub/c.jsonl", "secret/e.jsonl")
    (tmp_path / "d" / "linked.jsonl").symlink_to("a.jsonl")
    (tmp_path / "d" / "b.jsonl").symlink_to(".store/b.jsonl")
    (tmp_path / "d" / "broken.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "d" / "out.jsonl").symlink_to("../secret/e.jsonl")
    (tmp_path / "d" / "out").symlink_to("../secret")
    (tmp_path / "d" / "circle").symlink_to(".")
    for path in ("d", "d/**", "d/**/*.jsonl"):
        assert sorted(os.path.realpath(tmp_path / name) for name in found(tmp_path, path)) == [
            str(tmp_path / "d" / name) for name in (".store/b.jsonl", "a.jsonl", "sub/c.jsonl")
        ]
    # The folder itself may be a link: somebody named it.
    (tmp_path / "link").symlink_to("secret")
    assert found(tmp_path, "link") == ["link/e.jsonl"]
    touch(tmp_path, "links/.keep")
    (tmp_path / "links" / "a.jsonl").symlink_to("../d/a.jsonl")
    assert fault(tmp_path / "links") == (
        "links: no data file is in this folder | links that lead out of the folder are not followed: name the files "
        "that they lead to"
    )


def test_what_datasets_notes_beside_its_rows_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "d/dataset_dict.json", "d/train/dataset_info.json", "d/train/state.json", "d/train/a.arrow")
    touch(tmp_path, "e/state.json")
    assert found(tmp_path, "d") == ["d/train/a.arrow"]
    assert found(tmp_path, "e") == ["e/state.json"]


@pytest.mark.parametrize("path", ["a\0*/b.jsonl", "a\0*", "*" * 5000, "[", "x" * 300 + "*", "[z-a]*"])
def test_patterns_that_can_match_nothing(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="no file matches this pattern"):
        source_files(str(tmp_path / path))


def test_patterns_in_a_config_are_relative_to_it(loads: Callable[..., LoadedConfig], folder: Path) -> None:
    touch(folder, "more/a.csv.gz")
    loaded = loads(
        "base: ./base\ndata: [{path: '*.jsonl'}, {path: more}, {path: more/a.csv.gz}]\nevaluation: {path: '**/*.gz'}\n"
    )
    assert [source.path for source in loaded.config.data] == [
        str(folder / "*.jsonl"),
        str(folder / "more"),
        str(folder / "more" / "a.csv.gz"),
    ]
    assert loaded.config.evaluation.path == str(folder / "**" / "*.gz")
