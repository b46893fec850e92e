"""The demo command; `tests/analysis/report/test_explanations.py` tests what its page answers."""

import shutil
import signal
import socket
import sys
import time
import urllib.request

import pytest

from experiments import demo
from mmfusion.training.loop import train
from tests import planted
from tests.errors import rejects
from tests.processes import Started

pytestmark = pytest.mark.usefixtures("traced_once")


def test_demo_without_gradio_says_how_to_install_it(monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # set by the command; restored after the test
    monkeypatch.setitem(sys.modules, "gradio", None)
    with rejects("demo", None, says="pip install 'gradio>=6,<7'"):
        demo.import_gradio()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def page_url(tiny_config, tmp_path):
    """Returns the address of the demo of a tiny run, which is stopped at the end."""
    pytest.importorskip("gradio")
    train(tiny_config("fusion=co_attention", {"steps": 4}), tmp_path / "run")
    port = free_port()
    process = Started("experiments.demo", [f"--workdir={tmp_path}/run", f"--port={port}"], merged=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in process.communicate(60)[0] and process.poll() is not None


@pytest.mark.process
@pytest.mark.thorough
def test_demo_page_in_a_browser_predicts_explains_and_loads_nothing_from_elsewhere(page_url, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not (browser_path := shutil.which("chromium")):
        pytest.skip("needs the browser chromium")
    (tmp_path / "a.png").write_bytes(planted.png(80))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page, addresses = browser.new_page(), []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(page_url)
        page.get_by_label("text").first.fill("the red circle is left")
        page.click("#predict")
        page.wait_for_selector("#result .explained .sum", timeout=120_000)
        assert page.locator("#result h2").inner_text().startswith("label: ")
        assert page.locator("#result .panel", has_text="absent").count() == 1  # the image
        page.locator("input[type=file]").first.set_input_files(tmp_path / "a.png")
        page.wait_for_selector("img[src*='a.png']")
        page.click("#predict")
        page.wait_for_selector("#result .maps figure", timeout=120_000)  # attention of the words over the image
        assert page.locator("#result .panel", has_text="absent").count() == 0
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert addresses and all(address.startswith((page_url, "data:", "blob:")) for address in addresses)
