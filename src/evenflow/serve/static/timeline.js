// All that was asked, in time: shown, saved, opened, shared.

import { $, hue, make, span } from "./ui.js";

const HOW = { keep: "memory kept", clear: "memory cleared", recache: "recomputed", anchored: "anchored" };

/** What an item of a timeline asks, in words. */
export function words(item) {
  switch (item.type) {
    case "prompt": return item.text;
    case "blend": return Object.entries(item.weights).map(([text, weight]) => `${Math.round(weight * 100)}% ${text}`).join(" + ");
    case "track": return `path ${item.id ?? ""}: ${item.points.length} point${item.points.length > 1 ? "s" : ""}`;
    case "erase": return `path ${item.id} erased`;
    case "image": return "began from a picture";
    default: return `${item.memory}, ${item.schedule}, seed ${item.seed}`;
  }
}

function notes(item) {
  return [HOW[item.how], item.over ? `over ${item.over} s` : "", item.way === "slerp" && item.over ? "along an arc" : ""].filter(Boolean).join(", ");
}

export class Timeline {
  /** again(item): ask for it once more. */
  constructor(again) {
    this.again = again;
    this.history = null;
    this.position = 0;
    this.seconds = () => 0;
  }

  set(history, seconds) {
    this.history = history;
    if (seconds) this.seconds = seconds;
    this.draw();
  }

  add(at, item) {
    this.history?.entries.push({ at, item });
    this.draw();
  }

  progress(position) {
    this.position = position;
    this.bar();
  }

  all() {
    if (!this.history) return [];
    return [{ at: 0, item: { type: "prompt", text: this.history.prompt } }, ...this.history.entries];
  }

  draw() {
    const entries = this.all();
    $("entries").replaceChildren(...entries.map(({ at, item }) => {
      const line = make("li", {}, make("time", { text: span(this.seconds(at)) }),
        make("span", {}, words(item), make("small", { text: notes(item) })));
      if (item.type === "prompt" || item.type === "blend") line.append(make("button", { class: "small", text: "Again", onclick: () => this.again(item) }));
      return line;
    }).reverse());
    for (const id of ["share", "download", "replay"]) $(id).disabled = !this.history;
    this.bar();
  }

  bar() {
    const end = Math.max(this.position, 1);
    const shown = this.all().filter(({ item }) => item.type === "prompt" || item.type === "blend");
    $("bar").replaceChildren(...shown.map(({ at, item }, index) => {
      const next = shown[index + 1]?.at ?? end, text = words(item);
      const piece = make("i", { title: text, text });
      piece.style.left = `${Math.min(100, (100 * at) / end)}%`;
      piece.style.width = `${Math.max(0, (100 * (next - at)) / end)}%`;
      piece.style.setProperty("--h", hue(text));
      return piece;
    }));
  }

  /** A link that holds the timeline; null when it is too long for one. */
  link() {
    const packed = btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify(this.history))));
    const link = `${location.origin}/#t=${packed.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}`;
    return link.length > 16000 ? null : link;
  }
}

/** The timeline in a link's hash, or null. */
export function shared(hash) {
  try {
    const packed = hash.match(/[#&]t=([\w-]+)/)?.[1].replaceAll("-", "+").replaceAll("_", "/");
    return packed ? checked(JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0))))) : null;
  } catch {
    return null;
  }
}

/** Throws with what is wrong when `history` is no timeline; the server looks closer. */
export function checked(history) {
  const fits = typeof history?.prompt === "string" && typeof history.memory === "string" && typeof history.schedule === "string"
    && Number.isInteger(history.seed) && Array.isArray(history.entries ?? []);
  if (!fits) throw new Error("that is no saved timeline");
  return { ...history, entries: history.entries ?? [] };
}
