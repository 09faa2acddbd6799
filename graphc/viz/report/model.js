// The report's data, decoded: graphs by pass, and who computes what.

function unrun(runs) {
  const numbers = [];
  for (let i = 0; i < runs.length; i += 2) {
    for (let n = 0; n < runs[i + 1]; n++) numbers.push(runs[i] + n);
  }
  return numbers;
}

const size = bytes => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB`
  : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB`
  : bytes >= 1e3 ? `${(bytes / 1e3).toFixed(2)} kB` : `${bytes} B`;
const duration = seconds => seconds >= 1 ? `${seconds.toFixed(2)} s`
  : seconds >= 1e-3 ? `${(1e3 * seconds).toFixed(2)} ms` : `${(1e6 * seconds).toFixed(2)} µs`;
const percent = share => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

class Model {
  constructor(data) {
    this.data = data;
    this.phases = data.phases;
    this.records = new Map();
    this.graphs = new Map();
    this.launches = data.launches || [];
    this.kernelOf = new Map();  // operator or kernel name -> numbers of launches
    this.launches.forEach((launch, number) => {
      const add = name => {
        if (!this.kernelOf.has(name)) this.kernelOf.set(name, []);
        if (!this.kernelOf.get(name).includes(number)) this.kernelOf.get(name).push(number);
      };
      add(launch.name);
      launch.nodes.forEach(text => add(text.slice(0, text.lastIndexOf(": "))));
    });
    this.timeOf = new Map();  // launch number -> its row of the profile
    const byName = new Map(this.launches.map((launch, number) => [launch.name, number]));
    if (data.profile) {
      data.profile.launches.forEach(row => this.timeOf.set(byName.get(row.name), row));
      this.profiled = data.profile.launches.map(row => byName.get(row.name));
    }
  }

  get last() { return this.data.passes.length - 1; }

  // One node as it stands after some passes; `id` is the same where it is.
  record(id) {
    if (!this.records.has(id)) {
      const t = this.data.text;
      const [name, op, layer, phase, types, layouts, origin, attributes, bytes, body, operands] =
        this.data.nodes[id];
      this.records.set(id, {
        id, name: t[name], op: t[op], layer: t[layer], phase: this.phases[phase],
        types: t[types], layouts: t[layouts], origin: t[origin], attributes: t[attributes], bytes,
        operands: operands.map(o => t[o]),
        body: body < 0 ? [] : this.data.bodies[body].map(([n, o, ty, ops]) =>
          ({name: t[n], op: t[o], types: t[ty], operands: ops.map(v => t[v])})),
      });
    }
    return this.records.get(id);
  }

  // The graph after a pass: nodes by name, rows of nodes by layer and phase, users of each node.
  graph(number) {
    if (!this.graphs.has(number)) this.graphs.set(number, this.decode(this.data.passes[number]));
    return this.graphs.get(number);
  }

  decode(pass) {
    const t = this.data.text, nodes = new Map(), cells = new Map(), users = new Map();
    const drawn = new Set();
    for (const id of unrun(pass.cells)) {
      const [layer, phase, rows] = this.data.cells[id];
      const cell = rows.map(row => row.map(node => this.record(node)));
      cells.set(`${this.phases[phase]} ${t[layer]}`, cell);
      cell.flat().forEach(node => { nodes.set(node.name, node); drawn.add(node.name); });
    }
    for (const id of unrun(pass.inlined)) nodes.set(this.record(id).name, this.record(id));
    for (const node of nodes.values()) {
      for (const operand of node.operands) {
        const source = producer(operand, nodes);
        if (!users.has(source)) users.set(source, []);
        if (!users.get(source).includes(node.name)) users.get(source).push(node.name);
      }
    }
    const named = pairs => pairs.map(([name, value]) => [t[name], t[value]]);
    return {nodes, drawn, cells, users, outputs: named(pass.outputs), updates: named(pass.updates)};
  }

  // What a pass did, by name of the node.
  changes(number) {
    const after = this.graph(number).nodes, before = number ? this.graph(number - 1).nodes : after;
    const added = [], changed = [], removed = [];
    for (const [name, node] of after) {
      if (!before.has(name)) added.push(name);
      else if (before.get(name) !== node) changed.push(name);
    }
    for (const name of before.keys()) if (!after.has(name)) removed.push(name);
    return {added, changed, removed};
  }

  // Launches that compute a node of any pass.
  launchesOf(name) { return this.kernelOf.get(name) || []; }
}

// The node of a value: "split:1" is output 1 of "split".
function producer(value, nodes) {
  if (nodes.has(value)) return value;
  const colon = value.lastIndexOf(":");
  return colon < 0 ? value : value.slice(0, colon);
}
