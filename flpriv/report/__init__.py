"""The report: one self-contained HTML page, and its numbers as JSON and CSV beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flpriv.finding import Verdict

__all__ = ["write"]


def write(verdicts: Sequence[Verdict], path: Path, *, redact_images: bool = False) -> Path:
    """Write the page at ``path``, its numbers beside it as ``.json`` and ``.csv``, and return ``path``.

    The page needs no network, and no script to be read. All three files are written whole or not at all, with mode 0600:
    images of patients are on the page (never in the JSON or CSV) unless ``redact_images`` leaves them out. A folder that is not
    there is made.

    Args:
        verdicts: one, or several to be compared.
        path: where the page goes, ``.html`` or ``.htm``.
        redact_images: leave out every original, reconstruction and null.

    Raises:
        CaptureError: if a file cannot be written.
        ScenarioError: for no verdicts, or a path that is not a page's.
    """
    from flpriv.errors import ScenarioError
    from flpriv.files import private_folder, write_private
    from flpriv.report.page import render
    from flpriv.report.tables import report_json, tidy

    if not verdicts:
        raise ScenarioError("report: no verdict to show; name the folder of a finished run")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ScenarioError(f"report: {path} must end in .html; the JSON and the CSV take the same name beside it")
    page = render(verdicts, redact_images=redact_images)
    if not path.parent.is_dir():
        private_folder(path.parent)
    write_private(path.with_suffix(".json"), report_json(verdicts, redact_images=redact_images).encode())
    write_private(path.with_suffix(".csv"), tidy(verdicts).to_csv(index=False).encode())
    write_private(path, page.encode())
    return path
