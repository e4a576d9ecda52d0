"""Record the live page as an animated picture: `python tools/record_live.py docs/live.webp`.

A server of its own and a headless Chromium; the page is steered by a prompt and by a path that is drawn.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from evenflow.serve import started

WIDTH, HEIGHT, SHOWN = 1440, 1080, (960, 720)
EVERY, SECONDS = 0.25, 15.0
FIRST = "a large red circle bounces over the sea, by day"
THEN = "a large yellow star bounces over the sea, at night"


def played(page: Page, address: str) -> list[tuple[float, Image.Image]]:
    """Start, steer, draw a path; pictures of the page and when each was taken."""
    page.goto(address)
    page.wait_for_selector('#status[data-state="open"]')
    page.fill("#prompt", FIRST)
    page.click("#start")
    # The page forbids code that is made at run time, and with it Playwright's wait for a function.
    while page.inner_text("#f-fps") == "–":
        time.sleep(0.1)
    began, pictures, asked, drawn = time.monotonic(), [], False, False
    while (now := time.monotonic() - began) < SECONDS:
        if now > 3.5 and not asked:
            page.fill("#prompt", THEN)
            page.click("#send")
            asked = True
        if now > 8.5 and not drawn:
            page.click("#draw")
            box = page.locator("#paths").bounding_box()
            assert box is not None
            points = [(0.2, 0.7), (0.35, 0.45), (0.5, 0.35), (0.65, 0.45), (0.8, 0.7)]
            for n, (x, y) in enumerate(points):
                page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
                if not n:
                    page.mouse.down()
            page.mouse.up()
            drawn = True
        taken = Image.open(io.BytesIO(page.screenshot(type="jpeg", quality=90)))
        pictures.append((now, taken.convert("RGB").resize(SHOWN, Image.Resampling.LANCZOS)))
        time.sleep(max(0.0, EVERY - (time.monotonic() - began - now)))
    return pictures


def main(out: Path) -> None:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("a browser is needed: install the package chromium")
    with started() as address, sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--disable-gpu"])
        pictures = played(browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}), address)
        browser.close()
    times = [taken for taken, _ in pictures]
    lasting = [round(1000 * (b - a)) for a, b in zip(times, [*times[1:], times[-1] + 1.5], strict=True)]
    first, *rest = (picture for _, picture in pictures)
    first.save(out, save_all=True, append_images=rest, duration=lasting, loop=0, quality=55, method=4)
    print(f"{out}: {len(pictures)} pictures, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/live.webp"))
