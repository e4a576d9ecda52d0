// A line over time, drawn small.

const POINTS = 600;

export class Chart {
  /** least: the least height of the value axis. unit: how a value is written. */
  constructor(canvas, { least = 0.1, unit = (value) => value.toFixed(2), zero = true } = {}) {
    this.canvas = canvas;
    this.least = least;
    this.unit = unit;
    this.zero = zero;
    this.points = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(x, y) {
    if (y == null || !Number.isFinite(y)) return;
    this.points.push([x, y]);
    if (this.points.length > POINTS) this.points = this.points.filter((_, at) => at % 2 === 0);
    this.draw();
  }

  clear() {
    this.points = [];
    this.draw();
  }

  draw() {
    const { canvas, points } = this, scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const [line, soft, accent] = ["--line", "--soft", "--accent"].map((name) => style.getPropertyValue(name).trim());
    pen.scale(scale, scale);
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const values = points.map(([, y]) => y);
    const low = this.zero || !points.length ? 0 : Math.min(...values);
    const high = Math.max(...values, low + this.least);
    const from = points[0]?.[0] ?? 0, to = points.at(-1)?.[0] ?? 1;
    const X = (x) => 2 + ((x - from) / Math.max(1e-9, to - from)) * (width - 4);
    const Y = (y) => height - 4 - ((y - low) / (high - low)) * (height - 20);
    pen.strokeStyle = line;
    pen.beginPath();
    for (const y of [height - 4, 16]) { pen.moveTo(0, y + 0.5); pen.lineTo(width, y + 0.5); }
    pen.stroke();
    pen.fillStyle = soft;
    if (points.length) pen.fillText(this.unit(high), 2, 11);
    if (points.length && !this.zero) pen.fillText(this.unit(low), 2, height - 8);
    if (points.length < 2) return;
    pen.beginPath();
    points.forEach(([x, y], at) => (at ? pen.lineTo(X(x), Y(y)) : pen.moveTo(X(x), Y(y))));
    pen.strokeStyle = accent;
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(X(to), height - 4);
    pen.lineTo(X(from), height - 4);
    pen.globalAlpha = 0.12;
    pen.fillStyle = accent;
    pen.fill();
  }
}
