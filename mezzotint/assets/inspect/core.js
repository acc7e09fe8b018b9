"use strict";
/* Helpers that all parts of the page share. Text from the model stays text: nothing here accepts HTML. */
const Mezzotint = {};
(() => {
  const M = Mezzotint;
  const SVG = "http://www.w3.org/2000/svg";

  M.data = JSON.parse(document.getElementById("data").textContent);

  const filled = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      const aria = name.startsWith("aria-");
      if (value === null || value === undefined || (value === false && !aria)) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true && !aria ? "" : value);
    }
    element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
    return element;
  };

  /** An element with attributes (`onclick` and the like are listeners) and children (elements or text). */
  M.el = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
  M.svg = (tag, attributes, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
  M.note = (text) => M.el("p", { class: "note" }, text);
  M.link = (text, onclick, attributes) => M.el("button", { class: "link", type: "button", onclick, ...attributes }, M.path(text));
  M.tool = (text, onclick, attributes) => M.el("button", { class: "tool", type: "button", onclick, ...attributes }, text);

  /** A number with at most `digits` significant digits; null is a dash. */
  M.number = (value, digits = 4) => {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
    const text = Number(value).toPrecision(digits);
    return text.includes("e") ? text.replace("e+", "e") : String(Number(text));
  };
  M.percent = (share) => (share >= 0.0995 ? `${(share * 100).toFixed(0)} %` : `${(share * 100).toFixed(1)} %`);
  M.bytes = (count) => {
    const units = ["bytes", "kB", "MB", "GB"];
    let value = count, unit = 0;
    while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return `${unit ? value.toPrecision(3) : value} ${units[unit]}`;
  };
  M.db = (value) => (value === null || value === undefined ? "no error" : `${value.toFixed(1)} dB`);

  /** A long name shortened in its middle: the ends of a path identify it. */
  M.short = (text, length) => {
    if (text.length <= length) return text;
    const tail = Math.ceil((length - 1) * 0.62);
    return `${text.slice(0, length - 1 - tail)}…${text.slice(-tail)}`;
  };

  /** A name that may wrap after its slashes and dots. */
  M.path = (text) => text.split(/(?<=[/.])/).flatMap((part, i) => (i ? [M.el("wbr"), part] : [part]));

  /** A description list of [name, text or element]; empty entries are left out. */
  M.facts = (pairs) => M.el("dl", { class: "facts" },
    pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) => [M.el("dt", null, name), M.el("dd", null, value)]));

  /** The text of zlib data in base64. */
  M.inflate = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  };

  const KIND_WORDS = {
    integer: "integer kernel", island: "float on purpose (island)", unfused: "float, not fused", float: "float elementwise",
    quantize: "quantize, dequantize", layout: "shape and layout", table: "timestep tables, constants",
  };
  M.kinds = M.data.graph.kinds;
  M.kindWord = (kind) => KIND_WORDS[M.kinds[kind]];
  M.kindClass = (kind) => `k-${M.kinds[kind]}`;
  M.legend = () => M.el("div", { class: "keys" }, M.kinds.map((kind, i) =>
    M.el("span", { class: `k-${kind}` }, M.el("i"), M.kindWord(i))));

  /** One entry of a row of the ranges, which is a list or one number for all timesteps. */
  M.at = (row, column) => (Array.isArray(row) ? row[column] : row);

  // Indices that several parts need.
  const graph = M.data.graph;
  M.nodeOfName = new Map(graph.nodes.map((node, i) => [node.name, i]));
  M.blockOfNode = new Int32Array(graph.nodes.length);
  graph.blocks.forEach((block, i) => block.nodes.forEach((node) => { M.blockOfNode[node] = i; }));
  M.auditOf = new Map(M.data.audit.map((row) => [row.name, row]));
  M.costOf = new Map((M.data.cost.rows ?? []).map((row) => [row.name, row]));
  M.nodesOfQuantizer = new Map();
  graph.nodes.forEach((node, i) => (node.quantizers ?? []).forEach(([row, role]) => {
    // A layer is a better target for a quantizer than the nodes that implement it.
    const layer = M.auditOf.has(node.name) && role !== "output" || M.kinds[node.kind] === "integer";
    if (layer && !M.nodesOfQuantizer.get(row)?.layer || !M.nodesOfQuantizer.has(row)) {
      M.nodesOfQuantizer.set(row, { node: i, layer });
    }
  }));

  /** The nodes that read a value; the index is built at the first call. */
  M.readers = (value) => {
    if (!M.readersOf) {
      M.readersOf = graph.values.map(() => []);
      graph.nodes.forEach((node, i) => node.in.forEach((v) => v >= 0 && M.readersOf[v].push(i)));
    }
    return M.readersOf[value];
  };

  /** A link to the node of a name, or only the name when the compiled graph has no such node. */
  M.nodeLink = (name, text = name) => (M.nodeOfName.has(name)
    ? M.link(text, () => M.graph.show(M.nodeOfName.get(name)), { "data-node-link": name })
    : M.el("span", null, M.path(text)));
})();
