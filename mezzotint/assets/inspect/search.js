/* The search box: nodes, blocks, values and quantizers by any part of their names. */
(() => {
  const M = Mezzotint;
  const MOST = 40;
  const KINDS = ["block", "node", "quantizer", "value"];
  let index = null;

  const entries = () => {
    const { nodes, values, blocks } = M.data.graph, found = [];
    const add = (kind, name, go, more = "") => name && found.push({ kind, name, lower: name.toLowerCase(), go, more });
    blocks.forEach((block, i) => i && add(0, block.path, () => M.graph.showBlock(i)));
    nodes.forEach((node, i) => add(1, node.name, () => M.graph.show(i), node.op));
    M.data.quantizers.forEach((q, row) => add(2, q.site, () => M.showQuantizer(row), q.format));
    values.forEach(([name, type, maker], v) => {
      const node = maker >= 0 ? maker : M.readers(v)[0];
      if (node !== undefined) add(3, name, () => M.graph.show(node), type);
    });
    return found;
  };

  /** 0: the whole name, 1: its last part, 2: its beginning, 3: anywhere. */
  const rank = (entry, word) => {
    if (entry.lower === word) return 0;
    if (entry.lower.endsWith(`/${word}`)) return 1;
    return entry.lower.startsWith(word) ? 2 : 3;
  };

  const matches = (text) => {
    index ??= entries();
    const words = text.toLowerCase().split(/\s+/).filter(Boolean), found = [];
    if (!words.length) return found;
    for (const entry of index) {
      if (words.every((word) => entry.lower.includes(word) || entry.more.toLowerCase() === word)) found.push(entry);
    }
    return found.sort((a, b) => rank(a, words[0]) - rank(b, words[0]) || a.kind - b.kind || a.name.length - b.name.length);
  };

  M.startSearch = () => {
    const box = document.getElementById("search"), list = document.getElementById("found");
    let shown = [], chosen = 0;
    const close = () => { list.hidden = true; box.setAttribute("aria-expanded", "false"); box.removeAttribute("aria-activedescendant"); };
    const mark = () => {
      [...list.children].forEach((item, i) => item.setAttribute("aria-selected", i === chosen));
      box.setAttribute("aria-activedescendant", `found-${chosen}`);
      list.children[chosen]?.scrollIntoView({ block: "nearest" });
    };
    const open = (entry) => { close(); entry.go(); };
    const look = () => {
      const all = matches(box.value);
      shown = all.slice(0, MOST);
      chosen = 0;
      list.replaceChildren(...shown.map((entry, i) => M.el("li", {
        role: "option", id: `found-${i}`, onmousedown: (event) => event.preventDefault(), onclick: () => open(entry),
      }, M.short(entry.name, 70), M.el("small", null, `${KINDS[entry.kind]} ${entry.more}`))));
      if (box.value.trim() && !shown.length) list.append(M.el("li", { class: "soft" }, "no name matches"));
      if (all.length > MOST) list.append(M.el("li", { class: "soft" }, `${all.length - MOST} more: continue typing`));
      list.hidden = !box.value.trim();
      box.setAttribute("aria-expanded", String(!list.hidden));
      if (shown.length) mark();
    };
    box.addEventListener("input", look);
    box.addEventListener("focus", () => box.value && look());
    box.addEventListener("blur", () => setTimeout(close, 150));
    box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        if (!shown.length) return;
        chosen = (chosen + (event.key === "ArrowDown" ? 1 : shown.length - 1)) % shown.length;
        mark();
      } else if (event.key === "Enter") { if (shown[chosen]) { box.blur(); open(shown[chosen]); } }
      else if (event.key === "Escape") { close(); box.value = ""; }
      else return;
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input, textarea, select");
      if (event.key === "/" && !typing) { event.preventDefault(); box.focus(); }
    });
  };
})();
