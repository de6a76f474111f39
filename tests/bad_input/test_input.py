"""Wrong input through the real command: one error with its place, one hint, exit code 2, and nothing heavy loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Refused

# -- the config ---------------------------------------------------------------------------------------------------


def test_missing_config(folder: Path, refused: Refused) -> None:
    assert refused("train", "d.yaml") == "d.yaml: no such file | did you mean c.yaml?"


def test_a_config_that_is_a_folder(folder: Path, refused: Refused) -> None:
    assert refused("train", "base/") == "base: this is a folder, not a config | try one of base/*.yaml"


def test_a_config_that_is_data(folder: Path, refused: Refused) -> None:
    assert refused("train", "rows.jsonl") == (
        "rows.jsonl: this is data, not a config | `ft init --data rows.jsonl` writes a config for it"
    )


def test_a_config_that_is_no_yaml(folder: Path, refused: Refused) -> None:
    (folder / "bad.yaml").write_text("base: ./base\ndata: [{path: rows.jsonl}\nlora: {}\n")
    assert refused("check", "bad.yaml") == (
        "bad.yaml:3: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<scalar>' | check the "
        "indentation, the quotes and the colons around that line"
    )


def test_a_config_that_is_binary(folder: Path, refused: Refused) -> None:
    (folder / "bad.yaml").write_bytes(bytes(range(256)) * 20)
    assert refused("check", "bad.yaml") == "bad.yaml: not a text file in UTF-8 | a config is a YAML text file"


def test_an_unknown_key(folder: Path, refused: Refused) -> None:
    with open(folder / "c.yaml", "a") as file:
        file.write("lora: {rnak: 32}\n")
    assert refused("train", "c.yaml") == "c.yaml:5: lora.rnak: unknown key | did you mean `rank`?"


def test_an_unknown_key_on_the_command_line(folder: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "lora.rnak=32") == (
        "-s lora.rnak: lora.rnak: unknown key | did you mean `rank`?"
    )


def test_a_key_that_moves_the_cursor(folder: Path, refused: Refused) -> None:
    with open(folder / "c.yaml", "a") as file:
        file.write('"\\e[2K\\nerror: none": 1\n')
    assert refused("check", "c.yaml").startswith("c.yaml:5: \\x1b[2K\\nerror: none: unknown key | known here: ")


# -- the data -----------------------------------------------------------------------------------------------------


def test_missing_data(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").rename(folder / "rows2.jsonl")
    assert refused("train", "c.yaml") == "c.yaml:4: data.0.path: no such file: rows.jsonl | did you mean rows2.jsonl?"


def test_a_malformed_line(stories: Path, refused: Refused) -> None:
    lines = ['{"question": "Why?", "answer": "So."}'] * 1200
    lines[999] = '{"question": "Why?", "answer": So.}'
    (stories / "rows.jsonl").write_text("\n".join(lines))
    assert refused("train", "c.yaml") == (
        "rows.jsonl:1000: not valid JSON: expecting value (column 32) | each line must be one JSON object"
    )


def test_a_row_without_its_field(stories: Path, refused: Refused) -> None:
    lines = ['{"question": "Why?", "answer": "So."}'] * 1200
    lines[999] = '{"question": "Why?", "anwser": "So."}'
    (stories / "rows.jsonl").write_text("\n".join(lines))
    assert refused("train", "c.yaml") == ("rows.jsonl:1000: has no field 'answer' | its fields are: question, anwser")


def test_rows_of_no_known_format(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").write_text('{"ask": "Why?", "reply": "So."}\n')
    assert refused("check", "c.yaml") == (
        "rows.jsonl:1: of no known format: its columns are ask, reply | rename them with `columns:`, for instance "
        "columns: {prompt: question, completion: answer}"
    )


@pytest.mark.parametrize("command", ["check", "train"])
def test_an_empty_dataset(folder: Path, refused: Refused, command: str) -> None:
    (folder / "rows.jsonl").write_text("")
    assert refused(command, "c.yaml") == "rows.jsonl: there are no rows in it | a dataset needs at least two rows"


def test_overlong_rows(stories: Path, refused: Refused) -> None:
    with open(stories / "rows.jsonl", "a") as file:
        file.write('{"question": "Why?", "answer": "' + "a" * 3000 + '"}\n')
    assert refused("train", "c.yaml", "-s", "evaluation.split=0") == (
        "rows.jsonl:21: 1 of 21 rows are longer than train.sequence_length 2,048; the first is here, the longest has "
        "3,034 tokens (rows.jsonl:21) | raise train.sequence_length to 3034, or set in data `on_overlong: truncate` "
        "(loses 983 tokens with loss, 0 rows whole), `on_overlong: split` (loses 3,001) or `on_overlong: drop` (loses "
        "3,001 in 1 rows)"
    )


def test_a_split_that_leaves_nothing(stories: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "evaluation.split=20") == (
        "evaluation.split: would hold out 20 of 20 rows, which leaves none to train on | give more rows, hold out "
        "fewer, or set it to 0, which evaluates nothing"
    )


# -- the base -----------------------------------------------------------------------------------------------------


def test_a_base_that_does_not_exist(folder: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "base=./bsae") == (
        "-s base: base: no such folder: bsae | name a model folder, or a Hub id: owner/name"
    )


def test_a_base_without_a_config(folder: Path, refused: Refused) -> None:
    (folder / "base" / "config.json").unlink()
    assert refused("train", "c.yaml") == (
        "c.yaml:1: base: no config.json in base | a model folder has config.json and weights"
    )


def test_a_base_without_a_tokenizer(folder: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml") == (
        "base: there is no tokenizer.json | save the tokenizer with a current transformers "
        "(`AutoTokenizer…save_pretrained`), which writes one"
    )


def test_a_base_that_is_nowhere_near(folder: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "base=nobody/nothing") == (
        "nobody/nothing: is not in the local cache and the Hub cannot be reached | connect to the network once, or set "
        "`base:` to a local folder"
    )


def test_a_base_without_a_chat_template(stories: Path, refused: Refused) -> None:
    (stories / "c.yaml").write_text("base: ./base\ndata:\n  - path: rows.jsonl\n")
    assert refused("data", "c.yaml") == (
        "base: the base has no chat template | add `chat_template: plain` to the config (chatml needs tokens that this "
        "base does not have)"
    )


def test_chatml_for_a_base_without_its_tokens(stories: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "chat_template=chatml") == (
        "base: chat_template: chatml needs the tokens <|im_start|> and <|im_end|>, which this base does not have | use "
        "`chat_template: plain`"
    )


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_lora_target_that_does_not_exist(stories: Path, refused: Refused, command: str) -> None:
    assert refused(command, "c.yaml", "-s", "lora.targets=[q_proj, w_proj]") == (
        "-s lora.targets: lora.targets: the base has no layer named w_proj | did you mean v_proj? "
        "it has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_a_template_that_fails(stories: Path, refused: Refused) -> None:
    (stories / "t.jinja").write_text("{{ messages[0].content }}{{ range(10 ** 9) }}</s>")
    assert refused("data", "c.yaml", "-s", "chat_template=t.jinja").startswith(
        "rows.jsonl:1: the chat template (t.jinja) refuses this conversation: Range too big."
    )


def test_a_template_that_is_none(stories: Path, refused: Refused) -> None:
    (stories / "t.jinja").write_text("{{ messages\n}")
    assert refused("data", "c.yaml", "-s", "chat_template=t.jinja").startswith(
        "t.jinja:2: the chat template is not valid Jinja: "
    )


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "export"])
def test_a_run_that_does_not_exist(folder: Path, refused: Refused, command: str) -> None:
    (folder / "runs" / "legal").mkdir(parents=True)
    assert refused(command, "leagl") == "leagl: no such run | did you mean runs/legal?"


def test_a_run_without_an_adapter(folder: Path, refused: Refused) -> None:
    (folder / "runs" / "legal").mkdir(parents=True)
    (folder / "runs" / "legal" / "manifest.json").write_text('{"state": "failed", "config_path": "legal.yaml"}')
    assert refused("export", "legal") == (
        "runs/legal: this run has no trained adapter yet | `ft train legal.yaml` goes on with it"
    )


# -- the others ---------------------------------------------------------------------------------------------------


def test_init_over_a_file(folder: Path, refused: Refused) -> None:
    assert refused("init", "c.yaml") == "c.yaml: this file exists | name another file, or remove this one"


def test_init_with_data_that_is_not_there(folder: Path, refused: Refused) -> None:
    assert refused("init", "new.yaml", "--data", "row.jsonl") == (
        "row.jsonl: no such data file | known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, "
        ".zst)"
    )
    assert not (folder / "new.yaml").exists()


def test_init_with_a_folder_without_data(folder: Path, refused: Refused) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a")
    assert refused("init", "new.yaml", "--data", "texts") == (
        "texts: no data file is in this folder | known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also "
        "packed: .gz, .zst)"
    )


def test_an_archive_that_breaks_off(folder: Path, refused: Refused) -> None:
    import gzip

    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes())[:-9])
    assert refused("check", "c.yaml", "-s", "data.0.path=rows.jsonl.gz") == (
        "rows.jsonl.gz: the archive breaks off before its end | copy or download it again; what it held may be "
        "incomplete"
    )


def test_a_bad_row_in_one_of_several_files(folder: Path, refused: Refused) -> None:
    (folder / "more.csv").write_text("question,answer\nWhy?\n")
    assert refused("check", "c.yaml", "-s", "data.0.path=./*.[cj]s[vo]*") == (
        "more.csv:2: has 1 cells where the header has 2 | a cell with a comma or a line break in it must stand in "
        '"quotes"'
    )


def test_init_with_a_base_that_is_not_there(folder: Path, refused: Refused) -> None:
    assert refused("init", "new.yaml", "--base", "./bsae") == (
        "./bsae: no such folder | name a model folder, or a Hub id: owner/name"
    )


def test_explain_an_unknown_key(folder: Path, refused: Refused) -> None:
    assert refused("config", "explain", "lora.rnk") == "there is no key 'lora.rnk' | did you mean `lora.rank`?"


def test_a_row_to_show_that_does_not_exist(stories: Path, refused: Refused) -> None:
    assert refused("data", "c.yaml", "--row", "99") == (
        "--row 99: there is no such row to train on | name one from 1 to 19"
    )
