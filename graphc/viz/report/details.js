// The panel on the right: all that is known of the chosen node.

class Details {
  constructor(element, report) {
    this.element = element;
    this.report = report;
    this.model = report.model;
    element.addEventListener("click", event => {
      const link = event.target.closest("[data-node]");
      if (link) report.select(link.dataset.node, true);
    });
  }

  show(name, number) {
    const node = name && this.find(name, number);
    this.element.innerHTML = node ? this.node(node, number) : this.overview();
    this.element.scrollTop = 0;
  }

  // The node as it is after the pass that is shown, or after the last that has it.
  find(name, number) {
    const passes = [number, ...Array.from({length: this.model.last + 1}, (_, i) => this.model.last - i)];
    for (const pass of passes) {
      const found = this.model.graph(pass).nodes.get(name);
      if (found) return found;
    }
    return null;
  }

  link(value) {
    const node = this.model.graph(this.report.number).nodes;
    const name = producer(value, node), known = node.get(name);
    const type = known ? ` <small>${escapeHtml(known.types)}</small>` : "";
    return `<a data-node="${escapeHtml(name)}">${escapeHtml(value)}</a>${type}`;
  }

  facts(pairs) {
    const rows = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
    return `<dl>${rows.map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join("")}</dl>`;
  }

  list(title, items) {
    if (!items.length) return "";
    const shown = items.slice(0, 40), more = items.length - shown.length;
    return `<h2>${title}</h2><ul>${shown.map(i => `<li>${i}</li>`).join("")}` +
      `${more ? `<li><small>and ${more} more</small></li>` : ""}</ul>`;
  }

  node(node, number) {
    const graph = this.model.graph(number), e = escapeHtml;
    const results = [
      ...graph.outputs.filter(([, v]) => producer(v, graph.nodes) === node.name)
        .map(([name]) => `output <b>${e(name)}</b>`),
      ...graph.updates.filter(([, v]) => producer(v, graph.nodes) === node.name)
        .map(([name]) => `new value of <a data-node="${e(name)}">${e(name)}</a>`),
    ];
    const inner = node.body.length > 1 ? node.body.map(b =>
      `${e(b.name)} <small>${e(b.op)} ${e(b.types)}</small>`) : [];
    return `<h3>${e(node.name)}</h3>
      <div class="sub">${e(node.op === "fused" && node.body.length === 1 ? node.body[0].op : node.op)}
        <span class="chip ${node.phase}">${node.phase}</span></div>` +
      this.facts([
        ["type", e(node.types)],
        ["layout", e(node.layouts)],
        ["bytes", node.bytes === null ? "" : `${node.bytes.toLocaleString("en")} <small>${size(node.bytes)}</small>`],
        ["layer", e(node.layer)],
        ["origin", e(node.origin)],
        ["attributes", node.op === "fused" ? "" : e(node.attributes).replace(/\n/g, "<br>")],
      ]) +
      this.list("Operands", node.operands.map(v => this.link(v))) +
      this.list("Read by", (graph.users.get(node.name) || []).map(v => this.link(v))) +
      this.list("Results", results) +
      this.list("Fused operators", inner) +
      this.reasons(node.name) +
      this.model.launchesOf(node.name).map((n, i, all) => this.kernel(n, i, all.length)).join("");
  }

  // Why it is as it is: what it was not fused with, conversions, algorithms, recomputation.
  reasons(name) {
    const data = this.model.data, e = escapeHtml, lines = [];
    for (const [a, b, reason] of data.apart || []) {
      const from = data.text[a], to = data.text[b];
      if (from === name) lines.push(`apart from ${this.link(to)}: ${e(data.text[reason])}`);
      else if (to === name) lines.push(`apart from ${this.link(from)}: ${e(data.text[reason])}`);
    }
    if (data.conversions && data.conversions[name]) lines.push(e(data.conversions[name]));
    if (data.recomputed && data.recomputed[name]) {
      lines.push(`computed again by ${data.recomputed[name].map(k => this.link(k)).join(", ")}`);
    }
    const choice = data.algorithms && data.algorithms[name];
    if (choice) {
      const costs = Object.entries(choice[1]).sort((a, b) => a[1] - b[1]);
      lines.push(`algorithm <b>${e(choice[0])}</b>; predicted ` +
        costs.map(([n, s]) => `${e(n)} ${duration(s)}`).join(", "));
    }
    return this.list("Why", lines);
  }

