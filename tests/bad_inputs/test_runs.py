"""Run folders in which something is missing, damaged or of another kind, to every command that takes a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Refused, said_by
from .host import Host
from .made import (
    COPY,
    LFS_POINTER,
    POINTER,
    Spoil,
    Tensors,
    adapter_config,
    adapter_tensors,
    gguf,
    head,
    pipe,
    remove,
    write,
    write_safetensors,
)

COMMANDS: dict[str, list[str]] = {
    "chat": ["chat", "runs/good", "-p", "hello"],
    "merge": ["merge", "runs/good"],
    "export": ["export", "runs/good"],
    "eval": ["eval", "runs/good"],
    "serve": ["serve", "runs/good", "--port", "47113"],
}
FRESH = "restore it, or train with --fresh"
AGAIN = "restore it, or train again with --fresh"
OTHER = "this is not, or not all of, what `ft train` saves: restore it, or train again with --fresh"
MANIFEST = "runs/good/manifest.json"
CONFIG = "runs/good/adapter/adapter_config.json"
WEIGHTS = "runs/good/adapter/adapter_model.safetensors"

# -- the folder and its manifest, for all commands ----------------------------------------------------------------

FOLDERS: dict[str, tuple[Spoil, str]] = {
    "no manifest": (
        remove("manifest.json"),
        "runs/good: not a run folder: it has no manifest.json | `ft runs` lists the runs",
    ),
    "half a manifest": (
        write("manifest.json", '{"state": "fin'),
        f"{MANIFEST}: manifest.json cannot be read | {FRESH}",
    ),
    "a manifest of brackets": (
        write("manifest.json", "[" * 100_000),
        f"{MANIFEST}: manifest.json cannot be read | {FRESH}",
    ),
    "a manifest in Latin-1": (write("manifest.json", b"\xe9"), f"{MANIFEST}: manifest.json cannot be read | {FRESH}"),
    "a manifest that is a list": (
        write("manifest.json", "[]"),
        f"{MANIFEST}: manifest.json is not a mapping | train with --fresh",
    ),
    "a manifest that is a pipe": (pipe("manifest.json"), f"{MANIFEST}: is a pipe, not a file | {FRESH}"),
    "a manifest of a later version": (
        write("manifest.json", '{"format": 99}'),
        f"{MANIFEST}: this run has the format 99, and this ft knows up to 1 | use the ft that made it, or a newer one",
    ),
    "a manifest of no version": (
        write("manifest.json", '{"format": -1}'),
        f"{MANIFEST}: this run has the format -1, and this ft knows up to 1 | use the ft that made it, or a newer one",
    ),
    "a file in place of the run": (
        lambda run: (shutil.rmtree(run), run.write_text("x")),
        "runs/good: this is a file, not a run folder | `ft runs` lists the runs",
    ),
    "an empty folder": (
        lambda run: (shutil.rmtree(run), run.mkdir()),
        "runs/good: not a run folder: it has no manifest.json | `ft runs` lists the runs",
    ),
    "no run at all": (
        shutil.rmtree,
        "runs/good: no such run | `ft runs` lists the runs; `ft train CONFIG` makes one",
    ),
    "no adapter": (
        lambda run: shutil.rmtree(run / "adapter"),
        "runs/good: this run has no trained adapter yet | `ft train c.yaml` goes on with it",
    ),
    "a file in place of the adapter": (
        lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").write_text("x")),
        "runs/good: this run has no trained adapter yet | `ft train c.yaml` goes on with it",
    ),
}


@pytest.mark.fault("a run folder that is damaged or none", stage="input", outcome="refused before a model is loaded")
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_finished_run(run: Path, refused: Refused, case: str) -> None:
    spoil, expected = FOLDERS[case]
    spoil(run)
    assert refused(*COMMANDS["chat"]) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_the_folder(run: Path, refused: Refused, command: str) -> None:
    for case in ("a manifest of a later version", "no adapter"):
        spoil, expected = FOLDERS[case]
        (run / "manifest.json").write_text('{"format": 1, "config_path": "c.yaml"}')
        spoil(run)
        assert refused(*COMMANDS[command]) == expected


# -- what it was made with ----------------------------------------------------------------------------------------

RESOLVED: dict[str, tuple[Spoil, str]] = {
    "no resolved.yaml": (remove("resolved.yaml"), f"runs/good: this run has no resolved.yaml | {FRESH}"),
    "half a resolved.yaml": (
        write("resolved.yaml", "base: ["),
        "runs/good/resolved.yaml:1: not valid YAML: while parsing a flow node expected the node content, but found "
        "'<stream end>' | check the indentation, the quotes and the colons around that line",
    ),
    "an empty resolved.yaml": (
        write("resolved.yaml", ""),
        "runs/good/resolved.yaml: not a config: expected `key: value` lines | a config is a YAML mapping with at least "
        "`base:` and `data:`; `ft init` writes one",
    ),
    "a resolved.yaml with an unknown key": (
        write("resolved.yaml", "base: a/b\ndata: [{path: a/b}]\nlora: {rnk: 3}\n"),
        "runs/good/resolved.yaml:3: lora.rnk: unknown key | did you mean `rank`?",
    ),
    "a base that was moved away": (
        lambda run: (run / "../../base").rename(run / "../../elsewhere"),
        "base: there is no such folder any more | move the base back to where it was",
    ),
}


@pytest.mark.parametrize("command", ["chat", "merge"])
@pytest.mark.parametrize("case", RESOLVED)
def test_what_a_run_was_made_with_is_gone(run: Path, refused: Refused, case: str, command: str) -> None:
    spoil, expected = RESOLVED[case]
    spoil(run)
    assert refused(*COMMANDS[command]) == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_base_that_is_another_now(run: Path, folder: Path, refused: Refused, name: str) -> None:
    path = folder / "base" / name
    if name == "config.json":
        path.write_text(path.read_text() + " ")
    else:
        path.write_bytes(head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    assert refused("merge", "runs/good", code=1).splitlines()[0] == (
        f"base/{name}: is not the file that the adapter was trained on | fetch the revision that the run's manifest "
        "names, or train again on this one"
    )


# -- the adapter --------------------------------------------------------------------------------------------------


def settings(**changed: Any) -> Spoil:
    return write("adapter/adapter_config.json", json.dumps(adapter_config(**changed)))


def tensors(change: Callable[[Tensors], Tensors]) -> Spoil:
    return lambda run: write_safetensors(run / "adapter" / "adapter_model.safetensors", change(adapter_tensors()))


def shapes(layer: int, module: str, into: int, rank: int) -> str:
    return (
        f"`model.layers.{layer}.{module}` has the shapes (4, {into}) and (256, 4), its configuration says rank {rank}"
    )


# Each with its exit code: a damaged file is the machine's fault, what is not understood is the input's or ours.
ADAPTERS: dict[str, tuple[Spoil, int, str]] = {
    "half an adapter_config.json": (
        write("adapter/adapter_config.json", '{"r": '),
        2,
        f"{CONFIG}: is not valid JSON: Expecting value: line 1 column 7 (char 6) | {AGAIN}",
    ),
    "an adapter_config.json that is a list": (
        write("adapter/adapter_config.json", "[]"),
        2,
        f"{CONFIG}: is not a table | {AGAIN}",
    ),
    "no weights": (
        remove("adapter/adapter_model.safetensors"),
        2,
        f"runs/good/adapter: there is no adapter_model.safetensors | {AGAIN}",
    ),
    "weights in the pickle format": (
        lambda run: (run / "adapter/adapter_model.safetensors").rename(run / "adapter/adapter_model.bin"),
        2,
        "runs/good/adapter: there is no adapter_model.safetensors | weights in the pickle format are never read",
    ),
    "weights without their end": (
        lambda run: os.truncate(run / "adapter/adapter_model.safetensors", 41_000),
        1,
        f"{WEIGHTS}: its header speaks of 41,960 bytes and the file has 41,000 | {COPY}",
    ),
    "a pointer in place of weights": (
        write("adapter/adapter_model.safetensors", LFS_POINTER),
        1,
        f"{WEIGHTS}: {POINTER}",
    ),
    "another rank": (
        settings(r=8),
        1,
        "\n".join(
            f"{WEIGHTS}: {shapes(layer, module, into, 8)} | {OTHER}"
            for layer in (0, 1)
            for module, into in (("mlp.down_proj", 512), ("self_attn.q_proj", 256))
        ),
    ),
    "a rank of 0": (settings(r=0), 1, f"{CONFIG}: `r` is 0 | {OTHER}"),
    "a rank that is text": (settings(r="4"), 1, f"{CONFIG}: `r` and `lora_alpha` must be numbers | {OTHER}"),
    "another kind of adapter": (
        settings(peft_type="LOHA"),
        1,
        f"{CONFIG}: `peft_type` is 'LOHA'; only LORA can be merged | {OTHER}",
    ),
    "a setting that is not known": (
        settings(use_wombat=True),
        1,
        f"{CONFIG}: `use_wombat` is True, which a merge does not carry over yet | {OTHER}",
    ),
    "a pattern that never ends": (
        settings(rank_pattern={"(.*.*)*!": 4}),
        1,
        f"{CONFIG}: `rank_pattern` has the pattern `(.*.*)*!`, which repeats what can match in several ways, or has a "
        f"rare kind of group: write the names in full | {OTHER}",
    ),
    "DoRA without its magnitudes": (
        settings(use_dora=True),
        1,
        "\n".join(
            f"{WEIGHTS}: `model.layers.{layer}.{module}` has the parts ['A', 'B'], not ['A', 'B', 'dora'] | {OTHER}"
            for layer in (0, 1)
            for module in ("mlp.down_proj", "self_attn.q_proj")
        ),
    ),
    "a tensor that is part of nothing": (
        tensors(lambda found: found | {"evil": np.ones(3, np.float32)}),
        1,
        f"{WEIGHTS}: `evil` is a kind of weight that is not known, which a merge does not carry over yet | {OTHER}",
    ),
    "twenty tensors that are part of nothing": (
        tensors(lambda found: found | {f"evil{number:02d}": np.ones(3, np.float32) for number in range(20)}),
        1,
        "".join(
            f"{WEIGHTS}: `evil{number:02d}` is a kind of weight that is not known, which a merge does not carry over "
            f"yet | {OTHER}\n"
            for number in range(5)
        )
        + f"{WEIGHTS}: … and 15 more of this kind | {OTHER}",
    ),
    "a name of a kilobyte": (
        tensors(lambda found: found | {"e" * 1000: np.ones(3, np.float32)}),
        1,
        f"{WEIGHTS}: `{'e' * 60}…` is a name of 1000 characters; 200 are allowed | {OTHER}",
    ),
    "no tensors": (tensors(lambda found: {}), 1, f"{WEIGHTS}: it holds no LoRA weights | {OTHER}"),
    "a pipe in place of weights": (
        pipe("adapter/adapter_model.safetensors"),
        2,
        f"runs/good/adapter: there is no adapter_model.safetensors | {AGAIN}",
    ),
}


@pytest.mark.fault(
    "an adapter that is damaged or incomplete", stage="merge", outcome="refused before a model is loaded"
)
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_wrong(run: Path, refused: Refused, case: str) -> None:
    spoil, code, expected = ADAPTERS[case]
    spoil(run)
    # Both read it in the same way, so they take turns.
    command = ("merge", "export")[list(ADAPTERS).index(case) % 2]
    assert refused(*COMMANDS[command], code=code) == expected
    assert not (run / "merged").exists()
    assert not list(run.glob("gguf/*"))


TALKED_TO: dict[str, tuple[Spoil, int, str]] = {
    "half an adapter_config.json": (
        write("adapter/adapter_config.json", '{"r": '),
        2,
        f"{CONFIG}: cannot be read | {AGAIN}",
    ),
    "a pointer in place of adapter_config.json": (
        write("adapter/adapter_config.json", LFS_POINTER),
        2,
        f"{CONFIG}: {POINTER}",
    ),
    "an adapter_config.json of nothing": (
        write("adapter/adapter_config.json", "{}"),
        2,
        f"{CONFIG}: does not say what kind of adapter this is (peft_type) | {AGAIN}",
    ),
    "no weights": ADAPTERS["no weights"],
    "weights without their end": ADAPTERS["weights without their end"],
    "a pointer in place of weights": ADAPTERS["a pointer in place of weights"],
    "a pipe in place of weights": (
        pipe("adapter/adapter_model.safetensors"),
        1,
        f"{WEIGHTS}: is a pipe, not a file | {COPY}",
    ),
}


@pytest.mark.fault(
    "an adapter that is damaged or incomplete", stage="chat, serve", outcome="refused before it is loaded"
)
@pytest.mark.parametrize("case", TALKED_TO)
def test_an_adapter_that_cannot_be_talked_to(run: Path, refused: Refused, case: str) -> None:
    spoil, code, expected = TALKED_TO[case]
    spoil(run)
    command = ("chat", "serve")[list(TALKED_TO).index(case) % 2]
    assert refused(*COMMANDS[command], code=code) == expected


def not_finite(found: Tensors) -> Tensors:
    next(iter(found.values()))[0, 0] = np.nan
    return found


NUMBERS: dict[str, tuple[Spoil, str]] = {
    "a NaN": (
        tensors(not_finite),
        f"{WEIGHTS}: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` has values that are not finite "
        "numbers | use a checkpoint from before the loss went wrong",
    ),
    "only zeros": (
        tensors(lambda found: {name: tensor * 0 for name, tensor in found.items()}),
        f"{WEIGHTS}: every lora_B is zero: nothing was learned | was the run stopped at its start?",
    ),
    "the shapes of another base": (
        tensors(
            lambda found: {n: t[:, :100].copy() if n.endswith("q_proj.lora_A.weight") else t for n, t in found.items()}
        ),
        "\n".join(
            f"runs/good/adapter: `model.layers.{layer}.self_attn.q_proj.weight` has the shape (256, 256), the adapter "
            "was trained on (256, 100) | was the adapter trained on this base, and is the base the 16-bit one?"
            for layer in (0, 1)
        ),
    ),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_cannot_be_merged(run: Path, host: Host, case: str) -> None:
    """These take torch to find out, and still no model is loaded: transformers is not."""
    spoil, expected = NUMBERS[case]
    spoil(run)
    outcome = host.run(["merge", "runs/good"], run.parent.parent)
    assert outcome.code == 1
    assert said_by(outcome.stderr.replace(f"{run.parent.parent}/", "")) == expected
    assert outcome.heavy == ["torch"]
    assert not (run / "merged").exists()


# -- the merged folder and GGUF files -----------------------------------------------------------------------------


def merged(run: Path) -> Path:
    shutil.copytree(run.parent.parent / "base", run / "merged")
    return run / "merged"


MERGED: dict[str, tuple[Spoil, int, str]] = {
    "nothing in it": (
        lambda run: (run / "merged").mkdir(),
        2,
        "runs/good/merged/config.json: config.json cannot be read | download the model again: this file is damaged",
    ),
    "weights without their end": (
        lambda run: os.truncate(merged(run) / "model.safetensors", 3_000_000),
        1,
        "runs/good/merged/model.safetensors: its header speaks of 3,150,440 bytes and the file has 3,000,000 | " + COPY,
    ),
}


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize("case", MERGED)
def test_a_merged_folder_that_is_wrong(run: Path, refused: Refused, case: str, command: str) -> None:
    spoil, code, expected = MERGED[case]
    spoil(run)
    assert refused(*COMMANDS[command], "--using", "merged", code=code) == expected


FILE = "runs/good/gguf/good-q8_0.gguf"
EXPORT = "remove it and export it again"
GGUFS: dict[str, tuple[bytes, str]] = {
    "no byte": (b"", "is not a GGUF file: its first bytes are others"),
    "another kind": (b"GGML" + gguf()[4:], "is not a GGUF file: its first bytes are others"),
    "a zip": (b"PK\3\4" + bytes(1000), "is not a GGUF file: its first bytes are others"),
    "version 1": (gguf(version=1), "is GGUF of version 1, and only 2 and 3 are known"),
    "the other byte order": (gguf(version=0x03000000), "is GGUF of version 50331648, and only 2 and 3 are known"),
    "the magic alone": (b"GGUF", "is cut short: it ends within its head"),
    "half a head": (gguf()[:60], "is cut short: it ends within its head"),
    "without its end": (
        gguf()[:-1],
        f"is cut short: its tensors end at byte {len(gguf())} and it has {len(gguf()) - 1}",
    ),
    "a tensor beyond its end": (
        gguf(offset=2**40),
        f"is cut short: its tensors end at byte {2**40 + len(gguf()):,} and it has {len(gguf())}",
    ),
    "2^60 tensors": (gguf(tensors=2**60), f"claims to have {2**60:,} tensors and 1 entries"),
    "2^60 entries": (gguf(entries=2**60), f"claims to have 1 tensors and {2**60:,} entries"),
    "more entries than there are": (gguf(entries=50), "is cut short: it ends within its head"),
}


@pytest.mark.fault("a GGUF file that is cut short or lies", stage="chat, serve", outcome="refused before it is loaded")
@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_file_that_is_wrong(run: Path, refused: Refused, case: str) -> None:
    content, expected = GGUFS[case]
    command = ("chat", "serve")[list(GGUFS).index(case) % 2]
    (run / "gguf").mkdir()
    (run / "gguf" / "good-q8_0.gguf").write_bytes(content)
    assert refused(*COMMANDS[command], code=1) == f"{FILE}: {expected} | {EXPORT}"


def test_a_pointer_in_place_of_a_gguf_file(run: Path, refused: Refused) -> None:
    (run / "gguf").mkdir()
    (run / "gguf" / "good-q8_0.gguf").write_bytes(LFS_POINTER)
    assert refused(*COMMANDS["chat"], code=1) == f"{FILE}: {POINTER}"


def test_a_pipe_in_place_of_a_gguf_file(run: Path, refused: Refused) -> None:
    (run / "gguf").mkdir()
    os.mkfifo(run / "gguf" / "good-q8_0.gguf")
    assert refused(*COMMANDS["chat"], code=1) == f"{FILE}: is a pipe, not a file | {EXPORT}"


# -- the list of runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_damaged_runs_are_listed_as_such(run: Path, host: Host, options: list[str]) -> None:
    hostile = {"state": "\x1b[2J", "base": 3, "name": "else", "path": [], "kind": 1, "event": {}, "format": 1}
    for name, content in (("a", "["), ("b", json.dumps(hostile)), ("c", '{"state": {"a": -1}, "seed": -5}')):
        (run.parent / name).mkdir()
        (run.parent / name / "manifest.json").write_text(content)
        (run.parent / name / "evaluation.json").write_text('{"base": {"loss": "much"}, "tuned": -3}')
    outcome = host.run(["runs", *options], run.parent.parent)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    assert "damaged" in outcome.stdout
    assert "\x1b" not in outcome.stdout
    if options:
        events = [json.loads(line) for line in outcome.stdout.splitlines()]
        assert [(event["event"], event["name"]) for event in events] == [
            ("run", name) for name in ("a", "b", "c", "good")
        ]
