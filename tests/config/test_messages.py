"""Golden messages: what a person reads when a config is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import GOOD, Faults

ENDINGS = "known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, .zst)"


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        # Unknown keys and the nearest valid name.
        ("lora: {rnak: 3}", "lora.rnak: unknown key | did you mean `rank`?"),
        ("trian: {}", "trian: unknown key | did you mean `train`?"),
        ("rank: 3", "rank: unknown key | did you mean `lora.rank`?"),
        ("train: {rank: 3}", "train.rank: unknown key | did you mean `lora.rank`?"),
        ("lora: {xyzzy: 3}", "lora.xyzzy: unknown key | known here: rank, alpha, dropout, targets"),
        ("lora: {1: 3}", "lora.1: unknown key | known here: rank, alpha, dropout, targets"),
        # Wrong types.
        (
            "lora: {rank: high}",
            "lora.rank: expected a whole number, got 'high' | `ft config explain lora.rank` says more",
        ),
        ("lora: {rank: '16'}", "lora.rank: expected a whole number, got '16' | write the number without quotes"),
        ("lora: {rank: 1.5}", "lora.rank: expected a whole number, got 1.5 | `ft config explain lora.rank` says more"),
        (
            "lora: {rank: true}",
            "lora.rank: expected a whole number, got true | `ft config explain lora.rank` says more",
        ),
        ("lora: {rank: }", "lora.rank: expected a whole number, got nothing | `ft config explain lora.rank` says more"),
        (
            "train: {epochs: 1:30}",
            "train.epochs: expected a number, got '1:30' | `ft config explain train.epochs` says more",
        ),
        ("train: {packing: no}", "train.packing: expected true or false, got 'no' | write false"),
        ("train: {packing: on}", "train.packing: expected true or false, got 'on' | write true"),
        ("revision: 1.0", "revision: expected text, got 1.0 | write it in quotes, so that it is text"),
        (
            "lora: 16",
            "lora: expected a mapping (`key: value` lines), got 16 | `ft config explain lora` says more",
        ),
        (
            "lora: {targets: q_proj}",
            "lora.targets: expected all-linear or a list of module names, got 'q_proj' | for instance [q_proj, v_proj]",
        ),
        (
            "lora: {targets: [1]}",
            "lora.targets: expected all-linear or a list of module names, got a list | for instance [q_proj, v_proj]",
        ),
        (
            "quantization: nf5",
            "quantization: expected nf4, int8 or none, got 'nf5' | did you mean `nf4`?",
        ),
        # Values out of range.
        ("lora: {rank: 0}", "lora.rank: must be at least 1, got 0 | `ft config explain lora.rank` says more"),
        (
            "lora: {rank: 1e400}",
            "lora.rank: expected a whole number, got inf | `ft config explain lora.rank` says more",
        ),
        ("lora: {dropout: 1}", "lora.dropout: must be less than 1, got 1 | `ft config explain lora.dropout` says more"),
        (
            "train: {epochs: 0}",
            "train.epochs: must be more than 0, got 0 | `ft config explain train.epochs` says more",
        ),
        (
            "evaluation: {samples: 51}",
            "evaluation.samples: must be at most 50, got 51 | `ft config explain evaluation.samples` says more",
        ),
        (
            "train: {learning_rate: .NaN}",
            "train.learning_rate: must be a finite number, got nan | `ft config explain train.learning_rate` says more",
        ),
        (
            "evaluation: {split: 2.5}",
            "evaluation.split: must be a fraction below 1 or a whole number of rows, got 2.5 | "
            "`ft config explain evaluation.split` says more",
        ),
        # Keys without effect.
        (
            "train: {max_steps: 3, epochs: 1}",
            "train.epochs has no effect: train.max_steps decides when training ends | remove `epochs`",
        ),
        (
            "revision: main",
            "revision has no effect: base is a local folder, which has no revisions | remove `revision`",
        ),
        (
            "evaluation: {split: 0, every: 5}",
            "evaluation.every has no effect: evaluation.split is 0, so nothing is evaluated | remove `every`",
        ),
        (
            "evaluation: {format: text}",
            "evaluation.format has no effect: there is no evaluation.path for it to describe | remove `format`",
        ),
        # Given twice.
        ("base: x", "base: given twice (first on line 1) | remove one; only one can count"),
        ("train: {seed: 1, seed: 1}", "train.seed: given twice (first on line 4) | remove one; only one can count"),
        # Names of files and models.
        (
            "chat_template: chatlm",
            "chat_template: expected chatml, plain or a .jinja file, got 'chatlm' | chatml suits a base that was never "
            "tuned to chat",
        ),
    ],
)
def test_one_fault(faults: Faults, extra: str, fault: str) -> None:
    assert faults(f"{GOOD}{extra}\n") == [f"c.yaml:4: {fault}"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "base: ./nomodel\ndata: [{path: rows.jsonl}]\n",
            "c.yaml:1: base: no such folder: {here}/nomodel | name a model folder, or a Hub id: owner/name",
        ),
        (
            "base: .\ndata: [{path: rows.jsonl}]\n",
            "c.yaml:1: base: no config.json in {here} | a model folder has config.json and weights",
        ),
        (
            "base: a/b/c\ndata: [{path: rows.jsonl}]\n",
            "c.yaml:1: base: neither a folder nor a model id: 'a/b/c' | a Hub id is owner/name",
        ),
        (
            "base: a--b\ndata: [{path: rows.jsonl}]\n",
            "c.yaml:1: base: neither a folder nor a model id: 'a--b' | a Hub id is owner/name",
        ),
        (
            "base: ./base\ndata: [{path: row.jsonl}]\n",
            "c.yaml:2: data.0.path: no such file: {here}/row.jsonl | did you mean rows.jsonl?",
        ),
        (
            "base: ./base\ndata:\n - path: far/away.csv\n",
            "c.yaml:3: data.0.path: no such file: {here}/far/away.csv | paths are relative to the YAML file they are "
            "written in",
        ),
        (
            "base: ./base\ndata: [{path: ~nobody-of-that-name/x.csv}]\n",
            "c.yaml:2: data.0.path: no such file: {here}/~nobody-of-that-name/x.csv | paths are relative to the YAML "
            "file they are written in",
        ),
        (
            "base: ./base\ndata: [{path: empty}]\n",
            "c.yaml:2: data.0.path: {here}/empty: no data file is in this folder | " + ENDINGS,
        ),
        (
            "base: ./base\ndata: [{path: 'row*.json'}]\n",
            "c.yaml:2: data.0.path: {here}/row*.json: no file matches this pattern | `*` stands for a part of a name, "
            "`**` for any folders; hidden files are left out",
        ),
        (
            "base: ./base\ndata: [{path: '?.yaml'}]\n",
            "c.yaml:2: data.0.path: {here}/?.yaml: no data file matches | " + ENDINGS,
        ),
        (
            "base: ./base\ndata: [{path: row.csv.gz}]\n",
            "c.yaml:2: data.0.path: no such file: {here}/row.csv.gz | paths are relative to the YAML file they are "
            "written in",
        ),
        (
            "base: ./base\ndata: [{path: rows.tar.zst}]\n",
            "c.yaml:2: data.0.path: rows.tar.zst is of no known kind | " + ENDINGS,
        ),
        (
            "base: ./base\ndata: [{path: c.yaml}]\n",
            "c.yaml:2: data.0.path: c.yaml is of no known kind | " + ENDINGS,
        ),
        (
            "base: ./base\ndata: [{path: a b c}]\n",
            "c.yaml:2: data.0.path: neither a file nor a dataset id: 'a b c' | a file ends in .jsonl, .json, .csv, "
            ".tsv, .parquet, .arrow; a Hub id is owner/name",
        ),
        (
            "base: ./base\ndata: rows.jsonl\n",
            "c.yaml:2: data: expected a list (lines that begin with `-`), got 'rows.jsonl' | `ft config explain data` "
            "says more",
        ),
        ("base: ./base\ndata: []\n", "c.yaml:2: data: must not be empty | `ft config explain data` says more"),
        (
            "base: ./base\ndata: [rows.jsonl]\n",
            "c.yaml:2: data.0: expected a mapping (`key: value` lines), got 'rows.jsonl' | `ft config explain data` "
            "says more",
        ),
        ("base: ./base\n", "c.yaml: data is missing | for instance `data: [{path: my-data.jsonl}]`"),
        (
            "data: [{path: rows.jsonl}]\n",
            "c.yaml: base is missing | for instance `base: meta-llama/Llama-3.2-3B-Instruct`",
        ),
        (
            "base: ./base\ndata:\n  - format: text\n",
            "c.yaml:3: data.0.path is missing | see `ft config explain data.path`",
        ),
        (
            "base: ./base\ndata: [{path: rows.jsonl, split: test}]\n",
            "c.yaml:2: data.0.split has no effect: path is a file; only Hub datasets have this | remove `split`",
        ),
    ],
)
def test_what_is_named(faults: Faults, folder: Path, text: str, fault: str) -> None:
    (folder / "empty").mkdir()
    (folder / "rows.tar.zst").touch()
    assert faults(text) == [fault.replace("{here}", str(folder))]


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "x/" * 3000 + "a.jsonl"])
def test_a_name_too_long_to_exist(faults: Faults, name: str) -> None:
    assert "c.yaml:2: data.0.path: no such file: " in faults(f"base: ./base\ndata: [{{path: {name}}}]\n")[0]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("lora.rnak=3", "-s lora.rnak: lora.rnak: unknown key | did you mean `rank`?"),
        ("lroa.rank=3", "-s lroa.rank: lroa: unknown key | did you mean `lora`?"),
        ("rank=3", "-s rank: rank: unknown key | did you mean `lora.rank`?"),
        ("lora.rank=x", "-s lora.rank: lora.rank: expected a whole number, got 'x'"),
        ("lora.rank", "-s lora.rank: expected KEY=VALUE | for instance -s lora.rank=32"),
        ("=3", "-s =3: expected KEY=VALUE | for instance -s lora.rank=32"),
        ("lora.rank=[", "-s lora.rank: '[' is not a YAML value | quote it, or write a list as [a, b]"),
        ("lora={rnak: 3}", "-s lora: lora.rnak: unknown key | did you mean `rank`?"),
        ("data.7.path=x.jsonl", "-s data.7.path: data.7: there is no such key | see `ft config explain`"),
        ("data.path=x.jsonl", "-s data.path: data.path: there is no such key | see `ft config explain`"),
        ("base.x.y=1", "-s base.x.y: base.x: there is no such key | see `ft config explain`"),
        ("extends=x.yaml", "-s extends: extends: can only stand in a file | write it into the config"),
        ("train.max_steps=3", "-s train.max_steps: train.epochs"),
        (
            "evaluation={split: 0, every: 3}",
            "-s evaluation: evaluation.every has no effect: evaluation.split is 0, so nothing is evaluated | remove "
            "`every`",
        ),
        ("evaluation.path=none.jsonl", "-s evaluation.path: evaluation.path: no such file: "),
    ],
)
def test_one_wrong_override(faults: Faults, override: str, fault: str) -> None:
    if override == "train.max_steps=3":
        found = faults(f"{GOOD}train: {{epochs: 2}}\n", override)
        assert found[0].startswith("c.yaml:4: train.epochs has no effect: train.max_steps decides")
        return
    found = faults(GOOD, override)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_all_faults_of_a_file_are_reported_at_once_in_its_order(faults: Faults, folder: Path) -> None:
    text = """\
