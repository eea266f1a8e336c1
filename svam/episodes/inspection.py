"""What is inside a store: gathered as plain JSON values, and printed as tables."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from svam.contract import VECTORS, ContractError, EpisodeSource
from svam.episodes.rows import RowReader
from svam.episodes.statistics import vector_statistics
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import FileError
from svam.params import Convert

QUANTITIES = ("mean", "std", "min", "q01", "q99", "max")
_LONGEST = 200
"""Characters of an entry of the source's provenance that a person sees; `--json` has all."""


def training_blocks(store: EpisodeStore, name: str) -> Iterator[NDArray[np.float32]]:
    """The rows of a vector of the training episodes, one (n, D) block an episode, as the conversion counts them."""
    for episode in store.episodes("train"):
        yield store.vector(name, np.arange(*store.bounds(int(episode)), dtype=np.int64))


def _array_facts(reader: RowReader) -> dict[str, Any]:
    files = [file for file in reader.path.rglob("*") if file.is_file()]
    size, uncompressed = sum(file.stat().st_size for file in files), len(reader) * reader.row_bytes
    return {
        "shape": list(reader.shape), "dtype": str(reader.dtype),
        "chunk_rows": reader.chunk_rows, "shard_rows": reader.shard_rows,
        "files": len(files), "bytes": size, "uncompressed_bytes": uncompressed, "ratio": uncompressed / max(1, size),
    }  # fmt: skip


def _task_facts(store: EpisodeStore) -> list[dict[str, Any]]:
    """One entry a task, in the store's order."""
    steps = np.diff(store.episode_ends, prepend=0)
    mine = [np.flatnonzero(store.episode_task == number) for number in range(len(store.tasks))]
    return [
        {
            "task": task, "episodes": len(episodes), "rows": int(steps[episodes].sum()),
            **{split: int((store.episode_split[episodes] == k).sum()) for k, split in enumerate(SPLITS)},
            "said": dict(Counter(store.episode_instructions[e] for e in episodes.tolist()).most_common()),
            "instructions": store.instructions[task],
        }
        for task, episodes in zip(store.tasks, mine, strict=True)
    ]  # fmt: skip


def _vector_facts(store: EpisodeStore) -> dict[str, Any]:
    """Statistics of each vector; those that the store does not keep are computed from its training episodes."""
    found: dict[str, Any] = {}
    for name in filter(store.has, VECTORS):
        stored = getattr(store.attributes.statistics, name, None)
        statistics = stored or vector_statistics(lambda name=name: training_blocks(store, name))  # type: ignore[misc]
        names = store.provenance.get("dimension_names", {}).get(name, [])
        width = len(statistics.mean)
        found[name] = {
            "dimensions": width, "names": names if len(names) == width else [], "stored": stored is not None,
            **statistics.model_dump(mode="json"),
        }  # fmt: skip
    return found


