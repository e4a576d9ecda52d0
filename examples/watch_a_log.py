"""Watch a log that never ends, and say which lines are odd: python examples/watch_a_log.py [LOG [MODEL]]

No rules and no training: a line is odd when the model, which has just read the lines before it, did not see it coming.
Memory and the cost of a line stay the same for years. Without LOG, a log is written, rotated and watched: that of a
lighthouse, because the shipped model has read novels and knows nothing of servers; MODEL takes one that does.
"""

import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import evenflow as ef
from evenflow.media import Line, lines
from evenflow.models import Stream

USUAL = [
    "The wind came from the west, and the sea was calm.",
    "The lamp was lit at dusk, and burned well all the night.",
    "A ship went by to the north, and we saw her lights.",
    "It rained in the morning, and the afternoon was fair.",
    "My wife went to the town for bread and oil.",
    "I cleaned the glass, and wrote a letter to my brother.",
]
ODD = {
    90: "MAYDAY MAYDAY de trawler Kitty, 48°51'N 5°02'W, engine afire, 7 aboard!!",
    150: "kernel: sdb1: I/O error (-5), sector 0x7f3a, retry 3/3",
}
LENGTH = 180
KNOWN = 20  # lines to read before anything can be called odd
CERTAIN = 4.0  # standard deviations above the usual from which a line is odd


def keep(path: Path) -> None:
    """The keeper at work: the same few lines, and two that are not the same. The log is rotated half-way."""
    draw = random.Random(1)
    for count in range(LENGTH):
        if count == LENGTH // 2:
            path.rename(path.with_suffix(".1"))
        with path.open("a") as log:
            log.write((ODD.get(count) or draw.choice(USUAL)) + "\n")
        time.sleep(0.01)


def watch(path: Path, stream: Stream) -> Iterator[tuple[Line, float, float, float]]:
    """Each line as it comes, its nats per token, and their mean and standard deviation over the lines before it."""
    lately = deque[float](maxlen=100)
    for line in lines(path, follow=True):
        if line is None:  # nothing new for the moment
            continue
        ids = stream.tokenizer.encode(line.text, add_special_tokens=False)
        nats = stream.surprisal(ids).nanmean().item()
        if len(lately) >= KNOWN:
            yield line, nats, statistics.mean(lately), statistics.stdev(lately)
        lately.append(nats)


def report(watched: Iterator[tuple[Line, float, float, float]]) -> None:
    for line, nats, usual, spread in watched:
        if nats > usual + CERTAIN * spread:
            print(f"{nats:.1f} nats a token, usual {usual:.1f} ± {spread:.1f}: {line.text.rstrip()}", flush=True)


def main() -> None:
    stream = ef.open(sys.argv[2] if len(sys.argv) > 2 else "tiny", "streaming-llm(sink=4, window=508)")
    if len(sys.argv) > 1:
        report(watch(Path(sys.argv[1]), stream))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "keeper.log"
        log.touch()
        threading.Thread(target=keep, args=(log,), daemon=True).start()
        report(islice(watch(log, stream), LENGTH - KNOWN))


if __name__ == "__main__":
    main()
