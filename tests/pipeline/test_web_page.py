"""The page of deployments/web in a real browser: headless Chromium, driven by selenium."""

from __future__ import annotations

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.runtime.javascript import find_package
from quant_core.api import quantize
from quant_core.errors import RequestError
from tests.models import sketch, tiny_cnn

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

PAGE = Path(__file__).parents[2] / "deployments" / "web" / "index.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WAIT_S = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromium-driver"),
]
# Not a number where all is masked.
MASKED = """(int64[n, t] mask) => (float y) {
    m = Cast<to = 1>(mask) s = ReduceSum<keepdims = 0>(m) y = Div(s, s)
}"""
DROP = """
    const [which, ...names] = arguments, done = names.pop();
    Promise.all(names.map((name) => fetch(name).then((answer) => answer.blob()))).then((blobs) => {
        const dataTransfer = new DataTransfer();
        blobs.forEach((blob, i) => dataTransfer.items.add(new File([blob], names[i])));
        document.getElementById(which).dispatchEvent(new DragEvent("drop", { dataTransfer }));
        done();
    });"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of the page, of onnxruntime-web and of some models."""
    try:
        package = find_package("onnxruntime-web")
    except RequestError as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(PAGE, folder)
    (folder / "node_modules").mkdir()
    (folder / "node_modules" / "onnxruntime-web").symlink_to(package.resolve())
    onnx.save(tiny_cnn(), folder / "float.onnx")
    quantize(folder / "float.onnx", folder / "int8.onnx", target="web")
    other = sketch("(float[n, 3] x) => (float[n, 3] other) { other = Relu(x) }")
    onnx.save(other, folder / "other.onnx")
    onnx.save(sketch(MASKED), folder / "masked.onnx")
    half = sketch(
        "(float16[n, 3] x) => (float16[n, 100] y) { y = MatMul(x, w) }",
        {"w": np.ones((3, 100), np.float16)},
    )
    onnx.save(half, folder / "half.onnx")
    apart = {"save_as_external_data": True, "location": "half.data", "size_threshold": 0}
    onnx.save(half, folder / "apart.onnx", **apart)
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(WAIT_S)
    yield browser
    browser.quit()


@pytest.fixture
def browser(address, driver):
    """The page, loaded anew."""
    driver.get(f"{address}/index.html")
    wait_for(driver, "document.readyState === 'complete'")
    return driver


def text_of(browser, css: str) -> str:
    return browser.execute_script(f"return document.querySelector('{css}').textContent")


def wait_for(browser, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, WAIT_S).until(lambda b: b.execute_script(f"return {script}"))


def test_two_models_that_are_dropped_are_compared(browser):
    browser.execute_async_script(DROP, "float", "float.onnx")
    browser.execute_async_script(DROP, "quantized", "int8.onnx")
    wait_for(browser, "!document.getElementById('run').disabled")

    browser.execute_script("document.querySelector('#sizes input').value = 2")
    browser.execute_script("document.getElementById('run').click()")
    wait_for(browser, "document.querySelector('#results table') || error.textContent")

    found = text_of(browser, "#results")
    assert text_of(browser, "#error") == ""
    assert found.count(" ms") == 2
    assert "x of float's" in found
    assert "output y" in found
    assert " dB" in found


def test_weights_that_lie_apart_are_dropped_with_their_model(browser):
    browser.execute_async_script(DROP, "float", "half.onnx")
    browser.execute_async_script(DROP, "quantized", "half.data", "apart.onnx")
    wait_for(browser, "!document.getElementById('run').disabled || error.textContent")
    browser.execute_script("document.getElementById('run').click()")
    wait_for(browser, "document.querySelector('#results table') || error.textContent")

    assert text_of(browser, "#error") == ""
    assert "equal" in text_of(browser, "#results")


def test_integers_are_drawn_so_that_no_mask_is_empty(browser):
    for which in ("float", "quantized"):
        browser.execute_async_script(DROP, which, "masked.onnx")
    wait_for(browser, "!document.getElementById('run').disabled || error.textContent")
    browser.execute_script("document.getElementById('run').click()")
    wait_for(browser, "document.querySelector('#results table') || error.textContent")

    assert "equal" in text_of(browser, "#results")


def test_weights_that_are_not_there_are_asked_for(browser):
    browser.execute_async_script(DROP, "float", "apart.onnx")
    wait_for(browser, "error.textContent")
    browser.execute_async_script(DROP, "quantized", "half.onnx")
    wait_for(browser, "document.querySelector('#quantized.taken')")

    assert "found by its name" in text_of(browser, "#error")


def test_what_is_no_model_is_said_to_be_none(browser):
    browser.execute_async_script(DROP, "float", "index.html")
    wait_for(browser, "error.textContent")

    assert "index.html does not load" in text_of(browser, "#error")
    assert browser.execute_script("return document.getElementById('run').disabled")


def test_models_that_do_not_belong_together_are_an_error(browser):
    browser.execute_async_script(DROP, "float", "float.onnx")
    browser.execute_async_script(DROP, "quantized", "other.onnx")
    wait_for(browser, "!document.getElementById('run').disabled")
    browser.execute_script("document.getElementById('run').click()")
    wait_for(browser, "error.textContent")

    assert text_of(browser, "#results") == ""