def facts(path: Path) -> dict[str, Any]:
    """All that `inspect` prints, as JSON values; sizes in bytes, pixels as [height, width]. Episodes have the `number` and
    `name` of the source, as `convert.episodes` and `convert.drop` take them.

    Raises:
        FileError, ContractError: the store does not open, or a vector is damaged.
    """
    store = EpisodeStore(path)
    arrays = {name: _array_facts(reader) for name, reader in store.arrays.items()}
    labels = {name: arrays.get(f"annotations/{name}/values") for name in ("depth", "segmentation")}
    files = [file for file in store.path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    uncompressed = sum(entry["uncompressed_bytes"] for entry in arrays.values())
    steps = np.diff(store.episode_ends, prepend=0)
    kept = store.attributes.statistics
    return {
        "path": str(path), "schema_version": store.attributes.schema_version,
        "episodes": len(steps), "rows": len(store), "rate_hz": store.rate_hz, "hours": len(store) / store.rate_hz / 3600,
        "episode_rows": {"shortest": int(steps.min()), "median": float(np.median(steps)), "longest": int(steps.max())},
        "split": {
            split: {"episodes": int((store.episode_split == k).sum()), "rows": int(steps[store.episode_split == k].sum())}
            for k, split in enumerate(SPLITS)
        },
        "cameras": {name: arrays[f"frames/{name}"]["shape"][1:3] for name in store.cameras},
        "foreseen": store.foreseen,
        "tasks": _task_facts(store),
        "convention": None if kept is None else kept.convention.model_dump(mode="json"),
        "vectors": _vector_facts(store),
        "annotations": {
            name: {"frames": array["shape"][0], "size": array["shape"][1:]} for name, array in labels.items() if array
        },
        "timestamps": "timestamps" in arrays,
        "episode_list": [
            {
                "number": number, "name": name, "task": store.task_of(episode), "split": SPLITS[store.episode_split[episode]],
                "rows": int(steps[episode]),
            }
            for episode, (number, name) in enumerate(zip(store.episode_numbers, store.episode_names, strict=True))
        ],
        "notes": store.attributes.notes,
        "compression": store.attributes.compression, "picture_error": store.attributes.picture_error,
        "provenance": dict(store.provenance),
        "arrays": arrays, "files": len(files), "bytes": size, "uncompressed_bytes": uncompressed,
        "ratio": uncompressed / max(1, size),
    }  # fmt: skip


def _cell(value: Any) -> str | Text:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return value if isinstance(value, Text) else " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(title: str, rows: Sequence[Mapping[str, Any]], most: int | None = None, option: str = "") -> Table:
    """A table of the first `most` of `rows`, which map the heads of columns to text, numbers or a shape."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for head, value in rows[0].items() if rows else ():
        number = isinstance(value, int | float)
        table.add_column(head.replace("_", " "), justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows[:most]:
        table.add_row(*map(_cell, row.values()))
    if most is not None and len(rows) > most:
        table.caption = f"and {len(rows) - most:,} more: {option} N shows N of them, --json all"
        table.caption_justify = "left"
    return table


def _compression(found: dict[str, Any]) -> str:
    """How frames are kept, and what was lost."""
    if (error := found["picture_error"]) is None:
        return f"{found['compression']}, without loss"
    cameras = (
        f"{camera} {stated['mean_absolute']:.2f} grey levels, " + (f"{psnr} dB" if (psnr := stated["psnr_db"]) else "none")
        + f" ({stated['pictures']:,} pictures measured)"
        for camera, stated in error.items() if camera != "quality"
    )  # fmt: skip
    return f"{found['compression']} of quality {error['quality']}; mean absolute error and PSNR: {'; '.join(cameras)}"


def _overview(found: dict[str, Any]) -> Table:
    rows, convention = found["episode_rows"], found["convention"]
    binary = ", ".join(map(str, convention["binary_dimensions"])) if convention else ""
    cameras = [f"{name} {width} x {height}" for name, (height, width) in found["cameras"].items()]
    lines = {
        "store": f"{found['path']} (schema version {found['schema_version']})",
        "episodes": f"{found['episodes']:,} ({rows['shortest']} to {rows['longest']} rows each, median {rows['median']:g})",
        "rows": f"{found['rows']:,} at {found['rate_hz']:g} Hz, {timedelta(seconds=round(3600 * found['hours']))} (h:mm:ss)",
        "split": ", ".join(
            f"{name.replace('_', ' ')} {side['episodes']} episodes ({side['rows']:,} rows)"
            for name, side in found["split"].items()
        ),
        "cameras": ", ".join(cameras) + (f" (foreseen: {', '.join(found['foreseen'])})" if len(cameras) > 1 else ""),
        "vectors": ", ".join(f"{name} {entry['dimensions']}" for name, entry in found["vectors"].items()) or "none",
        "actions": f"normalised by {convention['normalisation']}, binary dimensions: {binary or 'none'}" if convention
        else "none: good for the video model, not for a policy",
        "annotations": ", ".join(
            f"{name} {entry['size'][1]} x {entry['size'][0]} on {entry['frames']:,} frames"
            f" ({entry['frames'] / found['rows']:.0%})"
            for name, entry in found["annotations"].items()
        ) or "none",
        "timestamps": "kept" if found["timestamps"] else f"none: a step lasts 1 / {found['rate_hz']:g} s",
        "compression": _compression(found),
        "on disk": f"{decimal(found['bytes'])} in {found['files']:,} files, "
        f"{decimal(found['uncompressed_bytes'])} uncompressed: {found['ratio']:.1f} times smaller",
    }  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for line in [*lines.items(), *(("note", note) for note in found["notes"])]:
        table.add_row(*line)
    return table


def _task_row(entry: dict[str, Any]) -> dict[str, Any]:
    said, held_out = list(entry["said"].items()), entry["instructions"].get("held_out", [])
    text = Text(" · ".join(f"{sentence} ({count})" if len(said) > 1 else sentence for sentence, count in said[:4]))
    extra = [f"{len(said) - 4} others"] if len(said) > 4 else []
    extra += [f"{len(held_out)} paraphrases held out"] if held_out else []
    text.append("".join(f" + {part}" for part in extra), style="dim")
    numbers = {key: entry[key] for key in ("episodes", *SPLITS, "rows")}
    return {"task": entry["task"], "instruction (times said)": text, **numbers}


def _vector_table(name: str, entry: dict[str, Any], binary: list[int]) -> Table:
    rows: list[dict[str, Any]] = []
    for d in range(entry["dimensions"]):
        mark = " binary" if d in binary else " constant" if entry["min"][d] == entry["max"][d] else ""
        called = Text(" ".join([str(d), *entry["names"][d : d + 1]])).append(mark, style="dim")
        rows.append({"dimension": called, **{quantity: entry[quantity][d] for quantity in QUANTITIES}})
    origin = "kept in the store" if entry["stored"] else "computed now"
    return _table(f"{name}: {entry['count']:,} training rows, {origin}", rows)


def _episode_table(episodes: list[dict[str, Any]], most: int) -> Table:
    rows = [entry | {"number": str(entry["number"])} for entry in episodes]
    return _table("episodes, as convert.episodes and convert.drop call them", rows, most, "--episodes")


def print_facts(found: dict[str, Any], console: Console, most_tasks: int, most_episodes: int) -> None:
    """The tables of `inspect`, from what `facts` returned; `console` must not read markup."""
    binary = found["convention"]["binary_dimensions"] if found["convention"] else []
    tasks = [_task_row(entry) for entry in sorted(found["tasks"], key=lambda entry: -int(entry["episodes"]))]
    provenance = [
        {"key": key, "value": textwrap.shorten(str(value), _LONGEST, placeholder=" ...")}
        for key, value in found["provenance"].items()
    ]
    sizes = ("bytes", "uncompressed_bytes")
    arrays = [
        {"array": name, **entry, **{key: decimal(entry[key]) for key in sizes}} for name, entry in found["arrays"].items()
    ]
    for table in (
        _overview(found),
        _table("tasks", tasks, most_tasks, "--tasks"),
        *(
            _vector_table(name, entry, binary if name in ("actions", "expert_actions") else [])
            for name, entry in found["vectors"].items()
        ),
        _episode_table(found["episode_list"], most_episodes),
        _table("provenance", provenance),
        _table("arrays", arrays),
    ):
        console.print(table)
        console.print()


def recording_facts(source: EpisodeSource, params: Convert) -> dict[str, Any]:
    """What `inspect --recording` prints: the episodes of a data set that is not converted yet."""
    listed: list[dict[str, Any]] = []
    for number in range(len(source)):
        try:
            shape = source.shape(number)
            listed.append({"number": number, "name": shape.name, "task": shape.task, "rows": shape.steps})
        except (FileError, ContractError) as error:
            name = source.names[number] if hasattr(source, "names") else ""
            listed.append({"number": number, "name": name, "task": f"cannot be read: {error}", "rows": 0})
    description = source.describe()
    return {
        "source": params.source, "rate_hz": description.rate_hz, "cameras": description.cameras,
        "notes": list(source.notes), "episode_list": listed,
    }  # fmt: skip


def print_recording(found: dict[str, Any], console: Console, most: int) -> None:
    """The lines and the table of `inspect --recording`."""
    cameras = ", ".join(found["cameras"])
    lines = [f"{found['source']}: {len(found['episode_list']):,} episodes at {found['rate_hz']:g} Hz, cameras {cameras}"]
    console.print("\n".join([*lines, *(f"note: {note}" for note in found["notes"])]), soft_wrap=True)
    console.print(_episode_table(found["episode_list"], most))
