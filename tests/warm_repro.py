"""`dvc repro` of the project in the current folder, with its stages forked from this process, which has imported their
libraries: in processes of their own, as DVC starts them, most would spend more seconds on that than on their work."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
import traceback
from importlib import import_module
from typing import Any

LIBRARIES: dict[str, list[str]] = {
    "svam": [],  # before torch: sets how OpenMP's threads wait
    "accelerate": [], "dvclive": [], "matplotlib.pyplot": [], "torchmetrics.functional.image": [],
    "diffusers": ["AutoencoderKLTemporalDecoder", "UNetSpatioTemporalConditionModel"],
    "transformers": ["CLIPTextModel", "CLIPTokenizer", "DepthAnythingForDepthEstimation", "Dinov2WithRegistersModel"],
}  # fmt: skip
"""And what of them is imported only when it is named."""


def forked(_: str, command: str, cwd: str, env: dict[str, str], **__: Any) -> None:
    """In place of DVC's own function, which starts a shell."""
    from dvc.stage.exceptions import StageCmdFailedError

    python, option, module, *arguments = shlex.split(command)
    assert (python, option) == ("python", "-m"), command
    sys.stdout.flush()
    process = os.fork()
    if not process:
        status: Any = 0
        try:
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code:
        raise StageCmdFailedError(command, code)


if __name__ == "__main__":
    sys.path[0] = ""  # as `python -m` does: the code of the project, not what lies beside this file
    for library, names in LIBRARIES.items():
        for name in [*names, "__name__"]:
            getattr(import_module(library), name)
    from dvc.cli import main
    from dvc.stage import run

    run._run = forked
    sys.exit(main(["repro"]))
