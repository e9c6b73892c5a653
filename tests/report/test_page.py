"""The page: opened in a real browser, at desktop and phone width, light and dark."""

from __future__ import annotations

import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from flpriv.errors import CaptureError, ScenarioError
from flpriv.finding import Finding, Level, Pair, Verdict
from flpriv.report import write

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>alert(1)</script>"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
VOID = {"meta", "link", "img", "input", "br", "hr", "col", "wbr"}

CONTRAST = """() => {
  const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data; };
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const poor = [];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode, element = text.parentElement;
    if (!text.data.trim() || element.closest("script, style, symbol, title, desc")) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.closest("svg") ? style.fill : style.color);
    let ground = null;
    for (let each = element; each && !ground; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) ground = color;
    }
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${text.data.trim().slice(0, 30)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return [seen, poor];
}"""


class Reader(HTMLParser):
    """Collects tags and attributes, and complains about tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag, line {self.getpos()[0]}"


def read(path: Path) -> Reader:
    """The page, parsed."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(verdict: Verdict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the full verdict."""
    return write([verdict], tmp_path_factory.mktemp("report") / "new" / "report.html")


@pytest.fixture(scope="module")
def both(verdict: Verdict, small: Verdict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on two runs and a nearly empty third."""
    other = replace(verdict, title="another", level=Level.LOW)
    return write([verdict, other, small], tmp_path_factory.mktemp("both") / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium of the system."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium found: the page is not opened in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def visit(browser: Browser, file: Path, **options: Any) -> tuple[Page, list[str]]:
    """Open ``file``; the list holds every console message, error and request besides the file itself."""
    opened = browser.new_page(**options)
    noise: list[str] = []
    opened.on("console", lambda message: noise.append(f"console {message.type}: {message.text}"))
    opened.on("pageerror", lambda error: noise.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: noise.append(f"dialog: {dialog.message}"))
    opened.on("request", lambda request: None if request.url.startswith("data:") else noise.append(f"request: {request.url}"))
    opened.goto(file.as_uri())
    noise.remove(f"request: {file.as_uri()}")
    return opened, noise


def test_three_private_files_beside_each_other(page: Path) -> None:
    files = sorted(page.parent.iterdir())
    assert [file.name for file in files] == ["report.csv", "report.html", "report.json"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert len(pd.read_csv(page.with_suffix(".csv"), keep_default_na=True)) > 30


def test_a_folder_that_is_there_keeps_its_mode(verdict: Verdict, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write([verdict], tmp_path / "x.html", redact_images=True)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["page", "both"])
def test_well_formed_self_contained_and_labelled(name: str, request: pytest.FixtureRequest) -> None:
    file: Path = request.getfixturevalue(name)
    reader = read(file)
    text = file.read_text()
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.tags:
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(key, "#")), (tag, attributes)
        assert not any(key.startswith("on") for key in attributes)
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"][1:] for tag, attributes in reader.tags if attributes.get("href", "").startswith("#")}
    assert anchors <= set(ids)
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    tables = sum(tag == "table" for tag, _ in reader.tags)
    assert tables > 5 and sum(tag == "caption" for tag, _ in reader.tags) == tables
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_says_what_a_privacy_officer_asks(page: Path, browser: Browser) -> None:
    opened, _ = visit(browser, page)
    text = opened.inner_text("main").replace("\u00a0", " ")
    for said in (
        "Verdict: Critical risk",
        "sees every client's own update",
        "does not know the order of the local batches",
        "best of 128 public images: 0 %",
        "mean public image: 15.2 dB",
        "images of 20 pixels hold no two scales",
        "3 of 4 updates",
        "1 of 4 updates",
        "95 % interval 62 to 98 %",
        "n = 8",
        "half of the images or more are recovered",
        "These are patient images.",
        "PSNR 48.3 dB (null 19.0 dB)",
        "no reconstruction was assigned to this image",
        "400 non-members; at least 1000 are needed",
        "Attack failed",
        f"ValueError: {HOSTILE} diverged",
        "Refused",
        "extra layer 'block.0.weight'",
        "Not granted",
        "+24 points",
        "−7 points",
        "claimed epsilon: 2.00",
        "Only 8 originals: the intervals are wide.",
        "Fowl et al., Robbing the Fed, ICLR 2022",
        'flpriv run xray.toml --set sites.root="$DATA" --out run',
    ):
        assert said in text, said
    assert text.count("above 100 dB counts as 100 dB") == 1
    assert "# <b>not bold</b> & so on" in (opened.text_content("main") or "")
    opened.close()


@pytest.mark.parametrize("name", ["page", "both"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_quiet_and_readable_in_the_browser(
    name: str, scheme: str, width: int, browser: Browser, request: pytest.FixtureRequest
) -> None:
    opened, noise = visit(browser, request.getfixturevalue(name), viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    seen, poor = opened.evaluate(CONTRAST)
    assert seen > 300 and poor == []
    broken = "[...document.images].filter((each) => !each.complete || !each.naturalWidth).length"
    assert opened.evaluate(broken) == 0
    assert noise == []
    opened.close()


def test_slices_move_by_keyboard(page: Path, browser: Browser) -> None:
    opened, noise = visit(browser, page)
    slider, image = opened.locator("input[type=range]").first, opened.locator("img.slices").first
    assert opened.locator(".pair.volume output").first.inner_text() == "slice 13 of 24"
    image.scroll_into_view_if_needed()
    before, place = image.screenshot(), image.evaluate("(each) => getComputedStyle(each).objectPosition")
    slider.focus()
    for _ in range(3):
        opened.keyboard.press("ArrowRight")
    assert opened.locator(".pair.volume output").first.inner_text() == "slice 16 of 24"
    assert slider.get_attribute("aria-valuetext") == "slice 16 of 24"
    assert image.evaluate("(each) => getComputedStyle(each).objectPosition") != place
    assert image.screenshot() != before
    opened.keyboard.press("End")
    assert opened.locator(".pair.volume output").first.inner_text() == "slice 24 of 24"
    assert noise == []
    opened.close()


def test_the_skip_link_comes_first(page: Path, browser: Browser) -> None:
    opened, _ = visit(browser, page)
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "main"
    opened.close()


def test_reads_without_script_and_in_print(page: Path, browser: Browser) -> None:
    opened, noise = visit(browser, page, java_script_enabled=False, viewport={"width": 700, "height": 900})
    assert opened.locator("img.slices").first.is_visible()
    assert opened.locator("input[type=range]").first.is_hidden()
    opened.emulate_media(media="print")
    assert opened.locator("nav.contents").is_hidden()
    assert noise == []
    opened.close()


def test_only_the_pages_own_script_may_run(page: Path, browser: Browser, tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    planted.write_text(page.read_text().replace("</main>", f"{HOSTILE}<img src='https://example.org/x.png' alt='x'></main>", 1))
    opened, noise = visit(browser, planted)
    refused = [line for line in noise if "violates the following Content Security Policy directive" in line]
    assert any("inline script" in line for line in refused) and any("https://example.org/x.png" in line for line in refused)
    assert not any(line.startswith("dialog") for line in noise)
    opened.close()


def test_redaction_leaves_no_image_anywhere(verdict: Verdict, tmp_path: Path) -> None:
    path = write([verdict], tmp_path / "report.html", redact_images=True)
    assert not [tag for tag, _ in read(path).tags if tag in ("img", "image")]
    for file in tmp_path.iterdir():
        assert "data:image" not in file.read_text() and "base64" not in file.read_text()
    text = path.read_text()
    assert "left out of this report" in text and "48.3" in text
    assert "RDLV" in text and "<td>1.59</td>" in text
    assert '"images": "left out"' in path.with_suffix(".json").read_text()


def test_sixty_four_reconstructions_stay_under_ten_megabytes(verdict: Verdict, small: Verdict, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 224, 224), (1, 32, 64, 64)):
        first = verdict.findings[0].pairs[0]
        images = [rng.random((3, *shape), dtype=np.float32) for _ in range(64)]
        pairs = tuple(replace(first, original=a, reconstruction=b, null=c) for a, b, c in images)
        finding: Finding = replace(verdict.findings[0], pairs=pairs)
        path = write([replace(small, findings=(finding,))], tmp_path / "large.html")
        assert path.stat().st_size < 10_000_000
        assert path.read_text().count('<figure class="pair') == 64


def test_too_many_reconstructions_are_counted_not_shown(verdict: Verdict, small: Verdict, tmp_path: Path) -> None:
    pair: Pair = verdict.findings[0].pairs[0]
    finding = replace(verdict.findings[0], pairs=(pair,) * 130)
    text = write([replace(small, findings=(finding,))], tmp_path / "many.html").read_text()
    assert text.count('<figure class="pair') == 128
    assert "2 weaker reconstructions are not shown" in text


def test_comparison_stands_in_front(both: Path) -> None:
    reader = read(both)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert ids.index("comparison") < ids.index("run-1-verdict") < ids.index("run-2-verdict") < ids.index("run-3-verdict")


def test_an_empty_verdict_has_a_page(small: Verdict, tmp_path: Path) -> None:
    text = write([small], tmp_path / "small.html").read_text()
    assert "Verdict: Unknown" in text and "No attack was run." in text


def test_who_is_at_more_risk_is_a_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    table = text[text.index("Who is at more risk, no defence") :].split("</table>")[0]
    assert ">sex F<" in table
    assert "180, 190" in table
    assert "0.71" in table
    assert ">age 80+<" in table
    assert "n/a" in table


def test_the_same_verdict_gives_the_same_page(verdict: Verdict, tmp_path: Path) -> None:
    one, two = (write([verdict], tmp_path / f"{name}.html").read_bytes() for name in "ab")
    assert one == two


def test_wrong_calls_are_told(verdict: Verdict, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no verdict"):
        write([], tmp_path / "report.html")
    with pytest.raises(ScenarioError, match=r"must end in \.html"):
        write([verdict], tmp_path / "report.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError):
        write([verdict], tmp_path / "file" / "report.html", redact_images=True)
