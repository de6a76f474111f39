"""Configs that cannot be meant, through `ft check` and `ft train`: YAML's traps, wrong values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Refused
from .made import LFS_POINTER

GOOD = "base: ./base\ndata:\n  - path: rows.jsonl\n"
KNOWN = (
    "known here: base, revision, chat_template, data, evaluation, quantization, lora, train, speed, private_data, "
    "tracking, extends"
)
NOT_YAML = "check the indentation, the quotes and the colons around that line"
TEXT_FILE = "a config is a YAML text file"
MAPPING = "not a config: expected `key: value` lines | a config is a YAML mapping with at least `base:` and `data:`; "
PLAIN = "a config holds plain values only"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def says_more(key: str) -> str:
    return f"`ft config explain {key}` says more"


TEXTS: dict[str, tuple[str | bytes, str]] = {
    # What is no mapping at all.
    "nothing": ("", f"x.yaml: {MAPPING}`ft init` writes one"),
    "a comment only": ("# later\n", f"x.yaml: {MAPPING}`ft init` writes one"),
    "a list": ("- base\n- data\n", f"x.yaml: {MAPPING}`ft init` writes one"),
    "one word": ("hello", f"x.yaml: {MAPPING}`ft init` writes one"),
    "two documents": (
        f"{GOOD}---\n{GOOD}",
        "x.yaml:4: not valid YAML: expected a single document in the stream but found another document | " + NOT_YAML,
    ),
    # Encodings.
    "UTF-16": (GOOD.encode("utf-16"), f"x.yaml: not a text file in UTF-8 | {TEXT_FILE}"),
    "UTF-32": (GOOD.encode("utf-32"), f"x.yaml: not a text file in UTF-8 | {TEXT_FILE}"),
    "Latin-1": (f"{GOOD}# é\n".encode("latin-1"), f"x.yaml: not a text file in UTF-8 | {TEXT_FILE}"),
    "binary": (bytes(range(256)), f"x.yaml: not a text file in UTF-8 | {TEXT_FILE}"),
    "a null character": (
        f"{GOOD}\0",
        f"x.yaml:4: not valid YAML: the character U+0000 is not text | {TEXT_FILE}; see `ft init`",
    ),
    "a null character, spelt out": (
        f'{GOOD}revision: "a\\0b"\n',
        "x.yaml:4: the character U+0000 cannot stand in a config | take out the escape sequence",
    ),
    "half an emoji": (
        f'{GOOD}revision: "\\ud83d"\n',
        "x.yaml:4: the character U+D83D cannot stand in a config | take out the escape sequence",
    ),
    "a byte order mark and a fault": (
        b"\xef\xbb\xbfbase: ./nothing\r\ndata:\r\n  - path: rows.jsonl\r\n",
        "x.yaml:1: base: no such folder: nothing | name a model folder, or a Hub id: owner/name",
    ),
    "Windows line ends and a fault": (
        b"base: ./base\r\ndata:\r\n  - path: rows.jsonl\r\nlora: {rank: 0}\r\n",
        f"x.yaml:4: lora.rank: must be at least 1, got 0 | {says_more('lora.rank')}",
    ),
    "a pointer of Git LFS": (
        LFS_POINTER,
        "x.yaml: is a Git LFS pointer: the note that stands for a file which was not fetched | `git lfs pull` in its "
        "folder fetches the file itself; or download it again",
    ),
    # Syntax.
    "a tab": (
        "base: ./base\ndata:\n\t- path: rows.jsonl\n",
        "x.yaml:3: not valid YAML: while scanning for the next token found character '\\t' that cannot start any token"
        " | YAML is indented with spaces, never with tabs",
    ),
    "a bracket that is never closed": (
        "base: ./base\ndata: [{path: rows.jsonl}\nlora: {}\n",
        f"x.yaml:3: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<scalar>' | {NOT_YAML}",
    ),
    "a quote that is never closed": (
        f'{GOOD}chat_template: "plain\n',
        f"x.yaml:5: not valid YAML: while scanning a quoted scalar found unexpected end of stream | {NOT_YAML}",
    ),
    "a wrong indentation": (
        "base: ./base\n data:\n  - path: rows.jsonl\n",
        f"x.yaml:2: not valid YAML: mapping values are not allowed here | {NOT_YAML}",
    ),
    "an @": (
        f"{GOOD}chat_template: @mine\n",
        "x.yaml:4: not valid YAML: while scanning for the next token found character '@' that cannot start any token | "
        + NOT_YAML,
    ),
    "no space after a colon": (
        f"{GOOD}lora:{{rank: 3}}\n",
        "x.yaml:4: lora:{rank: unknown key | did you mean `lora`?",
    ),
    "YAML of another version": (
        f"%YAML 9.9\n---\n{GOOD}",
        "x.yaml:1: not valid YAML: found incompatible YAML document (version 1.* is required) | " + NOT_YAML,
    ),
    # Traps of size and depth.
    "two thousand brackets": (
        f"{GOOD}lora: {'[' * 2000}",
        "x.yaml:4: nested too deep to be a config | see `ft config explain` for what can stand",
    ),
    "ninety thousand brackets": (
        f"{GOOD}lora: {'[' * 90_000}",
        "x.yaml:4: nested too deep to be a config | see `ft config explain` for what can stand",
    ),
    "indented three hundred times": (
        f"{GOOD}lora:\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1, 300)),
        "x.yaml:20: nested too deep to be a config | see `ft config explain` for what can stand",
    ),
    "thirty thousand values": (
        f"{GOOD}lora: [{'a,' * 30_000}]\n",
        "x.yaml:4: more than 10,000 values to be a config | see `ft config explain` for what can stand",
    ),
    "an alias bomb": (
        f"{GOOD}{BOMB}",
        "x.yaml:4: aliases that expand without end | write the values out instead of using & and *",
    ),
    "an alias of itself": (
        f"{GOOD}lora: &a [*a]\n",
        "x.yaml:4: aliases that expand without end | write the values out instead of using & and *",
    ),
    "an alias of nothing": (f"{GOOD}lora: *a\n", f"x.yaml:4: not valid YAML: found undefined alias 'a' | {NOT_YAML}"),
    "100 kB": (
        GOOD + "# much\n" * 20_000,
        "x.yaml: this file is too large to be a config | name the YAML file, not the data or weights",
    ),
    # Tags and merge keys.
    "a tag that calls a function": (
        f'{GOOD}revision: !!python/object/apply:os.system ["touch canary"]\n',
        f"x.yaml:4: the tag !!python/object/apply:os.system is not allowed | {PLAIN}\n"
        f"x.yaml:4: revision: expected text, got a list | {says_more('revision')}",
    ),
    "a tag of a type": (
        f'{GOOD}revision: !!binary "aGVsbG8="\n',
        f"x.yaml:4: the tag !!binary is not allowed | {PLAIN}\n"
        "x.yaml:4: revision has no effect: base is a local folder, which has no revisions | remove `revision`",
    ),
    "a merge key": (
        f"{GOOD}lora:\n  <<: {{rank: 3}}\n",
        "x.yaml:5: merge keys (<<) are not supported | use `extends: FILE` to share values",
    ),
    "a key that is a list": (f"{GOOD}? [a]\n: b\n", "x.yaml:4: a key must be a word | write `name: value`"),
    "a key that moves the cursor": (
        f'{GOOD}"\\e[2K\\nerror: none": 1\n',
        f"x.yaml:4: \\x1b[2K\\nerror: none: unknown key | {KNOWN}",
    ),
    # Keys.
    "a key twice": (
        f"{GOOD}train: {{seed: 1}}\ntrain: {{seed: 2}}\n",
        "x.yaml:5: train: given twice (first on line 4) | remove one; only one can count",
    ),
    "a key twice in a section": (
        f"{GOOD}lora:\n  rank: 8\n  rank: 16\n",
        "x.yaml:6: lora.rank: given twice (first on line 5) | remove one; only one can count",
    ),
    "a misspelt key": (f"{GOOD}lora: {{rnak: 32}}\n", "x.yaml:4: lora.rnak: unknown key | did you mean `rank`?"),
    "a key of another section": (
        f"{GOOD}learning_rate: 1e-4\n",
        "x.yaml:4: learning_rate: unknown key | did you mean `train.learning_rate`?",
    ),
    "a key with its value": (
        f"{GOOD}lora: {{rank:16}}\n",
        "x.yaml:4: lora.rank:16: unknown key | did you mean `rank`?",
    ),
    "a key that is a number": (f"{GOOD}3: b\n", f"x.yaml:4: 3: unknown key | {KNOWN}"),
    "no data": ("base: ./base\n", "x.yaml: data is missing | for instance `data: [{path: my-data.jsonl}]`"),
    "no base": (
        "data: [{path: rows.jsonl}]\n",
        "x.yaml: base is missing | for instance `base: meta-llama/Llama-3.2-3B-Instruct`",
    ),
    # Values.
    "no": (
        f"{GOOD}train: {{packing: no}}\n",
        "x.yaml:4: train.packing: expected true or false, got 'no' | write false",
    ),
    "on": (f"{GOOD}train: {{packing: on}}\n", "x.yaml:4: train.packing: expected true or false, got 'on' | write true"),
    "true in quotes": (
        f'{GOOD}train: {{packing: "true"}}\n',
        f"x.yaml:4: train.packing: expected true or false, got 'true' | {says_more('train.packing')}",
    ),
    "1:30": (
        f"{GOOD}train: {{max_steps: 1:30}}\n",
        f"x.yaml:4: train.max_steps: expected a whole number, got '1:30' | {says_more('train.max_steps')}",
    ),
    "1e-4 in quotes": (
        f'{GOOD}train: {{learning_rate: "1e-4"}}\n',
        "x.yaml:4: train.learning_rate: expected a number, got '1e-4' | write the number without quotes",
    ),
    "1e": (
        f"{GOOD}train: {{learning_rate: 1e}}\n",
        f"x.yaml:4: train.learning_rate: expected a number, got '1e' | {says_more('train.learning_rate')}",
    ),
    "1_000": (
        f"{GOOD}train: {{max_steps: 1_000}}\n",
        "x.yaml:4: train.max_steps: expected a whole number, got '1_000' | write 1000",
    ),
    "1,000": (
        f"{GOOD}train:\n  max_steps: 1,000\n",
        "x.yaml:5: train.max_steps: expected a whole number, got '1,000' | write 1000",
    ),
    "a date": (
        f"{GOOD}train: {{max_steps: 2026-01-01}}\n",
        f"x.yaml:4: train.max_steps: expected a whole number, got '2026-01-01' | {says_more('train.max_steps')}",
    ),
    "a fraction of a step": (
        f"{GOOD}train: {{max_steps: 1.5}}\n",
        f"x.yaml:4: train.max_steps: expected a whole number, got 1.5 | {says_more('train.max_steps')}",
    ),
    "a number of 5,000 digits": (
        f"{GOOD}train: {{max_steps: {'9' * 5000}}}\n",
        f"x.yaml:4: train.max_steps: expected a whole number, got '{'9' * 56}... | {says_more('train.max_steps')}",
    ),
    "not a number": (
        f"{GOOD}train: {{learning_rate: .nan}}\n",
        f"x.yaml:4: train.learning_rate: must be a finite number, got nan | {says_more('train.learning_rate')}",
    ),
    "infinity": (
        f"{GOOD}train: {{epochs: 1e400}}\n",
        f"x.yaml:4: train.epochs: must be a finite number, got inf | {says_more('train.epochs')}",
    ),
    "a negative seed": (
        f"{GOOD}train: {{seed: -1}}\n",
        f"x.yaml:4: train.seed: must be at least 0, got -1 | {says_more('train.seed')}",
    ),
    "a rank out of range": (
        f"{GOOD}lora: {{rank: 4096}}\n",
        f"x.yaml:4: lora.rank: must be at most 1024, got 4096 | {says_more('lora.rank')}",
    ),
    "a dropout of everything": (
        f"{GOOD}lora: {{dropout: 1}}\n",
        f"x.yaml:4: lora.dropout: must be less than 1, got 1 | {says_more('lora.dropout')}",
    ),
    "a section without values": (
        f"{GOOD}train:\n",
        f"x.yaml:4: train: expected a mapping (`key: value` lines), got nothing | {says_more('train')}",
    ),
    "a section that is a list": (
        f"{GOOD}train: [1]\n",
        f"x.yaml:4: train: expected a mapping (`key: value` lines), got a list | {says_more('train')}",
    ),
    "data without a list": (
        "base: ./base\ndata: {path: rows.jsonl}\n",
        f"x.yaml:2: data: expected a list (lines that begin with `-`), got a mapping | {says_more('data')}",
    ),
    "an empty list of data": ("base: ./base\ndata: []\n", f"x.yaml:2: data: must not be empty | {says_more('data')}"),
    "a misspelt choice": (
        f"{GOOD}quantization: nf5\n",
        "x.yaml:4: quantization: expected nf4, int8 or none, got 'nf5' | did you mean `nf4`?",
    ),
    "a revision that is a number": (
        f"{GOOD}revision: 1234567\n",
        "x.yaml:4: revision: expected text, got 1234567 | write it in quotes, so that it is text",
    ),
    "targets in one word": (
        f"{GOOD}lora: {{targets: q_proj}}\n",
        "x.yaml:4: lora.targets: expected all-linear or a list of module names, got 'q_proj' | for instance [q_proj, "
        "v_proj]",
    ),
    "a variable of the shell": (
        "base: ${HOME}/base\ndata: [{path: rows.jsonl}]\n",
        "x.yaml:1: base: neither a folder nor a model id: '${HOME}/base' | a Hub id is owner/name",
    ),
    "an address of the Hub": (
        "base: https://huggingface.co/a/b\ndata: [{path: rows.jsonl}]\n",
        "x.yaml:1: base: neither a folder nor a model id: 'https://huggingface.co/a/b' | a Hub id is owner/name",
    ),
    "a template of no known name": (
        f"{GOOD}chat_template: alpaca\n",
        "x.yaml:4: chat_template: expected chatml, plain or a .jinja file, got 'alpaca' | chatml suits a base that was "
        "never tuned to chat",
    ),
    "a key without effect": (
        f"{GOOD}train: {{max_steps: 5, epochs: 3}}\n",
        "x.yaml:4: train.epochs has no effect: train.max_steps decides when training ends | remove `epochs`",
    ),
    # Recipes.
    "a recipe that is not there": (
        f"extends: y.yaml\n{GOOD}",
        "x.yaml:1: extends: y.yaml: no such file | did you mean x.yaml?",
    ),
    "a recipe that is a folder": (
        f"extends: base\n{GOOD}",
        "x.yaml:1: extends: base: this is a folder, not a config | try one of base/*.yaml",
    ),
    "a config that extends itself": (
        f"extends: x.yaml\n{GOOD}",
        "x.yaml:1: extends goes in a circle: x.yaml → x.yaml | remove one of the `extends:`",
    ),
    "two recipes": (
        f"extends: [c.yaml, d.yaml]\n{GOOD}",
        "x.yaml:1: extends: expected the path of one YAML file | extends: ../recipes/x.yaml",
    ),
    "a recipe that is a device": (
        f"extends: /dev/zero\n{GOOD}",
        f"x.yaml:1: extends: /dev/zero: this is a device, not a file | {TEXT_FILE}",
    ),
}


@pytest.mark.fault("a config that is wrong", stage="input", outcome="refused with file and line, in under 2 s")
@pytest.mark.parametrize("case", TEXTS)
def test_a_config_that_is_wrong(folder: Path, refused: Refused, case: str) -> None:
    content, expected = TEXTS[case]
    (folder / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused("check", "x.yaml") == expected
    assert not (folder / "canary").exists()


def test_ten_problems_are_listed_and_the_others_counted(folder: Path, refused: Refused) -> None:
    (folder / "c.yaml").write_text(GOOD + "".join(f"zz{number}: 1\n" for number in range(25)))
    said = refused("check", "c.yaml").splitlines()
    assert said[:10] == [f"c.yaml:{4 + number}: zz{number}: unknown key | {KNOWN}" for number in range(10)]
    assert said[10:] == ["c.yaml: … and 15 more | mend these first"]


def test_a_circle_of_three(folder: Path, refused: Refused) -> None:
    for name, parent in (("a", "b"), ("b", "d"), ("d", "a")):
        (folder / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
    assert refused("check", "a.yaml") == (
        "d.yaml:1: extends goes in a circle: a.yaml → b.yaml → d.yaml → a.yaml | remove one of the `extends:`"
    )


# -- what is named as a config ------------------------------------------------------------------------------------

COMMANDS = pytest.mark.parametrize("command", ["check", "data", "train"])


@COMMANDS
def test_a_config_that_is_not_there(folder: Path, refused: Refused, command: str) -> None:
    assert refused(command, "d.yaml") == "d.yaml: no such file | did you mean c.yaml?"


def test_a_config_that_is_a_folder(folder: Path, refused: Refused) -> None:
    assert refused("train", "base/") == "base: this is a folder, not a config | try one of base/*.yaml"


def test_a_config_that_is_data(folder: Path, refused: Refused) -> None:
    assert refused("train", "rows.jsonl") == (
        "rows.jsonl: this is data, not a config | `ft init --data rows.jsonl` writes a config for it"
    )


def test_a_config_that_is_weights(folder: Path, refused: Refused) -> None:
    assert refused("train", "base/model.safetensors") == (
        "base/model.safetensors: this file is too large to be a config | name the YAML file, not the data or weights"
    )


@COMMANDS
def test_a_config_that_is_a_run(run: Path, refused: Refused, command: str) -> None:
    assert refused(command, "runs/good") == (
        "runs/good: this is a run, not a config | name the YAML file that it was made from; the run keeps a copy in "
        "runs/good/config.yaml"
    )


def test_a_config_with_a_name_that_cannot_be(folder: Path, refused: Refused) -> None:
    name = "a" * 300 + ".yaml"
    assert refused("train", name) == f"{name}: cannot be read: File name too long | check the path and its permissions"


@pytest.mark.fault("a pipe or a device in place of a file", stage="input", outcome="refused, never waited for")
@COMMANDS
def test_a_config_that_is_a_pipe(folder: Path, refused: Refused, command: str) -> None:
    os.mkfifo(folder / "pipe.yaml")
    assert refused(command, "pipe.yaml") == f"pipe.yaml: this is a pipe, not a file | {TEXT_FILE}"


def test_a_config_without_end(folder: Path, refused: Refused) -> None:
    assert refused("check", "/dev/zero") == f"/dev/zero: this is a device, not a file | {TEXT_FILE}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_config_that_may_not_be_read(folder: Path, refused: Refused) -> None:
    (folder / "c.yaml").chmod(0)
    assert (
        refused("check", "c.yaml") == "c.yaml: cannot be read: Permission denied | check the path and its permissions"
    )
