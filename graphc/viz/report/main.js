// The page: tabs, passes, search, and what is chosen.

const byId = id => document.getElementById(id);

class Report {
  constructor(data) {
    this.model = new Model(data);
    this.number = this.model.last;
    this.selected = null;
    this.canvas = new Canvas(byId("canvas"), byId("tip"));
    this.graph = new GraphView(this.model, this.canvas, this);
    this.details = new Details(byId("details"), this);
    this.views = {};
    this.heading();
    this.tabs();
    this.passList();
    this.search();
    this.keys();
    this.details.show(null, this.number);
    this.open("Graph");
  }

  heading() {
    const d = this.model.data, threads = `${d.threads} thread${d.threads > 1 ? "s" : ""}`;
    document.title = `${d.name}: graphc report`;
    byId("name").textContent = d.name;
    byId("facts").textContent = this.model.launches.length
      ? `${this.model.launches.length} launches of ${d.sources.length} kernels, ${threads}, ` +
        `${size(d.memory.total_bytes)}` + (d.profile ? `, ${duration(d.profile.step_seconds)} a step` : "")
      : `target ${d.target}`;
  }

  // ---- tabs

  tabs() {
    const d = this.model.data, names = ["Graph"];
    if (d.memory) names.push("Memory");
    if (this.model.launches.length) names.push("Timeline", "Roofline", "Kernels");
    names.push("Why");
    byId("tabs").innerHTML = names.map(name => `<button data-tab="${name}">${name}</button>`).join("");
    byId("tabs").addEventListener("click", event => {
      if (event.target.dataset.tab) this.open(event.target.dataset.tab);
    });
  }

  open(tab) {
    this.tab = tab;
    for (const button of byId("tabs").children) {
      button.setAttribute("aria-selected", String(button.dataset.tab === tab));
    }
    const page = byId("document"), view = this.view(tab);
    const text = !view;
    page.hidden = !text;
    byId("canvas").style.display = text ? "none" : "";
    byId("passes").style.display = tab === "Graph" ? "" : "none";
    this.toolbar(tab, text);
    if (text) this.text(tab, page);
    else this.canvas.show(view);
  }

  view(tab) {
    const make = {
      Graph: () => this.graph,
      Memory: () => new MemoryView(this.model, this),
      Timeline: () => this.model.data.profile && new TimelineView(this.model, this),
      Roofline: () => this.model.data.profile && new RooflineView(this.model, this),
    }[tab];
    if (make && !(tab in this.views)) this.views[tab] = make();
    return this.views[tab];
  }

  text(tab, page) {
    if (tab === "Kernels") {
      this.table = this.table || new KernelTable(page, this);
      this.table.show();
    } else if (tab === "Why") {
      page.innerHTML = explanation(this.model);
    } else {
      page.innerHTML = '<div class="empty">Not profiled yet: call <code>exe.profile(...)</code> ' +
        "before <code>exe.dump(...)</code>, and the times of that run are shown here.</div>";
    }
    page.scrollTop = 0;
  }

  toolbar(tab, text) {
    const graph = tab === "Graph", buttons = text ? [] : ["Fit"];
    if (graph) buttons.push("Fold all", "Unfold all", "Fold repeated");
    byId("tools").innerHTML = buttons.map(name => `<button>${name}</button>`).join("") +
      (graph ? `<label><input type="checkbox" id="compare"${this.graph.compared ? " checked" : ""}>
        mark changes</label>` : "");
    byId("tools").onclick = event => {
      const act = {"Fit": () => {}, "Fold all": () => this.graph.foldAll(false),
        "Unfold all": () => this.graph.foldAll(true),
        "Fold repeated": () => this.graph.foldRepeated()}[event.target.textContent];
      if (!act) return;
      act();
      this.canvas.fit();
    };
    if (graph) byId("compare").onchange = event => this.graph.compare(event.target.checked);
    byId("legend").style.display = text ? "none" : "";
    const phases = Object.entries(PHASE).filter(([name]) => this.model.data.nodes.some(
      node => this.model.phases[node[3]] === name));
    byId("legend").innerHTML = phases.map(([name, c]) =>
      `<span><i style="background:${c.fill};border-color:${c.stroke}"></i>${name}</span>`).join("");
  }

  // ---- passes

  passList() {
    const whole = this.model.data.passes.reduce((sum, pass) => sum + pass.seconds, 0);
    const rows = this.model.data.passes.map((pass, number) => {
      const same = number && this.same(number) ? ' class="same"' : "";
      return `<button data-pass="${number}"${same}><i>${String(number).padStart(2, "0")}</i>
        <span>${escapeHtml(pass.name)}</span><small>${pass.after}</small></button>`;
    });
    byId("passes").innerHTML = `<h2>After pass <span style="float:right">nodes</span></h2>` +
      rows.join("") + `<div class="change">all passes: ${duration(whole)}</div>`;
    byId("passes").addEventListener("click", event => {
      const row = event.target.closest("[data-pass]");
      if (row) this.showPass(Number(row.dataset.pass));
    });
    this.markPass();
  }

  // Whether a pass left the graph as it was.
  same(number) {
    const [a, b] = [this.model.data.passes[number - 1], this.model.data.passes[number]];
    return String(a.cells) === String(b.cells) && String(a.inlined) === String(b.inlined);
  }

  showPass(number) {
    this.number = Math.max(0, Math.min(this.model.last, number));
    this.graph.show(this.number);
    this.markPass();
    this.details.show(this.selected, this.number);
  }