base: ./nomodel
data:
  - {path: row.jsonl, path: rows.jsonl, splt: train}
  - {path: rows.jsonl, on_overlong: cut}
  - {path: x y z}
revision: abc
lora: {rank: '16', alpha: 32, <<: {}}
train: {learning_rate: 1e-4, packing: no, max_steps: 5, epochs: 3}
evaluation: {format: text}
quantisation: nf4
"""
    assert [fault.partition(" | ")[0] for fault in faults(text)] == [
        f"c.yaml:1: base: no such folder: {folder}/nomodel",
        "c.yaml:3: data.0.path: given twice (first on line 3)",
        "c.yaml:3: data.0.splt: unknown key",
        f"c.yaml:3: data.0.path: no such file: {folder}/row.jsonl",
        "c.yaml:4: data.1.on_overlong: expected error, truncate, split or drop, got 'cut'",
        "c.yaml:5: data.2.path: neither a file nor a dataset id: 'x y z'",
        "c.yaml:6: revision has no effect: base is a local folder, which has no revisions",
        "c.yaml:7: merge keys (<<) are not supported",
        "c.yaml:7: lora.rank: expected a whole number, got '16'",
        "c.yaml:8: train.packing: expected true or false, got 'no'",
        "c.yaml: … and 2 more",
    ]
    few = text.replace("lora: {rank: '16', alpha: 32, <<: {}}\n", "")
    assert [fault.partition(" | ")[0] for fault in faults(few)][8:] == [
        "c.yaml:8: evaluation.format has no effect: there is no evaluation.path for it to describe",
        "c.yaml:9: quantisation: unknown key",
    ]


def test_faults_of_a_section_do_not_invent_others(faults: Faults) -> None:
    """With evaluation.path of the wrong type, evaluation.format is not without effect: nobody knows yet."""
    assert len(faults(f"{GOOD}evaluation: {{path: 3, format: text}}\n")) == 1
    assert len(faults("base: 3\nrevision: abc\ndata: [{path: rows.jsonl}]\n")) == 1
    assert len(faults("data: [{path: rows.jsonl}]\nrevision: abc\n")) == 1


def test_a_missing_config_names_its_neighbours(faults: Faults, folder: Path) -> None:
    from finetune.config.load import load
    from finetune.errors import ConfigError

    (folder / "legal-llama3-8b.yaml").write_text(GOOD)
    for name, hint in (
        ("legal-llama-8b.yaml", "did you mean legal-llama3-8b.yaml?"),
        ("zzz.yaml", "`ft init` writes a new config; here are legal-llama3-8b.yaml"),
        ("nowhere/zzz.yaml", "check the path; `ft init` writes a new config"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(Path(name))
        assert str(caught.value) == f"{name}: no such file"
        assert caught.value.problems[0].hint == hint
