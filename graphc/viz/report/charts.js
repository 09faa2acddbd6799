// Memory map, timeline and roofline: views of the canvas.

function niceSteps(span, most) {
  const raw = span / Math.max(1, most), unit = 10 ** Math.floor(Math.log10(raw || 1));
  return [1, 2, 5, 10].map(m => m * unit).find(step => step >= raw) || unit;
}

function label(ctx, text, x, y, align = "left", colour = FAINT, font = `11px ${FONT}`) {
  ctx.font = font;
  ctx.textAlign = align;
  ctx.textBaseline = "middle";
  ctx.fillStyle = colour;
  ctx.fillText(text, x, y);
}

// ---- memory: a rectangle for each value, from its first to its last step, at its place

class MemoryView {
  constructor(model, report) {
    this.report = report;
    this.axes = "free";
    this.padding = [86, 60, 24, 40];
    const m = this.memory = model.data.memory, text = model.data.text;
    const final = model.graph(model.last);
    this.steps = m.steps.map(n => text[n]);
    this.values = m.lifetimes.map(([name, bytes, first, last, offset, shares]) => {
      const values = shares.map(s => text[s]), node = producer(values[0] || text[name], final.nodes);
      const record = final.nodes.get(node);
      return {name: text[name], bytes, first, last, offset, values, node,
        phase: record ? record.phase : "forward"};
    });
    this.live = new Float64Array(this.steps.length + 1);
    for (const v of this.values) for (let i = v.first; i <= v.last; i++) this.live[i] += v.bytes;
    this.peak = this.live.indexOf(Math.max(...this.live));
    this.curve = m.arena_bytes * 0.22;  // height of the curve of live bytes, below the map
  }

  // Bytes go up, so that y is negative; the curve lies below.
  bounds() {
    const first = Math.min(this.steps.length, ...this.values.map(v => v.first));
    return [first, -this.memory.arena_bytes * 1.02, this.steps.length, this.curve * 1.25];
  }

  paint(ctx, cam, width, height) {
    const m = this.memory, X = x => cam.x + cam.kx * x, Y = bytes => cam.y - cam.ky * bytes;
    const step = niceSteps(height / cam.ky, 8);
    for (let b = 0; b <= m.arena_bytes * 1.01; b += step) {
      ctx.fillStyle = GRID;
      ctx.fillRect(X(0), Y(b), cam.kx * this.steps.length, 1);
      label(ctx, size(b), Math.max(X(0), 82) - 8, Y(b), "right");
    }
    for (const v of this.values) {
      const x = X(v.first), y = Y(v.offset + v.bytes);
      const w = Math.max(1, cam.kx * (v.last + 1 - v.first)), h = Math.max(0.5, cam.ky * v.bytes);
      if (x > width || x + w < 0 || y > height || y + h < 0) continue;
      const colour = PHASE[v.phase];
      ctx.fillStyle = v === this.chosen ? "#ffd9a8" : colour.fill;
      ctx.fillRect(x, y, w, h);
      if (w > 2 && h > 2) {
        ctx.strokeStyle = v === this.chosen ? "#c0392b" : colour.stroke + "b0";
        ctx.lineWidth = v === this.chosen ? 2 : 0.6;
        ctx.strokeRect(x, y, w, h);
      }
      if (w > 44 && h > 12) {
        ctx.font = `10px ${FONT}`;
        const at = Math.max(x, 0) + 4;
        label(ctx, fitted(ctx, v.name, Math.min(x + w, width) - at - 4), at, y + h / 2, "left",
          INK, `10px ${FONT}`);
      }
    }
    this.paintLive(ctx, cam, X);
    this.paintLine(ctx, X, Y, width, m.arena_bytes, [], "#1b2733", "arena", -10);
    this.paintLine(ctx, X, Y, width, m.lower_bound, [6, 4], "#c0392b", "lower bound",
      m.arena_bytes - m.lower_bound > 24 / cam.ky ? -10 : 10);
    ctx.setLineDash([2, 3]);
    ctx.strokeStyle = "#c0392b";
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(X(this.peak + 0.5), Y(m.arena_bytes));
    ctx.lineTo(X(this.peak + 0.5), Y(-this.curve * 1.15));
    ctx.stroke();
    ctx.setLineDash([]);
    const text = `peak ${size(this.live[this.peak])} at step ${this.peak}: ${this.steps[this.peak]}`;
    const left = X(this.peak) > width / 2;
    label(ctx, text, X(this.peak + 0.5) + (left ? -6 : 6), Y(-this.curve * 0.08),
      left ? "right" : "left", "#c0392b");
    label(ctx, `step (${this.steps.length} nodes in order of execution)`, width / 2,
      Math.min(height - 12, Y(-this.curve * 1.22)), "center");
  }

