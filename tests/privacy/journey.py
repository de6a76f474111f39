"""A whole life of a run in one process, as the tests of this folder need it: `python journey.py STEPS OUTCOMES`.

STEPS is a JSON list of command lines, `["ft", ...]`, and of `["copy", FROM, TO]`, which keeps a state. OUTCOMES gets a
list of what came of each command: its exit code and what it wrote. Importing torch once instead of eight times is what
makes this affordable.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path


def run(arguments: list[str]) -> dict[str, object]:
    from finetune import cli
    from finetune.console import Console

    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    code: object = 0
    sys.argv = arguments
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        cli.console = Console()  # it holds on to the streams that are there when it is made
        try:
            cli.main()
        except SystemExit as left:
            code = left.code or 0
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return {"arguments": arguments, "code": code, "stdout": texts[0], "stderr": texts[1]}


def main() -> None:
    outcomes = []
    for step in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        if step[0] == "copy":
            shutil.copytree(step[1], step[2])
        else:
            outcomes.append(run(step))
    Path(OUTCOMES).write_text(json.dumps(outcomes), "utf-8")


if __name__ == "__main__":
    OUTCOMES = sys.argv[2]
    main()
