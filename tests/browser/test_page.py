"""The page in a real browser: what a person does with it, and what happens when the server goes away."""

from __future__ import annotations

import json
import re

import av
import numpy as np

from .conftest import settle

COLOUR = """() => {
  const c = document.getElementById("video"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  const sum = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) for (let k = 0; k < 3; k++) sum[k] += d[i + k] * 4 / d.length;
  return sum;
}"""


def shows(page, red: bool = False, green: bool = False, blue: bool = False) -> bool:
    """Whether exactly these of the three colours are strong in the picture."""
    mean = np.array(page.evaluate(COLOUR))
    return mean.max() > 20 and ((mean > 0.5 * mean.max()) == (red, green, blue)).all()


def opened(page, address: str):
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_selector('#status[data-state="open"]')
    return page


def started(page, address: str, prompt: str = "a red ball"):
    opened(page, address)
    page.fill("#prompt", prompt)
    page.click("#start")
    settle(lambda: shows(page, red="red" in prompt, green="green" in prompt, blue="blue" in prompt))
    return page


def text(page, selector: str) -> str:
    return page.inner_text(selector)


def test_start_steer_blend_and_pause(page, server):
    started(page, server.address)
    assert text(page, "#caption") == "a red ball"
    page.click("#suggestions button:has-text('blue')")
    settle(lambda: shows(page, blue=True))
    settle(lambda: re.fullmatch(r"\d+ ms|\d\.\d s", text(page, "#f-latency")))
    settle(lambda: float(text(page, "#f-fps").replace("–", "0")) > 8)
    assert page.locator("#strip li[data-region=sink] img").count() == 3
    settle(lambda: page.locator("#strip li[data-region=window] img").count() >= 6)
    # A blend, with the keyboard alone.
    page.keyboard.press("Escape")
    page.locator("body").press("b")
    page.fill("#prompt-2", "a red ball")
    page.focus("#mix")
    page.keyboard.press("ArrowRight")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    settle(lambda: shows(page, red=True, blue=True))
    assert "49% a blue sea + 51% a red ball" in text(page, "#caption")
    assert page.locator("#entries li").count() == 4  # moving the slider asks, too
    page.keyboard.press("Escape")
    page.locator("body").press(" ")
    settle(lambda: page.get_attribute("#play", "aria-label") == "Start")
    settle(lambda: text(page, "#badge") == "Paused")
    page.locator("body").press("?")
    assert page.is_visible("#shortcuts") and "start or pause" in text(page, "#shortcuts")
    page.keyboard.press("Escape")
    assert not page.is_visible("#shortcuts")


