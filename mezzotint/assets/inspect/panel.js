/* The details of one node. */
(() => {
  const M = Mezzotint;
  const { nodes, values, inputs, outputs } = M.data.graph;
  const MOST = 12;

  /** The first few of a list, and a button for the rest. */
  const few = (items) => {
    const list = M.el("ul", null, items.slice(0, MOST));
    if (items.length <= MOST) return list;
    const all = M.link(`${items.length - MOST} more`, () => { list.append(...items.slice(MOST)); all.remove(); });
    return M.el("div", null, list, all);
  };

  const valueLine = (value, others) => {
    const [name, type] = values[value];
    return M.el("li", null, M.el("span", { class: "mono" }, name), " ", M.el("span", { class: "soft" }, type),
      others.length ? M.el("div", null, others) : null);
  };
  const inputLine = (value) => {
    if (value < 0) return M.el("li", { class: "soft" }, "absent");
    const maker = values[value][2];
    const from = maker >= 0 ? ["from ", M.nodeLink(nodes[maker].name)] : inputs.includes(value) ? ["an input of the graph"] : [];
    return valueLine(value, from);
  };
  const outputLine = (value) => {
    const links = M.readers(value).slice(0, MOST).map((node, i) => [i ? ", " : "to ", M.nodeLink(nodes[node].name)]).flat();
    return valueLine(value, outputs.includes(value) ? ["an output of the graph", ...links] : links);
  };

  M.formatOf = (q) => {
    const widths = Object.entries(q.bits).map(([bits, count]) => `${bits} bits: ${count}`).join(", ");
    return widths ? `${q.format} (${widths})` : q.format;
  };
  M.scaleOf = (q) => q.scale.map((s) => M.number(s)).join(" .. ");
  M.zeroOf = (q) => [...new Set(q.zero)].join(" .. ");
  M.grainOf = (q) => [
    q.axis === null ? "per tensor" : `${q.channels} channels (axis ${q.axis})`,
    q.rows > 1 ? `${q.rows} timestep groups` : "all timesteps",
  ].join(", ");

  const quantizer = ([row, role]) => {
    const q = M.data.quantizers[row];
    return M.el("div", { class: "quantizer" },
      M.el("h4", null, `${role}: `, M.el("span", { class: "mono" }, q.site)),
      M.facts([["format", `${M.formatOf(q)}, ${M.grainOf(q)}`], ["scale", M.scaleOf(q)], ["zero point", M.zeroOf(q)], ["chosen by", q.by]]),
      M.data.ranges.note ? M.el("p", { class: "soft" }, "scales over timesteps: not in this bundle") : M.scalePlot(row));
  };

  const verdict = (node) => {
    const row = M.auditOf.get(node.name);
    if (!row) return [];
    return [["kernel", row.kernel], ["rule", row.rule], ["why", row.why], ["fix", row.fix]];
  };

  const cost = (node) => {
    const row = M.costOf.get(node.name), { timesteps } = M.data.cost;
    if (!row) return null;
    const plots = timesteps.length > 1 ? M.plot({
      x: timesteps, series: [{ name: "of its own output", y: row.local }, { name: "of epsilon, it alone quantized", y: row.output }],
      caption: "SQNR by timestep, dB",
    }) : M.facts([["SQNR of its output", M.db(row.local[0])], ["SQNR of epsilon", M.db(row.output[0])]]);
    return [M.el("h4", null, "error"), M.facts([["share of all error", M.percent(row.share)], ["would help", row.what], ["because", row.why]]), plots];
  };

  const share = (ms) => {
    const total = M.blockTime(0) + (M.data.speed.other_ms ?? 0);
    return total ? ` (${M.percent(ms / total)} of all kernels)` : "";
  };

  /** The panel of a node. */
  M.panel = (index, close) => {
    const node = nodes[index];
    return M.el("div", { class: `panel ${M.kindClass(node.kind)}`, "data-panel": node.name },
      M.tool("×", close, { class: "tool close", "aria-label": "close" }),
      M.el("h3", null, M.path(node.name)),
      M.el("p", null, M.el("span", { class: "chip" }, M.kindWord(node.kind)), " ", node.domain ? `${node.domain}.${node.op}` : node.op),
      M.facts([
        ...verdict(node),
        ["time", node.ms === undefined ? null : `${M.number(node.ms, 3)} ms${share(node.ms)}`],
      ]),
      cost(node),
      (node.quantizers ?? []).map(quantizer),
      M.el("h4", null, "inputs"), few(node.in.map(inputLine)),
      M.el("h4", null, "outputs"), few(node.out.map(outputLine)),
      node.attributes ? [M.el("h4", null, "attributes"), M.facts(Object.entries(node.attributes))] : null);
  };
})();
