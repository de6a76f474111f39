"""GGUF: the file format of llama.cpp and of what is built on it (Ollama, LM Studio)."""

from finetune.export.gguf.convert import GgufReport, convert
from finetune.export.gguf.encode import Quant

__all__ = ["GgufReport", "Quant", "convert"]
