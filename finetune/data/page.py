"""`ft data --html`: the same as one page, to look at in peace or to show to whoever knows the data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from finetune.config.schema import Config
from finetune.data.inspect import Segment, binned, segments, visible
from finetune.data.prepare import PreparedData
from finetune.data.store import TokenRow
from finetune.runs.files import write_text

# Nothing is fetched and nothing runs: the page holds private text, and what is in it came from somebody's data.
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .8rem; border-radius: .4rem; }}
b {{ background: #cdeccf; font-weight: normal; }}
i {{ color: #8a5a00; font-style: normal; }}
table {{ border-collapse: collapse; }}
td {{ padding: 0 .6rem 0 0; text-align: right; white-space: nowrap; }}
td.bar {{ width: 100%; text-align: left; }}
td.bar span {{ display: inline-block; height: .8em; background: #6aa6c8; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #e6e6e6; background: #17181a; }} pre {{ background: #222428; }}
  b {{ background: #1f4d2b; }} i {{ color: #e0a94a; }}
}}
</style>
"""


def write_page(
    path: Path, data: PreparedData, config: Config, rows: Sequence[tuple[int, TokenRow]], account: Sequence[str]
) -> None:
    """Write the page: the account of the data, how long its rows are, and these (number, row)."""
    names = ", ".join(data.accounting.formats)
    parts = [
        _HEAD.format(title=escape(f"Data of {config.base}: {names}")),
        f"<h1>{escape(names)}</h1>\n<p>As {escape(config.base)} will see it.</p>\n<pre>",
        escape("\n".join(account)),
        "</pre>\n<h2>Tokens per row</h2>\n",
        _histogram(data.train.lengths.tolist()),
        "<h2>Rows</h2>\n<p><b>With loss</b>: what the model learns to write. <i>Special tokens</i>.</p>\n",
    ]
    for number, row in rows:
        supervised = int(row.supervised.sum())
        parts.append(
            f"<h3>Row {number:,}</h3>\n<p>{escape(row.place)}: {len(row.ids):,} tokens, {supervised:,} with loss</p>\n"
        )
        parts.append(f"<pre>{''.join(map(_marked, segments(data, row)))}</pre>\n")
    write_text(path, "".join(parts))


def _marked(part: Segment) -> str:
    text = escape(visible(part.text))
    text = f"<i>{text}</i>" if part.special else text
    return f"<b>{text}</b>" if part.loss else text


def _histogram(lengths: Sequence[int]) -> str:
    bars = binned(lengths)
    highest = max(count for _, _, count in bars)
    lines = [
        f"<tr><td>{low:,}–{high:,}</td><td>{count:,}</td>"
        f'<td class="bar"><span style="width: {100 * count / highest:.1f}%"></span></td></tr>'
        for low, high, count in bars
    ]
    return "<table>\n" + "\n".join(lines) + "\n</table>\n"
