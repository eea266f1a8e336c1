"""A data set on the Hugging Face hub, by id and commit."""

from __future__ import annotations

from pathlib import Path

from svam.errors import ParamsError
from svam.files import FileError
from svam.sources._choice import HUB_ID


def fetched(name: str, revision: str) -> Path:
    """The folder of a data set `owner/name` at a commit, fetched into the hub's cache where it is not there yet.

    Raises:
        ParamsError: `name` is no id.
        FileError: the data set cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(name):
        raise ParamsError(
            f"convert.revision is set, but convert.path {name!r} is no id of a data set on the hub, owner/name; set "
            "convert.revision to null for a folder"
        )
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's own errors, and those of whichever HTTP client its version uses
        said = " ".join(str(error).split())[:200] or "no message"
        raise FileError(
            f"convert.path: the data set {name} at {revision[:12]} cannot be fetched from the hub ({type(error).__name__}: "
            f"{said}); check id, commit and network, or download it and set convert.path to its folder"
        ) from None
