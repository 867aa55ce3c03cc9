# SPDX-License-Identifier: Apache-2.0
"""A page in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Measures the page, which has no script of its own, and leaves the figure in the title.
MEASURE = (
    "<script>onload = () => { document.title = 'wide by ' + "
    "(document.documentElement.scrollWidth - innerWidth) }</script></body>"
)


def browse(folder: Path, text: str, *options: str) -> str:
    """Open a page in Chromium and return the document as it stands then."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    assert browser, "no Chromium: run ./bootstrap test"
    path = folder / "page.html"
    path.write_text(text)
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=1000",
            f"--user-data-dir={folder / 'profile'}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def too_wide(folder: Path, text: str, width: int) -> bool:
    """Tell whether a page is wider than a window of so many pixels."""
    page = text.replace("</body>", MEASURE)
    document = browse(folder, page, f"--window-size={width},900", "--dump-dom")
    assert "<title>wide by " in document
    return "<title>wide by 0</title>" not in document
