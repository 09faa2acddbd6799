// The view of the graph after one pass.

const READABLE = 0.68;  // the least scale at which names can be read
const AUTO_BOXES = 90;  // groups are open at first while there are fewer boxes than that

class GraphView {
  constructor(model, canvas, report) {
    this.model = model;
    this.canvas = canvas;
    this.report = report;
    this.tree = outlineTree(model.data);
    this.groups = new Map([...groupsIn(this.tree)].map(group => [group.path, group]));
    this.number = model.last;
    this.compared = false;
    this.selected = null;
    this.foldAutomatically();
  }

  get graph() { return this.model.graph(this.number); }
  get padding() { return [40, 64, 40, 44]; }

  bounds() {
    const a = this.arrangement;
    return [0, -30, Math.max(a.width, 200), Math.max(a.height, 60)];
  }

  // What is shown at first: all of it, or where that would be too small to read, its upper part.
  opening(width, height) {
    const [x0, y0, x1, y1] = this.bounds(), pad = this.padding;
    const wide = width - pad[0] - pad[2], high = height - pad[1] - pad[3];
    const whole = Math.min(wide / (x1 - x0), high / (y1 - y0));
    if (whole >= READABLE) return [x0, y0, x1, y1];
    const scale = Math.max(READABLE, Math.min(1, wide / (x1 - x0)));
    return [x0, y0, x1, y0 + high / scale];
  }

  // ---- folding

  // Open the outline from the top while the picture stays readable; repeated blocks stay folded.
  foldAutomatically() {
    const groups = [...groupsIn(this.tree)].filter(group => group !== this.tree);
    groups.forEach(group => { group.open = false; });
    this.arrange();
    let level = this.tree.rows.flat();
    while (level.length) {
      const next = [];
      for (const group of level) {
        group.open = true;
        const before = this.arrangement;
        this.arrange();
        if (this.arrangement.boxes.length > AUTO_BOXES && before.boxes.length > 12) {
          group.open = false;
          this.arrangement = before;
        } else if (!group.repeats) {
          next.push(...group.rows.flat());
        }
      }
      level = next;
    }
    this.arrange();
  }

  foldAll(open) {
    for (const group of groupsIn(this.tree)) group.open = open || !group.parent;
    this.arrange();
  }

  foldRepeated() {
    for (const group of groupsIn(this.tree)) {
      if (group.repeats) group.open = false;
      else if (group.parent) group.open = true;
    }
    this.arrange();
  }

  // Fold or unfold a group; what is under the pointer stays there.
  toggle(group, open) {
    const before = this.anchor(group);
    group.open = open;
    this.arrange();
    const after = this.anchor(group), camera = this.canvas.camera;
    if (before && after) {
      camera.x += (before[0] - after[0]) * camera.kx;
      camera.y += (before[1] - after[1]) * camera.ky;
    }
    this.canvas.draw();
  }

  anchor(group) {
    const found = [...this.arrangement.frames, ...this.arrangement.boxes].find(
      b => b.group === group);
    return found && [found.x, found.y];
  }

  reveal(name) {
    const node = this.graph.nodes.get(name);
    if (!node) return;
    const layer = [...this.groups.values()].find(g => !g.rows.length && g.path === node.layer);
    for (let g = layer; g && g.parent; g = g.parent) g.open = true;
    this.arrange();
  }

  arrange() {
    this.arrangement = new Arrangement(this.tree, this.graph, this.model.phases);
    this.edges = null;
  }

  show(number) {
    this.number = number;
    this.arrange();
    this.marks = null;
    this.canvas.draw();
  }

  compare(on) {
    this.compared = on;
    this.canvas.draw();
  }

  mark(name) {
    if (!this.marks) {
      const {added, changed} = this.model.changes(this.number);
      this.marks = new Map([...changed.map(n => [n, "#d69a1c"]), ...added.map(n => [n, "#2e8b43"])]);
    }
    return this.marks.get(name);
  }