def test_a_path_is_drawn_followed_and_erased(page, server):
    started(page, server.address, "a blue sea")
    page.click("#draw")
    box = page.locator("#paths").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.8)
    page.mouse.down()
    for step in range(5):
        page.mouse.move(box["x"] + box["width"] * (0.2 + 0.01 * step), box["y"] + box["height"] * 0.8)
    page.mouse.up()
    white = "() => document.getElementById('video').getContext('2d').getImageData(14, 51, 1, 1).data[0]"
    settle(lambda: page.evaluate(white) > 200)
    page.click("#tracks button")
    settle(lambda: page.evaluate(white) < 150)
    assert page.locator("#tracks button").count() == 0
    page.focus("#paths")
    for key in ("Enter", "ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    settle(lambda: page.locator("#tracks button").count() == 1)
    page.keyboard.press("Escape")
    assert page.get_attribute("#draw", "aria-pressed") == "false"


def test_memory_and_schedule_can_be_changed_and_refusals_are_explained(page, server):
    started(page, server.address)
    assert page.locator("#memory-choice option:has-text('streaming-llm')").get_attribute("disabled") is not None
    page.click("#refused summary")
    assert "it has no frames" in text(page, "#refused")
    page.select_option("#memory-choice", "self-forcing")
    assert page.input_value("#memory") == "self-forcing(window=21)"
    page.select_option("#schedule-choice", "rolling")
    page.click("#apply")
    settle(lambda: "self-forcing(window=21), rolling(levels=5), seed 0" in text(page, "#entries"))
    settle(lambda: shows(page, red=True))
    page.fill("#memory", "nonsense")
    page.click("#apply")
    settle(lambda: "there are longlive" in text(page, "#toasts"))
    settle(lambda: shows(page, red=True))


def test_a_recording_is_downloaded_and_plays(page, server, tmp_path):
    started(page, server.address)
    page.click("#record")
    settle(lambda: "Recording" in text(page, "#badge"))
    page.wait_for_timeout(1200)
    with page.expect_download() as waiting:
        page.click("#record")
    waiting.value.save_as(tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) >= 12 and frames[0].shape == (256, 256, 3)
    mean = frames[-1].mean((0, 1))
    assert mean[0] > 2 * mean[1]


def test_a_timeline_is_saved_shared_and_replayed(page, server, tmp_path):
    started(page, server.address)
    page.fill("#prompt", "a blue sea")
    page.keyboard.press("Enter")
    settle(lambda: shows(page, blue=True))
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(tmp_path / "timeline.json")
    timeline = json.loads((tmp_path / "timeline.json").read_text())
    assert timeline["prompt"] == "a red ball" and timeline["entries"][0]["item"]["text"] == "a blue sea"
    page.click("#replay")
    settle(lambda: shows(page, red=True))
    settle(lambda: "has been replayed" in text(page, "#toasts"))
    settle(lambda: shows(page, blue=True))
    page.click("#share")
    settle(lambda: "#t=" in page.url)
    other = page.context.new_page()
    opened(other, page.url)
    assert "“a red ball” and 1 change" in text(other, "#banner")
    other.click("#banner button")
    settle(lambda: shows(other, red=True))
    settle(lambda: shows(other, blue=True))
    page.set_input_files("#upload-file", {"name": "bad.json", "mimeType": "application/json", "buffer": b"{}"})
    settle(lambda: "no timeline" in text(page, "#toasts"))


def test_two_tabs_have_two_videos_and_a_reload_goes_on(page, server):
    started(page, server.address, "a red ball")
    other = page.context.new_page()
    started(other, server.address, "a blue sea")
    assert shows(page, red=True) and shows(other, blue=True)
    settle(lambda: "shared with" in text(other, "#f-time-note"))
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    settle(lambda: "goes on at" in text(page, "#toasts"))
    settle(lambda: shows(page, red=True))
    assert page.is_hidden("#start")
    settle(lambda: shows(other, blue=True))


def test_the_page_recovers_when_the_server_was_killed(page, server):
    started(page, server.address, "a blue sea")
    page.wait_for_timeout(1200)  # it is saved every half second
    server.kill()
    settle(lambda: re.search(r"Lost the server at \d\d:\d\d; trying again…", text(page, "#banner")))
    assert "Waiting for the server" in text(page, "#badge") and page.is_disabled("#record")
    assert text(page, "#status") == "Server away"
    server.start()
    settle(
        lambda: re.search(r"The server is back since \d\d:\d\d; your video goes on at \d+:\d\d", text(page, "#banner"))
    )
    settle(lambda: shows(page, blue=True))
    settle(lambda: float(text(page, "#f-fps").replace("–", "0")) > 5)
    assert text(page, "#caption") == "a blue sea"


def test_a_text_is_read(page, server):
    opened(page, server.address)
    page.click("#tab-read")
    page.fill("#text", "The sea was calm. " * 60)
    page.click("#read-start")
    settle(lambda: "Read to the end" in text(page, "#toasts"), 20)
    # The last figures come with the next picture of the page, which on a busy machine is after the message.
    settle(lambda: float(text(page, "#r-loss").replace("–", "0")) > 0)
    assert int(text(page, "#r-tokens").replace(",", "")) > 200
    assert page.locator("#flow span").count() > 250, "all that was read is shown, however fast"
    page.fill("#text-memory", "nonsense")
    page.click("#read-start")
    settle(lambda: "no recipe 'nonsense'" in text(page, "#toasts"))
    page.fill("#text", "")
    page.fill("#text-memory", "window(window=64)")
    page.click("#read-start")  # the sample, which never ends
    settle(lambda: int(text(page, "#r-tokens").replace(",", "").replace("–", "0")) > 500, 20)
    assert "64 tokens held" in text(page, "#r-bytes-note")
    page.click("#read-stop")


def test_a_phone_has_all_of_it(browser, server):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark"
    )
    context.set_default_timeout(10_000)
    page = context.new_page()
    started(page, server.address)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    small = page.evaluate(
        "() => [...document.querySelectorAll('#live button')].filter((b) => b.offsetParent && b.offsetHeight < 32).map((b) => b.id)"
    )
    assert small == []
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, input, select, textarea')].filter((e) => !e.hidden && !(e.ariaLabel || e.innerText?.trim()"
        " || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    context.close()
