"""The page in a real browser: headless Chromium, driven by selenium, from the disk.

A screenshot of the page is kept in pytest's temporary folder when a test fails.
"""

from __future__ import annotations

import json
import shutil

import pytest

from flows.report.page import write_report
from tests.reports import write_reports

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromium-driver"),
]

HOSTILE = "<img src=x onerror=alert(1)> & spaces/äöü#1"
NAMES = [f"model {i}" for i in range(60)] + [HOSTILE]
FIRST_COLUMN = """
    return [...document.querySelectorAll("#models tbody tr:not([hidden])")]
        .map((row) => row.cells[0].textContent)"""
SPEEDUPS = """
    return [...document.querySelectorAll("#models tbody tr")]
        .map((row) => row.cells[6].dataset.value).filter((v) => v !== undefined).map(Number)"""
OPEN = """
    return [...document.querySelectorAll("#details > details[open] > summary")]
        .map((summary) => summary.textContent)"""
CLICK = """
    [...document.querySelectorAll("#models th button")]
        .find((button) => button.textContent === arguments[0]).click()"""
CHOOSE = """
    const state = document.getElementById("state");
    state.value = arguments[0];
    state.dispatchEvent(new Event("change"))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page whose last models are packed, and two of whose models are wrong."""
    folder = tmp_path_factory.mktemp("browser")
    write_reports(
        folder, NAMES, runs=2, failed=["model 3"], not_met=["model 5"], slower=["model 7"]
    )
    return write_report(folder, folder / "report.html")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page, request, tmp_path):
    """The page, newly opened. Nothing may be written to the console."""
    failures = request.session.testsfailed
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(is_whole)  # `get` may return at the load of about:blank
    yield browser
    complaints = browser.get_log("browser")
    if request.session.testsfailed > failures or complaints:
        browser.save_screenshot(str(tmp_path / "failed.png"))
    assert not complaints


def is_whole(browser) -> bool:
    return browser.execute_script(
        "return location.protocol === 'file:' && document.readyState === 'complete'"
    )


def requested(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [message["params"]["request"]["url"] for message in sent]


def click(browser, heading: str) -> None:
    browser.execute_script(CLICK, heading)


def type_into_filter(browser, text: str) -> None:
    browser.find_element("id", "filter").send_keys(text)


def test_the_page_asks_for_nothing_but_itself(opened, page):
    urls = requested(opened)

    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]


def test_failures_and_missed_contracts_are_open(opened):
    assert opened.execute_script(OPEN) == ["model 3 failed", "model 5 not met"]


def test_a_click_sorts_by_number_and_a_second_one_turns_the_order(opened):
    click(opened, "speed-up")
    rising = opened.execute_script(SPEEDUPS)
    click(opened, "speed-up")
    falling = opened.execute_script(SPEEDUPS)

    assert rising == sorted(rising)
    assert falling == sorted(rising, reverse=True)
    assert opened.execute_script(FIRST_COLUMN)[-1] == "model 3"  # it failed: nothing was timed


def test_the_keyboard_sorts_and_opens_and_one_sees_where_it_is(opened):
    keys = webdriver.Keys
    is_seen = "return getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(40):
        opened.switch_to.active_element.send_keys(keys.TAB)
        assert opened.execute_script(is_seen) == "solid"
        if opened.switch_to.active_element.text == "target":
            break
    opened.switch_to.active_element.send_keys(keys.ENTER)
    by_target = opened.find_element("css selector", "#models th:last-child")
    opened.switch_to.active_element.send_keys(keys.TAB, keys.ENTER)  # the link of the first row

    assert by_target.get_attribute("aria-sort") == "ascending"
    assert opened.switch_to.active_element.tag_name == "summary"
    assert "model 0 met" in opened.execute_script(OPEN)


def test_names_sort_as_people_count(opened):
    click(opened, "model")

    assert opened.execute_script(FIRST_COLUMN)[1:4] == ["model 0", "model 1", "model 2"]


def test_words_and_verdicts_filter_the_table(opened):
    type_into_filter(opened, "model 1")
    by_word = opened.execute_script(FIRST_COLUMN)
    opened.find_element("id", "filter").clear()
    opened.execute_script(CHOOSE, "worse")

    assert {"model 1", "model 10", "model 19"} <= {*by_word}
    assert "model 2" not in by_word
    assert opened.execute_script(FIRST_COLUMN) == ["model 3", "model 7"]
    assert opened.find_element("id", "count").text == "2 of 61 models"


def test_a_deep_link_opens_a_packed_model_whose_name_stays_text(opened):
    opened.execute_script(
        "location.hash = [...document.querySelectorAll('#models a')].at(-1).getAttribute('href')"
    )

    has_layers = (
        "return document.querySelectorAll('#details > details:last-of-type td').length > 500"
    )
    for _ in range(100):
        if opened.execute_script(has_layers):
            break
        opened.execute_async_script("setTimeout(arguments[0], 100)")
    assert opened.execute_script(has_layers)
    assert opened.execute_script(OPEN)[-1] == f"{HOSTILE} met"
    assert opened.execute_script("return document.querySelectorAll('img').length") == 0
    assert (
        opened.execute_script(
            "return document.querySelectorAll('details:last-of-type svg circle').length"
        )
        > 50
    )


def test_dark_mode_is_the_systems(opened):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = opened.execute_script(background)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]

    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    dark = opened.execute_script(background)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    assert light == "rgb(255, 255, 255)"
    assert sum(map(int, dark.removeprefix("rgb(").removesuffix(")").split(","))) < 150


def test_a_phone_scrolls_tables_and_not_the_page(opened):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}

    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    width = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    assert width == 390


def test_the_keyboard_reaches_the_filter(opened):
    opened.find_element("tag name", "body").send_keys("/")
    opened.switch_to.active_element.send_keys("model 42")

    assert opened.execute_script(FIRST_COLUMN) == ["model 42"]