  // ---- edges between boxes

  connect() {
    if (this.edges) return this.edges;
    const {boxOf} = this.arrangement, found = new Map();
    for (const name of this.graph.drawn) {
      const node = this.graph.nodes.get(name), to = boxOf.get(name);
      for (const operand of node.operands) {
        const source = producer(operand, this.graph.nodes), from = boxOf.get(source);
        if (!from || !to || from === to) continue;
        if (!found.has(from)) found.set(from, new Map());
        found.get(from).set(to, (found.get(from).get(to) || 0) + 1);
      }
    }
    const between = new Obstacles(this.arrangement.boxes);
    this.edges = [];
    for (const [from, targets] of found) {
      for (const to of targets.keys()) this.edges.push(route(from, to, between));
    }
    return this.edges;
  }

  // ---- painting

  paint(ctx, camera, width, height) {
    const k = camera.kx, left = -camera.x / k, top = -camera.y / k;
    const view = {x0: left, y0: top, x1: left + width / k, y1: top + height / k};
    const seen = b => b.x < view.x1 && b.x + b.w > view.x0 && b.y < view.y1 && b.y + b.h > view.y0;
    ctx.save();
    ctx.translate(camera.x, camera.y);
    ctx.scale(k, k);
    for (const frame of this.arrangement.frames) if (seen(frame)) this.paintFrame(ctx, frame, k);
    const chosen = this.arrangement.boxOf.get(this.selected);
    this.paintEdges(ctx, view, k, chosen);
    for (const box of this.arrangement.boxes) if (seen(box)) this.paintBox(ctx, box, k, chosen);
    ctx.restore();
    this.paintColumns(ctx, camera);
  }

  paintColumns(ctx, camera) {
    ctx.textBaseline = "middle";
    ctx.textAlign = "center";
    ctx.font = `600 12px ${FONT}`;
    for (const column of this.arrangement.columns) {
      if (!column.width) continue;
      const y = Math.max(camera.y - 24, 56);
      ctx.fillStyle = "#ffffffd0";
      ctx.fillRect((column.x + column.width / 2) * camera.kx + camera.x - 40, y - 9, 80, 18);
      ctx.fillStyle = PHASE[column.phase].stroke;
      ctx.fillText(column.phase, (column.x + column.width / 2) * camera.kx + camera.x, y);
    }
  }

  paintFrame(ctx, f, k) {
    roundBox(ctx, f.x, f.y, f.w, f.h, 7);
    ctx.fillStyle = "#5a67720d";
    ctx.fill();
    ctx.lineWidth = Math.max(1, 0.7 / k);
    ctx.strokeStyle = "#d5dde6";
    ctx.stroke();
    if (10 * k < 4.5) return;
    ctx.font = `600 10.5px ${FONT}`;
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    ctx.fillStyle = PHASE[f.phase].stroke;
    ctx.fillText(fitted(ctx, `▾ ${f.group.path}`, f.w - 2 * PAD), f.x + PAD, f.y + TITLE / 2 + 3);
  }

  paintEdges(ctx, view, k, chosen) {
    const strong = [];
    for (const edge of this.connect()) {
      if (chosen && (edge.from === chosen || edge.to === chosen)) { strong.push(edge); continue; }
      const [x0, y0, x1, y1] = edge.extent;
      if (x0 > view.x1 || x1 < view.x0 || y0 > view.y1 || y1 < view.y0) continue;
      ctx.globalAlpha = chosen ? 0.25 : 1;
      ctx.strokeStyle = edge.across ? "#cfd8e1" : PHASE[edge.to.phase].edge;
      ctx.lineWidth = Math.max(edge.across ? 0.8 : 1.4, (edge.across ? 0.35 : 0.7) / k);
      strokeEdge(ctx, edge, k);
    }
    ctx.globalAlpha = 1;
    for (const edge of strong) {
      ctx.strokeStyle = edge.to === chosen ? "#2f6fd0" : "#c0392b";
      ctx.lineWidth = Math.max(2, 1.4 / k);
      strokeEdge(ctx, edge, k);
    }
  }

