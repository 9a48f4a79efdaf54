"""The report in a browser: nothing overflows, every picture decodes, and the console stays silent."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth import compose
from dreambooth.report.page import write_report
from dreambooth.report.task import report
from tests.runs import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"""
VIEWS = [(390, "screen", "light"), (390, "screen", "dark"), (1440, "screen", "light"), (1440, "screen", "dark")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: .ci/run installs them"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with a profile of its own, which stays off the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The report of a run with long words in it, that of one with large pictures, and the comparison of both."""
    folder = tmp_path_factory.mktemp("runs")
    long = make_run(folder / "run with a long name", prompt="a photo of a " + "very" * 30 + " long <b>dog</b>")
    large = make_run(folder / "large", side=512, photo_side=700, lr=1e-4)
    (large / "evaluation" / "scores.jsonl").unlink()  # grids of samples instead
    compared = report(compose(["task=report", f"report.runs=[{long},{large}]", f"report.out_path={folder}"]))
    assert compared is not None
    return [write_report(long), write_report(large), compared]


def show(browser: Any, page: Path, width: int, media: str, scheme: str) -> None:
    """Open the page as a screen of that width, or a printer, would show it."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def brightness(browser: Any, selector: str, key: str) -> float:
    """Of a colour, 0 to 255."""
    script = f"return getComputedStyle(document.querySelector('{selector}')).{key}.match(/[\\d.]+/g).slice(0, 3)"
    return sum(map(float, browser.execute_script(script))) / 3


def test_it_fits_decodes_and_stays_silent(browser: Any, pages: list[Path]) -> None:
    for page in pages:
        for width, media, scheme in VIEWS:
            show(browser, page, width, media, scheme)
            wide = browser.execute_script("return document.scrollingElement.scrollWidth")
            assert wide <= browser.execute_script("return innerWidth") == width, page
            undecoded = "return [...document.images].filter(one => !(one.complete && one.naturalWidth > 0)).length"
            assert browser.execute_script(undecoded) == 0, page
            background, ink = brightness(browser, "body", "backgroundColor"), brightness(browser, "body", "color")
            assert (background < 60 < 180 < ink) if scheme == "dark" else (ink < 60 < 180 < background)
        assert browser.execute_script("return document.images.length") > 1
        requests = "return performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length"
        assert browser.execute_script(requests) == 0
    assert browser.get_log("browser") == []


def test_it_prints(browser: Any, pages: list[Path]) -> None:
    for page in pages:
        show(browser, page, 760, "print", "light")
        shown = "return getComputedStyle(document.querySelector('%s')).display"
        assert browser.execute_script(shown % ".skip") == "none"
        assert browser.execute_script(shown % "main section") == "block"
        assert len(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]) > 10_000
    assert browser.get_log("browser") == []


def test_the_keyboard_reaches_everything(browser: Any, pages: list[Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages[0], 1440, "screen", "light")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    focused = "return document.activeElement.className"
    assert browser.execute_script(focused) == "skip"
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().top") >= 0
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "main"
    summary = browser.find_element(By.TAG_NAME, "summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open") is True


def test_the_table_sorts_and_keeps_the_focus(browser: Any, pages: list[Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages[2], 1440, "screen", "light")
    names = "return [...document.querySelectorAll('tbody a')].map(one => one.textContent)"
    before = browser.execute_script(names)
    button = next(each for each in browser.find_elements(By.CSS_SELECTOR, "th button") if "DINO" in each.text)
    orders = []
    for _ in range(2):
        button.send_keys(Keys.ENTER)
        orders.append(browser.execute_script(names))
        assert "DINO" in browser.execute_script("return document.activeElement.textContent")
    assert orders[0] == orders[1][::-1]
    assert sorted(orders[0]) == sorted(before)
    assert browser.execute_script("return document.querySelectorAll('th[aria-sort]').length") == 1
    assert "descending" in browser.find_element(By.ID, "sorted").text
    assert browser.get_log("browser") == []