  markPass() {
    document.querySelectorAll("#passes .change.here").forEach(element => element.remove());
    for (const row of document.querySelectorAll("[data-pass]")) {
      const here = Number(row.dataset.pass) === this.number;
      row.setAttribute("aria-current", String(here));
      if (!here) continue;
      const pass = this.model.data.passes[this.number];
      const {added, changed, removed} = this.model.changes(this.number);
      const counts = [["added", added], ["changed", changed], ["removed", removed]]
        .filter(([, names]) => names.length)
        .map(([what, names]) => `<b class="${what}" title="${escapeHtml(names.slice(0, 60).join(", "))}">${
          names.length} ${what}</b>`).join(", ");
      const notes = pass.notes.slice(0, 12).map(n => `<div>${escapeHtml(n)}</div>`).join("");
      row.insertAdjacentHTML("afterend", `<div class="change here">${counts || "no change"}, ${
        duration(pass.seconds)}${notes}</div>`);
    }
  }

  // ---- choosing

  // Show a node in the panel; `go`: bring it into view too.
  select(name, go = false) {
    this.selected = name;
    this.graph.selected = name;
    this.details.show(name, this.number);
    if (go && name) {
      if (this.tab !== "Graph") this.open("Graph");
      this.goTo(name);
    }
    if (this.tab === "Kernels") this.markRow();
    this.canvas.draw();
  }

  goTo(name) {
    if (!this.graph.graph.nodes.has(name)) {
      const pass = this.passWith(name);
      if (pass !== null) this.showPass(pass);
    }
    this.graph.reveal(name);
    // A parameter is shown at what reads it.
    const shown = this.graph.arrangement.boxOf.get(name) || (this.graph.graph.users.get(name) || [])
      .map(user => { this.graph.reveal(user); return this.graph.arrangement.boxOf.get(user); })[0];
    if (shown) this.canvas.centre([shown.x, shown.y, shown.x + shown.w, shown.y + shown.h]);
  }

  passWith(name) {
    for (let number = this.model.last; number >= 0; number--) {
      if (this.model.graph(number).nodes.has(name)) return number;
    }
    return null;
  }

  markRow() {
    document.querySelectorAll("tr.chosen").forEach(row => row.classList.remove("chosen"));
    const row = this.selected && document.querySelector(
      `#document tr[data-node="${CSS.escape(this.selected)}"]`);
    if (row) row.classList.add("chosen");
  }

  // ---- search

  search() {
    const field = byId("search"), list = byId("found");
    field.addEventListener("input", () => this.find(field.value));
    field.addEventListener("focus", () => this.find(field.value));
    field.addEventListener("blur", () => setTimeout(() => { list.hidden = true; }, 200));
    field.addEventListener("keydown", event => {
      const at = this.at + {ArrowDown: 1, ArrowUp: -1}[event.key];
      if (event.key === "Enter" && this.hits.length) this.choose(this.at);
      else if (event.key === "Escape") field.blur();
      else if (at >= 0 && at < this.hits.length) this.mark(at);
      else return;
      event.preventDefault();
    });
    list.addEventListener("pointerdown", event => {
      const row = event.target.closest("[data-hit]");
      if (row) this.choose(Number(row.dataset.hit));
    });
  }

  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(word => word);
    const hits = [], list = byId("found");
    if (words.length) {
      for (const node of this.graph.graph.nodes.values()) {
        const where = `${node.name} ${node.op} ${node.layer} ${node.body.map(b => `${b.name} ${b.op}`).join(" ")}`
          .toLowerCase();
        if (words.every(word => where.includes(word))) hits.push(node);
      }
      const rank = node => node.name.toLowerCase() === text.toLowerCase() ? 0
        : node.name.toLowerCase().startsWith(words[0]) ? 1 : node.name.toLowerCase().includes(words[0]) ? 2 : 3;
      hits.sort((a, b) => rank(a) - rank(b));
    }
    this.hits = hits.slice(0, 60);
    list.innerHTML = this.hits.map((node, i) => `<li data-hit="${i}">${escapeHtml(node.name)}
      <small>${escapeHtml(node.op === "fused" ? node.body.map(b => b.op).slice(0, 5).join(" ") : node.op)}
      ${escapeHtml(node.types)}</small></li>`).join("") ||
      '<li class="none">nothing in the graph after this pass</li>';
    list.hidden = !words.length;
    this.mark(0);
  }

  mark(at) {
    this.at = at;
    [...byId("found").children].forEach((row, i) => row.setAttribute("aria-selected", String(i === at)));
    const row = byId("found").children[at];
    if (row) row.scrollIntoView({block: "nearest"});
  }

  choose(at) {
    const node = this.hits[at];
    byId("found").hidden = true;
    byId("search").blur();
    this.select(node.name, true);
  }

  keys() {
    document.addEventListener("keydown", event => {
      if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey) return;
      const act = {
        "/": () => byId("search").select(),
        "Escape": () => this.select(null),
        "f": () => this.canvas.fit(),
        "ArrowDown": () => this.tab === "Graph" && this.showPass(this.number + 1),
        "ArrowUp": () => this.tab === "Graph" && this.showPass(this.number - 1),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  // Where a node's box is on the page (for tests), or null.
  place(name) {
    const box = this.graph.arrangement.boxOf.get(name), c = this.canvas.camera;
    if (!box) return null;
    const r = this.canvas.element.getBoundingClientRect();
    return {x: r.left + c.x + c.kx * (box.x + box.w / 2), y: r.top + c.y + c.ky * (box.y + 12)};
  }
}

const report = new Report(JSON.parse(byId("data").textContent));
// Milliseconds from the page's first byte until the first picture is painted.
requestAnimationFrame(() => requestAnimationFrame(() => { report.ready = performance.now(); }));
window.report = report;
