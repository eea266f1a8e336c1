"""Records of earlier code taken for records of the code that is here, by somebody who vouches that no number changes.

A key holds every module that a run's stages import, so a mended message or a case that no run met makes it another key, and
hours of computing would be done again for the same bytes. Nothing here can check that: the one who calls it states it.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from svam.experiments import trail
from svam.experiments.keys import Project, key_of
from svam.experiments.loop import Plan
from svam.experiments.records import read_records, write_record
from svam.files import FileError


class Vouched(NamedTuple):
    """Code files that differ, and names of the records whose keys were changed."""

    changed: list[str]
    records: list[str]


def project_at(revision: str) -> tuple[Project, str]:
    """What decides keys, as it was at a commit of the repository in the current folder, and the commit's full name.

    Raises:
        FileError: git has no such commit, or it has no pipeline.
    """
    done = subprocess.run(["git", "archive", "--format=tar", f"{revision}^{{commit}}"], capture_output=True, check=False)
    if done.returncode:
        raise FileError(f"revision {revision!r}: {done.stderr.decode(errors='replace').strip() or 'git cannot read it'}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            commit = str(archive.pax_headers["comment"])  # git writes it there
            archive.extractall(folder, filter="data")
        return Project.read(Path(folder)), commit


def vouch(plan: Plan, entries: trail.Trail | None, revision: str) -> Vouched:
    """Give every record (of runs, and of the trail where there is one) whose key is that of the code at `revision`, with the
    params that are here, the key of the code that is here; the record names that commit.

    Raises:
        FileError: as `project_at`; or a record is damaged.
    """
    (before, commit), now = project_at(revision), plan.project
    changed = sorted(f for f in before.code.keys() | now.code.keys() if before.code.get(f) != now.code.get(f))
    keys = {run.name: key_of(before, plan.values(run)) for run in plan.runs}
    taken = []
    for record in read_records(plan.folder):
        if record.key == keys.get(record.name) != plan.keys[record.name]:
            update = {"key": plan.keys[record.name], "vouched": (*record.vouched, commit)}
            write_record(plan.folder, record.model_copy(update=update))
            taken.append(record.name)
    if entries is None:
        return Vouched(changed, taken)
    for entry in entries.entries:
        file, key = entries.folder / f"{entry.name}.json", entries.keys[entry.name]
        if file.is_file() and (kept := trail.read(file)).key == entries.key(entry, before) != key:
            trail.write(entries.folder, kept.model_copy(update={"key": key, "vouched": (*kept.vouched, commit)}))
            taken.append(f"{trail.FOLDER}/{entry.name}")
    return Vouched(changed, taken)
