"""The page of ``apt-trainer report`` as a real browser shows it: laid out, whole, and with nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from test_ablation import RECORDS, record

from apt_trainer.report.comparison import compare
from apt_trainer.report.html import to_html

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const seen = e => getComputedStyle(e).visibility === "visible" && e.getClientRects().length > 0;
document.body.setAttribute("data-seen", JSON.stringify({
  rows: [...document.querySelectorAll("tr")].map(r => [...r.cells].map(c => c.innerText)),
  pictures: [...document.querySelectorAll("svg")].map(box),
  drawn: [...document.querySelectorAll("svg")].map(s => s.querySelectorAll("path, text, use").length),
  words: [...document.querySelectorAll("svg text")].filter(seen).map(t => t.textContent.trim()),
  outside: [...document.querySelectorAll("svg")].flatMap(s => [...s.querySelectorAll("text")].filter(t => {
    const a = box(s), b = box(t); return b[0] < a[0] - 1 || b[2] > a[2] + 1 || b[1] < a[1] - 1 || b[3] > a[3] + 1;
  }).map(t => t.textContent)),
  width: [document.documentElement.scrollWidth, innerWidth],
  loaded: performance.getEntriesByType("resource").map(e => e.name),
}));
</script>"""


def _chromium(folder: Path, *words: str) -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found is not None, f"none of {', '.join(BROWSERS)} is installed"
    command = [found, *OPTIONS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _looked_at(folder: Path, page: str, width: int) -> dict[str, Any]:
    file = folder / "probe.html"
    file.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = _chromium(folder, f"--window-size={width},1400", "--dump-dom", file.as_uri())
    found = re.search(r'data-seen="(.*?)"', dom)
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("width", [1300, 700])
def test_a_browser_shows_the_table_and_every_picture(tmp_path: Path, width: int) -> None:
    records = [*RECORDS, record("<b>&", 1, 0.5)]
    comparison = compare(records, "full")
    seen = _looked_at(tmp_path, to_html(comparison, records, "A & B"), width)
    assert [row[0] for row in seen["rows"]] == ["variant", *comparison.cells]
    assert {len(row) for row in seen["rows"]} == {len(seen["rows"][0])}
    assert "0.7000 ± 0.1000 (-0.2000 ± 0.1414)" in [cell for row in seen["rows"] for cell in row]
    assert len(seen["pictures"]) == 3 and min(seen["drawn"]) > 20
    assert seen["outside"] == [] and {"peak memory (MB)", "heads", "neurons", "<b>&"} <= set(seen["words"])
    tops = [top for _, top, _, _ in seen["pictures"]]
    bottoms = [bottom for _, _, _, bottom in seen["pictures"]]
    assert all(bottom <= top for bottom, top in zip(bottoms, tops[1:], strict=False))  # one below the other
    assert all(right <= width and right - left > 0.6 * min(width, 1100) for left, _, right, _ in seen["pictures"])
    assert seen["width"][0] <= seen["width"][1] == width  # nothing but the table scrolls sideways
    assert seen["loaded"] == []


def test_a_screenshot_is_not_empty(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(to_html(compare(RECORDS, "full"), RECORDS, "study"), encoding="utf-8")
    _chromium(tmp_path, "--window-size=1300,1400", f"--screenshot={picture}", page.as_uri())
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1400, 1300)
    ink = (pixels < 0.9).any(axis=-1)
    thirds = [float(part.mean()) for part in np.array_split(ink, 3)]
    assert min(thirds[:2]) > 0.005 and ink.mean() < 0.5
    colours = {tuple(colour) for colour in (pixels[ink] * 15).round().astype(int)}
    assert len(colours) > 10