  paintBox(ctx, box, k, chosen) {
    const {fill, stroke} = PHASE[box.phase], node = box.node;
    const input = node && node.op === "input";
    if (box.group && !node) {
      for (const shift of [5, 2.5]) {
        roundBox(ctx, box.x + shift, box.y + shift, box.w - 5, box.h - 5, 6);
        ctx.fillStyle = fill;
        ctx.strokeStyle = stroke;
        ctx.lineWidth = 0.8;
        ctx.fill();
        ctx.stroke();
      }
    }
    const w = node ? box.w : box.w - 5, h = node ? box.h : box.h - 5;
    roundBox(ctx, box.x, box.y, w, h, input ? 18 : 6);
    ctx.fillStyle = input ? "#eceff1" : fill;
    ctx.fill();
    const mark = this.compared && node && this.mark(node.name);
    ctx.strokeStyle = box === chosen ? "#c0392b" : mark || (input ? "#607080" : stroke);
    ctx.lineWidth = box === chosen || mark ? Math.max(3, 2 / k) : Math.max(1, 0.6 / k);
    ctx.stroke();
    if (k * 11 < 4) return;
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    if (!node) return this.paintFolded(ctx, box, w, h, stroke);
    this.write(ctx, node.name, box.x + 9, box.y + 12, w - 18, `600 11.5px ${FONT}`, INK);
    const what = node.body.length === 1 ? node.body[0].op : node.body.length
      ? `${node.body.length} operators` : node.op;
    this.write(ctx, `${what}  ${node.types}`, box.x + 9, box.y + 26, w - 18, `10px ${FONT}`, FAINT);
    if (node.body.length > 1) this.paintBody(ctx, box, k, stroke);
  }

  write(ctx, text, x, y, width, font, colour) {
    ctx.font = font;
    ctx.fillStyle = colour;
    ctx.fillText(fitted(ctx, text, width), x, y);
  }

  // A fused kernel is a cluster of its operators.
  paintBody(ctx, box, k, stroke) {
    const body = box.node.body, shown = body.slice(0, MOST_LINES);
    shown.forEach((inner, i) => {
      const y = box.y + 35 + i * LINE;
      roundBox(ctx, box.x + 8, y, box.w - 16, LINE - 3, 3);
      ctx.fillStyle = WHITE;
      ctx.fill();
      ctx.strokeStyle = stroke + "80";
      ctx.lineWidth = 0.6;
      ctx.stroke();
      if (k * 9 < 4.5) return;
      const name = inner.name.startsWith(inner.op) ? inner.op : `${inner.name} · ${inner.op}`;
      this.write(ctx, name, box.x + 13, y + 6.5, box.w - 26, `9px ${FONT}`, "#33414d");
    });
    if (body.length > MOST_LINES && k * 9 >= 4.5) {
      this.write(ctx, `and ${body.length - MOST_LINES} more`, box.x + 13,
        box.y + 35 + MOST_LINES * LINE + 6, box.w - 26, `9px ${FONT}`, FAINT);
    }
  }

  paintFolded(ctx, box, w, h, stroke) {
    const times = box.group.repeats ? `${box.group.repeats} × ` : "";
    const nodes = `${box.count} node${box.count > 1 ? "s" : ""}`;
    this.write(ctx, `▸ ${times}${box.group.path}`, box.x + 9, box.y + h / 2 - 6, w - 18,
      `600 11.5px ${FONT}`, INK);
    this.write(ctx, nodes, box.x + 9, box.y + h / 2 + 8, w - 18, `10px ${FONT}`, stroke);
  }

  // ---- pointing

  pick(x, y) {
    const hit = b => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h;
    const box = this.arrangement.boxes.find(hit);
    if (box) return box;
    const frames = this.arrangement.frames.filter(f => hit(f) && y <= f.y + TITLE + 4);
    return frames[frames.length - 1] || null;
  }

