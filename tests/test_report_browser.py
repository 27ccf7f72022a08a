"""A report in a real browser: it loads without errors or requests, and what it offers works.

Debian's packages chromium and chromium-driver, driven by selenium; skips where one is absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.report.page import write_report
from tests.recorded_run import CONFIG, step_record, write_run
from tests.test_report import HOSTILE, full_run

pytestmark = [pytest.mark.slow, pytest.mark.browser]


class Page:
    """A page in the browser, asked through JavaScript and used through the pointer."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.url = driver, path.as_uri()
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(self.url)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def lines(self, run: int, panel: str = "loss") -> list[str]:
        """The drawn paths of a run in a panel."""
        selector = f'[data-panel={panel}] path.line[data-run="{run}"]'
        script = f"[...document.querySelectorAll('{selector}')].map(p => p.getAttribute('d'))"
        return self.ask(script)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def move(self, *parts: float, panel: str = "loss", drag: bool = False) -> None:
        """The pointer to the given parts of a panel's width, one after the other."""
        from selenium.webdriver.common.action_chains import ActionChains

        svg = self.driver.find_element("css selector", f"[data-panel={panel}] > svg")
        width = svg.size["width"]
        actions = ActionChains(self.driver, duration=20)
        for i, part in enumerate(parts):
            actions.move_to_element_with_offset(svg, int((part - 0.5) * width), 0)
            if drag and i == 0:
                actions.click_and_hold()
        (actions.release() if drag else actions).perform()

    def double_click(self, panel: str = "loss") -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        svg = self.driver.find_element("css selector", f"[data-panel={panel}] > svg")
        ActionChains(self.driver, duration=20).double_click(svg).perform()

    def tip(self, panel: str = "loss") -> str:
        return self.driver.find_element("css selector", f"[data-panel={panel}] .tip").text

    def x_labels(self, panel: str = "loss") -> list[str]:
        selector = f"[data-panel={panel}] text.axis[text-anchor=middle]"
        return self.ask(f"[...document.querySelectorAll('{selector}')].map(t => t.textContent)")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and requests for anything but the page."""
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                # the browser's own first page loads its parts from chrome://
                if url != self.url and not url.startswith(("data:", "chrome://")):
                    found.append(f"request: {url}")
        return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, program = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root may not use it
        "--disable-dev-shm-usage",
        "--window-size=1280,1600",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(program))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    a = full_run(root / "a")
    records = [step_record(i) for i in range(1, 401)]
    b = write_run(root / "b", records=records, config=CONFIG.replace("12", "400"))
    return Path(write_report([str(a), str(b)], str(root / "r.html")))


@pytest.fixture
def page(driver: Any, report: Path) -> Page:
    return Page(driver, report)


def test_a_page_loads_without_a_complaint_or_a_request_and_draws_every_curve(page: Page) -> None:
    assert page.complaints() == []
    assert page.ask("document.title") == "a, b"
    panels = page.ask("document.querySelectorAll('.panel').length")
    data = json.loads(page.ask("document.getElementById('data').textContent"))
    assert panels == len(data["panels"]) >= 6
    for panel in data["panels"]:
        for i, run in enumerate(data["runs"]):
            drawn = page.lines(i, panel["id"])
            assert len(drawn) == len([k for k in panel["keys"] if k in run["series"]])
            assert all(d.startswith("M") and "NaN" not in d for d in drawn)
    marks = "document.querySelectorAll('[data-panel=loss] > svg .mark').length"
    assert page.ask(marks) == 2  # a restart, a batch left out


def test_the_lines_of_a_run_in_a_panel_are_told_apart(driver: Any, tmp_path: Path) -> None:
    phases = ["batch", "agree", "forward_backward", "clip", "optimizer", "save", "other"]
    seconds = {f"perf/seconds/{name}": 0.1 for name in phases}
    run = write_run(tmp_path / "a", records=[step_record(i) | seconds for i in range(1, 13)])
    page = Page(driver, Path(write_report([str(run)], str(tmp_path / "r.html"))))
    data = json.loads(page.ask("document.getElementById('data').textContent"))
    (panel,) = [p["id"] for p in data["panels"] if p["title"] == "Seconds of each phase"]
    lines = f"[...document.querySelectorAll('[data-panel={panel}] .key line')]"
    patterns = page.ask(f"{lines}.map(line => line.getAttribute('stroke-dasharray'))")
    assert len(patterns) == len(set(patterns)) == len(phases)


def test_hovering_names_the_values_of_every_run_and_marks_the_place_in_all_panels(
    page: Page,
) -> None:
    page.move(0.5)
    tip = page.tip()
    assert tip.startswith("tokens ") and "train/loss" in tip
    rows = tip.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["b"]  # the other one ended before
    value, step = rows[0].split()[2], int(rows[0].split()[4].replace(",", ""))
    assert 150 < step < 250 and 3 < float(value) < 4
    crosses = "[...document.querySelectorAll('.cross')].map(c => c.getAttribute('visibility'))"
    assert set(page.ask(crosses)) == {"visible"}
    page.move(0.06)
    assert [row.split()[0] for row in page.tip().splitlines()[1:]] == ["a", "a", "b"]
    page.move(0.5, panel="lr")
    assert page.tip() == "" and page.tip("lr").startswith("tokens ")


def test_a_run_is_hidden_and_shown_by_its_button(page: Page) -> None:
    assert page.lines(0) and page.lines(1)
    page.click('#legend button[data-run="1"]')
    assert page.lines(0) and not page.lines(1)
    assert page.ask("document.querySelectorAll('#legend [aria-pressed=false]').length") == 1
    page.click('#legend button[data-run="1"]')
    assert page.lines(1)


def test_a_drag_zooms_all_panels_and_a_double_click_shows_the_whole(page: Page) -> None:
    whole = page.x_labels()
    page.move(0.4, 0.5, 0.6, drag=True)
    near = page.x_labels()
    assert near != whole and page.x_labels("lr") != whole
    assert page.ask("document.getElementById('reset').disabled") is False
    page.double_click()
    assert page.x_labels() == whole
    page.move(0.4, 0.6, drag=True)
    page.click("#reset")
    assert page.x_labels() == whole and page.complaints() == []


def test_axis_scale_raw_curves_and_theme_can_be_chosen(page: Page) -> None:
    for x, name in (("step", "step"), ("flops", "FLOPs"), ("time", "hours of training")):
        page.click(f'#x-axis button[data-x="{x}"]')
        assert page.x_labels()[-1] == name
        assert all("NaN" not in d for i in (0, 1) for d in page.lines(i))
    linear = page.lines(1)
    page.click("#log")
    assert page.lines(1) != linear
    assert page.ask("document.querySelectorAll('path.raw').length") > 0
    page.click("#raw")
    assert page.ask("document.querySelectorAll('path.raw').length") == 0
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.ask(colour)
    page.click("#theme")
    assert page.ask(colour) != before and page.complaints() == []


def test_a_run_that_is_named_to_harm_runs_nothing(driver: Any, tmp_path: Path) -> None:
    folder = full_run(tmp_path / HOSTILE.replace("/", "\u2215"))
    hostile = {"step": 13, "tokens": 13, "train/loss": 1.0, HOSTILE: 1.0}
    hostile |= {f"val/{HOSTILE}/loss": 1.0, "guard/event": HOSTILE, "sample/text": HOSTILE}
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(hostile) + "\n")
    page = Page(driver, Path(write_report([str(folder)], str(tmp_path / "r.html"))))
    page.move(0.98)  # its names stand in the tooltip
    assert "alert(1)" in page.tip()
    assert page.ask("document.scripts.length") == 2
    assert page.ask("document.images.length") == 0
    assert page.complaints() == []


def test_a_page_about_an_empty_folder_says_that_there_is_nothing(
    driver: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    page = Page(driver, Path(write_report([str(tmp_path / "empty")], str(tmp_path / "r.html"))))
    assert page.ask("document.getElementById('panels').textContent").startswith("No training step")
    assert page.complaints() == []
