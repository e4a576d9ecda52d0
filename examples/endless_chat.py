"""A chat that never has to be cut short: python examples/endless_chat.py [--model FOLDER] [--ask]

Every turn reads what is new and nothing else, whatever was said before, so the hundredth answer comes as fast as the
first and memory stays flat. The chat survives the program, and a question aside leaves no trace in it. The shipped
model has only read novels: it answers like one. --ask lets you type, until an empty line.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import evenflow as ef
from evenflow.models import Stream

SAID = [
    "Good evening! Who lives in this house?",
    "And what did the old man say to you?",
    "Did you believe him, when he told you that?",
    "What was in the letter, then?",
    "How far is it from here to the sea?",
    "Shall we go there tomorrow, if the weather holds?",
    "You have not told me yet why you left the town.",
    "Is there anything that you are afraid of?",
    "Then let us talk of something else. What do you read?",
    "It is late. Will you tell me the rest tomorrow?",
]


def typed() -> Iterator[str]:
    while text := input("\nyou: "):
        yield text


def answer(stream: Stream, text: str) -> str:
    """One turn: read what was said, write a paragraph."""
    print(f"\nyou: {text}\nit:", end="")
    begin, reply = time.perf_counter(), []
    asked = f'\n\n"{text}"\n\n'
    for token in stream.generate(asked, max_tokens=40, temperature=0.7, top_p=0.9, seed=3, stop="\n\n"):
        reply.append(token)
    spoken = " ".join(stream.tokenizer.decode(reply).split())
    cost = 1000 * (time.perf_counter() - begin) / len(reply)
    print(f" {spoken}\n    [position {stream.position}, {stream.nbytes:,} bytes held, {cost:.0f} ms a token]")
    return spoken


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="tiny", help="a folder or hub name of any transformers decoder")
    options.add_argument("--memory", default="streaming-llm(sink=4, window=252)")
    options.add_argument("--ask", action="store_true", help="type yourself")
    chosen = options.parse_args()

    chat = ef.open(chosen.model, chosen.memory)
    for text in typed() if chosen.ask else SAID:
        answer(chat, text)

    # A question aside is asked of a copy: the chat itself does not hear it.
    here = chat.position
    print("\n(aside, to a copy)")
    answer(chat.fork(), "Between us: who was the old man?")
    assert chat.position == here

    # The chat goes on tomorrow, in another process, exactly as it would have gone on now.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.evenflow"
        chat.save(path)
        print(f"\n(saved: {path.stat().st_size:,} bytes; now and tomorrow say the same)")
        tomorrow = ef.resume(chat.model, path, tokenizer=chat.tokenizer)
        assert answer(chat, "Good night!") == answer(tomorrow, "Good night!")


if __name__ == "__main__":
    main()
