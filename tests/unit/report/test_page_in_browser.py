"""The page of ``apt-trainer report`` as a real browser shows it: laid out, whole, and with nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from test_ablation import RECORDS, record

from apt_trainer.report.comparison import compare
from apt_trainer.report.html import to_html
from apt_trainer.report.run_page import run_page

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const seen = e => getComputedStyle(e).visibility === "visible" && e.getClientRects().length > 0;
parent.document.body.setAttribute("data-seen", JSON.stringify({
  rows: [...document.querySelectorAll("tr")].map(r => [...r.cells].map(c => c.innerText)),
  pictures: [...document.querySelectorAll("svg")].map(box),
  drawn: [...document.querySelectorAll("svg")].map(s => s.querySelectorAll("path, text, use").length),
  words: [...document.querySelectorAll("svg text")].filter(seen).map(t => t.textContent.trim()),
  outside: [...document.querySelectorAll("svg")].flatMap(s => [...s.querySelectorAll("text")].filter(t => {
    const a = box(s), b = box(t); return b[0] < a[0] - 1 || b[2] > a[2] + 1 || b[1] < a[1] - 1 || b[3] > a[3] + 1;
  }).map(t => t.textContent)),
  width: [document.documentElement.scrollWidth, innerWidth],
  text: document.body.innerText,
  colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
  cards: [...document.querySelectorAll(".card")].map(box),
  loaded: performance.getEntriesByType("resource").map(e => e.name),
}));
</script>"""


def _chromium(folder: Path, *words: str) -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found is not None, f"none of {', '.join(BROWSERS)} is installed"
    command = [found, *OPTIONS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _looked_at(folder: Path, page: str, width: int, *words: str) -> dict[str, Any]:
    """What a window of ``width`` shows; a narrow one is a frame in a wider one, which cannot be that narrow itself."""
    file = folder / "probe.html"
    probed = page.replace("</body>", PROBE + "</body>")
    if width < 500:
        frame = f'<iframe srcdoc="{escape(probed)}" style="width: {width}px; height: 1400px; border: 0"></iframe>'
        probed = f"<!DOCTYPE html><html><body>{frame}</body></html>"
    file.write_text(probed, encoding="utf-8")
    dom = _chromium(folder, f"--window-size={max(width, 500)},1400", *words, "--dump-dom", file.as_uri())
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


TEXT = "<script>document.title = 'taken'</script> & \"quoted\" 'text' 🙂 " + "unbroken" * 30


def _run_folder(folder: Path) -> Path:
    """What a run leaves of which its page is made, with texts that are no HTML."""
    sizes = {"heads": {"0": 4, "1": 4}, "neurons": {"0": 24, "1": 24}, "hidden": 16}
    event = {"step": 4, "kind": "prune", "sparsity": 0.6, "ranks": {"a": 8}, "tune": "adapters", "dense": sizes}
    event |= {"heads": {"0": 1, "1": 2}, "neurons": {"0": 8, "1": 24}, "hidden": 16}
    speed = {"speedup": {"export": {"1": {"forward": 3.3}, "32": {"forward": 5.98}}, "pruned": {}}}
    metrics = {
        "metric_name": "accuracy",
        "task_metric": 0.94,
        "task_metric_dense": 0.97,
        "task_metric_low": 0.91,
        "task_metric_high": 0.96,
        "evaluated_on": "test",
        "disk_bytes": 65_300_000,
        "disk_bytes_dense": 90_900_000,
        "latency_ms": {n: {"1": {"median_ms": t, "iqr_ms": 1.0}} for n, t in (("dense", 32.0), ("pruned", 16.0))},
        "exports": {"onnx_int8": {"bytes": 17_000_000, "task_metric": 0.94, "speed": speed}},
        "train_seconds": 117.0,
        "train_seconds_dense": 174.0,
        "device": "cpu",
    }
    right = ["dense"] * 2 + ["pruned"]
    examples = [
        {"row": i, "text": TEXT, "label": "<i>", "dense": "a|b", "pruned": "c", "right": r}
        for i, r in enumerate(right)
    ]
    found = {"rows": 50, "of": 50, "differ": 3, "numbers": False, "right": {"dense": 2, "pruned": 1, "neither": 0}}
    written = {"metrics.json": metrics, "differences.json": found | {"examples": examples}}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 4, "loss": 0.5}]}))
    return folder


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_page_of_a_run_answers_on_any_screen(tmp_path: Path, width: int, dark: bool) -> None:
    page = run_page(_run_folder(tmp_path), "my run")
    words = ["--blink-settings=preferredColorScheme=0"] if dark else []
    seen = _looked_at(tmp_path, page, width, *words)
    text = re.sub(r"\s+", " ", seen["text"])
    for said in (
        "How much smaller? 28 % smaller 65.3 MB on disk instead of 90.9 MB; exported as onnx_int8 17.0 MB",
        "How much faster? 2.0 times as fast 16.0 ms instead of 32.0 ms, one text, in PyTorch; exported as onnx",
        "How much worse? -3.0 points accuracy 0.9400 instead of 0.9700 on the test data (95 % interval: 0.9100 to",
        "What did it cost? 1 min 57 s of training on cpu; fine-tuning the dense model took 2 min 54 s",
        "On 3 of 50 test rows the two say something else. Only the dense model is right on 2 of them",
    ):
        assert said in text
    rows = [row for row in seen["rows"] if row[-1] == "c"]
    assert rows == [[TEXT, "<i>", "a|b", "c"]] * 3 and "taken" not in page.partition("<body>")[0]
    assert seen["width"][0] <= seen["width"][1] == width  # nothing but tables of numbers scrolls sideways
    assert len({top for _, top, _, _ in seen["cards"]}) == (1 if width > 1000 else 4)  # side by side, or one by one
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in seen["colours"])
    assert (ink > 500 and paper < 150) if dark else (ink < 250 and paper > 700)
    assert len(seen["pictures"]) == 1 and seen["drawn"][0] > 20 and seen["outside"] == [] and seen["loaded"] == []
