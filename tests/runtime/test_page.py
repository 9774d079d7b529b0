"""The server's page, in a browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_engine import SECONDS, prompts_bundle
from tests.runtime.test_serve import Running, serving

webdriver = pytest.importorskip("selenium.webdriver")

__all__ = ["prompts_bundle"]

PROGRAMS = ("chromium", "chromedriver")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def running(
    windowed_bundle: Path, prompts_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    for name, bundle in (("classes", windowed_bundle), ("words", prompts_bundle)):
        subprocess.run(["cp", "-r", bundle, folder / name], check=True)
    with serving(folder / "classes", folder / "words") as running:
        running.until_ready()
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.set_script_timeout(SECONDS)
        yield driver


def wait(browser: Any, condition: str) -> Any:
    """The value of a JavaScript expression, once it is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, SECONDS, 0.05).until(
        lambda driver: driver.execute_script(f"return {condition}")
    )


def test_pictures_appear_line_by_line(browser: Any, running: Running) -> None:
    browser.get(running.url)
    wait(browser, "document.querySelectorAll('#model option').length === 2")
    # Whatever is shown is noted.
    browser.execute_script(
        "window.states = []; new MutationObserver((all) => { for (const one of all) states.push(one.target.dataset.state); })"
        ".observe(document.getElementById('images'), {subtree: true, attributes: true, attributeFilter: ['src', 'data-state']});"
    )
    browser.find_element("id", "count").clear()
    browser.find_element("id", "count").send_keys("3")
    browser.find_element("css selector", "button").click()
    wait(browser, "document.querySelectorAll('img[data-state=done]').length === 3")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('#images img')].map((i) => i.naturalWidth)"
    )
    assert min(sizes) > 0
    assert "partial" in browser.execute_script("return states")
    assert not browser.find_elements("css selector", "figure button")
    browser.find_element("id", "map").click()
    browser.find_element("css selector", "form#ask button").click()
    wait(browser, "document.querySelectorAll('figure button').length === 3")
    browser.find_element("css selector", "figure button").click()
    wait(
        browser,
        "document.getElementById('kept').open && document.querySelector('#kept img').naturalWidth > 100",
    )
    browser.find_element("css selector", "dialog button").click()
    captions = [caption.text for caption in browser.find_elements("css selector", "figcaption")]
    assert captions == ["class 0 · 1", "class 0 · 2", "class 0 · 3"] * 2


def test_models_that_read_are_asked_in_words(browser: Any, running: Running) -> None:
    browser.get(running.url)
    wait(browser, "document.querySelectorAll('#model option').length === 2")
    assert not browser.find_element("id", "prompt").is_displayed()
    browser.execute_script(
        "const m = document.getElementById('model'); m.value = 'words'; m.dispatchEvent(new Event('change'));"
    )
    assert browser.find_element("id", "prompt").is_displayed()
    assert not browser.find_element("id", "class").is_displayed()
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("a bowl of oranges")
    browser.find_element("css selector", "button").click()
    wait(browser, "document.querySelectorAll('img[data-state=done]').length === 4")
    # What is refused is said below its picture.
    prompt.clear()
    prompt.send_keys("a " * 100)
    browser.find_element("css selector", "button").click()
    wait(browser, "document.querySelectorAll('figcaption.error').length === 4")
    assert "room for 24" in browser.find_element("css selector", "figcaption.error").text
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("400" in entry["message"] for entry in severe), severe
