"""What runtimes want to read beside a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import ExportError


def modelfile(
    gguf: str, *, stop: Sequence[str] = (), system: str | None = None, license_text: str | None = None
) -> str:
    """The Modelfile that makes an Ollama model of a GGUF file in the same folder.

    gguf          the file's name
    stop          the tokens that end an answer, as text
    system        a system prompt for conversations that bring none
    license_text  the licence of the merged model; leave it out where it is not known

    The chat template is not repeated here: Ollama takes it from the GGUF file if it knows it. Format:
    https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Raises ExportError for text it cannot hold.
    """
    lines = [f"FROM ./{gguf}"]
    lines += [f"PARAMETER stop {_quoted(token)}" for token in stop]
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    if license_text:
        lines.append(f"LICENSE {_quoted(license_text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A value in quotation marks. The format has no escapes: what stands between the marks is taken as it is."""
    if '"""' in text or text.endswith('"'):
        raise ExportError(f"a Modelfile cannot hold this text: {text[:60]!r}", hint='avoid """ and a closing "')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
