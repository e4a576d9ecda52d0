// The running video: what is asked of the server, and what it answers.

import { Chart } from "./chart.js";
import { Strip } from "./memory.js";
import { Stage } from "./stage.js";
import { Timeline, checked, shared, words } from "./timeline.js";
import { $, amount, banner, brief, choices, clock, copy, icon, make, saveFile, span, toast } from "./ui.js";
import { Wire } from "./wire.js";

const KEPT = "evenflow.session";

export class Live {
  constructor(options) {
    this.options = options;
    this.video = options.video;
    this.session = null;
    this.playing = this.recording = false;
    this.began = null; // what to begin with once the socket is open
    this.lastAck = 0;
    this.stage = new Stage({ shown: (frame) => this.shown(frame), drawn: (points) => this.put({ type: "track", points }) });
    this.strip = new Strip();
    this.drift = new Chart($("drift"), { least: 0.1 });
    this.timeline = new Timeline((item) => this.put(item));
    this.timeline.seconds = (at) => Math.max(0, this.video.stride * (at - 1) + 1) / this.video.fps;
    this.forms();
    this.buttons();
    this.wire = new Wire("/v1/live", {
      open: (again) => this.opened(again), event: (event) => this.heard(event),
      frame: (frame) => this.stage.show(frame), lost: (at, wait) => this.lost(at, wait),
    });
    setInterval(() => this.tick(), 500);
    this.render();
  }

  // -- the connection ---------------------------------------------------------------------------------------------

