"""Make a film of a synthetic world, change its prompt on the way, and let the judge read it: python examples/world.py [TEXT ...]

TEXT: a scene in plain words, and what it becomes, e.g. "a red circle bounces over the sea". All that is printed is known
exactly or measured from the pixels; nothing is downloaded.
"""

import sys

from evenflow.world import drift, film, obeys

SCENES = (
    "a large red circle bounces and a small striped blue square drifts left over a meadow by day, the camera pans left",
    "a large green circle bounces and a small striped blue square drifts left over a city at night, the camera pans left",
)
SECONDS = 3


def main() -> None:
    texts = sys.argv[1:] or SCENES
    length = SECONDS * 16
    clip = film(seed=1, frames=length * len(texts), scenes=texts, changes=[length * k for k in range(1, len(texts))])
    print(
        f"{clip.frames} frames of {clip.width}×{clip.height}, {len(clip.things)} things, {len(clip.sound)} samples of sound"
    )
    for event in clip.events:
        names = " and ".join(f"the {clip.things[n].colour} {clip.things[n].shape}" for n in event.things)
        print(f"{event.time:5.2f} s  {event.what}{': ' if names else ''}{names}")
    for question in clip.questions:
        print(
            f"at frame {question.asked}: {question.text} {question.answer} (frames {question.first} to {question.last})"
        )
    for k, text in enumerate(texts):
        shown = clip.pixels[length * k + 12 : length * (k + 1)]  # a change is complete after ten frames
        verdict = obeys(shown, text)
        print(f"{text!r}: {verdict.overall:.2f}, {'obeyed' if verdict.obeyed else 'not obeyed'}")
    change = drift(clip.pixels[:length], clip.pixels[-length + 12 :])
    print(f"from the first scene to the last: identity {change.identity:.2f}, backdrop {change.backdrop:.2f}")


if __name__ == "__main__":
    main()
