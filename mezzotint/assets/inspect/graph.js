/* The drawing of one block: pan, zoom, enter, leave. Positions come with the data; nothing is laid out here. */
(() => {
  const M = Mezzotint;
  const { blocks, nodes, values } = M.data.graph;
  const SIZE = { n: [186, 40], b: [206, 58], i: [170, 24], o: [170, 24], I: [170, 24], O: [170, 24] };
  const MARGIN = 24, CLOSEST = 2.5, FARTHEST = 0.08, READABLE = 0.5, MOVED = 4;
  const state = { block: 0, chosen: null, colour: "kind", view: { x: 0, y: 0, width: 1, height: 1 } };
  const parts = {};

  // The weight of a block is the sum over its nodes and those of all blocks below it.
  const weights = { time: new Map(), cost: new Map() };
  const nodeWeight = {
    time: (node) => nodes[node].ms ?? 0,
    cost: (node) => M.costOf.get(nodes[node].name)?.share ?? 0,
  };
  const blockWeight = (kind, block) => {
    if (!weights[kind].has(block)) {
      const own = blocks[block].nodes.reduce((sum, node) => sum + nodeWeight[kind](node), 0);
      weights[kind].set(block, blocks[block].children.reduce((sum, child) => sum + blockWeight(kind, child), own));
    }
    return weights[kind].get(block);
  };
  const itemWeight = ([kind, number]) => (kind === "b" ? blockWeight(state.colour, number) : kind === "n" ? nodeWeight[state.colour](number) : 0);
  M.blockTime = (block) => blockWeight("time", block);

  const curve = (way) => {
    // Smooth between waypoints: each piece starts and ends vertically.
    let d = `M${way[0]} ${way[1]}`;
    for (let i = 2; i < way.length; i += 2) {
      const middle = (way[i - 1] + way[i + 1]) / 2;
      d += `C${way[i - 2]} ${middle} ${way[i]} ${middle} ${way[i]} ${way[i + 1]}`;
    }
    return d;
  };

  const caption = ([kind, number, label]) => {
    if (kind === "n") {
      const node = nodes[number], time = node.ms === undefined ? "" : `, ${M.number(node.ms, 3)} ms`;
      return { title: node.name, first: M.short(label, 24), second: `${node.op}${time}`, aria: `node ${node.name}, ${node.op}, ${M.kindWord(node.kind)}` };
    }
    if (kind === "b") {
      const count = blocks[number].mix.reduce((a, b) => a + b, 0), time = blockWeight("time", number);
      const second = `${count} nodes${time ? `, ${M.number(time, 3)} ms` : ""}`;
      return { title: blocks[number].path, first: M.short(label, 28), second, aria: `block ${blocks[number].path}, ${count} nodes` };
    }
    const way = { i: "from", o: "to", I: "input", O: "output" }[kind];
    return { title: `${way} ${label}`, first: M.short(`${way} ${label}`, 24), second: "", aria: `${way} ${label}` };
  };

  const openItem = (item, event) => {
    event?.stopPropagation();
    const [kind, number] = item;
    if (kind === "b") M.graph.enter(number);
    else if (kind === "n") M.graph.select(number);
    else if (kind === "i" || kind === "o") (number < 0 ? M.graph.show(-1 - number) : M.graph.enter(number));
  };

  const drawItem = (item, index, most) => {
    const [kind, number, , x, y] = item, [width, height] = SIZE[kind], text = caption(item);
    const group = M.svg("g", {
      class: `item ${{ n: "node", b: "block" }[kind] ?? "port"} ${kind === "n" ? M.kindClass(nodes[number].kind) : ""}`,
      transform: `translate(${x} ${y})`, tabindex: 0, role: "button", "aria-label": text.aria, "data-item": index,
      "data-node": kind === "n" ? nodes[number].name : null, "data-block": kind === "b" ? blocks[number].path : null,
      onclick: (event) => !parts.dragged && openItem(item, event),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openItem(item, event); } },
      onmouseenter: () => near(index, true), onmouseleave: () => near(index, false),
      onfocus: () => near(index, true), onblur: () => near(index, false),
    }, M.svg("title", null, text.title));
    const box = M.svg("rect", { class: "box", width, height, rx: kind === "b" ? 8 : 5 });
    if (state.colour !== "kind" && (kind === "n" || kind === "b")) {
      const share = most ? itemWeight(item) / most : 0;
      box.setAttribute("style", `fill: color-mix(in srgb, var(--hot) ${Math.round(share * 65)}%, var(--card)); stroke: var(--soft)`);
    }
    group.append(box);
    if (kind === "n") group.append(M.svg("rect", { class: "tag", width: 5, height, rx: 2 }));
    const left = kind === "n" ? 14 : 10;
    group.append(M.svg("text", { x: left, y: kind === "n" ? 17 : kind === "b" ? 20 : 16 }, text.first));
    if (text.second) group.append(M.svg("text", { class: "op", x: left, y: kind === "n" ? 32 : 36 }, text.second));
    if (kind === "b") group.append(M.svg("g", null, M.mixBar(blocks[number].mix, 10, 43, width - 20, 6)));
    if (kind === "n" && number === state.chosen) group.classList.add("chosen");
    return group;
  };

  const near = (index, on) => parts.svg.querySelectorAll(`[data-from="${index}"], [data-to="${index}"]`)
    .forEach((edge) => edge.classList.toggle("near", on));

  const drawEdge = ([from, to, count, way]) => M.svg("path", {
    class: "edge", d: curve(way), "data-from": from, "data-to": to, "marker-end": "url(#tip)",
    style: count > 1 ? `stroke-width: ${Math.min(1.2 + 0.5 * (count - 1), 4)}` : null,
  }, M.svg("title", null, `${count} value${count > 1 ? "s" : ""}`));

  const look = () => {
    const { x, y, width, height } = state.view;
    parts.svg.setAttribute("viewBox", `${x.toFixed(1)} ${y.toFixed(1)} ${width.toFixed(1)} ${height.toFixed(1)}`);
  };
  const room = () => ({ width: parts.svg.clientWidth || 800, height: parts.svg.clientHeight || 500 });

  /** Show the whole drawing; where it would be too small to read, show its upper middle. */
  const fit = () => {
    const [wide, tall] = blocks[state.block].size, { width, height } = room();
    const whole = Math.min(width / (wide + 2 * MARGIN), height / (tall + 2 * MARGIN));
    const scale = Math.min(Math.max(whole, READABLE), 1.2), view = { width: width / scale, height: height / scale };
    const first = blocks[state.block].items.reduce((top, item) => (item[4] < top[4] ? item : top), [0, 0, 0, wide / 2, 1e9]);
    const centre = wide + 2 * MARGIN > view.width ? Math.max(Math.min(first[3] + 90, wide + MARGIN - view.width / 2), view.width / 2 - MARGIN) : wide / 2;
    state.view = { ...view, x: centre - view.width / 2, y: tall + 2 * MARGIN > view.height ? -MARGIN : tall / 2 - view.height / 2 };
    look();
  };
  /** The start of a view centred at `middle` that stays within the drawing. */
  const within = (middle, length, all) => (all + 2 * MARGIN < length ? (all - length) / 2
    : Math.min(Math.max(middle - length / 2, -MARGIN), all + MARGIN - length));
  const centreOn = (index) => {
    const [kind, , , x, y] = blocks[state.block].items[index], [width, height] = SIZE[kind];
    const { width: w, height: h } = room(), scale = Math.max(w / state.view.width, 0.75), all = blocks[state.block].size;
    const view = { width: w / scale, height: h / scale };
    state.view = { ...view, x: within(x + width / 2, view.width, all[0]), y: within(y + height / 2, view.height, all[1]) };
    look();
  };
  const zoom = (factor, px, py) => {
    const { width, height } = room(), view = state.view;
    const scale = Math.min(Math.max(width / view.width * factor, FARTHEST), CLOSEST), ax = (px ?? width / 2) / width, ay = (py ?? height / 2) / height;
    const next = { width: width / scale, height: height / scale };
    state.view = { ...next, x: view.x + ax * (view.width - next.width), y: view.y + ay * (view.height - next.height) };
    look();
  };
  const pan = (dx, dy) => {
    const scale = state.view.width / room().width;
    state.view.x -= dx * scale; state.view.y -= dy * scale;
    look();
  };

  const pointers = new Map();
  const onDown = (event) => { pointers.set(event.pointerId, event); parts.dragged = false; parts.travel = 0; };
  const onMove = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
    parts.travel += Math.hypot(dx, dy);
    if (parts.travel > MOVED && !parts.dragged) { parts.dragged = true; parts.svg.setPointerCapture(event.pointerId); }
    if (pointers.size === 1) { if (parts.dragged) pan(dx, dy); }
    else {
      const other = [...pointers.values()].find((p) => p.pointerId !== event.pointerId), edge = parts.svg.getBoundingClientRect();
      const was = Math.hypot(before.clientX - other.clientX, before.clientY - other.clientY);
      const is = Math.hypot(event.clientX - other.clientX, event.clientY - other.clientY);
      zoom(is / Math.max(was, 1), (event.clientX + other.clientX) / 2 - edge.left, (event.clientY + other.clientY) / 2 - edge.top);
      pan(dx / 2, dy / 2);
    }
    pointers.set(event.pointerId, event);
  };
  const onUp = (event) => { pointers.delete(event.pointerId); setTimeout(() => { parts.dragged = false; }); };
  const onWheel = (event) => {
    // Scrolling the page must not stop at the drawing: the wheel zooms after a click on the drawing, or with Ctrl.
    if (!event.ctrlKey && !parts.stage.contains(document.activeElement)) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0016), event.offsetX, event.offsetY);
  };
  const onKey = (event) => {
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (step) pan(...step);
    else if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "Escape" && state.chosen !== null) M.graph.select(null);
    else if (event.key === "Escape" || event.key === "Backspace") { if (blocks[state.block].parent < 0) return; M.graph.enter(blocks[state.block].parent, state.block); }
    else return;
    event.preventDefault();
  };

  const crumbs = () => {
    const trail = [];
    for (let block = state.block; block >= 0; block = blocks[block].parent) trail.unshift(block);
    parts.crumbs.replaceChildren(...trail.map((block) => M.link(block ? blocks[block].name : "whole graph", () => M.graph.enter(block),
      { "aria-current": block === state.block ? "true" : null })));
  };

  const draw = () => {
    const block = blocks[state.block], most = state.colour === "kind" ? 0 : Math.max(...block.items.map(itemWeight));
    parts.svg.replaceChildren(
      M.svg("defs", null, M.svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" },
        M.svg("path", { d: "M0 0L8 4L0 8z", style: "fill: var(--soft)" }))),
      M.svg("g", null, block.edges.map(drawEdge)), M.svg("g", null, block.items.map((item, i) => drawItem(item, i, most))));
    crumbs();
  };

  M.graph = {
    /** Show a block; `from` is the block that was shown before: it is centred and gets the focus. */
    enter(block, from) {
      state.block = block;
      draw();
      fit();
      const index = blocks[block].items.findIndex(([kind, number]) => kind === "b" && number === from);
      if (index >= 0) { centreOn(index); }
      const target = index >= 0 ? parts.svg.querySelector(`[data-item="${index}"]`) : parts.svg;
      target.focus({ preventScroll: true });
    },
    /** Open a node's panel, or close it with null. */
    select(node) {
      state.chosen = node;
      parts.svg.querySelectorAll(".chosen").forEach((one) => one.classList.remove("chosen"));
      parts.box.classList.toggle("open", node !== null);
      parts.panel.replaceChildren(...(node === null ? [] : [M.panel(node, () => M.graph.select(null))]));
      if (node === null) { parts.svg.focus({ preventScroll: true }); return; }
      parts.panel.firstChild.scrollTop = 0;
      const index = blocks[state.block].items.findIndex(([kind, number]) => kind === "n" && number === node);
      if (index >= 0) parts.svg.querySelector(`[data-item="${index}"]`).classList.add("chosen");
    },
    /** Show a node in the drawing of its block. */
    show(node) {
      document.getElementById("graph").scrollIntoView({ block: "start" });
      if (state.block !== M.blockOfNode[node]) M.graph.enter(M.blockOfNode[node]);
      M.graph.select(node);
      centreOn(blocks[state.block].items.findIndex(([kind, number]) => kind === "n" && number === node));
      parts.svg.querySelector(".chosen")?.focus({ preventScroll: true });
    },
    showBlock(block) {
      document.getElementById("graph").scrollIntoView({ block: "start" });
      M.graph.enter(block);
    },
    build() {
      parts.svg = M.svg("svg", {
        tabindex: 0, role: "group", "aria-label": "Drawing of the graph: Tab moves through its items, Enter opens one, Escape leaves the block, arrows pan, + and - zoom",
        onpointerdown: onDown, onpointermove: onMove, onpointerup: onUp, onpointercancel: onUp, onpointerleave: onUp,
      });
      parts.svg.addEventListener("wheel", onWheel, { passive: false });
      const modes = [["kind", "precision"], ["time", "time"], ["cost", "error"]].filter(([mode]) => mode === "kind" || blockWeight(mode, 0) > 0);
      const buttons = modes.map(([mode, word]) => M.tool(word, () => {
        state.colour = mode;
        buttons.forEach((button, i) => button.setAttribute("aria-pressed", modes[i][0] === mode));
        draw();
      }, { "aria-pressed": mode === state.colour }));
      parts.crumbs = M.el("nav", { class: "crumbs", "aria-label": "Enclosing blocks" });
      parts.stage = M.el("div", { class: "stage" }, parts.svg, M.el("div", { class: "zoom" },
        M.tool("+", () => zoom(1.3), { "aria-label": "zoom in" }), M.tool("−", () => zoom(1 / 1.3), { "aria-label": "zoom out" }), M.tool("fit", fit)));
      parts.panel = M.el("aside", { "aria-label": "Node", "aria-live": "polite" });
      parts.box = M.el("div", { class: "graph", onkeydown: onKey }, parts.stage, parts.panel);
      return [
        M.el("div", { class: "tools" }, parts.crumbs, modes.length > 1 ? M.el("span", { class: "soft" }, "colour by") : null, modes.length > 1 ? buttons : null),
        parts.box, M.legend(),
        M.el("p", { class: "soft hint" }, "Click a block to open it, a node for its details. Drag to pan, use Ctrl and the wheel (or two fingers) to zoom, Escape to leave a block."),
      ];
    },
    start() { draw(); fit(); },
  };
})();
