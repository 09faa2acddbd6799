// Coordinates of a graph in the outline of its layers, where any group may be folded to one box.
//
// Rows of groups go down and are shared by all phases; each phase has a column of its own. Data of
// the forward pass flow down, those of the backward pass up, so that what belongs together stands
// side by side. (graphc/viz/arrange.py does the same for pictures, with every group open.)

const BOX = 184, LINE = 15, MOST_LINES = 12;
const GAP = 16, LAYER_GAP = 22, PAD = 9, TITLE = 17, COLUMN_GAP = 70, FOLDED = 40;

// The outline as a tree of {path, name, repeats, rows, parent, open}.
function outlineTree(data) {
  const make = ([path, name, repeats, rows], parent) => {
    const group = {path: data.text[path], name: data.text[name], repeats, parent, open: true};
    group.rows = rows.map(row => row.map(child => make(child, group)));
    return group;
  };
  return make(data.outline, null);
}

function* groupsIn(group) {
  yield group;
  for (const row of group.rows) for (const child of row) yield* groupsIn(child);
}

function boxHeight(node) {
  const inner = node.body.length > 1 ? Math.min(node.body.length, MOST_LINES + 1) : 0;
  return 36 + (inner ? inner * LINE + 5 : 0);
}

class Arrangement {
  constructor(tree, graph, phases) {
    this.graph = graph;
    this.phases = phases;
    this.boxes = [];
    this.frames = [];
    this.boxOf = new Map();  // name of a node -> the box that shows it
    this.extents = new Map();
    this.counts = new Map();
    this.count(tree);
    const {widths, height} = this.measure(tree);
    const lefts = [];
    let left = 0;
    widths.forEach(width => { lefts.push(left); left += width ? width + COLUMN_GAP : 0; });
    this.columns = lefts.map((x, i) => ({x, width: widths[i], phase: phases[i]}));
    this.put(tree, lefts, 0, {widths, height});
    this.width = Math.max(0, left - COLUMN_GAP);
    this.height = height;
  }

  cell(group, phase) { return this.graph.cells.get(`${phase} ${group.path}`) || []; }

  // Nodes of a group in each phase.
  count(group) {
    const sums = this.phases.map(() => 0);
    if (group.rows.length) {
      group.rows.flat().forEach(child => this.count(child).forEach((n, i) => { sums[i] += n; }));
    } else {
      this.phases.forEach((phase, i) => { sums[i] = this.cell(group, phase).flat().length; });
    }
    this.counts.set(group, sums);
    return sums;
  }

  // Groups of one node in each column are shown as the node.
  plain(group) {
    return !group.rows.length && Math.max(...this.counts.get(group)) <= 1;
  }

  present(group) {
    return group.rows.map(row => row.filter(g => this.measure(g).height)).filter(r => r.length);
  }

  measure(group) {
    if (this.extents.has(group)) return this.extents.get(group);
    const counts = this.counts.get(group);
    let extent;
    if (!counts.some(n => n)) extent = {widths: counts, height: 0};
    else if (!group.open && group.parent && !this.plain(group)) {
      extent = {widths: counts.map(n => n ? BOX : 0), height: FOLDED};
    } else {
      extent = group.rows.length ? this.ofGroups(group) : this.ofNodes(group);
      if (group.parent && !this.plain(group)) {
        extent = {
          widths: extent.widths.map(w => w ? w + 2 * PAD : 0),
          height: extent.height + 2 * PAD + TITLE,
        };
      }
    }
    this.extents.set(group, extent);
    return extent;
  }

  rowWidth(row, column) {
    const wide = row.map(g => this.measure(g).widths[column]).filter(w => w);
    return wide.reduce((a, b) => a + b, 0) + GAP * Math.max(wide.length - 1, 0);
  }

  ofGroups(group) {
    const rows = this.present(group);
    const heights = rows.map(row => Math.max(...row.map(g => this.measure(g).height)));
    return {
      widths: this.phases.map((_, i) => Math.max(0, ...rows.map(row => this.rowWidth(row, i)))),
      height: heights.reduce((a, b) => a + b + LAYER_GAP, -LAYER_GAP),
    };
  }

  ofNodes(group) {
    const cells = this.phases.map(phase => this.cell(group, phase));
    return {
      widths: cells.map(cell => Math.max(0, ...cell.map(row => row.length * (BOX + GAP) - GAP))),
      height: Math.max(...cells.map(cell => this.cellHeight(cell))),
    };
  }

  cellHeight(cell) {
    if (!cell.length) return 0;
    return cell.reduce((sum, row) => sum + Math.max(...row.map(boxHeight)) + LAYER_GAP, -LAYER_GAP);
  }

  put(group, lefts, top, {widths, height}) {
    const folded = !group.open && group.parent && !this.plain(group);
    if (folded) return this.putFolded(group, lefts, widths, top, height);
    if (group.parent && !this.plain(group)) {
      this.phases.forEach((phase, i) => {
        if (widths[i]) {
          this.frames.push({group, phase, x: lefts[i], y: top, w: widths[i], h: height});
        }
      });
      top += PAD + TITLE;
      height -= 2 * PAD + TITLE;
    }
    if (!group.rows.length) {
      this.phases.forEach((_, i) => this.putNodes(group, i, lefts[i], widths[i], top, height));
      return;
    }
    for (const row of this.present(group)) {
      const tall = Math.max(...row.map(g => this.measure(g).height));
      const starts = lefts.map((left, i) => left + (widths[i] - this.rowWidth(row, i)) / 2);
      for (const child of row) {
        const own = this.measure(child);
        this.put(child, starts.slice(), top + (tall - own.height) / 2, own);
        own.widths.forEach((w, i) => { starts[i] += w ? w + GAP : 0; });
      }
      top += tall + LAYER_GAP;
    }
  }

  putFolded(group, lefts, widths, top, height) {
    this.phases.forEach((phase, i) => {
      if (!widths[i]) return;
      const box = {group, phase, x: lefts[i], y: top, w: widths[i], h: height,
        count: this.counts.get(group)[i]};
      this.boxes.push(box);
      for (const inner of groupsIn(group)) {
        if (!inner.rows.length) {
          this.cell(inner, phase).flat().forEach(node => this.boxOf.set(node.name, box));
        }
      }
    });
  }

  putNodes(group, column, left, width, top, height) {
    const phase = this.phases[column], cell = this.cell(group, phase);
    let y = top + (height - this.cellHeight(cell)) / 2;
    for (const row of phase === "backward" ? cell.slice().reverse() : cell) {
      const tall = Math.max(...row.map(boxHeight));
      let x = left + (width - row.length * (BOX + GAP) + GAP) / 2;
      for (const node of row) {
        const h = boxHeight(node);
        const box = {node, group, phase, x, y: y + (tall - h) / 2, w: BOX, h};
        this.boxes.push(box);
        this.boxOf.set(node.name, box);
        x += BOX + GAP;
      }
      y += tall + LAYER_GAP;
    }
  }
}
