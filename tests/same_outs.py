"""`python -m tests.same_outs REF`: which outputs of the toy pipeline differ between a commit and the working tree.

Run it around a change that should alter no number. Both run from nothing, some minutes each; what is compared are the hashes
in `dvc.lock`, by path, but for the digests of code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT

# By the tests of that commit, since toy params belong to its own params.
RUN = """
import json, sys
from pathlib import Path
from tests.project import locked_stages, make_project, run
project = make_project(Path(sys.argv[1]))
run(project, "dvc", "repro")
print(json.dumps({out["path"]: out["md5"] for stage in locked_stages(project).values() for out in stage.get("outs", [])}))
"""


def outs(tree: Path, project: Path) -> dict[str, str]:
    """Path -> hash of every output after a run of the code in `tree`."""
    command = [sys.executable, "-c", RUN, str(project)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run of {tree} failed:\n{done.stderr[-3000:]}")
    hashes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return {path: value for path, value in hashes.items() if not path.startswith("data/code/")}


def main() -> int:
    """Print each output that differs; exit status 0 where none does."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), sys.argv[1]], cwd=ROOT, check=True)
        try:
            before, after = outs(tree, Path(name) / "before"), outs(ROOT, Path(name) / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for path in sorted(before.keys() | after.keys()):
        if path not in before or path not in after:
            print(f"{path}: only {'here' if path in after else f'at {sys.argv[1]}'}")
        elif before[path] != after[path]:
            print(f"{path}: differs")
    same = before == after
    print(f"{len(after)} outputs, {'all the same' if same else 'not all the same'} as at {sys.argv[1]}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
