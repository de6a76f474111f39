"""Running a GGUF file in llama.cpp."""

from finetune.serve.llamacpp.client import LlamaCpp, Message

__all__ = ["LlamaCpp", "Message"]
