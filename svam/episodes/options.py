"""Which source `convert.source` names, and whether `convert.options` is what it understands."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svam import sources
from svam.contract import EpisodeSource
from svam.errors import ParamsError
from svam.params import Params, describe


def available_sources() -> list[str]:
    """Names that `convert.source` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__) if not module.name.startswith("_"))


def source_options(params: Params) -> tuple[Any, Any]:
    """(module, its `Options`) of `convert.source`. Only that module is imported: others may need libraries that are absent.

    Raises:
        ParamsError: there is no such source, or an option is unknown, missing or of the wrong type.
    """
    name = params.convert.source
    if name not in available_sources():
        raise ParamsError(f"convert.source is {name!r}; available: {', '.join(available_sources())}")
    module = import_module(f"svam.sources.{name}")
    given = dict(params.convert.options)
    if name == "metaworld":  # what was collected last may be less than what lies in the folder
        given.setdefault("tasks", params.collect.tasks)
    try:
        return module, module.Options.model_validate(given)
    except ValidationError as error:
        raise ParamsError(describe(error, f"convert.source {name!r}", "convert.options.")) from None


def open_named_source(path: Path, params: Params) -> EpisodeSource:
    """The reader that `convert.source` names, of the data at `path`."""
    module, options = source_options(params)
    source: EpisodeSource = module.open_source(path, options)
    return source
