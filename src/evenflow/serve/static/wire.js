// A socket that comes back by itself.

const HEADER = 32;
const FORMATS = ["image/webp", "image/jpeg"];

/** What a binary message says: see docs/live.md. */
export function readFrame(buffer) {
  const view = new DataView(buffer);
  if (view.byteLength < HEADER || view.getUint32(0) !== 0x45564e46 || view.getUint8(4) !== 1) return null;
  return {
    width: view.getUint16(6, true), height: view.getUint16(8, true), chunk: view.getUint32(12, true),
    frame: Number(view.getBigUint64(16, true)), captured: view.getFloat64(24, true),
    picture: new Blob([new Uint8Array(buffer, HEADER)], { type: FORMATS[view.getUint8(5)] }),
  };
}

export class Wire {
  /** handlers: open(again), event(event), frame(frame), lost(at, seconds until the next try). */
  constructor(path, handlers) {
    this.address = location.origin.replace(/^http/, "ws") + path;
    this.handlers = handlers;
    this.wait = 0.5;
    this.lostAt = null;
    this.socket = null;
    this.timer = 0;
    this.wanted = true;
    this.connect();
    addEventListener("online", () => this.now());
    document.addEventListener("visibilitychange", () => { if (!document.hidden && this.lostAt) this.now(); });
  }

  get open() { return this.socket?.readyState === WebSocket.OPEN; }

  connect() {
    clearTimeout(this.timer);
    const socket = new WebSocket(this.address);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      const again = this.lostAt;
      this.wait = 0.5;
      this.lostAt = null;
      this.handlers.open(again);
    };
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.handlers.event(JSON.parse(data));
      else {
        const frame = readFrame(data);
        if (frame) this.handlers.frame?.(frame);
      }
    };
    socket.onclose = () => {
      if (this.socket !== socket || !this.wanted) return;
      this.lostAt ??= new Date();
      this.handlers.lost(this.lostAt, this.wait);
      this.timer = setTimeout(() => this.connect(), this.wait * 1000);
      this.wait = Math.min(5, this.wait * 1.6);
    };
  }

  /** Try again at once. */
  now() {
    if (this.wanted && this.socket.readyState === WebSocket.CLOSED) this.connect();
  }

  send(type, values = {}) {
    if (!this.open) return false;
    this.socket.send(JSON.stringify({ type, ...values }));
    return true;
  }

  close() {
    this.wanted = false;
    clearTimeout(this.timer);
    this.socket.close();
  }
}
