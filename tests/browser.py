"""A headless Chromium for tests of pages, or a reason to skip them."""

import contextlib
import shutil
import tempfile
import time

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1600,1000"
).split()


def find_browser() -> tuple[str, str]:
    """Paths of Chromium and its driver; skips the test where one of them is missing."""
    pytest.importorskip("selenium", reason="needs selenium: pip install graphc-nn[test]")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    return browser, driver


@contextlib.contextmanager
def headless():
    """A running browser with a profile of its own."""
    browser, driver = find_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        window = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield window
        finally:
            window.quit()


def open_report(window, folder) -> float:
    """Open a dump's page and wait until it is painted; milliseconds that took in the browser."""
    window.get((folder / "index.html").resolve().as_uri())
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        ready = window.execute_script("return window.report ? report.ready : null")
        if ready:
            return float(ready)
        time.sleep(0.05)
    raise AssertionError(f"the report did not open: {window.get_log('browser')}")
