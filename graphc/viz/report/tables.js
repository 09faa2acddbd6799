// Tabs that are text: the table of kernels, and why the program is as it is.

const KERNEL_COLUMNS = [
  ["launch", k => k.launch.name, "left"],
  ["kind", k => k.launch.kind, "left"],
  ["layers", k => k.launch.layers.join(", "), "left"],
  ["MFLOP", k => k.launch.flops / 1e6, v => v.toFixed(3)],
  ["bytes", k => k.launch.bytes, v => size(v)],
  ["time", k => k.time && k.time.seconds, v => duration(v)],
  ["%", k => k.time && k.time.seconds / k.whole, v => percent(v)],
  ["waiting", k => k.time && k.time.waiting / Math.max(k.time.seconds, 1e-12), v => percent(v)],
  ["GFLOP/s", k => k.time && k.time.gflops, v => v.toFixed(1)],
  ["GB/s", k => k.time && k.time.gbytes, v => v.toFixed(1)],
  ["of roof", k => k.time && k.time.share, v => percent(v)],
  ["roof", k => k.time && k.time.roof, "text"],
];

class KernelTable {
  constructor(element, report) {
    this.element = element;
    this.report = report;
    this.sort = [0, 1];
    const model = report.model, p = model.data.profile;
    this.rows = model.launches.map((launch, number) =>
      ({launch, number, time: model.timeOf.get(number), whole: p ? p.kernel_seconds : 1}));
    this.columns = KERNEL_COLUMNS.filter((c, i) => p || i < 5);
    element.addEventListener("click", event => {
      const head = event.target.closest("th"), row = event.target.closest("tr[data-node]");
      if (head) this.sortBy(Number(head.dataset.column));
      else if (row) report.select(row.dataset.node);
    });
  }

  sortBy(column) {
    this.sort = [column, this.sort[0] === column ? -this.sort[1] : column < 3 ? 1 : -1];
    const value = this.columns[column][1], way = this.sort[1];
    this.rows.sort((a, b) => {
      const x = value(a) ?? -1, y = value(b) ?? -1;
      return way * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
    this.show();
  }

  show() {
    const e = escapeHtml, cell = (row, [, value, format]) => {
      const v = value(row);
      if (format === "left") return `<td class="left" title="${e(v)}">${e(v)}</td>`;
      return `<td>${v === undefined ? "" : format === "text" ? e(v) : format(v)}</td>`;
    };
    const rows = this.rows.map(row => {
      const chosen = row.launch.name === this.report.selected ? ' class="chosen"' : "";
      const dot = `<span class="dot" style="background:${PHASE[row.launch.phase].stroke}"></span>`;
      const cells = this.columns.map(c => cell(row, c)).join("");
      return `<tr data-node="${e(row.launch.name)}"${chosen}>${cells.replace(">", ">" + dot)}</tr>`;
    });
    const head = this.columns.map(([name, , format], i) =>
      `<th data-column="${i}"${format === "left" ? ' class="left"' : ""}>${name}` +
      `${this.sort[0] === i ? (this.sort[1] > 0 ? " ▴" : " ▾") : ""}</th>`);
    this.element.innerHTML = this.summary() + this.layers() +
      `<h2>Launches</h2><table><thead><tr>${head.join("")}</tr></thead>` +
      `<tbody>${rows.join("")}</tbody></table>`;
  }

  summary() {
    const p = this.report.model.data.profile;
    if (!p) {
      return '<div class="line">Not profiled: <code>exe.profile(...)</code> before ' +
        "<code>exe.dump(...)</code> adds times.</div>";
    }
    const facts = [[duration(p.step_seconds), "a step"],
      [`${(p.flops / 1e9).toPrecision(3)} GFLOP`, "in a step"],
      [`${(p.flops / p.step_seconds / 1e9).toFixed(1)} GFLOP/s`, `of ${p.machine.gflops.toFixed(0)} measured`],
      ...Object.entries(p.phases).map(([name, s]) => [duration(s), name]),
      [duration(p.waiting_seconds), "waiting for the slowest thread"]];
    return `<div class="summary">${facts.map(([b, t]) => `<div><b>${b}</b>${t}</div>`).join("")}</div>`;
  }

  layers() {
    const p = this.report.model.data.profile;
    if (!p) return "";
    const phases = Object.keys(p.phases), e = escapeHtml;
    const rows = Object.entries(p.layers).map(([layer, times]) => {
      const sum = Object.values(times).reduce((a, b) => a + b, 0);
      const bars = phases.map(phase => `<i style="display:inline-block;height:9px;width:${
        240 * (times[phase] || 0) / p.kernel_seconds * 4}px;background:${PHASE[phase].stroke}"></i>`);
      return `<tr data-node="${e(layer)}"><td class="left">${e(layer)}</td>${phases.map(phase =>
        `<td>${times[phase] ? duration(times[phase]) : ""}</td>`).join("")}<td>${duration(sum)}</td>
        <td>${percent(sum / p.kernel_seconds)}</td><td class="left">${bars.join("")}</td></tr>`;
    });
    return `<details><summary>Time by layer</summary><table><thead><tr><th class="left">layer</th>${
      phases.map(phase => `<th>${phase}</th>`).join("")}<th>in all</th><th>%</th><th></th></tr></thead>
      <tbody>${rows.join("")}</tbody></table></details>`;
  }
}

function explanation(model) {
  const line = text => {
    const colon = text.indexOf(": ");
    return colon < 0 ? escapeHtml(text)
      : `<b>${escapeHtml(text.slice(0, colon))}</b>: ${escapeHtml(text.slice(colon + 2))}`;
  };
  return Object.entries(model.data.explain).map(([title, lines]) => {
    const body = lines.map(text => `<div class="line">${line(text)}</div>`).join("");
    return lines.length > 60
      ? `<h2>${escapeHtml(title)}</h2><details><summary>${lines.length} lines</summary>${body}</details>`
      : `<h2>${escapeHtml(title)}</h2>${body}`;
  }).join("") || '<div class="empty">There is nothing to explain.</div>';
}
