// The video, and the paths drawn on it.

import { $ } from "./ui.js";

const MOST = 256; // points of a path that are sent

export class Stage {
  /** shown(frame): a frame is on the screen. drawn(points): a path of [seconds, x, y] in pixels of the video. */
  constructor({ shown, drawn }) {
    this.canvas = $("video");
    this.overlay = $("paths");
    this.shown = shown;
    this.drawn = drawn;
    this.last = -1;
    this.times = [];
    this.tracks = new Map(); // id → {points, begun}
    this.path = null; // being drawn
    this.cursor = null; // of the keyboard
    this.armed = false;
    this.pointer();
    this.keyboard();
    new ResizeObserver(() => this.paint()).observe(this.overlay);
  }

  async show(frame) {
    const image = await createImageBitmap(frame.picture);
    if (frame.frame > this.last) {
      this.last = frame.frame;
      if (this.canvas.width !== frame.width || this.canvas.height !== frame.height) {
        this.canvas.width = frame.width;
        this.canvas.height = frame.height;
        $("screen").style.setProperty("--ratio", frame.width / frame.height);
      }
      this.canvas.getContext("2d").drawImage(image, 0, 0);
      this.times.push(performance.now());
      if (this.times.length > 64) this.times.shift();
      if (this.tracks.size || this.armed) this.paint();
      this.shown(frame);
    }
    image.close();
  }

  /** Frames shown a second, over the last two. */
  rate() {
    const now = performance.now(), lately = this.times.filter((time) => now - time < 2000);
    return lately.length < 2 ? 0 : ((lately.length - 1) * 1000) / (now - lately[0]);
  }

  arm(on) {
    this.armed = on;
    this.path = null;
    this.cursor = null;
    $("screen").classList.toggle("drawing", on);
    if (on) this.overlay.setAttribute("tabindex", "0");
    else this.overlay.removeAttribute("tabindex");
    this.overlay.setAttribute("aria-hidden", String(!on));
    this.overlay.setAttribute("aria-label", "Draw here: Enter begins and ends a path, arrows move");
    if (on) this.overlay.focus({ preventScroll: true });
    this.paint();
  }

  keep(id, points) { this.tracks.set(id, { points, begun: performance.now() }); this.paint(); }
  drop(id) { this.tracks.delete(id); this.paint(); }
  clear() { this.tracks.clear(); this.paint(); }

  /** Where the video lies in the overlay: pixels of the page for one of the video, and its corner. */
  fit() {
    const width = this.overlay.clientWidth, height = this.overlay.clientHeight;
    const scale = Math.min(width / this.canvas.width, height / this.canvas.height);
    return { scale, left: (width - this.canvas.width * scale) / 2, top: (height - this.canvas.height * scale) / 2 };
  }

  place(event) {
    const box = this.overlay.getBoundingClientRect(), { scale, left, top } = this.fit();
    const within = (value, most) => Math.max(0, Math.min(most - 1, value));
    return [within((event.clientX - box.left - left) / scale, this.canvas.width),
      within((event.clientY - box.top - top) / scale, this.canvas.height)];
  }

  begin(x, y) { this.path = { began: performance.now(), points: [[0, x, y]] }; }

  go(x, y) {
    const [, lastX, lastY] = this.path.points.at(-1);
    if (Math.hypot(x - lastX, y - lastY) < 0.5) return;
    this.path.points.push([(performance.now() - this.path.began) / 1000, x, y]);
    this.paint();
  }

  end() {
    const { points } = this.path;
    this.path = null;
    const step = Math.ceil(points.length / MOST);
    const some = points.filter((_, at) => at % step === 0 || at === points.length - 1);
    this.drawn(some.map(([seconds, x, y]) => [Math.round(seconds * 1000) / 1000, Math.round(x * 10) / 10, Math.round(y * 10) / 10]));
    this.paint();
  }

  pointer() {
    const pad = this.overlay;
    pad.addEventListener("pointerdown", (event) => {
      if (!this.armed) return;
      event.preventDefault();
      pad.setPointerCapture(event.pointerId);
      this.begin(...this.place(event));
    });
    pad.addEventListener("pointermove", (event) => { if (this.path && !this.cursor) this.go(...this.place(event)); });
    for (const kind of ["pointerup", "pointercancel"]) pad.addEventListener(kind, () => { if (this.path && !this.cursor) this.end(); });
  }

  keyboard() {
    const steps = { ArrowLeft: [-2, 0], ArrowRight: [2, 0], ArrowUp: [0, -2], ArrowDown: [0, 2] };
    this.overlay.addEventListener("keydown", (event) => {
      if (!this.armed || !(event.key in steps || event.key === "Enter")) return;
      event.preventDefault();
      event.stopPropagation();
      this.cursor ??= [this.canvas.width / 2, this.canvas.height / 2];
      if (event.key === "Enter") {
        if (this.path) { this.end(); this.cursor = null; } else this.begin(...this.cursor);
      } else {
        const [dx, dy] = steps[event.key];
        this.cursor = [Math.max(0, Math.min(this.canvas.width - 1, this.cursor[0] + dx)),
          Math.max(0, Math.min(this.canvas.height - 1, this.cursor[1] + dy))];
        if (this.path) this.go(...this.cursor);
      }
      this.paint();
    });
  }

  paint() {
    const pad = this.overlay, ratio = devicePixelRatio || 1;
    if (!pad.clientWidth) return;
    pad.width = Math.round(pad.clientWidth * ratio);
    pad.height = Math.round(pad.clientHeight * ratio);
    const pen = pad.getContext("2d"), { scale, left, top } = this.fit();
    pen.scale(ratio, ratio);
    const at = (x, y) => [left + (x + 0.5) * scale, top + (y + 0.5) * scale];
    const line = (points, alpha) => {
      pen.globalAlpha = alpha;
      pen.beginPath();
      points.forEach(([, x, y], index) => (index ? pen.lineTo(...at(x, y)) : pen.moveTo(...at(x, y))));
      for (const [width, colour] of [[6, "rgb(0 0 0 / 55%)"], [3, "#fff"]]) {
        pen.lineWidth = width;
        pen.strokeStyle = colour;
        pen.lineCap = pen.lineJoin = "round";
        pen.stroke();
      }
    };
    const dot = (x, y, size) => {
      pen.globalAlpha = 1;
      pen.beginPath();
      pen.arc(...at(x, y), size, 0, 2 * Math.PI);
      pen.fillStyle = "#fff";
      pen.strokeStyle = "rgb(0 0 0 / 70%)";
      pen.lineWidth = 2;
      pen.fill();
      pen.stroke();
    };
    for (const { points, begun } of this.tracks.values()) {
      const now = (performance.now() - begun) / 1000, over = now - points.at(-1)[0];
      line(points, over > 2 ? 0.25 : 0.8);
      const next = points.findIndex(([seconds]) => seconds >= now);
      if (next >= 0) dot(points[next][1], points[next][2], 6);
    }
    if (this.path) {
      line(this.path.points, 1);
      dot(this.path.points.at(-1)[1], this.path.points.at(-1)[2], 7);
    } else if (this.cursor) dot(...this.cursor, 7);
  }
}
