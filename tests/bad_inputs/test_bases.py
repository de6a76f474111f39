"""Bases that are damaged, incomplete or something else, through `ft check`, `ft data` and `ft merge`: heads suffice."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from .conftest import Refused
from .host import Host
from .made import COPY, LFS_POINTER, POINTER, Spoil, head, pipe, remove, write

AGAIN = "download the model again: this file is damaged"
NO_HEAD = f"its first bytes are not the head of a safetensors file, or it is cut short | {COPY}"
SHARD = "model-00001-of-00002.safetensors"


def cut(name: str, count: int) -> Spoil:
    return lambda base: os.truncate(base / name, (base / name).stat().st_size - count)


def weights(content: bytes) -> Spoil:
    return write("model.safetensors", content)


def sharded(index: str | bytes) -> Spoil:
    def spoil(base: Path) -> None:
        (base / "model.safetensors").rename(base / SHARD)
        write("model.safetensors.index.json", index)(base)

    return spoil


def placed(name: str, shard: object) -> str:
    return json.dumps({"weight_map": {"model.embed_tokens.weight": SHARD, name: shard}})


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

CASES: dict[str, tuple[Spoil, str]] = {
    # config.json
    "no config.json": (
        remove("config.json"),
        "c.yaml:1: base: no config.json in base | a model folder has config.json and weights",
    ),
    "half a config.json": (
        write("config.json", '{"model_type": "lla'),
        f"base/config.json: config.json cannot be read | {AGAIN}",
    ),
    "an empty config.json": (write("config.json", ""), f"base/config.json: config.json cannot be read | {AGAIN}"),
    "a config.json of brackets": (
        write("config.json", "[" * 100_000),
        f"base/config.json: config.json cannot be read | {AGAIN}",
    ),
    "a config.json that is a list": (
        write("config.json", "[]"),
        "base/config.json: config.json names no model_type | this is not a transformers model folder",
    ),
    "a model_type that is a number": (
        write("config.json", '{"model_type": 3}'),
        "base/config.json: config.json names no model_type | this is not a transformers model folder",
    ),
    "a pointer in place of config.json": (write("config.json", LFS_POINTER), f"base/config.json: {POINTER}"),
    # The tokenizer
    "no tokenizer": (
        remove("tokenizer.json"),
        "base: there is no tokenizer.json | save the tokenizer with a current transformers "
        "(`AutoTokenizer…save_pretrained`), which writes one",
    ),
    "half a tokenizer": (
        cut("tokenizer.json", 1000),
        f"base/tokenizer.json: tokenizer.json cannot be read | {AGAIN}",
    ),
    "a tokenizer of nothing": (
        write("tokenizer.json", "{}"),
        f"base/tokenizer.json: tokenizer.json cannot be read | {AGAIN}",
    ),
    "a pointer in place of the tokenizer": (write("tokenizer.json", LFS_POINTER), f"base/tokenizer.json: {POINTER}"),
    "half a tokenizer_config.json": (
        write("tokenizer_config.json", '{"eos_tok'),
        f"base/tokenizer_config.json: cannot be read | {AGAIN}",
    ),
    "a tokenizer_config.json that is a list": (
        write("tokenizer_config.json", "[]"),
        f"base/tokenizer_config.json: is not a mapping | {AGAIN}",
    ),
    "a tokenizer_config.json that is a pipe": (
        pipe("tokenizer_config.json"),
        "base/tokenizer_config.json: is a pipe, not a file | download the model again",
    ),
    # The chat template
    "a template in Latin-1": (
        write("chat_template.jinja", b"\xe9"),
        "base/chat_template.jinja: cannot be read | give another with `chat_template:`",
    ),
    "a template that is no Jinja": (
        write("chat_template.jinja", "{{ messages\n{% if %}"),
        "of base:2: the chat template is not valid Jinja: expected token 'end of print statement', got '{' | give "
        "another with `chat_template: chatml | plain | path.jinja`",
    ),
    # Weights
    "no weights": (
        remove("model.safetensors"),
        "base: there are no weights here (model.safetensors) | download the model again, or use a revision of it with "
        "safetensors files",
    ),
    "weights in the pickle format": (
        lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "base: its weights are in the pickle format, which can run code when it is opened | use a revision that has "
        "safetensors files",
    ),
    "half the weights": (
        cut("model.safetensors", 1_000_000),
        f"base/model.safetensors: its header speaks of 3,150,440 bytes and the file has 2,150,440 | {COPY}",
    ),
    "weights without their last byte": (
        cut("model.safetensors", 1),
        f"base/model.safetensors: its header speaks of 3,150,440 bytes and the file has 3,150,439 | {COPY}",
    ),
    "no byte of weights": (weights(b""), f"base/model.safetensors: {NO_HEAD}"),
    "a kilobyte of zeros": (weights(bytes(1000)), f"base/model.safetensors: {NO_HEAD}"),
    "a head of four exabytes": (weights(struct.pack("<Q", 2**62) + bytes(100)), f"base/model.safetensors: {NO_HEAD}"),
    "a pointer in place of weights": (weights(LFS_POINTER), f"base/model.safetensors: {POINTER}"),
    "a head that is no JSON": (
        weights(head(b"{oops}")),
        "base/model.safetensors: its header is not valid: Expecting property name enclosed in double quotes: line 1 "
        f"column 2 (char 1) | {COPY}",
    ),
    "a head that is a list": (weights(head(b"[]")), f"base/model.safetensors: its header is not a table | {COPY}"),
    "a tensor of an unknown type": (
        weights(head({"a": ONE | {"dtype": "Q7"}}, bytes(8))),
        f"base/model.safetensors: `a` has the unknown type 'Q7' | {COPY}",
    ),
    "a tensor of a negative size": (
        weights(head({"a": ONE | {"shape": [-2]}}, bytes(8))),
        f"base/model.safetensors: the shape or place of `a` is not valid | {COPY}",
    ),
    "a tensor that is larger than its place": (
        weights(head({"a": ONE | {"shape": [2**40, 2**20]}}, bytes(8))),
        "base/model.safetensors: `a` has 8 bytes, which its shape [1099511627776, 1048576] does not | " + COPY,
    ),
    "tensors that share a place": (
        weights(head({"a": ONE, "b": ONE}, bytes(8))),
        f"base/model.safetensors: `b` does not follow the tensor before it | {COPY}",
    ),
    "a tensor twice": (
        weights(head(b'{"a": {}, "a": {}}')),
        f"base/model.safetensors: its header is not valid: a name occurs twice | {COPY}",
    ),
    "weights that are a pipe": (
        pipe("model.safetensors"),
        "base: model.safetensors is a pipe, not a file | download the model again",
    ),
    "weights that are a folder": (
        lambda base: ((base / "model.safetensors").unlink(), (base / "model.safetensors").mkdir()),
        "base: model.safetensors is a folder, not a file | download the model again",
    ),
    # The index of shards
    "half an index": (
        sharded('{"weight_map": {'),
        f"base/model.safetensors.index.json: is not a valid index of weights | {COPY}",
    ),
    "an index of a list": (
        sharded('{"weight_map": []}'),
        f"base/model.safetensors.index.json: is not a valid index of weights | {COPY}",
    ),
    "an index of nothing": (
        sharded('{"weight_map": {}}'),
        f"base/model.safetensors.index.json: names no tensors | {COPY}",
    ),
    "an index of a shard that is missing": (
        sharded(placed("model.norm.weight", "model-00002-of-00002.safetensors")),
        "base: these files are missing: model-00002-of-00002.safetensors | download them again",
    ),
    "an index of ten shards that are missing": (
        sharded(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(10)}})),
        "base: these files are missing: 0.safetensors, 1.safetensors, 2.safetensors, 3.safetensors, 4.safetensors … "
        "(10 in all) | download them again",
    ),
    "an index that leads out of the folder": (
        sharded(placed("model.norm.weight", "../../x.safetensors")),
        "base/model.safetensors.index.json: `model.norm.weight` is said to be in '../../x.safetensors', which is not a "
        "file name | use a model of somebody whom you trust: this one points out of its folder",
    ),
    "an index of a tensor that is not there": (
        sharded(placed("model.extra.weight", SHARD)),
        f"base/model.safetensors.index.json: `model.extra.weight` is not in {SHARD}, where it should be | {COPY}",
    ),
    "a pointer in place of the index": (sharded(LFS_POINTER), f"base/model.safetensors.index.json: {POINTER}"),
}

WORLD = (
    "model.safetensors: i",
    "model.safetensors: t",
    "model.safetensors: `",
    "index.json: ",
    "base: these files are missing",
)
"""How messages about files that did not arrive whole begin: a fault of the machine or the moment, exit code 1."""


@pytest.mark.fault("a base that is damaged or incomplete", stage="input", outcome="refused before a model is loaded")
@pytest.mark.parametrize("case", CASES)
def test_a_base_that_is_wrong(folder: Path, refused: Refused, case: str) -> None:
    spoil, expected = CASES[case]
    spoil(folder / "base")
    code = 1 if any(part in expected for part in WORLD) else 2
    assert refused("check", "c.yaml", code=code) == expected


MERGED = [case for case in CASES if "weights" in case or "index" in case or "shard" in case]


@pytest.mark.fault("a base that is damaged or incomplete", stage="merge", outcome="refused before a model is loaded")
@pytest.mark.parametrize("case", MERGED)
def test_a_base_that_went_wrong_since_it_was_trained_on(run: Path, folder: Path, refused: Refused, case: str) -> None:
    spoil, expected = CASES[case]
    spoil(folder / "base")
    code = 1 if any(part in expected for part in WORLD) else 2
    assert refused("merge", "runs/good", code=code) == expected
    assert not (run / "merged").exists()


# -- what is named as a base --------------------------------------------------------------------------------------


def test_a_base_that_is_nowhere_near(folder: Path, refused: Refused) -> None:
    assert refused("data", "c.yaml", "-s", "base=nobody/nothing") == (
        "nobody/nothing: is not in the local cache and the Hub cannot be reached | connect to the network once, or set "
        "`base:` to a local folder"
    )


def test_a_base_that_is_a_run(run: Path, refused: Refused) -> None:
    assert refused("check", "c.yaml", "-s", "base=./runs/good") == (
        "-s base: base: no config.json in runs/good | a model folder has config.json and weights"
    )


def test_a_base_that_is_a_gguf_file(folder: Path, refused: Refused) -> None:
    (folder / "base.gguf").write_bytes(b"GGUF")
    assert refused("check", "c.yaml", "-s", "base=./base.gguf") == (
        "-s base: base: no such folder: base.gguf | name a model folder, or a Hub id: owner/name"
    )


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_lora_target_that_does_not_exist(folder: Path, refused: Refused, command: str) -> None:
    assert refused(command, "c.yaml", "-s", "lora.targets=[q_proj, w_proj]") == (
        "-s lora.targets: lora.targets: the base has no layer named w_proj | did you mean v_proj? "
        "it has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


# -- chat templates -----------------------------------------------------------------------------------------------


def test_a_base_without_a_chat_template(stories: Path, refused: Refused) -> None:
    assert refused("data", "c.yaml") == (
        "base: the base has no chat template | add `chat_template: plain` to the config (chatml needs tokens that this "
        "base does not have)"
    )


def test_chatml_for_a_base_without_its_tokens(stories: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "chat_template=chatml") == (
        "base: chat_template: chatml needs the tokens <|im_start|> and <|im_end|>, which this base does not have | use "
        "`chat_template: plain`"
    )


def test_a_template_of_ones_own_that_fails(folder: Path, refused: Refused) -> None:
    (folder / "t.jinja").write_text("{{ messages[0].content }}{{ range(10 ** 9) }}</s>")
    assert refused("data", "c.yaml", "-s", "chat_template=t.jinja").startswith(
        "rows.jsonl:1: the chat template (t.jinja) refuses this conversation: Range too big."
    )


def test_a_template_of_ones_own_that_is_not_there(folder: Path, refused: Refused) -> None:
    assert refused("check", "c.yaml", "-s", "chat_template=t.jinja") == (
        "-s chat_template: chat_template: no such file: t.jinja | paths are relative to the YAML file they are "
        "written in"
    )


def test_the_base_is_right(folder: Path, host: Host) -> None:
    """Otherwise every refusal above could have another reason."""
    outcome = host.run(["check", "c.yaml"], folder)
    assert (outcome.code, outcome.heavy) == (0, [])
    assert outcome.stderr.endswith("c.yaml is valid\n")