  paintLive(ctx, cam, X) {
    const scale = this.curve / Math.max(this.live[this.peak], 1), base = this.curve * 1.12;
    const Y = bytes => cam.y + cam.ky * (base - bytes * scale);
    ctx.beginPath();
    ctx.moveTo(X(0), Y(0));
    this.steps.forEach((_, i) => { ctx.lineTo(X(i), Y(this.live[i])); ctx.lineTo(X(i + 1), Y(this.live[i])); });
    ctx.lineTo(X(this.steps.length), Y(0));
    ctx.closePath();
    ctx.fillStyle = "#8fa3b855";
    ctx.fill();
    label(ctx, "live", Math.max(X(0), 82) - 8, Y(this.live[this.peak] / 2), "right");
  }

  paintLine(ctx, X, Y, width, bytes, dash, colour, name, shift) {
    ctx.setLineDash(dash);
    ctx.strokeStyle = colour;
    ctx.lineWidth = 1.4;
    ctx.beginPath();
    ctx.moveTo(X(0), Y(bytes));
    ctx.lineTo(X(this.steps.length), Y(bytes));
    ctx.stroke();
    ctx.setLineDash([]);
    label(ctx, `${name} ${size(bytes)}`, Math.min(width - 10, X(this.steps.length)) - 6,
      Y(bytes) + shift, "right", colour, `600 11px ${FONT}`);
  }

  pick(x, y) {
    const hits = this.values.filter(
      v => x >= v.first && x < v.last + 1 && -y >= v.offset && -y < v.offset + v.bytes);
    return hits[0] || null;
  }

  choose(value) {
    this.chosen = value;
    this.report.select(value ? value.node : null);
  }

  hint(v) {
    return `${v.values.join(", ") || v.name}\n${size(v.bytes)} at offset ${v.offset.toLocaleString("en")}\n` +
      `live from step ${v.first} (${this.steps[v.first] || ""}) to ${v.last}`;
  }
}

// ---- timeline: a row for each thread, a box for each launch


class TimelineView {
  constructor(model, report) {
    this.model = model;
    this.report = report;
    this.axes = "x";
    this.padding = [80, 70, 30, 60];
    const p = this.profile = model.data.profile;
    this.boxes = p.boxes.map(([thread, number, begin, end]) => {
      const launch = model.launches[model.profiled[number]];
      return {thread, launch, row: p.launches[number], begin, end};
    });
    this.end = Math.max(...this.boxes.map(b => b.end));
  }

  bounds() { return [0, 0, this.end, 1]; }

  paint(ctx, cam, width, height) {
    const X = x => cam.x + cam.kx * x, top = 64;
    const ROW = Math.max(40, Math.min(150, (height - top - 130) / this.profile.threads));
    Object.assign(this, {top, row: ROW});
    const step = niceSteps(width / cam.kx, 10);
    const first = Math.max(0, Math.floor(-cam.x / cam.kx / step) * step);
    for (let t = first; X(t) < width && t <= this.end * 1.05; t += step) {
      ctx.fillStyle = GRID;
      ctx.fillRect(X(t), top - 8, 1, this.profile.threads * ROW + 8);
      label(ctx, duration(1e-6 * t), X(t), top - 18, "center");
    }
    for (let t = 0; t < this.profile.threads; t++) {
      ctx.fillStyle = "#f6f8fa";
      ctx.fillRect(Math.max(X(0), 0), top + t * ROW + 4, cam.kx * this.end, ROW - 14);
    }
    let last = new Array(this.profile.threads).fill(-1);
    for (const b of this.boxes) {
      const x = X(b.begin), w = cam.kx * (b.end - b.begin);
      if (x > width || x + w < 0 || (w < 0.3 && x - last[b.thread] < 0.5)) continue;
      last[b.thread] = x;
      const y = top + b.thread * ROW + 4, colour = PHASE[b.launch.phase];
      ctx.fillStyle = b.launch.name === this.report.selected ? "#ffd9a8" : colour.fill;
      ctx.fillRect(x, y, Math.max(w, 0.6), ROW - 14);
      if (w > 1.5) {
        ctx.strokeStyle = colour.stroke;
        ctx.lineWidth = 0.7;
        ctx.strokeRect(x, y, w, ROW - 14);
      } else {
        ctx.fillStyle = colour.stroke + "90";
        ctx.fillRect(x, y, Math.max(w, 0.6), ROW - 14);
      }
      const from = Math.max(x, 0) + 5, room = Math.min(x + w, width) - from - 5;
      if (room > 34) {
        ctx.font = `11px ${FONT}`;
        label(ctx, fitted(ctx, b.launch.name, room), from, y + 14, "left", INK);
        label(ctx, fitted(ctx, b.launch.kind, room), from, y + 29, "left", FAINT, `10px ${FONT}`);
        label(ctx, fitted(ctx, `${duration(1e-6 * (b.end - b.begin))} · ${percent(b.row.share)} of roof`,
          room), from, y + 44, "left", FAINT, `10px ${FONT}`);
      }
    }
    for (let t = 0; t < this.profile.threads; t++) {
      ctx.fillStyle = "#ffffffd8";
      ctx.fillRect(0, top + t * ROW + 22, 66, 22);
      label(ctx, `thread ${t}`, 10, top + t * ROW + 33, "left", INK, `600 11px ${FONT}`);
    }
    this.paintSummary(ctx, top + this.profile.threads * ROW + 30);
  }

