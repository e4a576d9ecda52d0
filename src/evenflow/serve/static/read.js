// A text that is read live.

import { Chart } from "./chart.js";
import { sample } from "./sample.js";
import { $, amount, banner, choices, clock, make, toast } from "./ui.js";
import { Wire } from "./wire.js";

const PIECE = 4096; // characters sent at a time
const AHEAD = 16384; // characters that may wait on the server
const WORDS = 1200; // tokens shown

export class Read {
  constructor(options) {
    this.wire = null;
    this.source = null;
    this.file = null;
    this.loss = new Chart($("loss"), { least: 0.5, zero: false, unit: (value) => `${value.toFixed(1)} nats` });
    choices($("text-memory-choice"), $("text-memory"), $("text-hint"), options.text.memories, options.text.memory, (choice) => choice.refused.text ?? null);
    $("read-start").onclick = () => this.start();
    $("read-stop").onclick = () => this.stop("Stopped.");
    $("text-file-open").onclick = () => $("text-file").click();
    $("text-file").onchange = ({ target }) => {
      this.file = target.files[0] ?? null;
      if (this.file) { $("text").value = ""; $("text").placeholder = `${this.file.name}, ${amount(this.file.size)}`; }
      target.value = "";
    };
    new ResizeObserver(() => this.held()).observe($("kept"));
  }

  async *pieces() {
    const text = $("text").value;
    if (text.trim()) {
      for (let at = 0; at < text.length; at += PIECE) yield text.slice(at, at + PIECE);
    } else if (this.file) {
      const reader = this.file.stream().pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        for (let at = 0; at < value.length; at += PIECE) yield value.slice(at, at + PIECE);
      }
    } else yield* sample();
  }

  start() {
    this.stop();
    this.loss.clear();
    this.latest = null;
    this.sent = 0;
    this.finished = false;
    $("flow").replaceChildren();
    for (const id of ["r-loss", "r-rate", "r-bytes", "r-tokens"]) $(id).textContent = "–";
    $("r-tokens-note").textContent = "the model is being loaded…";
    this.source = this.pieces();
    this.busy(true);
    this.wire = new Wire("/v1/read", {
      open: (again) => {
        if (again) { banner(`The server is back since ${clock()}; reading from the beginning.`, "good", null, 6); this.source = this.pieces(); this.loss.clear(); }
        this.wire.send("read.create", { memory: $("text-memory").value.trim() || null });
        this.feed(0);
      },
      event: (event) => this.heard(event),
      lost: (at) => banner(`Lost the server at ${clock(at)}; trying again…`, "bad", ["Try now", () => this.wire?.now()]),
    });
  }

  stop(said) {
    if (!this.wire) return;
    this.wire.close();
    this.wire = null;
    this.busy(false);
    if (said) toast(said);
  }

  busy(on) {
    $("read-start").textContent = on ? "Read anew" : "Read";
    $("read-stop").disabled = !on;
  }

  /** Send as much as the server may have waiting. */
  async feed(waiting) {
    const { wire, source } = this;
    if (this.feeding === source || !wire?.open) return;
    this.feeding = source; // another text may begin while this one is still being fetched
    for (let ahead = waiting; ahead < AHEAD;) {
      const { done, value } = await source.next();
      if (this.wire !== wire || this.source !== source) break;
      if (done) { if (!this.finished) wire.send("read.finish"); this.finished = true; break; }
      this.finished = false;
      wire.send("read.append", { text: value });
      ahead += value.length;
    }
    if (this.feeding === source) this.feeding = null;
  }

  heard(event) {
    if (event.type === "read.progress") {
      this.latest = event;
      this.show(event);
      if (event.waiting < AHEAD / 2) this.feed(event.waiting);
    } else if (event.type === "read.finished") {
      this.stop(`Read to the end: ${event.tokens.toLocaleString("en")} tokens, ${event.nats?.toFixed(3) ?? "–"} nats each.`);
    } else if (event.type === "error" && event.error.code !== "rate_limited" && event.error.code !== "busy") {
      toast(event.error.message, event.error.what_to_do, true);
      this.stop();
    }
  }

  show(event) {
    $("r-loss").textContent = (event.nats ?? event.nats_all)?.toFixed(2) ?? "–";
    $("r-loss-note").textContent = event.nats_all == null ? "nats, lately" : `nats, lately; ${event.nats_all.toFixed(2)} over all`;
    $("r-rate").textContent = event.tokens_per_second == null ? "–" : Math.round(event.tokens_per_second).toLocaleString("en");
    $("r-bytes").textContent = amount(event.bytes);
    $("r-bytes-note").textContent = `${event.count.toLocaleString("en")} tokens held${event.folded ? `, ${event.folded} folded` : ""}`;
    $("r-tokens").textContent = event.tokens.toLocaleString("en");
    $("r-tokens-note").textContent = "tokens";
    this.loss.add(event.tokens, event.nats);
    const flow = $("flow"), atEnd = flow.scrollTop + flow.clientHeight >= flow.scrollHeight - 8;
    flow.append(...event.pieces.map(([text, nats]) => {
      const word = make("span", { text, title: nats == null ? "" : `${nats.toFixed(1)} nats` });
      word.style.setProperty("--s", `${Math.round(Math.min(1, Math.max(0, (nats ?? 0) - 1) / 9) * 60)}%`);
      return word;
    }));
    while (flow.children.length > WORDS) flow.firstChild.remove();
    if (atEnd) flow.scrollTop = flow.scrollHeight;
    this.held();
  }

  /** The text from its first to its last token, with what is still held filled in. */
  held() {
    const canvas = $("kept"), width = canvas.clientWidth, scale = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), height = canvas.height;
    const colour = (name) => style.getPropertyValue(name).trim();
    pen.fillStyle = colour("--well");
    pen.fillRect(0, height * 0.3, canvas.width, height * 0.4);
    if (!this.latest?.tokens) return;
    const end = this.latest.tokens + 1;
    this.latest.held.forEach(([first, last], at) => {
      pen.fillStyle = colour(at === this.latest.held.length - 1 ? "--window" : at ? "--memory" : "--sink");
      const x = (first / end) * canvas.width;
      pen.fillRect(x, height * 0.2, Math.max(2 * scale, ((last + 1 - first) / end) * canvas.width), height * 0.6);
    });
  }
}
