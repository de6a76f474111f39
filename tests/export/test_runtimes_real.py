"""What is exported, loaded by other people's programs: GPT4All's library and MLX on the CPU.

Each runs in a process of its own: they bring libraries that do not share a process with torch for certain.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.export.gguf import Quant, convert
from finetune.export.merge import merge
from finetune.export.runtimes import GPT4ALL_ARCHITECTURES
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp
from tests.export.conftest import LlamaMaker, save_adapter

ONCE = "Once upon a time"


def has(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def told_by(program: str, *arguments: str | Path) -> Any:
    """What a program prints as its last line of JSON."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# -- GPT4All ------------------------------------------------------------------------------------------------------

GPT4ALL = """
import json, sys
from pathlib import Path
from gpt4all import GPT4All
file = Path(sys.argv[1])
try:
    model = GPT4All(file.name, model_path=file.parent, allow_download=False, device="cpu", n_threads=1, n_ctx=256)
except Exception as error:
    print(json.dumps({"error": str(error)}))
else:
    text = model.generate(sys.argv[2], max_tokens=int(sys.argv[3]), temp=0.0, repeat_penalty=1.0)
    print(json.dumps({"text": text}))
"""


@has("gpt4all", "xllamacpp")
@pytest.mark.parametrize("quant", ["f16", "q4_0"])
def test_gpt4all_writes_what_llamacpp_writes(stories: Path, tmp_path: Path, quant: Quant) -> None:
    """Greedy, 48 tokens, the same text; GPT4All's llama.cpp is two years older than ours."""
    out = tmp_path / "stories.gguf"
    convert(open_model(stories), out, quant=quant)
    with LlamaCpp(out, context=256, gpu_layers=0, threads=1) as llama:
        body = {"prompt": ONCE, "n_predict": 48, "samplers": ["top_k"], "top_k": 1, "temperature": 0.0}
        expected = llama._process.ask("/completion", body)["content"]
    assert len(expected) > 80
    assert told_by(GPT4ALL, out, ONCE, "48") == {"text": expected}


@has("gpt4all")
def test_gpt4all_refuses_what_we_say_it_refuses(assets: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    sizes = {"vocab_size": 151_936, "tie_word_embeddings": True, "num_hidden_layers": 1}
    folder = make_llama(architecture="Qwen3", tokenizer=assets / "tokenizers" / "qwen2", **sizes)
    out = tmp_path / "random.gguf"
    convert(open_model(folder), out, quant="f16")
    assert "qwen3" not in GPT4ALL_ARCHITECTURES
    assert "Unsupported model architecture: qwen3" in told_by(GPT4ALL, out, "Hello", "2")["error"]


# -- MLX ----------------------------------------------------------------------------------------------------------

THETA = 300.0
"""A rotation that neither library takes by default, and that tells even near positions apart."""

MLX = """
import json, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import load
from mlx_lm.generate import generate_step
told = []
for folder in sys.argv[2:]:
    model, tokenizer = load(folder)
    prompt = mx.array(json.loads(sys.argv[1]))
    steps = generate_step(prompt, model, max_tokens=16, sampler=lambda scores: mx.argmax(scores, axis=-1))
    told.append([int(token) for token, _ in steps])
print(json.dumps(told))
"""


@has("mlx", "mlx_lm")
def test_mlx_continues_a_merged_model_as_transformers_does(
    stories: Path, full_adapter: Path, make_llama: LlamaMaker, tmp_path: Path
) -> None:
    """Greedy, float32. MLX reads the rotation from keys that transformers 5 does not write; the merge does."""
    import transformers

    prompt = [1, 403, 407, 261, 378]
    folders = [tmp_path / "story"]
    merge(stories, full_adapter, folders[0], tokenizer=stories, dtype=None)
    for architecture in ("Llama", "Qwen2"):
        base = make_llama(
            f"base-{architecture}",
            architecture=architecture,
            tokenizer=stories,
            vocab_size=512,
            rope_parameters={"rope_theta": THETA, "rope_type": "default"},
        )
        assert "rope_theta" not in json.loads((base / "config.json").read_text())
        adapter = save_adapter(base, tmp_path / f"adapter-{architecture}")
        folders.append(tmp_path / architecture)
        merge(base, adapter, folders[-1], tokenizer=stories, dtype=None)
    expected = []
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        written = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        expected.append(written[0, len(prompt) :].tolist())
    assert told_by(MLX, json.dumps(prompt), *folders) == expected