  opened(again) {
    this.status("open", "Connected");
    const linked = location.hash.match(/[#&]session=([\w-]{22})/)?.[1];
    const known = this.session ?? linked ?? sessionStorage.getItem(KEPT);
    this.back = again;
    if (known) this.wire.send("session.resume", { session: known });
    else if (again) banner(`The server is back since ${clock()}.`, "good", null, 5);
    if (linked) history.replaceState(null, "", location.pathname);
    this.render();
  }

  lost(at) {
    this.status("lost", "Server away");
    banner(`Lost the server at ${clock(at)}; trying again…`, "bad", ["Try now", () => this.wire.now()]);
    this.render();
  }

  status(state, text) {
    $("status").dataset.state = state;
    $("status").querySelector("span").textContent = text;
  }

  // -- what the server says ------------------------------------------------------------------------------------------

  heard(event) {
    switch (event.type) {
      case "session.created": return this.entered(event);
      case "session.updated": return this.updated(event);
      case "session.closed": return this.left();
      case "session.saved": return this.saved(event);
      case "input.appended": return this.appended(event);
      case "response.started": this.playing = true; return this.render();
      case "response.cancelled": this.playing = false; return this.render();
      case "record.started": this.recording = true; return this.render();
      case "record.done": return this.recorded(event);
      case "history.replayed": return toast("The timeline has been replayed.");
      case "stats": return this.figures(event);
      case "memory": return this.strip.show(event);
      case "error": return this.failed(event);
    }
  }

  entered(event) {
    this.session = event.session;
    this.stage.last = -1;
    sessionStorage.setItem(KEPT, event.session);
    if (this.back) banner(`The server is back since ${clock()}; your video goes on at ${span(this.timeline.seconds(event.position))}.`, "good", null, 8);
    else if (event.resumed) toast(`Your video goes on at ${span(this.timeline.seconds(event.position))}.`);
    else banner(null);
    this.back = null;
    this.updated(event);
  }

  updated(event) {
    const { settings } = event;
    this.playing = event.playing;
    this.recording = event.recording;
    this.setSchedule(settings.schedule);
    this.setMemory(settings.memory);
    $("seed").value = settings.seed;
    $("pace").value = Math.log2(settings.pace);
    this.paced();
    this.timeline.set(event.history);
    if (event.position < this.timeline.position) this.drift.clear();
    this.timeline.progress(event.position);
    for (const id of this.stage.tracks.keys()) if (!event.tracks.includes(id)) this.stage.drop(id);
    this.caption(event.asked);
    this.paths();
    this.render();
  }

  left() {
    this.session = null;
    this.playing = this.recording = false;
    sessionStorage.removeItem(KEPT);
    this.render();
  }

  appended({ at, item, unknown }) {
    this.timeline.add(at, item);
    if (unknown.length) toast(`Words that this model does not know and skips: ${unknown.join(", ")}.`, "The suggestions use words that it knows.");
    if (item.type === "prompt" || item.type === "blend") this.caption(item);
    if (item.type === "track") this.stage.keep(item.id, item.points);
    if (item.type === "erase") this.stage.drop(item.id);
    this.paths();
  }

  async saved(event) {
    const link = `${location.origin}/#session=${event.session}`;
    const copied = await copy(link);
    toast(`Kept at ${clock()}: ${amount(event.bytes)}.`, copied ? "The link that opens it was copied." : make("a", { href: link, text: "The link that opens it" }));
  }

  recorded(event) {
    this.recording = false;
    const link = make("a", { href: event.url, download: "evenflow.mp4", text: "Download the film" });
    toast(`${event.seconds.toFixed(1)} s recorded (${amount(event.bytes)}). `, link);
    link.click();
    this.render();
  }

  failed({ error }) {
    if (error.code === "not_found" && !this.playing && (this.back || sessionStorage.getItem(KEPT))) {
      this.left();
      banner(`The server no longer knows your video (${error.message}). Start begins a new one.`, "bad", null, 12);
    } else if (error.code === "busy" && this.wire.open && !this.playing && sessionStorage.getItem(KEPT)) {
      setTimeout(() => this.wire.send("session.resume", { session: sessionStorage.getItem(KEPT) }), 700);
      return;
    } else {
      if (error.code === "failed") this.playing = false;
      const sentence = error.message.charAt(0).toUpperCase() + error.message.slice(1);
      toast(`${sentence}.`, error.what_to_do, true);
    }
    this.back = null;
    this.render();
  }

  figures(stats) {
    this.stats = stats;
    $("f-latency").textContent = brief(stats.latency);
    $("f-bytes").textContent = amount(stats.bytes);
    $("f-drift").textContent = stats.drift.toFixed(3);
    this.drift.add(stats.position, stats.drift);
    this.timeline.progress(stats.position);
    $("f-time").textContent = span(this.timeline.seconds(stats.position));
    const others = stats.sharers - 1;
    $("f-time-note").textContent = others ? `the model is shared with ${others} other${others > 1 ? "s" : ""}` : `${stats.position.toLocaleString("en")} latent frames`;
    if (this.recording) this.badge(`Recording ${stats.recorded?.toFixed(0) ?? 0} s`, "recording");
  }

  // -- what is asked ---------------------------------------------------------------------------------------------------

  wanted() {
    return { memory: $("memory").value.trim(), schedule: $("schedule").value.trim(), seed: Number($("seed").value) || 0, pace: 2 ** Number($("pace").value) };
  }

  start() {
    if (this.session) return void this.wire.send("response.create");
    if (!this.wire.open) return void this.wire.now();
    const prompt = $("prompt").value.trim() || this.video.prompt;
    this.wire.send("session.create", { prompt, start: true, ...this.wanted() });
  }

  toggle() {
    if (!this.playing) this.start();
    else this.wire.send("response.cancel");
  }

  put(item) {
    if (!this.session) {
      if (item.type === "prompt") { $("prompt").value = item.text; this.start(); }
      return;
    }
    if (!this.wire.send("input.append", { item })) toast("The server is away.", "What you asked for was not sent; ask again when it is back.", true);
    else if (!this.playing && item.type !== "image") this.wire.send("response.create");
  }

  ask() {
    const text = $("prompt").value.trim(), second = $("prompt-2").value.trim();
    if (!text) return $("prompt").focus();
    const change = { how: $("how").value || null, over: Number($("over").value), way: $("way").value };
    if (this.blending && second && second !== text) {
      const share = Number($("mix").value) / 100;
      this.put({ type: "blend", weights: { [text]: 1 - share, [second]: share }, ...change });
    } else this.put({ type: "prompt", text, ...change });
  }

  async picture(file) {
    const image = await createImageBitmap(file).catch(() => null);
    if (!image) return toast("That is no picture.", "Choose a PNG, JPEG or WebP file.", true);
    const scale = Math.min(1, 512 / Math.max(image.width, image.height));
    const canvas = make("canvas", { width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale)) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    const data = canvas.toDataURL("image/jpeg", 0.85).split(",")[1];
    if (!this.session) this.wire.send("session.create", { prompt: $("prompt").value.trim() || this.video.prompt, ...this.wanted() });
    else { this.wire.send("response.cancel"); this.wire.send("session.restart"); }
    this.wire.send("input.append", { item: { type: "image", data } });
    this.wire.send("response.create");
  }

  replay(timeline) {
    if (!this.session) this.wire.send("session.create", { prompt: timeline.prompt, memory: timeline.memory, schedule: timeline.schedule, seed: timeline.seed });
    this.wire.send("history.replay", { history: timeline });
  }

  // -- the page ------------------------------------------------------------------------------------------------------------

  forms() {
    const { video } = this;
    $("prompt").value = video.prompt;
    $("suggestions").replaceChildren(...video.suggestions.map((text) =>
      make("button", { type: "button", text, onclick: () => { $("prompt").value = text; this.ask(); } })));
    const reason = (choice) => choice.refused[$("schedule").value.split("(")[0].trim()] ?? null;
    this.setSchedule = choices($("schedule-choice"), $("schedule"), $("schedule-hint"), video.schedules, video.schedule);
    this.setMemory = choices($("memory-choice"), $("memory"), $("memory-hint"), video.memories, video.memory, reason);
    $("schedule").addEventListener("input", () => {
      const memory = video.memories.find((one) => one.name === $("memory").value.split("(")[0].trim());
      this.setMemory(memory && reason(memory) ? "default" : $("memory").value);
      const refused = video.memories.filter(reason);
      $("refused").hidden = !refused.length;
      $("refused").querySelector("ul").replaceChildren(...refused.map((choice) => make("li", {}, make("b", { text: choice.name }), ` – ${reason(choice)}`)));
    });
    $("schedule").dispatchEvent(new Event("input"));
    $("f-fps-note").textContent = `of ${video.fps} wanted`;
    $("ask").onsubmit = (event) => { event.preventDefault(); this.ask(); };
    $("prompt").onkeydown = $("prompt-2").onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.ask(); }
    };
    $("over").onchange = () => { $("way-field").hidden = $("over").value === "0"; };
    $("mix").oninput = () => {
      $("share-a").textContent = `${100 - $("mix").value}%`;
      $("share-b").textContent = `${$("mix").value}%`;
    };
    $("mix").onchange = () => { if (this.session && this.blending) this.ask(); };
    $("blend").onclick = () => this.blend();
    $("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e6); };
    $("pace").oninput = () => this.paced();
    $("pace").onchange = () => this.session && this.wire.send("session.update", { pace: 2 ** Number($("pace").value) });
    $("settings").onsubmit = (event) => {
      event.preventDefault();
      if (this.session) this.wire.send("session.update", this.wanted());
      else this.start();
    };
  }

  buttons() {
    $("start").onclick = () => this.start();
    $("play").onclick = () => this.toggle();
    $("restart").onclick = () => this.session && (this.wire.send("session.restart"), this.wire.send("response.create"));
    $("record").onclick = () => this.session && this.wire.send(this.recording ? "record.stop" : "record.start");
    $("draw").onclick = () => this.draw();
    $("pixels").onclick = () => this.sharp(!$("video").classList.contains("sharp"));
    $("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("screen").requestFullscreen?.());
    $("picture").onclick = () => $("picture-file").click();
    $("picture-file").onchange = ({ target }) => { if (target.files[0]) this.picture(target.files[0]); target.value = ""; };
    $("replay").onclick = () => this.timeline.history && this.replay(this.timeline.history);
    $("download").onclick = () => saveFile("evenflow-timeline.json", `${JSON.stringify(this.timeline.history, null, 1)}\n`);
    $("upload").onclick = () => $("upload-file").click();
    $("upload-file").onchange = async ({ target }) => {
      const [file] = target.files;
      target.value = "";
      if (!file) return;
      try { this.replay(checked(JSON.parse(await file.text()))); } catch (error) { toast("That file holds no timeline.", String(error.message), true); }
    };
    $("share").onclick = async () => {
      const link = this.timeline.link();
      if (!link) return toast("This timeline is too long for a link.", "Save it as a file instead.", true);
      history.replaceState(null, "", link.slice(location.origin.length));
      toast((await copy(link)) ? "The link was copied." : "The link is in the address line.");
    };
    $("keep").onclick = () => this.session && this.wire.send("session.save");
    this.sharp(localStorage.getItem("evenflow.sharp") === "1");
    this.offer();
    addEventListener("hashchange", () => this.offer());
  }

  /** A timeline in the address is offered, never played unasked. */
  offer() {
    const timeline = shared(location.hash);
    if (!timeline || JSON.stringify(timeline) === JSON.stringify(this.timeline.history)) return;
    const changes = timeline.entries.length;
    banner(`A shared timeline: “${timeline.prompt}” and ${changes} change${changes === 1 ? "" : "s"}.`, "ask",
      ["Play it", () => { banner(null); this.replay(timeline); }]);
  }

  blend() {
    this.blending = !this.blending;
    $("blend").setAttribute("aria-pressed", String(this.blending));
    $("second").hidden = !this.blending;
    $("send").textContent = this.blending ? "Show the blend" : "Show this";
    if (this.blending) {
      const other = this.video.suggestions.find((text) => text !== $("prompt").value);
      $("prompt-2").value ||= other ?? "";
      $("prompt-2").focus();
    }
  }

  draw() {
    this.drawing = !this.drawing;
    $("draw").setAttribute("aria-pressed", String(this.drawing));
    this.stage.arm(this.drawing);
    if (this.drawing) toast("Draw on the video.", "With the keyboard: Enter begins, arrows move, Enter ends.");
  }

  erase(id = [...this.stage.tracks.keys()].at(-1)) {
    if (id != null) this.put({ type: "erase", id });
  }

  sharp(on) {
    $("video").classList.toggle("sharp", on);
    $("pixels").setAttribute("aria-pressed", String(on));
    localStorage.setItem("evenflow.sharp", on ? "1" : "0");
  }

  paced() { $("pace-shown").textContent = `${(2 ** Number($("pace").value)).toFixed(2).replace(/\.?0+$/, "")}×`; }

  paths() {
    $("tracks").replaceChildren(...[...this.stage.tracks.keys()].map((id) =>
      make("button", { title: "Erase this path", onclick: () => this.erase(id) }, `path ${id}`, make("span", { class: "x", text: " ✕" }))));
  }

  caption(item) { $("caption").textContent = words(item); }

  badge(text, state) {
    $("badge").hidden = !text;
    $("badge").dataset.state = state;
    $("badge").querySelector("span").textContent = text;
  }

  shown(frame) {
    this.seen = frame;
    const now = performance.now();
    if (now - this.lastAck > 400) { this.lastAck = now; this.wire.send("frame.ack", { frame: frame.frame }); }
  }

  tick() {
    const rate = this.stage.rate();
    $("f-fps").textContent = this.session ? rate.toFixed(1) : "–";
    if (this.stage.tracks.size) this.stage.paint();
  }

  render() {
    const { session } = this, away = !this.wire?.open;
    $("start").hidden = Boolean(session);
    $("start").disabled = away;
    $("start").querySelector("span").textContent = away ? "Waiting for the server" : "Start";
    for (const id of ["play", "restart", "record", "draw", "keep"]) $(id).disabled = away || !session;
    if (!session && !away) $("play").disabled = false;
    icon($("play"), this.playing ? "pause" : "play");
    $("play").setAttribute("aria-label", this.playing ? "Pause" : "Start");
    icon($("record"), this.recording ? "stop" : "record");
    $("record").setAttribute("aria-pressed", String(this.recording));
    $("record").setAttribute("aria-label", this.recording ? "Stop recording" : "Record a film");
    if (!session) this.badge("");
    else if (away) this.badge("Waiting for the server", "paused");
    else if (this.recording) this.badge("Recording", "recording");
    else this.badge(this.playing ? "Live" : "Paused", this.playing ? "live" : "paused");
    $("apply").textContent = session ? "Apply, and begin anew" : "Start with these";
  }
}
