"""The lerobot source: sentences, the set's own split and success, and wrong lines, which metadata and rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from svam.contract import Segment
from tests.sources.common import refused
from tests.sources.lerobot_sets import edit, numbers, source, write_v2


def test_tasks(tmp_path: Path) -> None:
    """`task_index` decides where the metadata names several tasks; a column of sentences or one option can replace it."""
    root = write_v2(tmp_path, change=lambda e, n: {"task_index": pa.array([e] * n), "said": pa.array([f"say {e}"] * n)})
    lines = [{"episode_index": e, "tasks": ["a", "b", "valid"], "length": n} for e, n in enumerate((5, 7))]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": k, "task": t}) for k, t in enumerate("ab")))
    assert [source(root).read(e).instruction for e in range(2)] == ["a", "b"]
    assert source(root, instruction_column="said").read(1).instruction == "say 1"
    assert source(root, instruction="go").describe().instructions == {key: {"train": ["go"], "held_out": []} for key in "ab"}
    lines[0]["tasks"] = ["b"]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with refused("task_index says 'a' for episode 0, but the metadata says 'b'; set convert.options.instruction_column to"):
        source(root).shape(0)
    assert [source(root, instruction_column=name).read(0).instruction for name in ("tasks", "task_index")] == ["b", "a"]
    (root / "meta/tasks.jsonl").unlink()
    with refused("episode 1: no instruction; set convert.missing_instruction"):
        source(root).shape(1)
    filled = source(root, missing_instruction="go")
    assert [filled.shape(e).task for e in range(2)] == ["b", "go"] and list(filled.describe().instructions) == ["b", "go"]


def test_sentences_of_an_upgraded_set_and_of_other_types(tmp_path: Path) -> None:
    said = [pa.array([f"say {e}"] * n).cast(pa.string_view()) for e, n in enumerate((5, 7))]
    root = write_v2(tmp_path, change=lambda e, n: {"said": said[e], "bytes": [b"a"] * n})
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 5}\n{"episode_index": 1, "length": 7}')
    pq.write_table(pa.table({"task_index": [0], "task": ["of another version"]}), root / "meta/tasks.parquet")
    assert source(root).shape(0).task == "push the block"
    (root / "meta/tasks.jsonl").unlink()
    (root / "meta/tasks.parquet").unlink()
    assert source(root, instruction_column="said").shape(1).task == "say 1"
    with refused("bytes holds binary, expected numbers; set convert.options.instruction_column"):
        source(root, instruction_column="bytes", missing_instruction="go").shape(0)


def test_subtasks_have_a_list_of_their_own(tmp_path: Path) -> None:
    root = write_v2(tmp_path, (5, 7), lambda e, n: {"subtask_index": pa.array([0, 0, 0, *[1] * (n - 3)])})
    said = {"instruction_column": "subtask_index", "segments": True}
    with refused("episode 0: no instruction"):
        source(root, **said).shape(0)
    pq.write_table(pa.table({"subtask_index": [1, 0], "subtask": ["lift", "reach"]}), root / "meta/subtasks.parquet")
    assert source(root, **said).shape(0).segments == (Segment(0, 3, ("reach",)), Segment(3, 5, ("lift",)))
    assert source(root).shape(0).task == "push the block"
    pq.write_table(pa.table({"subtask_index": [0], "subtask": ["reach"]}), root / "meta/subtasks.parquet")
    with refused("subtask_index is 1, which meta/subtasks does not list"):
        source(root, **said).shape(0)


def test_an_episode_with_two_tasks_is_refused_or_cut(tmp_path: Path) -> None:
    root = write_v2(tmp_path, (5, 7), lambda e, n: {"said": pa.array((["left"] * (5 - 3 * e) + ["right"] * 5)[:n])})
    with refused("changes its task at row 2 from 'left' to 'right'.*convert.instruction.*convert.drop: .1."):
        source(root, instruction_column="said").shape(1)
    replaced = source(root, instruction_column="said", segments=True, instruction="go")
    assert replaced.shape(1).task == "left" and replaced.shape(1).segments == () and replaced.read(1).instruction == "go"
    parts = [source(root, instruction_column="said", segments=True).shape(e).segments for e in range(2)]
    assert parts == [(), (Segment(0, 2, ("left",)), Segment(2, 7, ("right",)))]


@pytest.mark.parametrize(
    ("tasks", "said", "choice", "expected"),
    [
        ([], [None] * 5, {}, "no instruction; set convert.missing_instruction"),
        ([], [None, *[""] * 4], {"missing_instruction": "go"}, "go"), ([], ["", " ", "push", "push ", ""], {}, "push"),
        ([], ["", "push", "", "push", ""], {"segments": True}, "push"),
        ([""], [0] * 5, {}, "a"), (["a "], [0] * 5, {}, "a"), (["a"], [1] * 5, {}, "a"),
        (["\ud800"], [None] * 5, {}, r"instruction '.ud800' is not Unicode text; set convert.instruction"),
        ([], [1] * 5, {"missing_instruction": "go"}, "go"), (["a"], [-1] * 5, {"instruction": "go"}, "go"),
        (["a"], [None] * 5, {}, "a"), (["a"], [0, None, 0, 0, 0], {}, "task_index lacks a value at row 1; set convert.options"),
        (["a"], [-1] * 5, {}, "said is -1, which meta/tasks does not list; set convert.options.instruction_column to 'tasks'"),
    ],
)  # fmt: skip
def test_sentences_that_are_missing(tmp_path: Path, tasks: list[str], said: list[Any], choice: Any, expected: str) -> None:
    """Empty ones, null and spaces are none; they contradict no other."""
    kind = pa.string() if any(isinstance(one, str) for one in said) else pa.int64()
    column = "said" if kind == pa.string() else "task_index"
    root = write_v2(tmp_path, (5,), lambda e, n: {column: pa.array(said, kind)})
    edit("episodes.jsonl", lambda line: line.update(tasks=tasks))(root)
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "a"}\n{"task_index": 1, "task": null}\n')
    data = source(root, instruction_column="said" if column == "said" else None, **choice)
    if " " in expected:
        with refused(expected.replace("said is", "task_index is")):
            data.shape(0)
    else:
        assert data.shape(0).task == expected and data.shape(0).segments == ()


@pytest.mark.parametrize(
    ("splits", "held_out", "note"),
    [
        (None, [None] * 3, ""), ({"train": "0:100"}, [None] * 3, ""),
        ({"train": "0:2", "test": "2:3"}, [False, False, True], ""),
        ({"train": "0:2", "val": "2:9"}, [False, False, True], ""), ({"train": "80%"}, [None] * 3, "not 'first:end'"),
        ({"train": "0:3", "val": "2:3"}, [None] * 3, "overlap in episode 2; the set's own split is not used"),
        ({"train": "0:2"}, [None] * 3, "do not name episode 2; the set's own split is not used"),
        ({"Training": "0:1", "Test": "1:2"}, [False, True, False], "do not name episode 2, which is trained on"),
        ("0:2", [None] * 3, "splits is '0:2', not ranges by name"), ([], [None] * 3, ""),
        ({"val": "0:9"}, [None] * 3, "leave no episode to train"), ({"val": "7:9"}, [None] * 3, "no episode to hold out"),
    ],
)  # fmt: skip
def test_the_sets_own_split(tmp_path: Path, splits: Any, held_out: list[Any], note: str) -> None:
    data = source(write_v2(tmp_path, (2, 2, 2), info={"splits": splits}))
    assert [data.shape(e).held_out for e in range(3)] == held_out
    assert len(data.notes) == bool(note) and note in " ".join(data.notes)


def test_success_is_the_metadatas_or_the_rows(tmp_path: Path) -> None:
    root = write_v2(tmp_path, change=lambda e, n: {"next.success": pa.array([False] * (n - 1) + [e == 1])})
    assert [source(root).shape(e).success for e in range(2)] == [False, True]
    for said in (True, 1):
        edit("episodes.jsonl", lambda line, said=said: line.update(success=said))(root)
        assert [source(root).shape(e).success for e in range(2)] == [True, True]
    for nothing in (pa.array([None] * 5, pa.bool_()), pa.array([float("nan")] * 5), pa.array([0.4] * 5)):
        root = write_v2(tmp_path, (5,), change=lambda e, n, nothing=nothing: {"next.success": nothing})
        assert source(root).shape(0).success is None


@pytest.mark.parametrize(
    ("said", "message"), [({"length": 0}, "length is 0; expected at least 1"), ({"length": "x"}, "length is 'x'")]
)
def test_a_wrong_line_of_metadata_is_one_bad_episode(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    root = write_v2(tmp_path)
    edit("episodes.jsonl", lambda line: line.update(said))(root)
    data = source(root)
    assert data.names == ["0", "1"] and numbers(data.read(1)) == list(range(16, 23))
    for look in (data.shape, data.read):
        with refused(f"episodes.jsonl: {message}"):
            look(0)