  paintSummary(ctx, y) {
    const p = this.profile, lines = [
      `The run nearest the median of ${p.runs}. A step takes ${duration(p.step_seconds)}: kernels ` +
        `${duration(p.kernel_seconds)} (${percent(p.kernel_seconds / p.step_seconds)}), in which ` +
        `threads wait ${duration(p.waiting_seconds)} for the slowest.`,
      `Starting threads, barriers, less what overlaps: ${signed(p.barrier_seconds)}; measuring adds ` +
        `${signed(p.timed_seconds - p.step_seconds)}; a call from Python takes ` +
        `${duration(p.call_seconds)}.`,
      "White between boxes is waiting. Kernels that run block by block of the batch are drawn one " +
        "after the other, each with all of its blocks.",
    ];
    lines.forEach((line, i) => label(ctx, line, 80, y + 18 * i, "left", FAINT, `12px ${FONT}`));
  }

  pick(x, y, sx, sy) {
    const row = Math.floor((sy - this.top) / this.row);
    return this.boxes.find(b => b.thread === row && x >= b.begin && x <= b.end) || null;
  }

  choose(box) { this.report.select(box ? box.launch.name : null); }

  hint(b) {
    return `${b.launch.name} (${b.launch.kind})\n${b.launch.layers.join(", ")}\n` +
      `${duration(1e-6 * (b.end - b.begin))} in this run, ${duration(b.row.seconds)} on average\n` +
      `${b.row.gflops.toFixed(1)} GFLOP/s, ${percent(b.row.share)} of its roof (${b.row.roof})`;
  }
}

const signed = s => (s < 0 ? "−" : "") + duration(Math.abs(s));

// ---- roofline: arithmetic intensity against speed, both logarithmic

class RooflineView {
  constructor(model, report) {
    this.report = report;
    this.axes = "free";
    this.padding = [70, 60, 40, 56];
    const p = this.profile = model.data.profile;
    this.points = p.launches.map((row, i) => ({row, launch: model.launches[model.profiled[i]]}))
      .filter(({launch, row}) => launch.flops > 0 && row.seconds > 0)
      .map(({launch, row}) => ({launch, row, x: Math.log10(row.intensity), y: Math.log10(row.gflops),
        radius: 3 + 22 * Math.sqrt(row.seconds / p.kernel_seconds)}))
      .sort((a, b) => b.radius - a.radius);
    this.peak = Math.log10(p.machine.gflops);
    this.levels = Object.entries(p.levels).map(([name, [bytes, speed]]) => ({name, bytes, speed}));
    const xs = this.points.map(q => q.x), ys = this.points.map(q => q.y);
    // What is very slow lies on the lower edge: tiny kernels, of which there is nothing to learn.
    const bottom = Math.max(Math.floor(Math.min(this.peak - 2, ...ys)), Math.floor(this.peak - 3));
    this.points.forEach(q => { q.y = Math.max(q.y, bottom); });
    this.box = [Math.floor(Math.min(-1, ...xs)), bottom, Math.ceil(Math.max(2, ...xs)),
      this.peak + 0.25];
  }

  bounds() {
    const [x0, y0, x1, y1] = this.box;
    return [x0, -y1, x1, -y0];
  }

