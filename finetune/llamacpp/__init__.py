"""Running a GGUF file in llama.cpp."""

from finetune.llamacpp.client import LlamaCpp, Message

__all__ = ["LlamaCpp", "Message"]
