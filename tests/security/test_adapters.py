"""A run folder that came from somebody else: adapter, links, GGUF files."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from .conftest import World
from .test_bases import plant_code

COMMANDS = (["merge", "runs/c", "--no-verify"], ["eval", "runs/c"], ["export", "runs/c", "--no-verify"])


@pytest.fixture
def module(finished: World) -> World:
    """With a module in the folder that commands are started in, which Python would find."""
    (finished.folder / "evil_module.py").write_text(finished.evil_code() + "class Evil: pass\n")
    return finished


def test_an_adapter_does_not_choose_its_base(finished: World) -> None:
    """Its word is what it was trained on; what it is put on is the run's."""
    shutil.copytree(finished.base, finished.folder / "evil")
    plant_code(finished, "evil")
    (finished.folder / "evil" / "pytorch_model.bin").write_bytes(finished.evil_pickle())
    (finished.folder / "evil" / "model.safetensors").unlink()
    finished.merge_json("runs/c/adapter/adapter_config.json", base_model_name_or_path=str(finished.folder / "evil"))
    for command in COMMANDS:
        finished.ft(*command)


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil_module"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "./evil", "num_virtual_tokens": 1},
        {"peft_type": "evil_module.Evil"},
        {"peft_type": "XLORA", "adapters": {"a": "./evil"}},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"corda_config": {"cache_file": "evil.pt", "covariance_file": "evil.pt"}, "init_lora_weights": "corda"},
        {"target_modules": "(([a-z_.0-9]+)+)+!"},
        {"target_modules": "(?:.*.*)*x", "exclude_modules": "(([a-z_.0-9]+)+)+!"},
        {"rank_pattern": {"(([a-z_.0-9]+)+)+!": 4}},
        {"layer_replication": [[0, 10**9]]},
        {"r": 10**12},
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "trust_remote_code": True},
        {"modules_to_save": ["(([a-z_.0-9]+)+)+!"]},
        {"task_type": "evil_module"},
    ],
    ids=[
        *("auto_mapping", "megatron", "prompt tuning", "peft_type", "xlora", "eva", "corda", "regex", "exclude regex"),
        *("rank regex", "replication", "rank", "auto_map", "modules_to_save", "task_type"),
    ],
)
def test_what_an_adapters_settings_can_name(module: World, settings: dict[str, object]) -> None:
    for name in ("modeling_evil.py", "evil.py"):
        (module.run / "adapter" / name).write_text(module.evil_code())
    (module.folder / "evil.pt").write_bytes(module.evil_pickle())
    module.merge_json("runs/c/adapter/adapter_config.json", **settings)
    module.ft(*COMMANDS[0])


def test_ft_eval_looks_at_an_adapters_settings_before_peft_does(finished: World) -> None:
    finished.merge_json("runs/c/adapter/adapter_config.json", peft_type="evil_module.Evil")
    finished.refused("eval", "runs/c")


def test_a_pickled_adapter(finished: World) -> None:
    (finished.run / "adapter" / "adapter_model.safetensors").unlink()
    (finished.run / "adapter" / "adapter_model.bin").write_bytes(finished.evil_pickle())
    for command in (COMMANDS[0], COMMANDS[2]):
        assert finished.refused(*command)


def test_code_and_pickles_beside_an_adapter(finished: World) -> None:
    plant_code(finished, "runs/c/adapter")
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (finished.run / "adapter" / name).write_bytes(finished.evil_pickle(f"canary-{name}"))
    (finished.run / "evaluation.json").unlink()
    for command in COMMANDS:
        finished.ft(*command)


@pytest.mark.parametrize(
    "name",
    ["merged", "gguf"],
)
def test_nothing_is_written_through_a_link(finished: World, name: str) -> None:
    elsewhere = finished.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    (finished.run / name).symlink_to(elsewhere)
    finished.ft(*(COMMANDS[0] if name == "merged" else COMMANDS[2]))
    assert [path.name for path in elsewhere.iterdir()] == ["precious.txt"]
    assert (elsewhere / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["merged.partial", "gguf.partial"])
def test_nothing_is_written_through_a_link_at_a_staging_name(finished: World, name: str) -> None:
    elsewhere = finished.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    (finished.run / name).symlink_to(elsewhere)
    finished.ft(*(COMMANDS[0] if name.startswith("merged") else COMMANDS[2]))
    assert [path.name for path in elsewhere.iterdir()] == ["precious.txt"]


# -- GGUF files ---------------------------------------------------------------------------------------------------


def gguf(tensors: int = 0, entries: int = 0, rest: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


HOSTILE = {
    "empty": b"",
    "not one": b"PK\x03\x04" + bytes(100),
    "another version": gguf(version=2**31),
    "tensors": gguf(tensors=2**62),
    "entries": gguf(entries=2**62),
    "long key": gguf(entries=1, rest=text(b"general", 2**62)),
    "negative key": gguf(entries=1, rest=text(b"general", 2**64 - 1)),
    "unknown type": gguf(entries=1, rest=text(b"general.architecture") + struct.pack("<I", 999)),
    "long array": gguf(entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 2**61)),
    "nested arrays": gguf(entries=1, rest=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "tensor dimensions": gguf(1, 0, text(b"t") + struct.pack("<I", 2**31) + bytes(64)),
    "tensor size": gguf(1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0)),
    "tensor offset": gguf(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**62)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_gguf_files(finished: World, content: bytes) -> None:
    (finished.run / "gguf").mkdir()
    (finished.run / "gguf" / "c-q8_0.gguf").write_bytes(content)
    assert finished.refused("chat", "runs/c", "--using", "gguf", "--prompt", "Hello")


def test_a_truncated_gguf_file(trained: World, finished: World) -> None:
    assert finished.ft("export", "runs/c", "--quant", "q8_0", "--no-verify").code == 0
    (file,) = (finished.run / "gguf").glob("*.gguf")
    whole = file.read_bytes()
    for part in (len(whole) // 2, 1000):
        file.write_bytes(whole[:part])
        assert finished.refused("chat", "runs/c", "--using", "gguf", "--prompt", "Hello")


def test_a_run_whose_config_says_more_than_a_config(finished: World) -> None:
    with open(finished.run / "resolved.yaml", "a") as file:
        file.write("\nextra: !!python/object/apply:os.system ['touch canary']\n")
    for command in COMMANDS:
        assert finished.refused(*command)
    manifest = finished.run / "manifest.json"
    manifest.write_text(json.dumps({"state": "finished", "config_path": "../../../../etc/passwd"}))
    assert finished.ft("runs").code == 0
