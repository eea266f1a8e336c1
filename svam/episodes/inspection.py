"""What is inside a store: gathered as plain JSON values, and printed as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from svam.contract import VECTORS, ContractError, EpisodeSource
from svam.episodes.rows import RowReader
from svam.episodes.statistics import vector_statistics
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import FileError, read_json
from svam.params import Convert

QUANTITIES = ("mean", "std", "min", "q01", "q99", "max")
_MOST_PROVENANCE = 12
"""Lines of the source's provenance that a person sees; `--json` has all."""


def stored_arrays(path: Path) -> dict[str, RowReader]:
    """Every array below `path`, by its name ("frames/front"), sorted.

    Raises:
        FileError: the metadata of one is damaged, or of another layout than the project writes.
    """
    found = {}
    for file in sorted(Path(path).rglob("zarr.json")):
        metadata = read_json(file)
        if not isinstance(metadata, dict) or metadata.get("node_type") not in ("group", "array"):
            raise FileError(f"{file}: neither the metadata of a Zarr v3 group nor of an array")
        if metadata["node_type"] == "array":
            found[file.parent.relative_to(path).as_posix()] = RowReader(file.parent)
    return found


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
    found: list[dict[str, Any]] = []
    for number, task in enumerate(store.tasks):
        mine = np.flatnonzero(store.episode_task == number)
        said = Counter(store.episode_instructions[e] for e in mine.tolist())
        entry: dict[str, Any] = {
            "task": task, "episodes": len(mine), "rows": int(steps[mine].sum()),
            **{split: int((store.episode_split[mine] == k).sum()) for k, split in enumerate(SPLITS)},
            "said": dict(said.most_common()), "instructions": store.instructions[task],
        }  # fmt: skip
        found.append(entry)
    return found


def _episode_facts(store: EpisodeStore) -> list[dict[str, Any]]:
    """One entry an episode: `number` and `name` are the source's, as `convert.episodes` and `convert.drop` take them."""
    return [
        {
            "number": number, "name": name, "rows": end - start, "task": store.task_of(episode),
            "split": SPLITS[store.episode_split[episode]],
        }
        for episode, (number, name) in enumerate(zip(store.episode_numbers, store.episode_names, strict=True))
        for start, end in [store.bounds(episode)]
    ]  # fmt: skip


def _vector_facts(store: EpisodeStore) -> dict[str, Any]:
    """Statistics of each vector; those that the store does not keep are computed from its training episodes."""
    kept = store.attributes.statistics
    found: dict[str, Any] = {}
    for name in VECTORS:
        if not store.has(name):
            continue
        stored = getattr(kept, name, None) if kept is not None else None
        statistics = stored or vector_statistics(lambda name=name: training_blocks(store, name))  # type: ignore[misc]
        names = store.provenance.get("dimension_names", {}).get("actions" if name == "expert_actions" else name, [])
        width = len(statistics.mean)
        found[name] = {
            "dimensions": width, "names": names if len(names) == width else [], "stored": stored is not None,
            **statistics.model_dump(mode="json"),
        }  # fmt: skip
    return found


def _annotation_facts(store: EpisodeStore, arrays: dict[str, Any]) -> dict[str, Any]:
    shapes = {
        name: arrays[f"annotations/{name}/values"]["shape"]
        for name in ("depth", "segmentation")
        if store.annotation(name) is not None
    }
    return {name: {"frames": shape[0], "size": shape[1:]} for name, shape in shapes.items()}


def facts(path: Path) -> dict[str, Any]:
    """All that `inspect` prints, as JSON values; sizes in bytes, pixels as [height, width].

    Raises:
        FileError, ContractError: the store does not open, or a vector is damaged.
    """
    store = EpisodeStore.open(path)
    arrays = {name: _array_facts(reader) for name, reader in stored_arrays(store.path).items()}
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
        "tasks": _task_facts(store),
        "convention": None if kept is None else kept.convention.model_dump(mode="json"),
        "vectors": _vector_facts(store),
        "annotations": _annotation_facts(store, arrays),
        "timestamps": store.timestamps(np.zeros(0, dtype=np.int64)) is not None,
        "episode_list": _episode_facts(store), "notes": store.attributes.notes,
        "compression": store.attributes.compression, "picture_error": store.attributes.picture_error,
        "provenance": dict(store.provenance),
        "arrays": arrays, "files": len(files), "bytes": size, "uncompressed_bytes": uncompressed,
        "ratio": uncompressed / max(1, size),
    }  # fmt: skip