  choose(item) {
    if (!item) this.report.select(null);
    else if (item.node) this.report.select(item.node.name);
    else this.toggle(item.group, item.count !== undefined);
  }

  hint(item) {
    if (!item.node) return `${item.group.path}: click to ${item.count ? "un" : ""}fold`;
    const node = item.node, launch = this.model.launchesOf(node.name);
    const time = launch.length && this.model.timeOf.get(launch[0]);
    return [`${node.name}: ${node.op}`, node.types, node.origin,
      time ? `${duration(time.seconds)}, ${percent(time.share)} of its roof` : ""]
      .filter(line => line).join("\n");
  }
}

// The boxes of each phase from the top, to see what lies between two of them.
class Obstacles {
  constructor(boxes) {
    this.columns = new Map();
    for (const box of boxes) {
      if (!this.columns.has(box.phase)) this.columns.set(box.phase, []);
      this.columns.get(box.phase).push(box);
    }
    for (const column of this.columns.values()) column.sort((a, b) => a.y - b.y);
  }

  // Whether the straight line between (x0, y0) and (x1, y1), y0 < y1, meets a box.
  blocked(phase, x0, y0, x1, y1) {
    const column = this.columns.get(phase);
    let low = 0, high = column.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (column[middle].y < y0) low = middle + 1; else high = middle;
    }
    for (; low < column.length && column[low].y < y1 - 1; low++) {
      const b = column[low], x = x0 + (x1 - x0) * (b.y + b.h / 2 - y0) / (y1 - y0);
      if (x > b.x - 4 && x < b.x + b.w + 4) return true;
    }
    return false;
  }
}

// The curve from one box to another: downwards, upwards, or across to another phase.
function route(from, to, between) {
  const across = from.phase !== to.phase;
  let points;
  if (across) {
    const right = from.x + from.w <= to.x;
    const x0 = right ? from.x + from.w : from.x, x1 = right ? to.x : to.x + to.w;
    const y0 = from.y + from.h / 2, y1 = to.y + to.h / 2, middle = (x0 + x1) / 2;
    points = [x0, y0, middle, y0, middle, y1, x1, y1];
  } else {
    const down = to.y >= from.y;
    const x0 = from.x + from.w / 2, x1 = to.x + to.w / 2;
    const y0 = down ? from.y + from.h : from.y, y1 = down ? to.y : to.y + to.h;
    const blocked = down ? between.blocked(to.phase, x0, y0, x1, y1)
      : between.blocked(to.phase, x1, y1, x0, y0);
    const far = blocked ? Math.min(150, 70 + Math.abs(y1 - y0) * 0.05) : 0;
    const bend = (y1 - y0) * (far ? 0.25 : 0.5);
    // Around what lies between: a shortcut runs beside the boxes.
    const out = far ? -(from.w / 2 + far - 60) : 0;
    points = [x0, y0, x0 + out, y0 + bend, x1 + out, y1 - bend, x1, y1];
  }
  const xs = points.filter((_, i) => i % 2 === 0), ys = points.filter((_, i) => i % 2);
  return {from, to, across, points,
    extent: [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)]};
}

function strokeEdge(ctx, edge, k) {
  const [x0, y0, a, b, c, d, x1, y1] = edge.points;
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.bezierCurveTo(a, b, c, d, x1, y1);
  ctx.stroke();
  if (k < 0.25 || edge.across) return;
  const angle = Math.atan2(y1 - d, x1 - c);
  ctx.beginPath();
  ctx.moveTo(x1, y1);
  ctx.lineTo(x1 - 7 * Math.cos(angle - 0.45), y1 - 7 * Math.sin(angle - 0.45));
  ctx.lineTo(x1 - 7 * Math.cos(angle + 0.45), y1 - 7 * Math.sin(angle + 0.45));
  ctx.fillStyle = ctx.strokeStyle;
  ctx.fill();
}
