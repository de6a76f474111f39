"""Small real models, real tokenizers and random adapters to merge and convert."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ASSETS = Path(__file__).parents[3] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip("the shared assets are not here")
    return ASSETS


@pytest.fixture(scope="session")
def stories(assets: Path) -> Path:
    """A real pre-trained Llama of 260K parameters (float32, tied embeddings, GQA) with its tokenizer."""
    return assets / "models" / "stories260K"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def peft_allowed() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5 for an attribute under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


LlamaMaker = Callable[..., Path]


@pytest.fixture
def make_llama(tmp_path: Path) -> LlamaMaker:
    """Save a small random Llama (or Mistral) and, beside it, a tokenizer's files."""

    def make(
        name: str = "base",
        *,
        tokenizer: Path | None = None,
        dtype: torch.dtype = torch.float32,
        shard: str = "5GB",
        architecture: str = "Llama",
        seed: int = 0,
        **settings: Any,
    ) -> Path:
        import transformers

        torch.manual_seed(seed)
        shape: dict[str, Any] = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.2,
        }
        config = getattr(transformers, f"{architecture}Config")(**(shape | settings))
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard)
        if tokenizer is not None:
            for file in tokenizer.glob("*token*"):
                shutil.copyfile(file, folder / file.name)
            if (tokenizer / "chat_template.jinja").is_file():
                shutil.copyfile(tokenizer / "chat_template.jinja", folder / "chat_template.jinja")
        return folder

    return make


def save_adapter(base: Path, folder: Path, *, strength: float = 0.1, seed: int = 1, **settings: Any) -> Path:
    """Save a random PEFT adapter for a base; B is not left at zero."""
    import peft
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    with peft_allowed():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter += torch.randn_like(parameter) * strength
    wrapped.save_pretrained(folder)
    return folder


def train_adapter(base: Path, folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """As `save_adapter`, with everything that could be trained moved by a random step."""
    import peft
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    with peft_allowed():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(folder)
    return folder


def default_adapter(base: Path, folder: Path, *, quantization: str = "none", seed: int = 1) -> Path:
    """What `ft train` makes of a base by default (`lora.targets: all-linear`), after a random step."""
    from finetune.config.schema import Config
    from finetune.model.adapter import add_adapter
    from finetune.model.base import load_base
    from finetune.model.hardware import detect

    settings = {"base": str(base), "data": [{"path": "x.jsonl"}], "quantization": quantization}
    config = Config.model_validate(settings | {"lora": {"rank": 4, "alpha": 8}})
    with peft_allowed():
        wrapped = add_adapter(config, load_base(config, base, detect()))
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def _q_adapter(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(stories, tmp_path_factory.mktemp("adapters") / "q", target_modules=["q_proj"])


@pytest.fixture
def q_adapter(_q_adapter: Path, tmp_path: Path) -> Path:
    """An adapter of the real model's q_proj layers, to be spoiled by a test."""
    return Path(shutil.copytree(_q_adapter, tmp_path / "q-adapter"))


@pytest.fixture(scope="session")
def full_adapter(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all of the real model's linear layers."""
    return save_adapter(stories, tmp_path_factory.mktemp("adapters") / "full")


def peft_merged(
    base: Path, adapter: Path, dtype: torch.dtype, *, then: Path | None = None, as_saved: Path | None = None
) -> dict[str, torch.Tensor]:
    """The reference: what PEFT itself makes of them, by tensor name (tied weights once).

    then      a second adapter, merged after the first
    as_saved  an empty folder to save the model to, for the names and shapes that tensors have on disk
    """
    import peft
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with peft_allowed():
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        names = None
        if then is not None:
            wrapped.load_adapter(then, "second")
            names = ["default", "second"]
        merged = wrapped.merge_and_unload(adapter_names=names)
    if as_saved is not None:
        merged.save_pretrained(as_saved)
        return dict(load_file(as_saved / "model.safetensors"))
    tied = set(getattr(merged, "all_tied_weights_keys", {}) or {}) if merged.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in merged.state_dict().items() if name not in tied}


def unmerged_logits(folder: Path, adapter: Path | None) -> torch.Tensor:
    """Logits of a model, with an adapter beside it or without, in float32, (1, 24, vocabulary)."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        with peft_allowed():
            model = peft.PeftModel.from_pretrained(model, adapter)
    ids = torch.arange(24).unsqueeze(0) * 3 % model.config.vocab_size
    with torch.no_grad():
        return torch.as_tensor(model.eval()(ids).logits)


def merged_bits(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = merged_bits(folder)
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
