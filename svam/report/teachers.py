"""`python -m svam.report.teachers`: are the teachers good enough for a comparison to rest on them?

The question comes before everything that follows them; the report says the same of a whole run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import one_line_errors
from svam.files import FileError, read_json, write_text
from svam.report.tables import acceptance_text


@one_line_errors
def main(
    backbones: Annotated[Path, typer.Argument(help="Folder of the trained backbones.")] = Path("data/backbones"),
    page: Annotated[Path | None, typer.Option(help="Markdown page to write it to too.")] = None,
) -> None:
    """Print the teachers' errors on held-out frames and the bounds within which they must lie."""
    text = acceptance_text({branch: read_json(backbones / branch / "metrics.json") for branch in ("geometric", "semantic")})
    if not text:
        raise FileError(f"{backbones}: neither teacher learnt from depth or segmentation, so there is no bound to judge it by")
    print(text)
    if page is not None:
        write_text(page, f"# Teachers\n\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
