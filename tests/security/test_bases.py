"""A base model that means harm: Python files, pickles and odd names in a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import EVALUATED, World

SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "adapter_config.json",
)


def plant_code(world: World, folder: str = "base") -> None:
    """Every way in which a model folder can name Python files for transformers or PEFT to run, each with its canary."""
    for name in ("modeling", "configuration", "tokenization", "processing", "image_processing"):
        (world.folder / folder / f"{name}_evil.py").write_text(
            world.evil_code(f"canary-{name}") + "class EvilConfig: pass\nclass Evil: pass\n"
        )
    auto_map = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
        "AutoProcessor": "processing_evil.Evil",
        "AutoImageProcessor": "image_processing_evil.Evil",
    }
    for name in SETTINGS:
        if name != "adapter_config.json" or (world.folder / folder / name).is_file():
            world.merge_json(f"{folder}/{name}", auto_map=auto_map, trust_remote_code=True)
    custom = world.folder / folder / "custom_generate"
    custom.mkdir()
    (custom / "generate.py").write_text(world.evil_code("canary-generate") + "def generate(*a, **k): pass\n")
    (world.folder / folder / "__init__.py").write_text(world.evil_code("canary-init"))
    (world.folder / folder / "conversion.py").write_text(world.evil_code("canary-conversion"))


def test_code_beside_a_known_model_is_never_run(world: World) -> None:
    """Six files that name classes of their own. The model is a Llama whatever they say: it trains, answers, merges,
    exports."""
    plant_code(world)
    world.config(evaluation=EVALUATED)
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "scheduler.pt", "model.pt"):
        (world.base / name).write_bytes(world.evil_pickle(f"canary-{name}"))
    for command in ("check", "data", "train"):
        outcome = world.ft(command, "c.yaml", "-s", "train.max_steps=2")
        assert outcome.code == 0, outcome.said
    adapter = world.run / "adapter"
    assert "auto_map" not in (adapter / "tokenizer_config.json").read_text()
    assert not list(adapter.glob("*.py"))
    for arguments in (["merge", "runs/c", "--no-verify"], ["export", "runs/c", "--quant", "q8_0", "--no-verify"]):
        outcome = world.ft(*arguments)
        assert outcome.code == 0, outcome.said
    assert not list((world.run / "merged").glob("*.py"))


def test_an_architecture_that_only_its_own_code_knows_is_refused(world: World) -> None:
    plant_code(world)
    world.merge_json("base/config.json", model_type="evil", architectures=["Evil"])
    assert "cannot be loaded" in world.refused("train", "c.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "llama\nimport os; os.system('touch canary')",
        "llama\n",
        "../../evil",
        "/etc/passwd",
        "l\u2113ama",
        "llama\u202e",
        "llama\x00",
        "__class__",
        "e" * 100_000,
    ],
    ids=["newline", "a newline", "dots", "absolute", "letter-like", "bidi", "nul", "dunder", "long"],
)
def test_odd_model_types(world: World, name: str) -> None:
    (world.base / "modeling_evil.py").write_text(world.evil_code())
    world.merge_json("base/config.json", model_type=name)
    world.refused("train", "c.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "evil_module.Evil"},
        {"quant_method": "auto-round", "packing_format": "__import__('os').system('touch canary')"},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "evil_module.Evil", "_data": {}}}},
        {"quant_method": "gptq", "bits": 4, "tokenizer": "../evil", "dataset": "../evil"},
        {"quant_method": {"__reduce__": "os.system"}},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "__import__('os').system('touch canary')"},
        ["evil_module"],
    ],
    ids=["module", "auto-round", "torchao", "gptq", "object", "dtype", "list"],
)
def test_odd_quantisations(world: World, settings: object) -> None:
    (world.folder / "evil_module.py").write_text(world.evil_code() + "class Evil: pass\n")
    world.merge_json("base/config.json", quantization_config=settings)
    world.ft("train", "c.yaml")  # refused, or not heeded because the config says `quantization: none`


def test_pickled_weights_alone(world: World) -> None:
    (world.base / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (world.base / name).write_bytes(world.evil_pickle())
    assert "pickled" in world.refused("train", "c.yaml")


def test_an_index_that_names_pickles(world: World) -> None:
    weights = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    (world.base / "model.safetensors").rename(world.base / "other.safetensors")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (world.base / name).write_text(weights)
    (world.base / "pytorch_model.bin").write_bytes(world.evil_pickle())
    assert world.refused("train", "c.yaml")


@pytest.mark.parametrize("where", ["dots", "absolute"])
def test_an_index_that_points_out_of_its_folder(finished: World, where: str) -> None:
    outside = finished.folder / "outside.safetensors"
    shutil.move(finished.base / "model.safetensors", outside)
    name = "../outside.safetensors" if where == "dots" else str(outside)
    (finished.base / "near.safetensors").write_bytes(outside.read_bytes())
    header = outside.read_bytes()
    tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    names = [tensor for tensor in tensors if tensor != "__metadata__"]
    (finished.base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
    )
    for command in (["merge", "runs/c"], ["export", "runs/c", "--quant", "q8_0"]):
        assert "outside" in finished.refused(*command)
    assert not (finished.run / "merged").exists()


def test_a_tokenizer_that_names_modules(world: World) -> None:
    """tokenizer.json's parts are data; a class that does not exist and a pickle are not looked for."""
    (world.folder / "evil_module.py").write_text(world.evil_code())
    (world.base / "tokenizer.model").write_bytes(world.evil_pickle())
    (world.base / "tokenizer.pkl").write_bytes(world.evil_pickle())
    world.merge_json(
        "base/tokenizer_config.json",
        tokenizer_class="evil_module.Evil",
        tokenizer_file=str(world.base / "tokenizer.pkl"),
        extra_special_tokens={"a": {"__type": "evil_module.Evil"}},
    )
    outcome = world.ft("data", "c.yaml")
    assert outcome.code in (0, 2)


def test_a_base_of_links(world: World, tmp_path: Path) -> None:
    """The Hub's cache is made of links, so they are followed; what is no model is an error that does not quote it."""
    secret = world.folder / "secret"
    secret.write_text("hunter2")
    (world.base / "config.json").unlink()
    (world.base / "config.json").symlink_to(secret)
    assert "hunter2" not in world.refused("check", "c.yaml")
