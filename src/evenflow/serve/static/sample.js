// A text without end, for those who have none at hand: plain sentences that come back in ever new order.

const WHO = ["The keeper", "A girl from the harbour", "The old captain", "Her brother", "The baker's wife", "A stranger", "The doctor"];
const DID = ["lit the lamp", "counted the boats", "wrote a letter", "told the same story", "walked to the end of the pier", "mended a net", "listened to the wind"];
const WHEN = ["before the rain came", "while the town slept", "as on every evening", "when the bell had rung", "and said nothing", "until the tide turned", "although it was late"];
const THEN = ["Nobody asked why.", "The sea did not answer.", "In the morning it was forgotten.", "It was the third time that week.", "The light went round and round.", "So the days went by."];

/** Paragraphs, for ever; the same seed gives the same text. */
export function* sample(seed = 1) {
  let state = seed;
  const pick = (list) => {
    state = (state * 48271) % 2147483647;
    return list[state % list.length];
  };
  for (;;) {
    const sentences = Array.from({ length: 4 }, () => `${pick(WHO)} ${pick(DID)} ${pick(WHEN)}. ${pick(THEN)}`);
    yield `${sentences.join(" ")}\n\n`;
  }
}