  paint(ctx, cam, width, height) {
    const X = x => cam.x + cam.kx * x, Y = y => cam.y - cam.ky * y, [x0, y0, x1, y1] = this.box;
    for (let x = x0; x <= x1; x++) {
      ctx.fillStyle = GRID;
      ctx.fillRect(X(x), Y(y1), 1, Y(y0) - Y(y1));
      label(ctx, power(x), X(x), Math.min(Y(y0) + 14, height - 34), "center");
    }
    for (let y = y0; y <= y1; y++) {
      ctx.fillStyle = GRID;
      ctx.fillRect(X(x0), Y(y), X(x1) - X(x0), 1);
      label(ctx, power(y), Math.max(X(x0), 40) - 8, Y(y), "right");
    }
    label(ctx, "operations a byte", X((x0 + x1) / 2), Math.min(Y(y0) + 34, height - 14), "center", INK);
    label(ctx, "GFLOP/s", Math.max(X(x0), 40) - 8, Y(y1) - 12, "right", INK);
    ctx.lineWidth = 1.6;
    for (const {name, speed} of this.levels) {
      const slope = Math.log10(speed), ridge = this.peak - slope;
      ctx.strokeStyle = "#8a97a3";
      ctx.beginPath();
      ctx.moveTo(X(Math.max(x0, y0 - slope)), Y(slope + Math.max(x0, y0 - slope)));
      ctx.lineTo(X(ridge), Y(this.peak));
      ctx.stroke();
      const at = Math.max(x0, y0 - slope) + 0.08;
      ctx.save();
      ctx.translate(X(at), Y(slope + at));
      ctx.rotate(-Math.atan2(cam.ky, cam.kx));
      label(ctx, `${name} ${speed.toFixed(0)} GB/s`, 4, -8);
      ctx.restore();
    }
    ctx.strokeStyle = INK;
    const first = Math.min(...this.levels.map(l => this.peak - Math.log10(l.speed)));
    ctx.beginPath();
    ctx.moveTo(X(first), Y(this.peak));
    ctx.lineTo(X(x1), Y(this.peak));
    ctx.stroke();
    label(ctx, `measured peak ${this.profile.machine.gflops.toFixed(0)} GFLOP/s, ` +
      `${this.profile.threads} thread${this.profile.threads > 1 ? "s" : ""}`,
      X(x1) - 4, Y(this.peak) - 10, "right", INK, `600 11px ${FONT}`);
    for (const point of this.points) {
      const colour = PHASE[point.launch.phase], chosen = point.launch.name === this.report.selected;
      ctx.beginPath();
      ctx.arc(X(point.x), Y(point.y), point.radius, 0, 2 * Math.PI);
      ctx.fillStyle = chosen ? "#ffb86cc0" : colour.stroke + "55";
      ctx.fill();
      ctx.lineWidth = chosen ? 2.4 : 1;
      ctx.strokeStyle = chosen ? "#c0392b" : colour.stroke;
      ctx.stroke();
    }
    const taken = [];
    ctx.font = `11px ${FONT}`;
    for (const point of this.points.slice(0, 24)) {
      const x = X(point.x) + point.radius + 4, y = Y(point.y);
      const w = ctx.measureText(point.launch.name).width;
      if (taken.some(t => x < t.x + t.w && t.x < x + w && Math.abs(y - t.y) < 13)) continue;
      taken.push({x, y, w});
      label(ctx, point.launch.name, x, y, "left", INK);
    }
    this.camera = cam;
  }

  pick(x, y, sx, sy) {
    const c = this.camera, near = q => Math.hypot(c.x + c.kx * q.x - sx, c.y - c.ky * q.y - sy);
    const hits = this.points.filter(q => near(q) <= q.radius + 2);
    return hits.sort((a, b) => a.radius - b.radius)[0] || null;
  }

  choose(point) { this.report.select(point ? point.launch.name : null); }

  hint({launch, row}) {
    return `${launch.name} (${launch.kind})\n${launch.layers.join(", ")}\n` +
      `${duration(row.seconds)}, ${row.gflops.toFixed(1)} GFLOP/s, ${row.gbytes.toFixed(1)} GB/s\n` +
      `${row.intensity.toFixed(2)} operations a byte; ${percent(row.share)} of its roof (${row.roof})`;
  }
}

const power = e => e >= 0 && e < 4 ? String(10 ** e) : e < 0 && e > -4 ? (10 ** e).toFixed(-e)
  : `1e${e}`;
