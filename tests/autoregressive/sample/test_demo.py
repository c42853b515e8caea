"""The demo page in a real browser: every tab, as a visitor uses it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from autoregressive.sample import demo, edit_c2i, sample_c2i
from tests.helpers import ROOT, quietly

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# JavaScript: the next answer comes a second late, 0.2 s before ``window.late``
LATE = """
const real = window.fetch;
window.fetch = async (...words) => {
  window.fetch = real;
  const answer = await real(...words);
  await new Promise((done) => setTimeout(done, 1000));
  setTimeout(() => { window.late = true; }, 200);
  return answer;
};
"""
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync "
    "disable-background-networking disable-component-update window-size=1240,1000"
)


@pytest.fixture(scope="module")
def page():
    """Address of a demo in a process of its own."""
    command = [sys.executable, "autoregressive/sample/demo.py", "--port", "0"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    )
    yield running.stdout.readline().split()[0]
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 0


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    downloads = {"download.default_directory": str(tmp_path)}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    with webdriver.Chrome(options, service) as driver:
        driver.implicitly_wait(20)
        yield driver


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def wait(browser, condition: str):
    """Wait until a JavaScript expression is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 30, 0.1).until(lambda b: b.execute_script(f"return {condition}"))


def set_value(browser, selector: str, value: object) -> None:
    script = "const [e, v] = arguments; e.value = v; e.dispatchEvent(new Event('input')); "
    script += "e.dispatchEvent(new Event('change'))"
    browser.execute_script(script, find(browser, selector), str(value))


def fetched(browser, name: str) -> bytes:
    """Content of a file that the page links to."""
    script = "const done = arguments[1]; fetch(document.querySelector(`a[download='${arguments[0]}'"
    script += "]`).href).then(a => a.arrayBuffer()).then(b => done([...new Uint8Array(b)]))"
    return bytes(browser.execute_async_script(script, name))


def files_of(code: str, main, folder, capfd, monkeypatch) -> None:
    """Run the command that the page shows, in ``folder``."""
    words = [str(folder / w) if w.endswith(".png") else w for w in shlex.split(code)[2:]]
    quietly(capfd, monkeypatch, *words, main=main)


@pytest.mark.slow
def test_a_visit(page, browser, tmp_path, capfd, monkeypatch):
    browser.get(page)
    wait(browser, "document.body.dataset.ready")

    # something is there at once
    wait(browser, "!document.querySelector('#generate .primary').disabled")
    assert "step 19 of 19" in find(browser, ".run[data-model=digits-4x] h3").text

    # a digit of a chosen class, by two models, filling in
    set_value(browser, "#generate [name=class]", 7)
    set_value(browser, "#generate [name=images]", 3)
    set_value(browser, "#generate [name=beside]", "digits-1x")
    find(browser, "#generate .primary").click()
    wait(browser, "document.querySelectorAll('#generate .run code').length == 2")
    wait(browser, "!document.querySelector('#generate .primary').disabled")
    title = find(browser, ".run[data-model=digits-4x] h3").text
    assert "step 19 of 19, 64 of 64 cells" in title
    assert "step 64 of 64" in find(browser, ".run[data-model=digits-1x] h3").text
    code = find(browser, ".run[data-model=digits-4x] code").text
    files_of(code, sample_c2i.main, tmp_path, capfd, monkeypatch)
    for name in ("digits-4x.png", "digits-4x.gif"):
        assert fetched(browser, name) == (tmp_path / name).read_bytes(), name
    set_value(browser, ".run[data-model=digits-4x] input[type=range]", 3)
    assert "step 4 of 19, 4 of 64 cells" in find(browser, ".run[data-model=digits-4x] h3").text
    pixels = "document.querySelector('.run canvas').toDataURL()"
    plain = browser.execute_script(f"return {pixels}")
    set_value(browser, "#overlay", "entropy")
    assert browser.execute_script(f"return {pixels}") != plain

    # a part of the first one anew
    find(browser, ".run[data-model=digits-4x] .tiles canvas").click()
    wait(browser, "!document.getElementById('edit').hidden")
    from selenium.webdriver import ActionChains

    canvas = find(browser, "#paint")
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(
        60, 60
    ).release().perform()
    find(browser, "#edit .primary").click()
    wait(browser, "document.querySelectorAll('#edits code').length == 1")
    for name in ("image.png", "mask.png"):
        (tmp_path / name).write_bytes(fetched(browser, name))
    code = find(browser, "#edits code").text
    files_of(code, edit_c2i.main, tmp_path, capfd, monkeypatch)
    assert fetched(browser, "edit.png") == (tmp_path / "edit.png").read_bytes()

    # the order
    find(browser, "[data-tab=order]").click()
    set_value(browser, "#order [name=grid]", 12)
    wait(browser, "document.getElementById('order-text').textContent.includes('39 forward calls')")
    browser.execute_script(LATE)
    set_value(browser, "#order [name=n]", 16)
    set_value(browser, "#order [name=schedule]", "nested")
    wait(browser, "window.late")  # what was asked first is answered last, and does not count
    wait(browser, "document.getElementById('order-text').textContent.includes('15 forward calls')")
    set_value(browser, "#order [name=schedule]", "3x")
    assert "expected region, nested" in wait(
        browser, "document.getElementById('order-error').textContent"
    )

    errors = [e for e in browser.get_log("browser") if "/api/order" not in e["message"]]
    assert not errors, errors
    requests = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [
        r["params"]["request"]["url"]
        for r in requests
        if r["method"] == "Network.requestWillBeSent"
    ]
    hosts = ("data:", "blob:", "chrome", page)
    assert asked and all(u.startswith(hosts) for u in asked), asked


def test_the_page_needs_both_files_or_none(capfd, monkeypatch):
    said = quietly(capfd, monkeypatch, "--gpt-ckpt", "a.pt", main=demo.main)
    assert "--gpt-ckpt and --vq-ckpt: both are needed, or neither" in said


def test_a_port_in_use_is_said(page, capfd, monkeypatch):
    port = page.rstrip("/").rpartition(":")[2]
    said = quietly(capfd, monkeypatch, "--port", port, main=demo.main)
    assert f"--host 127.0.0.1 --port {port}: " in said and os.strerror(98) in said
    said = quietly(capfd, monkeypatch, "--port", 99999, main=demo.main)
    assert "--port 99999: " in said
