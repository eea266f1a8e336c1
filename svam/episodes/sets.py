"""Several data sets in one model: each is converted to a store of its own, and an index joins them (`svam.episodes.joined`).

Each store is kept in `.cache/sets` as well, by all that it depends on, so that adding a set, or taking one away, converts no
other again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svam.console import console
from svam.contract import ContractError
from svam.episodes.convert import Plan, convert
from svam.episodes.joined import SCHEMA, Index, JoinedStore, Member
from svam.episodes.options import open_named_source
from svam.episodes.store import SETS, EpisodeStore
from svam.errors import SvamError
from svam.files import FileError, sha256_of_json, whole_directory, write_json
from svam.params import Params

KEPT = 8
"""Stores in `.cache/sets`, at least those of the sets that there are now; the least recently used go first."""


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """What is wrong with a set is told with its name."""
    try:
        yield
    except SvamError as error:
        raise type(error)(f"convert.sets, {name}: {error}") from None


def convert_sets(params: Params, out: Path, scratch: Path, kept: Path) -> None:
    """Write the stores of `convert.sets` and their index to `out`. `kept`: where whole ones stay for the next time; `scratch`:
    unfinished ones.

    Raises:
        as `convert` and `open_named_source`, of any set; ContractError: the sets do not fit one another.
    """
    section = params.convert
    used: list[Path] = []
    with whole_directory(out) as folder:
        for one, own in zip(section.sets, section.parts, strict=True):
            with _told_of(one.name):
                source = open_named_source(Path(own.path), params.model_copy(update={"convert": own}))
                for note in source.notes:
                    console.print(f"note: {one.name}: {note}", markup=False, soft_wrap=True)
                plan, shapes = Plan.of(source, own)
                store = kept / sha256_of_json([plan.key(shapes), params.seed])[:16]
                try:
                    EpisodeStore(store)
                except (FileError, ContractError):  # it is not there, or was damaged
                    store.parent.mkdir(parents=True, exist_ok=True)
                    convert(source, store, own, params.seed, params.machine.workers, scratch)
                else:
                    console.print(f"convert: {one.name} is as it was", markup=False)
                    store.touch()
            shutil.copytree(store, folder / one.name)
            used.append(store)
        members = [Member(name=one.name, weight=one.weight, policy=one.policy) for one in section.sets]
        write_json(folder / SETS, Index(schema_version=SCHEMA, sets=members).model_dump())
        JoinedStore(folder)  # says what does not fit
    others = sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime)
    for stale in [path for path in others if path not in used][: max(0, len(others) - KEPT)]:
        shutil.rmtree(stale, ignore_errors=True)