def readable_bytes(size: float) -> str:
    """12.3 MB, of 1000 to the next unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold", no_wrap=number >= left)
    return table


def _compression(found: dict[str, Any]) -> str:
    """How frames are kept, and what was lost."""
    if (error := found["picture_error"]) is None:
        return f"{found['compression']}, without loss"
    cameras = (
        f"{camera} {stated['mean_absolute']:.2f} grey levels, " + (f"{psnr} dB" if (psnr := stated["psnr_db"]) else "none")
        for camera, stated in error.items() if camera != "quality"
    )  # fmt: skip
    return f"{found['compression']} of quality {error['quality']}; mean absolute error and PSNR: {'; '.join(cameras)}"


def _overview(found: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows, split = found["episode_rows"], found["split"]
    lengths = f"{rows['shortest']} to {rows['longest']} rows each, median {rows['median']:g}"
    sides = [f"{name.replace('_', ' ')} {split[name]['episodes']} episodes ({split[name]['rows']:,} rows)" for name in SPLITS]
    cameras = [f"{name} {width} x {height}" for name, (height, width) in found["cameras"].items()]
    convention = found["convention"]
    lines = {
        "store": f"{found['path']} (schema version {found['schema_version']})",
        "episodes": f"{found['episodes']:,} ({lengths})",
        "rows": f"{found['rows']:,} at {found['rate_hz']:g} Hz, {_duration(found['hours'])}",
        "split": ", ".join(sides),
        "cameras": ", ".join(cameras) + (" (the first is the foresight camera)" if len(cameras) > 1 else ""),
        "vectors": ", ".join(f"{name} {entry['dimensions']}" for name, entry in found["vectors"].items()) or "none",
        "actions": "none: good for the video model, not for a policy" if convention is None else (
            f"normalised by {convention['normalisation']}, binary dimensions: "
            + (", ".join(str(d) for d in convention["binary_dimensions"]) or "none")
        ),
        "annotations": ", ".join(
            f"{name} {entry['size'][1]} x {entry['size'][0]} on {entry['frames']:,} frames"
            f" ({entry['frames'] / found['rows']:.0%})"
            for name, entry in found["annotations"].items()
        ) or "none",
        "timestamps": "kept" if found["timestamps"] else f"none: a step lasts 1 / {found['rate_hz']:g} s",
        "compression": _compression(found),
        "on disk": f"{readable_bytes(found['bytes'])} in {found['files']:,} files, "
        f"{readable_bytes(found['uncompressed_bytes'])} uncompressed: {found['ratio']:.1f} times smaller",
    }  # fmt: skip
    for name, text in [*lines.items(), *(("note", note) for note in found["notes"])]:
        table.add_row(name, escape(text))
    return table


def _task_table(found: dict[str, Any], most: int) -> Table:
    table = _table("tasks", "task", "instruction (times said)", "episodes", "train", "held out", "rows", left=2)
    for entry in sorted(found["tasks"], key=lambda entry: -int(entry["episodes"]))[:most]:
        said = list(entry["said"].items())
        text = Text(" · ".join(f"{sentence} ({count})" if len(said) > 1 else sentence for sentence, count in said[:4]))
        extra = [f"{len(said) - 4} others"] if len(said) > 4 else []
        if held_out := entry["instructions"].get("held_out", []):
            extra.append(f"{len(held_out)} paraphrases held out")
        if extra:
            text.append(f" + {', '.join(extra)}", style="dim")
        table.add_row(escape(entry["task"]), text, *(f"{entry[key]:,}" for key in ("episodes", "train", "held_out", "rows")))
    if len(found["tasks"]) > most:
        table.add_row(f"[dim]and {len(found['tasks']) - most:,} more[/dim]", "[dim]--tasks N shows N of them, --json all[/dim]")
    return table


def _vector_table(name: str, entry: dict[str, Any], binary: list[int]) -> Table:
    origin = "kept in the store" if entry["stored"] else "computed now"
    heads = ("mean", "std", "min", "1 %", "99 %", "max")
    table = _table(f"{name}: {entry['count']:,} training rows, {origin}", "dimension", *heads)
    for d in range(entry["dimensions"]):
        marks = " [dim]binary[/dim]" if d in binary else " [dim]constant[/dim]" if entry["min"][d] == entry["max"][d] else ""
        name = f" {escape(entry['names'][d])}" if entry["names"] else ""
        table.add_row(f"{d}{name}{marks}", *(f"{entry[quantity][d]:.4g}" for quantity in QUANTITIES))
    return table


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings as ("a.b", text)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = str(value)
        yield prefix, text if len(text) <= 200 else f"{text[:200]}..."


def _provenance_table(provenance: dict[str, Any]) -> Table:
    table = _table("provenance", "key", "value", left=2)
    lines = list(_flat(provenance))
    for key, text in lines[:_MOST_PROVENANCE]:
        table.add_row(escape(key), escape(text))
    if len(lines) > _MOST_PROVENANCE:
        table.add_row(f"[dim]and {len(lines) - _MOST_PROVENANCE} more[/dim]", "[dim]--json has all[/dim]")
    return table


def _array_table(arrays: dict[str, Any]) -> Table:
    heads = ("shape", "rows a chunk", "rows a shard", "files", "on disk", "uncompressed", "ratio")
    table = _table("arrays", "array", "type", *heads, left=2)
    for name, entry in arrays.items():
        table.add_row(
            escape(name), entry["dtype"], " x ".join(str(n) for n in entry["shape"]), f"{entry['chunk_rows']:,}",
            f"{entry['shard_rows']:,}", f"{entry['files']:,}", readable_bytes(entry["bytes"]),
            readable_bytes(entry["uncompressed_bytes"]), f"{entry['ratio']:.1f}",
        )  # fmt: skip
    return table


def _episode_table(episodes: list[dict[str, Any]], most: int) -> Table:
    table = _table("episodes, as convert.episodes and convert.drop call them", "number", "name", "task", "rows", left=3)
    for entry in episodes[:most]:
        table.add_row(str(entry["number"]), escape(entry["name"]), escape(entry["task"]), f"{entry['rows']:,}")
    if len(episodes) > most:
        table.add_row("[dim]...[/dim]", f"[dim]and {len(episodes) - most:,} more: --episodes N, --json[/dim]")
    return table


def recording_facts(source: EpisodeSource, params: Convert) -> dict[str, Any]:
    """What `inspect --recording` prints: the episodes of a data set that is not converted yet."""
    listed: list[dict[str, Any]] = []
    for number in range(len(source)):
        try:
            shape = source.shape(number)
            listed.append({"number": number, "name": shape.name, "task": shape.task, "rows": shape.steps})
        except (FileError, ContractError) as error:
            listed.append({"number": number, "name": "", "task": f"cannot be read: {error}", "rows": 0})
    description = source.describe()
    return {
        "source": params.source, "rate_hz": description.rate_hz, "cameras": description.cameras,
        "notes": list(source.notes), "episode_list": listed,
    }  # fmt: skip


def print_recording(found: dict[str, Any], console: Console, most: int) -> None:
    """The lines and the table of `inspect --recording`."""
    console.print(
        f"{found['source']}: {len(found['episode_list']):,} episodes at {found['rate_hz']:g} Hz, cameras "
        f"{', '.join(found['cameras'])}", markup=False, soft_wrap=True,
    )  # fmt: skip
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(_episode_table(found["episode_list"], most))


def print_facts(found: dict[str, Any], console: Console, most_tasks: int, most_episodes: int) -> None:
    """The tables of `inspect`, from what `facts` returned."""
    binary = found["convention"]["binary_dimensions"] if found["convention"] else []
    tables = [_overview(found), _task_table(found, most_tasks)]
    tables += [
        _vector_table(name, entry, binary if name in ("actions", "expert_actions") else [])
        for name, entry in found["vectors"].items()
    ]
    tables += [_episode_table(found["episode_list"], most_episodes)]
    tables += [_provenance_table(found["provenance"]), _array_table(found["arrays"])]
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)
