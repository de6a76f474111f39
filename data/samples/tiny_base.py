"""Pre-trains the quickstart base: a byte-level BPE tokenizer and a Llama small enough for two CPU cores."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretraining_text import Document

if TYPE_CHECKING:
    import torch

QWEN2_PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split of Qwen2's tokenizer.json, letter for letter: llama.cpp knows pre-tokenizers by name, not by pattern."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 1536
CONTEXT = 512
BLOCK = 160
BATCH = 16


def render(document: Document) -> str:
    """A document as the model sees it: a conversation in ChatML, and the end of text behind everything."""
    if isinstance(document, str):
        return document + "<|endoftext|>"
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in document) + "<|endoftext|>"


def train_tokenizer(documents: list[Document]) -> Any:
    """A byte-level BPE with Qwen2's normaliser and split; any byte sequence that is text survives it."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = [d if isinstance(d, str) else "\n".join(m["role"] + "\n" + m["content"] for m in d) for d in documents]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """A Llama whose rows are 256 wide, so that nf4 blocks and llama.cpp's k-quants both fit without a remainder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assert len(tokenizer) == VOCABULARY, len(tokenizer)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def blocks(documents: list[Document], tokenizer: Any) -> torch.Tensor:
    """All documents end to end, cut into rows of `BLOCK` tokens."""
    import torch

    rows = tokenizer([render(document) for document in documents])["input_ids"]
    flat = torch.tensor([token for row in rows for token in row])
    return flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)


def pretrain(model: Any, rows: torch.Tensor, seed: int, learning_rate: float = 3e-3) -> float:
    """One pass over the rows with AdamW and a cosine schedule; the mean loss of the last 50 steps."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    steps, warmup, started = len(rows) // BATCH, 100, time.monotonic()
    losses: list[float] = []
    for step in range(steps):
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = learning_rate * min((step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", file=sys.stderr, flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights in bfloat16 beside the tokenizer and the settings for greedy generation."""
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(written, indent=2) + "\n")
