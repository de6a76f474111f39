"""Configs, data and prepared data that mean harm."""

from __future__ import annotations

import base64
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from .conftest import World

ROWS = {"question": ["Where?"] * 4, "answer": ["Here.", "There.", "Then.", "Now."]}

# -- configs ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "apply": "base: !!python/object/apply:os.system ['touch canary']\n",
    "new": "base: !!python/object/new:subprocess.Popen [['touch', 'canary']]\n",
    "module": "base: !!python/module:evil_module\n",
    "name": "base: !!python/name:os.system\n",
    "tag": "base: !ENV ${HOME}\n",
    "key": "? !!python/object/apply:os.system ['touch canary']\n: 1\n",
    "merge": "<<: !!python/object/apply:os.system ['touch canary']\n",
    "extends a module": "extends: evil_module:config\n",
    "extends a url": "extends: https://evil.example/config.yaml\n",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS.keys())
def test_yaml_makes_values_and_nothing_else(world: World, content: str) -> None:
    (world.folder / "evil_module.py").write_text(world.evil_code())
    (world.folder / "evil.yaml").write_text(content)
    world.refused("train", "evil.yaml")


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}/x", "$HOME/x", "{{ env.HOME }}", "`touch canary`"],
)
def test_a_value_is_what_is_written(world: World, value: str) -> None:
    """No environment, no import paths, no shell."""
    said = world.refused("check", str(world.config("evil.yaml", base=value).name))
    assert str(world.folder.home()) not in said.replace(str(world.folder), "")
    assert world.refused("check", "c.yaml", "-s", f"train.optimizer={value}")


@pytest.mark.parametrize(
    "name",
    [
        "...yaml",
        "..yaml",
        ".yaml",
    ],
)
def test_a_config_whose_name_would_lead_out_of_the_runs(world: World, name: str) -> None:
    """A run is named after its config: `...yaml` without its ending is `..`."""
    before = {path.name for path in world.folder.iterdir()}
    world.config(name)
    world.ft("train", name)
    assert {path.name for path in world.folder.iterdir()} <= {*before, name, "output.txt", "runs"}


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("merge", "../c"),
        ("export", "runs/../../c"),
        ("eval", "/etc"),
        ("chat", "\x1b[2Kc"),
        ("train", "c\nerror: none"),
    ],
)
def test_runs_that_are_none(world: World, command: str, run: str) -> None:
    assert "\x1b" not in world.refused(command, run)


# -- data ---------------------------------------------------------------------------------------------------------


def hostile_table(world: World) -> pa.Table:
    """Rows with every kind of metadata that pyarrow or pandas once unpickled."""
    evil = world.evil_pickle()
    fields = [
        pa.field("question", pa.string()),
        pa.field(
            "answer",
            pa.string(),
            metadata={
                b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": evil,
            },
        ),
    ]
    pandas = b'{"index_columns": [], "columns": [{"name": "answer", "pandas_type": "object", "numpy_type": "object", '
    pandas += b'"metadata": {"pickle": "' + base64.b64encode(evil) + b'"}}], "attributes": {"pickled": true}}'
    schema = pa.schema(fields, metadata={b"pandas": pandas, b"huggingface": b'{"info": {"features": {"_type": "os"}}}'})
    return pa.table(ROWS, schema=schema)


def test_metadata_of_parquet_and_arrow_files_is_not_unpickled(world: World) -> None:
    table = hostile_table(world)
    pyarrow.parquet.write_table(table, world.folder / "rows.parquet")
    with pa.ipc.new_file(world.folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(world.folder / "rows-stream.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("rows.parquet", "rows.arrow", "rows-stream.arrow"):
        world.config(data=[{"path": name}])
        world.ft("check", "c.yaml")
        assert world.ft("data", "c.yaml").code == 0


def test_a_folder_of_data_with_a_loading_script(world: World) -> None:
    folder = world.folder / "mine"
    folder.mkdir()
    shutil.copy(world.folder / "rows.jsonl", folder / "rows.jsonl")
    for name in ("mine.py", "__init__.py", "dataset.py", "conftest.py"):
        (folder / name).write_text(world.evil_code(f"made-by-{name}"))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: '../../../etc/passwd'\n---\n")
    (folder / "dataset_infos.json").write_text('{"default": {"builder_name": "mine"}}')
    (folder / "rows.pkl").write_bytes(world.evil_pickle())
    world.config(data=[{"path": "mine"}])
    world.ft("data", "c.yaml")
    assert not list(world.folder.rglob("made-by-*"))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.npy", "rows.py", "rows.jsonl"])
def test_a_pickle_under_any_name(world: World, name: str) -> None:
    (world.folder / name).write_bytes(world.evil_pickle())
    world.config(data=[{"path": name}])
    world.refused("data", "c.yaml")


@pytest.mark.parametrize(
    "path", ["../../../../etc/passwd", "/etc/passwd", "a/../../b", "evil/../../../x", "/dev/zero", "owner/..", "a/b\nc"]
)
def test_paths_to_what_is_no_data(world: World, path: str) -> None:
    world.config(data=[{"path": path}])
    assert "root:" not in world.refused("data", "c.yaml")


def test_a_link_among_the_data(world: World) -> None:
    secret = world.folder / "secret.jsonl"
    secret.write_text("hunter2\n")
    (world.folder / "mine").mkdir()
    (world.folder / "mine" / "rows.jsonl").symlink_to(secret)
    world.config(data=[{"path": "mine"}])
    assert "hunter2" not in world.refused("data", "c.yaml")


# -- prepared data ------------------------------------------------------------------------------------------------


def test_a_pickle_in_prepared_data_is_not_read(world: World) -> None:
    assert world.ft("data", "c.yaml").code == 0
    (arrays,) = (world.folder / "runs" / ".data").glob("*/rows.npz")
    np.savez(arrays, begins=np.array([_Unpickled(world.evil_code())], dtype=object))
    assert world.ft("data", "c.yaml").code == 0, "it is prepared again"
    for path in (world.folder / "runs" / ".data").rglob("*"):
        if path.is_file():
            path.write_bytes(world.evil_pickle())
    assert world.ft("data", "c.yaml").code == 0


def test_prepared_data_that_lies_elsewhere(world: World) -> None:
    """A link in the place of the cache, to have it on another disk, or to harm: what is there already stays."""
    elsewhere = world.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    (world.folder / "runs").mkdir()
    (world.folder / "runs" / ".data").symlink_to(elsewhere)
    world.ft("data", "c.yaml")
    assert (elsewhere / "precious.txt").read_text() == "mine"


class _Unpickled:
    def __init__(self, code: str) -> None:
        self._code = code

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (self._code,)


def test_the_canary_sings(world: World) -> None:
    """What the other tests rely on: these pickles and modules do what they mean to, where they are let."""
    pickle.loads(world.evil_pickle("canary-a"))
    exec(world.evil_code("canary-b"))
    assert {path.name for path in world.folder.glob("canary*")} == {"canary-a", "canary-b"}
    with pytest.raises(AssertionError, match="the artifact ran"):
        world.ft("runs")
