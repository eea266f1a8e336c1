"""Whose recordings lie in a folder that a source refused: told by names, and of HDF5 files by their keys."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

_ENTRIES, _ENTRIES_OF_A_FOLDER = 2000, 200
"""So many names are looked at, so that a folder of millions of files costs no time."""
_BY_NAME = (
    ("lerobot", "a LeRobotDataset", r"(^|/)meta/info\.json$"),
    ("rlds", "an RLDS data set", r"(^|/)dataset_info\.json$|\.tfrecord(-\d+-of-\d+)?$"),
    ("calvin", "CALVIN", r"(^|/)(ep_start_end_ids\.npy|episode_\d{7}\.npz)$"),
    ("replay_zarr", "a replay buffer of diffusion_policy", r"(^|/)meta/episode_ends$|\.zarr\.zip$"),
    ("metaworld", "what `collect` records", r"(^|/)episode_\d{4}\.safetensors$"),
    ("", "DROID's raw recordings", r"(^|/)trajectory\.h5$"),
    ("", "AgiBot World", r"(^|/)(task_info/task_\d+\.json|proprio_stats\.h5)$"),
    ("", "RH20T", r"(^|/)task_\d+_user_\d+_scene_\d+_cfg_\d+"),
    ("", "raw BridgeData", r"(^|/)(traj_group\d+|obs_dict\.pkl|policy_out\.pkl)$"),
    ("", "a ROS or MCAP recording", r"\.(mcap|bag|db3)$"),
    ("video_folder", "videos with annotations", r"^annotation/.*\.json$"),
    ("raw", "the raw layout", r"^meta\.json$"),
)
"""Source ("" where none reads it), what it reads, and a pattern of paths below the folder."""
_BY_KEY = (
    ("robomimic", "robomimic's HDF5", r"^data/demo_\d+$"),
    ("aloha", "ALOHA's HDF5", r"^observations/(images|qpos)$"),
    ("", "RoboMIND", r"^observations/rgb_images$|^puppet/"),
    ("", "RoboTwin", r"^joint_action/"),
    ("", "ManiSkill", r"^traj_\d+/"),
)
"""The same by the first two levels of keys in an HDF5 file."""
_LAST = (("", "pickled recordings", r"^(?!(.*/)?t5_xxl/).*\.p(kl|ickle)$"),)
"""The same by names, of what may lie beside recordings of another kind; in `t5_xxl` lie features of texts, beside videos."""


def recognised(path: Path, source: str) -> str:
    """What `path` looks like, as a clause for the end of a message; "" where nothing is known, or something is of `source`."""
    names = _names(path)
    file = _first(r"\.(hdf5|h5)$", names)
    keys = _keys(path / file if path.is_dir() else path) if file else []
    seen = [
        (reader, f"this looks like {title} ({name if found is names else file}), which")
        for table, found in ((_BY_NAME, names), (_BY_KEY, keys), (_LAST, names))
        for reader, title, pattern in table if (name := _first(pattern, found))
    ]  # fmt: skip
    if any(reader == source for reader, _ in seen):
        return ""
    for reader, looks in seen:
        known = f"convert.source {reader!r} reads"
        return f"{looks} {known if reader else 'no source reads; bring it as `raw` (svam/sources/README.md)'}"
    if name := _first(r"\.(tar|tgz|tar\.\w+|zip|7z)$", names):
        return f"there are archives in it ({name}): unpack them first"
    return ""


def _names(path: Path) -> list[str]:
    """Paths of what lies below a folder, the nearest first; of a file its name."""
    if not path.is_dir():
        return [path.name] if path.exists() else []
    names: list[str] = []
    folders = [""]
    for folder in folders:
        try:
            with os.scandir(path / folder) as entries:
                listed = sorted((f"{folder}{entry.name}", entry.is_dir()) for entry in islice(entries, _ENTRIES_OF_A_FOLDER))
        except OSError:
            continue
        names += [name for name, _ in listed]
        folders += [f"{name}/" for name, is_folder in listed if is_folder]
        if len(names) > _ENTRIES:
            break
    return names


def _first(pattern: str, names: list[str]) -> str:
    return next((name for name in names if re.search(pattern, name)), "")


def _keys(file: Path) -> list[str]:
    """The keys of an HDF5 file, two levels deep; none where it cannot be read here."""
    try:
        import h5py

        with h5py.File(file, "r") as content:
            top = {key: content[key] for key in islice(content, 50)}
            return [f"{key}/{inner}" for key, group in top.items() if hasattr(group, "keys") for inner in islice(group, 50)]
    except (ImportError, OSError, KeyError, RuntimeError):
        return []