  kernel(number, index, count) {
    const k = this.model.launches[number], time = this.model.timeOf.get(number), e = escapeHtml;
    const loops = k.loops.map(([n, extent]) => `${e(n)}:${extent}`).join(" ");
    const tile = k.tile.map(([n, c]) => `${c} ${e(n)}`).join(" × ");
    const shared = k.blocks ? `${k.blocks} blocks, each with the kernels around it`
      : k.order.slice(0, k.parallel).map(e).join(" ") || "one thread";
    const speed = time ? `<div class="bar"><i style="width:${Math.min(100, 100 * time.share)}%"></i></div>
      <small>${percent(time.share)} of what ${time.roof === "arithmetic" ? "the arithmetic peak"
        : `${time.roof} bandwidth`} allows</small>` : "";
    const title = count > 1 ? `Kernel ${index + 1} of ${count}` : "Kernel";
    return `<h2>${title}</h2><div><a data-node="${e(k.name)}">${e(k.name)}</a>
      <small>${e(k.kind)}${k.prepared ? ", when parameters are loaded" : ""}</small></div>${speed}` +
      this.facts([
        ["time", time && `${duration(time.seconds)} <small>median ${duration(time.median)}, ` +
          `waiting ${duration(time.waiting)}</small>`],
        ["work", `${(k.flops / 1e6).toLocaleString("en", {maximumFractionDigits: 3})} MFLOP, ` +
          `${size(k.bytes)}`],
        ["speed", time && `${time.gflops.toFixed(1)} GFLOP/s, ${time.gbytes.toFixed(1)} GB/s`],
        ["layers", e(k.layers.join(", "))],
        ["loops", loops],
        ["lanes", k.lane ? e(k.lane) : "none (scalar)"],
        ["tile", tile],
        ["order", e(k.order.join(" "))],
        ["threads share", shared],
      ]) +
      this.list("Arguments", k.arguments.map(([name, type, place, bytes], i) =>
        `${i < k.arguments.length - k.results ? "reads" : "writes"} ${e(place)}
         <small>${e(type)}, ${size(bytes)}</small>`)) +
      `<details class="kernel-source"><summary>source: ${e(k.file)}</summary>
       <pre class="source">${highlight(this.model.data.sources[k.source])}</pre></details>`;
  }

  overview() {
    const d = this.model.data, graph = this.model.graph(this.model.last);
    const p = d.profile, m = d.memory;
    return `<h3>${escapeHtml(d.name)}</h3><div class="sub">click a node to see what is known of it</div>` +
      this.facts([
        ["target", escapeHtml(d.target)],
        ["threads", d.threads],
        ["nodes", `${d.passes[0].after} declared, ${graph.nodes.size} compiled`],
        ["launches", this.model.launches.length || ""],
        ["kernels", d.sources ? d.sources.length : ""],
        ["arena", m && `${size(m.arena_bytes)} <small>bound ${size(m.lower_bound)}, without reuse
          ${size(m.total_without_reuse)}</small>`],
        ["in all", m && size(m.total_bytes)],
        ["step", p && duration(p.step_seconds)],
        ["speed", p && `${(p.flops / p.step_seconds / 1e9).toFixed(1)} GFLOP/s
          <small>of ${p.machine.gflops.toFixed(0)} measured</small>`],
      ]) +
      `<h2>Keys</h2><dl><dt>/</dt><dd>search</dd><dt>drag, wheel</dt><dd>move, zoom</dd>
       <dt>↑ ↓</dt><dd>the pass before, after</dd><dt>f</dt><dd>fit to the window</dd>
       <dt>Esc</dt><dd>nothing chosen</dd></dl>`;
  }
}
