"""Real models and real data, from YAML to GGUF: what the product promises, on what it promises it for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from finetune.config.load import load
from finetune.console import Console
from finetune.delivery import Wishes, export
from finetune.pipeline import train as run_pipeline
from finetune.runs.folder import RunFolder
from tests.export.probes import PROBES
from tests.train.conftest import random_qwen2


@pytest.fixture(scope="module")
def medical_run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The real stories260K, tuned in nf4 on 400 rows of MedQuAD, exported to an exact GGUF."""
    folder = tmp_path_factory.mktemp("medical")
    rows = (assets / "data" / "medquad" / "medquad.jsonl").read_text("utf-8").splitlines()
    chosen = random.Random(0).sample(rows, 400)
    (folder / "medquad-400.jsonl").write_text("\n".join(chosen) + "\n", "utf-8")
    config = {
        "base": str(assets / "models" / "stories260K"),
        "chat_template": "plain",
        "data": [{"path": "medquad-400.jsonl", "on_overlong": "truncate"}],
        "evaluation": {"split": 40, "samples": 1, "max_new_tokens": 24},
        "train": {
            "max_steps": 12,
            "learning_rate": 5e-3,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "sequence_length": 512,
        },
    }
    path = folder / "medical.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    run = run_pipeline(path, [], folder / "runs", Console(), fresh=False).run
    export(run, "hf", [], Wishes(), Console())
    export(run, "gguf", ["f32"], Wishes(), Console())
    return run


def test_held_out_loss_falls(medical_run: RunFolder) -> None:
    scores = json.loads(medical_run.evaluation.read_text("utf-8"))
    assert scores["rows"] == 40
    # Measured over three seeds: from 4.6 to about 3.1. Half a nat is what no noise explains.
    assert scores["tuned"]["loss"] < scores["base"]["loss"] - 0.5


def test_the_merged_model_equals_base_plus_adapter(medical_run: RunFolder) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(load(medical_run.resolved).config.base, dtype=torch.float32)
    ids = torch.arange(3, 200).reshape(1, -1)
    with torch.no_grad():
        before = base(ids).logits.clone()
        adapted = PeftModel.from_pretrained(base, str(medical_run.adapter)).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(medical_run.merged, dtype=torch.float32).eval()(ids).logits
    assert (adapted - before).abs().max() > 0.5, "the adapter changes nothing, so this test would prove nothing"
    # The same sum in another order, in fp32 over rows of 64 to 172: 1e-4 is about a hundred roundings of the logits.
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


def test_the_gguf_has_the_tokens_of_the_tokenizer_and_says_what_the_model_says(medical_run: RunFolder) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from finetune.llamacpp import LlamaCpp

    tokenizer = Tokenizer.from_file(str(medical_run.adapter / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(medical_run.merged, dtype=torch.float32).eval()
    prompt = tokenizer.encode("### User:\nWhat is (are) Porphyria ?\n\n### Assistant:\n").ids
    with torch.inference_mode():
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    assert len(written) == 48
    assert len(PROBES) >= 60
    path = next(medical_run.gguf.glob("*.gguf"))
    with LlamaCpp(path, context=512) as runtime:
        for text in PROBES:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert runtime.tokenize(text) == ids, text
        assert runtime.generate_ids(prompt, 48) == written


def test_the_modelfile_stops_where_the_template_stops(medical_run: RunFolder) -> None:
    text = (medical_run.gguf / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./")
    assert 'PARAMETER stop "</s>"' in text


def test_chat_answers_from_the_gguf_and_from_the_adapter(medical_run: RunFolder) -> None:
    answers = {}
    for using in ("gguf", "adapter"):
        command = [sys.executable, "-m", "finetune.cli", "chat", str(medical_run.path), "--using", using]
        command += ["--prompt", "What is (are) Porphyria ?", "--max-tokens", "12"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        answers[using] = done.stdout.strip()
    assert all(answers.values())


def test_a_qwen2_base_with_the_real_tokenizer_trains(assets: Path, tmp_path: Path) -> None:
    base = random_qwen2(tmp_path / "base", assets / "tokenizers" / "qwen2")
    rows = (assets / "data" / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:40]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    config = {
        "base": str(base),
        "data": [{"path": "gsm8k.jsonl"}],
        "evaluation": {"split": 4, "samples": 1, "max_new_tokens": 8},
        "train": {"max_steps": 4, "learning_rate": 5e-3, "sequence_length": 512, "gradient_accumulation_steps": 1},
    }
    (tmp_path / "maths.yaml").write_text(yaml.safe_dump(config), "utf-8")
    run = run_pipeline(tmp_path / "maths.yaml", [], tmp_path / "runs", Console(), fresh=False).run
    scores = json.loads(run.evaluation.read_text("utf-8"))
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
