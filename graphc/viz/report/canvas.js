// A canvas that is panned and zoomed; what is on it is painted by the view that is shown.
//
// A view has: paint(ctx, camera), bounds() -> [x0, y0, x1, y1], and may have pick(x, y) -> item,
// choose(item), hint(item) -> text, axes: "xy" (default), "x" (zooms along x only) or "free".

const WHITE = "#ffffff", INK = "#1b2733", FAINT = "#5a6772", GRID = "#e8edf2";
const FONT = 'system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif';
const PHASE = {
  forward: {fill: "#e9f1fb", stroke: "#4a78b5", edge: "#7b93ad"},
  backward: {fill: "#fdeee0", stroke: "#c77a33", edge: "#d3a06c"},
  update: {fill: "#e8f5e9", stroke: "#4b9a57", edge: "#86b98e"},
};

class Canvas {
  constructor(element, tip) {
    this.element = element;
    this.tip = tip;
    this.ctx = element.getContext("2d");
    this.view = null;
    this.cameras = new Map();
    this.camera = {x: 0, y: 0, kx: 1, ky: 1};
    new ResizeObserver(() => this.resize()).observe(element);
    element.addEventListener("wheel", event => this.wheel(event), {passive: false});
    element.addEventListener("pointerdown", event => this.down(event));
    element.addEventListener("pointermove", event => this.move(event));
    element.addEventListener("pointerup", event => this.up(event));
    element.addEventListener("pointerleave", () => this.hint(null));
    element.addEventListener("dblclick", event => this.zoomAt(event, event.shiftKey ? 0.5 : 2));
  }

  get width() { return this.element.clientWidth; }
  get height() { return this.element.clientHeight; }

  show(view) {
    if (this.view) this.cameras.set(this.view, this.camera);
    this.view = view;
    this.hint(null);
    this.size();
    if (this.cameras.has(view)) this.camera = this.cameras.get(view);
    else this.fit(view.opening ? view.opening(this.width, this.height) : view.bounds());
    this.draw();
  }

  size() {
    const ratio = window.devicePixelRatio || 1;
    this.element.width = Math.round(this.width * ratio);
    this.element.height = Math.round(this.height * ratio);
  }

  resize() {
    this.size();
    this.paint();
  }

  // All of the view, or [x0, y0, x1, y1] of it, no larger than `most`.
  fit(box = this.view.bounds(), most = 1.25) {
    const [x0, y0, x1, y1] = box, pad = this.view.padding || [30, 50, 30, 40];
    const wide = Math.max(1, this.width - pad[0] - pad[2]);
    const high = Math.max(1, this.height - pad[1] - pad[3]);
    let kx = wide / Math.max(x1 - x0, 1e-9), ky = high / Math.max(y1 - y0, 1e-9);
    if (!this.view.axes) kx = ky = Math.min(kx, ky, most);
    this.camera = {
      kx, ky,
      x: pad[0] + (wide - kx * (x1 - x0)) / 2 - kx * x0,
      y: pad[1] + (high - ky * (y1 - y0)) / 2 - ky * y0,
    };
    this.draw();
  }

  // Bring a box into the middle, large enough to be read.
  centre([x0, y0, x1, y1], least = 0.8) {
    const c = this.camera;
    if (!this.view.axes) c.kx = c.ky = Math.max(c.kx, least);
    c.x = this.width / 2 - c.kx * (x0 + x1) / 2;
    c.y = this.height / 2 - c.ky * (y0 + y1) / 2;
    this.draw();
  }

  draw() {
    if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => this.paint());
    }
  }

  paint() {
    this.waiting = false;
    if (!this.view || !this.width) return;
    const ratio = window.devicePixelRatio || 1, c = this.ctx;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = WHITE;
    c.fillRect(0, 0, this.width, this.height);
    this.view.paint(c, this.camera, this.width, this.height);
  }

  at(event) {
    const r = this.element.getBoundingClientRect(), c = this.camera;
    const sx = event.clientX - r.left, sy = event.clientY - r.top;
    return {sx, sy, x: (sx - c.x) / c.kx, y: (sy - c.y) / c.ky};
  }

  wheel(event) {
    event.preventDefault();
    const unit = event.deltaMode ? 16 : 1;
    if (event.ctrlKey || event.metaKey || Math.abs(event.deltaX) < Math.abs(event.deltaY)) {
      this.zoomAt(event, Math.exp(-event.deltaY * unit * 0.0016));
    } else {
      this.camera.x -= event.deltaX * unit;
      this.draw();
    }
  }

  zoomAt(event, factor) {
    const {sx, sy, x, y} = this.at(event), c = this.camera;
    c.kx *= factor;
    c.x = sx - c.kx * x;
    if (this.view.axes !== "x") {
      c.ky *= factor;
      c.y = sy - c.ky * y;
    }
    this.draw();
  }

  down(event) {
    this.element.setPointerCapture(event.pointerId);
    this.drag = {x: event.clientX, y: event.clientY, moved: false};
  }

  move(event) {
    if (this.drag) {
      const dx = event.clientX - this.drag.x, dy = event.clientY - this.drag.y;
      if (!this.drag.moved && Math.hypot(dx, dy) < 4) return;
      this.element.classList.add("drag");
      this.camera.x += dx;
      if (this.view.axes !== "x") this.camera.y += dy;
      Object.assign(this.drag, {x: event.clientX, y: event.clientY, moved: true});
      this.draw();
      return;
    }
    const p = this.at(event), item = this.view.pick ? this.view.pick(p.x, p.y, p.sx, p.sy) : null;
    this.element.classList.toggle("over", Boolean(item));
    this.hint(item && this.view.hint ? this.view.hint(item) : null, p);
  }

  up(event) {
    const drag = this.drag;
    this.drag = null;
    this.element.classList.remove("drag");
    if (!drag || drag.moved || !this.view.pick) return;
    const p = this.at(event);
    this.view.choose(this.view.pick(p.x, p.y, p.sx, p.sy));
  }

  hint(text, p) {
    this.tip.hidden = !text;
    if (!text) return;
    this.tip.textContent = text;
    const left = Math.min(p.sx + 14, this.width - this.tip.offsetWidth - 8);
    const above = p.sy + 18 + this.tip.offsetHeight > this.height;
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = `${above ? p.sy - this.tip.offsetHeight - 10 : p.sy + 16}px`;
  }
}

function roundBox(ctx, x, y, width, height, radius) {
  ctx.beginPath();
  ctx.roundRect(x, y, width, height, Math.min(radius, width / 2, height / 2));
}

// Text cut to a width, with an ellipsis; the widths of strings are remembered.
const textWidths = new Map();
function fitted(ctx, text, width) {
  const key = ctx.font;
  if (!textWidths.has(key)) textWidths.set(key, new Map());
  const known = textWidths.get(key);
  const measure = t => {
    if (!known.has(t)) known.set(t, ctx.measureText(t).width);
    return known.get(t);
  };
  if (measure(text) <= width) return text;
  let n = Math.max(1, Math.floor(text.length * width / measure(text)));
  while (n > 1 && measure(text.slice(0, n) + "…") > width) n--;
  return text.slice(0, n) + "…";
}
