/* The heat map: quantizers by timesteps. Only the visible rows are painted; the canvas stays while the rows scroll. */
(() => {
  const M = Mezzotint;
  const ROW = 15, HEAD = 20, PRINT = 900;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const palette = () => {
    const stops = [0, 1, 2, 3].map((i) => {
      const text = css(`--heat${i}`);
      return rgb(text.length === 4 ? `#${[...text.slice(1)].map((c) => c + c).join("")}` : text);
    });
    return Array.from({ length: 64 }, (_, i) => {
      const at = i / 63 * 3, k = Math.min(Math.floor(at), 2), part = at - k;
      return `rgb(${stops[k].map((c, j) => Math.round(c + (stops[k + 1][j] - c) * part)).join(",")})`;
    });
  };

  const widthAt = (row, column) => {
    const low = M.at(M.data.ranges.low[row], column), high = M.at(M.data.ranges.high[row], column);
    return low === null || high === null ? null : high - low;
  };

  /** Rows: values first, then weights, each in the order of the manifest. A row is labelled by the node that computes the value: values have names like `conv2d_7`. */
  const order = (kind) => M.data.quantizers.map((q, i) => i)
    .filter((i) => kind === "all" || M.data.quantizers[i].kind === kind)
    .sort((a, b) => (M.data.quantizers[a].kind === "weight") - (M.data.quantizers[b].kind === "weight") || a - b);

  const paint = (context, rows, columns, place, colours) => {
    for (const [k, row] of rows) {
      const widths = columns.map((column) => widthAt(row, column)), most = Math.max(...widths.map((w) => w ?? 0));
      const fixed = !Array.isArray(M.data.ranges.low[row]) && !Array.isArray(M.data.ranges.high[row]);
      const { x, y, wide, tall } = place(k);
      const cell = wide / columns.length;
      if (fixed) { context.fillStyle = colours[63]; context.fillRect(x, y, wide, tall); continue; }
      widths.forEach((width, c) => {
        if (width === null) return;
        context.fillStyle = colours[most ? Math.round(width / most * 63) : 0];
        context.fillRect(x + c * cell, y, Math.ceil(cell), tall);
      });
    }
  };

  const facts = (row, column) => {
    const { ranges, quantizers } = M.data, q = quantizers[row], at = (name) => M.at(ranges[name][row], column);
    const seen = at("seen_low") === null ? "not measured" : `${M.number(at("seen_low"))} .. ${M.number(at("seen_high"))}`;
    return M.facts([
      ["quantizer", M.link(q.site, () => M.showQuantizer(row))], ["computed by", q.maker ? M.nodeLink(q.maker) : "-"], ["timestep", M.number(ranges.timesteps[column])],
      ["grid", `${M.number(at("low"))} .. ${M.number(at("high"))}, scale ${M.number(at("scale"))}`], ["seen", seen],
    ]);
  };

  M.heatMap = () => {
    const columns = M.columns(), state = { rows: order("all"), row: 0, column: 0 };
    const canvas = M.el("canvas", { tabindex: 0, role: "img", "aria-label": "ranges: quantizers by timesteps; arrow keys move, Enter opens the quantizer" });
    const spacer = M.el("div", { class: "rows" }), box = M.el("div", { class: "heat" }, canvas, spacer), readout = M.el("div", { class: "readout", "aria-live": "polite" });
    const context = canvas.getContext("2d"), tips = M.el("div");
    let colours = palette();
    const labels = () => Math.min(220, box.clientWidth * 0.38);
    const draw = () => {
      const ratio = window.devicePixelRatio || 1, wide = box.clientWidth, tall = box.clientHeight;
      if (!wide) return;
      canvas.width = wide * ratio; canvas.height = tall * ratio;
      canvas.style.width = `${wide}px`; canvas.style.height = `${tall}px`;
      // The canvas has its own height in the flow, and the rows begin below the head.
      spacer.style.height = `${HEAD + state.rows.length * ROW}px`;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.fillStyle = css("--card"); context.fillRect(0, 0, wide, tall);
      const left = labels(), first = Math.floor(box.scrollTop / ROW), count = Math.ceil(tall / ROW) + 1;
      const seen = state.rows.slice(first, first + count).map((row, i) => [first + i, row]);
      const top = (k) => HEAD + k * ROW - box.scrollTop;
      paint(context, seen, columns, (k) => ({ x: left, y: top(k), wide: wide - left - 14, tall: ROW - 1 }), colours);
      context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
      for (const [k, row] of seen) {
        context.fillStyle = k === state.row ? css("--accent") : css("--ink");
        context.fillText(M.short(M.data.quantizers[row].maker ?? M.data.quantizers[row].site, Math.floor(left / 6.8)), 6, top(k) + ROW / 2);
      }
      const cell = (wide - left - 14) / columns.length;
      context.strokeStyle = css("--hot"); context.lineWidth = 2;
      context.strokeRect(left + state.column * cell, top(state.row), Math.max(cell, 3), ROW - 1);
      context.fillStyle = css("--card"); context.fillRect(0, 0, wide, HEAD);
      context.fillStyle = css("--soft");
      context.fillText(`timestep ${M.number(M.data.ranges.timesteps[columns[0]])}`, left, HEAD / 2);
      const last = M.number(M.data.ranges.timesteps[columns[columns.length - 1]]);
      context.fillText(last, wide - 14 - context.measureText(last).width, HEAD / 2);
    };
    const say = () => { if (state.rows.length) readout.replaceChildren(facts(state.rows[state.row], columns[state.column])); };
    const to = (row, column) => {
      state.row = Math.min(Math.max(row, 0), state.rows.length - 1);
      state.column = Math.min(Math.max(column, 0), columns.length - 1);
      draw(); say();
    };
    const under = (event) => {
      const edge = canvas.getBoundingClientRect(), left = labels();
      const row = Math.floor((event.clientY - edge.top - HEAD + box.scrollTop) / ROW);
      const column = Math.floor((event.clientX - edge.left - left) / ((edge.width - left - 14) / columns.length));
      if (event.clientY - edge.top > HEAD && row < state.rows.length) to(row, column);
      return row;
    };
    canvas.addEventListener("mousemove", under);
    canvas.addEventListener("click", (event) => { under(event); detail(); });
    const detail = () => tips.replaceChildren(M.el("h3", null, M.data.quantizers[state.rows[state.row]].site), M.el("div", { class: "plots" }, M.rangePlot(state.rows[state.row])));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-20, 0], PageDown: [20, 0] }[event.key];
      if (event.key === "Enter") detail();
      else if (step) {
        to(state.row + step[0], state.column + step[1]);
        const top = state.row * ROW;
        if (top < box.scrollTop) box.scrollTop = top;
        if (top > box.scrollTop + box.clientHeight - HEAD - 2 * ROW) box.scrollTop = top - box.clientHeight + HEAD + 2 * ROW;
      } else return;
      event.preventDefault();
    });
    box.addEventListener("scroll", draw);
    const sheet = M.el("canvas", { class: "printed", "aria-hidden": "true" });
    const drawSheet = () => {
      const tall = Math.max(1, Math.min(8, Math.floor(PRINT / Math.max(state.rows.length, 1))));
      sheet.width = 1000; sheet.height = state.rows.length * tall || 1;
      paint(sheet.getContext("2d"), state.rows.map((row, i) => [i, row]), columns, (k) => ({ x: 0, y: k * tall, wide: 1000, tall }), colours);
    };
    const choose = (kind) => {
      state.rows = order(kind); state.row = 0; box.scrollTop = 0;
      canvas.dataset.rows = state.rows.length; canvas.dataset.columns = columns.length;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", kinds[i][0] === kind));
      to(0, 0); drawSheet();
    };
    const kinds = [["all", "all"], ["value", "activations"], ["weight", "weights"]];
    const buttons = kinds.map(([kind, word]) => M.tool(`${word} (${order(kind).length})`, () => choose(kind)));
    new ResizeObserver(draw).observe(box);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = palette(); draw(); drawSheet(); });
    choose("all");
    return [M.el("div", { class: "tools" }, buttons, M.el("span", { class: "soft" }, "narrow ", M.el("i", { class: "ramp" }), " the row's largest width")), box, sheet, readout, tips];
  };
})();
