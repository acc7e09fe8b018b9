/* The sections, from top to bottom: [id, name, purpose, function that makes its content]. */
(() => {
  const M = Mezzotint;
  const D = M.data;

  const tile = (value, word) => M.el("div", { class: "tile" }, M.el("b", null, value), M.el("span", null, word));

  const summary = () => {
    const s = D.summary, speed = D.speed, figures = D.pictures.figures;
    const tiles = [
      tile(M.bytes(s.bytes), `${(s.bytes / s.float_bytes).toPrecision(3)} of the float ${M.bytes(s.float_bytes)}`),
      tile(`${s.integer_layers} / ${s.layers}`, `layers on integer kernels ${s.measured_in}`),
      tile(String(s.islands), "islands in float on purpose"),
    ];
    if (speed.call_ms !== undefined) {
      const ratio = speed.float_ms ? `, ${(speed.float_ms / speed.call_ms).toFixed(2)} times as fast as float` : "";
      tiles.push(tile(`${M.number(speed.call_ms, 3)} ms`, `a call, batch ${speed.batch}, ${speed.threads} thread${speed.threads > 1 ? "s" : ""}${ratio}`));
    }
    if (figures) {
      tiles.push(tile(M.db(figures.eps_sqnr_db), `SQNR of epsilon; worst step ${M.db(figures.eps_sqnr_db_worst_step)}`),
        tile(M.db(figures.psnr_db_median), "PSNR of images, median"));
    }
    const cards = D.answers.map((card) => M.el("div", { class: "answer" }, M.el("h3", null, card.question), M.el("b", null, card.head),
      M.el("ul", null, card.lines.map((line) => M.el("li", null, line.node ? [line.before, " ", M.nodeLink(line.node), " ", line.after] : line))), M.el("a", { href: `#${card.section}` }, "more")));
    return [M.el("div", { class: "tiles" }, tiles), M.el("div", { class: "answers" }, cards), M.facts(s.rows)];
  };

  const pictures = () => {
    const p = D.pictures;
    if (p.note) return M.note(p.note);
    const strips = p.rows.map((row) => M.el("div", { class: "strip", style: `--n: ${row.images.length}` }, M.el("span", null, row.label),
      row.images.map((source, i) => M.el("img", { src: source, alt: `${row.label}, image ${i + 1}` }))));
    const psnr = p.psnr ? M.el("p", null, `PSNR by image: ${p.psnr.map((db) => M.db(db)).join(", ")}.`) : M.note(`The float images for comparison: ${p.hint}`);
    const plot = p.sqnr ? M.el("div", { class: "plots" }, M.plot({
      x: p.sqnr.map(([t]) => t), series: [{ name: "SQNR", y: p.sqnr.map(([, db]) => db) }],
      caption: "SQNR of epsilon by timestep, dB: both networks on the float trajectory",
    })) : null;
    const latents = p.view ? M.el("p", { class: "soft" }, p.view) : null;
    return [M.el("p", { class: "soft" }, `The same noise in each column, seed ${p.seed}.`), latents, M.el("div", { class: "strips" }, strips), psnr, plot];
  };

  const cost = () => {
    const c = D.cost;
    if (c.note) return M.note(c.note);
    const most = c.rows[0]?.share || 1;
    const columns = [
      { title: "layer", name: true, value: (r) => r.name, show: (r) => M.nodeLink(r.name) },
      { title: "share of the error", tight: true, most: true, value: (r) => r.share, show: (r) => [M.el("i", { class: "share", style: `width: ${(r.share / most * 5).toFixed(2)}rem` }), M.percent(r.share)] },
      ...c.timesteps.map((t, i) => ({ title: `t = ${M.number(t)}: own dB`, number: true, value: (r) => r.local[i], show: (r) => M.number(r.local[i], 3) })),
      { title: "would help", value: (r) => r.what }, { title: "because", value: (r) => r.why },
    ];
    const unknown = Object.entries(c.unknown);
    return [
      M.facts([["all layers quantized at once", M.db(c.together)], ["the bundle itself", M.db(c.bundle)],
        ["reference", c.same_weights ? "has the weights that the bundle was compiled from" : "has other weights than those that the bundle was compiled from"]]),
      M.table({ columns, rows: c.rows, label: "layers by error", filter: true, page: 15 }),
      unknown.length ? [M.el("h3", null, "not measured"), M.facts(unknown)] : null,
    ];
  };

  const opened = async (row, place, button) => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    place.replaceChildren();
    if (open) return;
    const { diff } = row, note = diff.note ? M.note(diff.note) : null;
    const heading = M.el("h3", null, `changes by ${row.name}: ${diff.added ?? 0} lines added, ${diff.removed ?? 0} removed`);
    if (!diff.text) { place.append(heading, note ?? M.note("the pass did not change the graph")); return; }
    place.append(heading, M.diffText(await M.inflate(diff.text)), ...(note ? [note] : []));
  };

  const passes = () => {
    const place = M.el("div", { id: "diff", "aria-live": "polite" }), rows = D.passes.rows;
    const changed = (r) => (r.diff.added === undefined ? "–" : `+${r.diff.added} −${r.diff.removed}`);
    const columns = [
      { title: "#", number: true, value: (r) => r.number },
      { title: "pass", tight: true, value: (r) => r.name, show: (r) => {
        const button = M.link(r.name, () => {
          place.parentNode.querySelectorAll("[aria-expanded=true]").forEach((other) => other !== button && other.setAttribute("aria-expanded", "false"));
          opened(r, place, button);
        }, { "aria-expanded": "false", "data-pass": r.name });
        return button;
      } },
      { title: "result", name: true, value: (r) => r.note }, { title: "nodes", tight: true, value: (r) => r.after, show: (r) => `${r.before} → ${r.after}` },
      { title: "diff", tight: true, value: changed }, { title: "seconds", number: true, value: (r) => r.seconds, show: (r) => r.seconds.toFixed(1) },
      { title: "peak MB", number: true, value: (r) => r.peak, show: (r) => r.peak.toFixed(0) },
      { title: "options", value: (r) => Object.entries(r.options).map(([k, v]) => `${k}=${v}`).join(", ") },
    ];
    return [M.table({ columns, rows, label: "passes", page: 60 }), place];
  };

  const training = () => {
    const rows = D.training.rows;
    if (!rows.length) return M.note("no pass of the recipe trains");
    const columns = [
      { title: "unit", name: true, value: (r) => r.unit }, { title: "pass", tight: true, value: (r) => r.pass },
      { title: "error before", number: true, value: (r) => r.start, show: (r) => M.number(r.start, 3) },
      { title: "behind the fit", number: true, value: (r) => r.soft, show: (r) => M.number(r.soft, 3) },
      { title: "rounded", number: true, value: (r) => r.hard, show: (r) => M.number(r.hard, 3) },
      { title: "kept", tight: true, value: (r) => (r.kept ? "yes" : "no") },
    ];
    const plots = rows.filter((r) => r.losses.length).map((r) => M.plot({
      x: r.losses.map((_, i) => i + 1), series: [{ name: "loss", y: r.losses }], caption: `loss of ${r.unit}`, zero: true, height: 90,
    }));
    return [M.table({ columns, rows, label: "trained units", filter: true, page: 20 }), M.el("div", { class: "plots" }, plots)];
  };

  const graph = () => [speedTable(), M.graph.build()];
  const speedTable = () => {
    const s = D.speed;
    if (s.note) return M.note(`times: ${s.note}`);
    const words = s.groups.slice(0, 6).map((g) => `${g.group} ${M.percent(g.share)}`).join(", ");
    return M.el("p", { class: "soft" }, `Time in kernels: ${words}. The times are the profiler's: compare their shares. ${M.number(s.other_ms, 3)} ms are in nodes that onnxruntime added (transposes, layouts) and that are not in this graph; the time of fused nodes is shown at one of them.`);
  };

  const audit = () => {
    const mark = (r) => (r.integer ? "k-integer" : r.rule === "island" ? "k-island" : "k-unfused");
    const columns = [
      { title: "layer", name: true, value: (r) => r.name, show: (r) => M.nodeLink(r.name) }, { title: "op", value: (r) => r.op },
      { title: "kernel", tight: true, value: (r) => r.kernel, show: (r) => M.el("span", { class: `chip ${mark(r)}` }, r.kernel) },
      { title: "rule", value: (r) => r.rule }, { title: "why", value: (r) => r.why }, { title: "fix", value: (r) => r.fix },
    ].filter((column) => ["layer", "kernel"].includes(column.title) || D.audit.some((row) => column.value(row)));
    const choices = [
      { label: "all", test: () => true }, { label: "in float", test: (r) => !r.integer }, { label: "integer", test: (r) => r.integer },
    ];
    return M.table({ columns, rows: D.audit, label: "layers", filter: true, choices, page: 20, attributes: (r) => ({ "data-layer": r.name }) });
  };

  const ranges = () => (D.ranges.note ? M.note(D.ranges.note) : M.heatMap());

  const noise = () => {
    const n = D.noise;
    if (n.note) return M.note(n.note);
    const x = n.calls.map((row) => row.timestep), pick = (name) => n.calls.map((row) => row[name]);
    const kept = n.calls.map((row) => row.sqnr_db[row.kept]), none = n.calls.map((row) => row.sqnr_db.none);
    return [M.el("p", null, n.summary), M.el("div", { class: "plots" },
      M.plot({ x, series: [{ name: "slope", y: pick("slope") }], caption: "slope of the error on the prediction, by timestep", zero: true }),
      M.plot({ x, series: [{ name: "bias", y: pick("bias") }], caption: "bias (root of the mean square over channels)", zero: true }),
      M.plot({ x, series: [{ name: "spread", y: pick("spread") }], caption: "spread of the rest", zero: true }),
      M.plot({ x, series: [{ name: "uncorrected", y: none }, { name: "corrected", y: kept }], caption: "SQNR of epsilon, held out, dB" }),
      M.plot({ x, series: [{ name: "planned", y: pick("sigma") }, { name: "added", y: pick("noise") }], caption: "the sampler's own noise", zero: true }))];
  };

  const islands = () => {
    if (!D.islands.length) return M.note("no layer was kept in float on purpose");
    return M.table({ label: "islands", rows: D.islands, columns: [
      { title: "layer", name: true, value: (r) => r.name, show: (r) => M.nodeLink(r.name) }, { title: "reason", value: (r) => r.why },
    ] });
  };

  const quantizers = () => {
    const rows = D.quantizers.map((q, row) => ({ ...q, row }));
    if (!rows.length) return M.note("nothing in this bundle is quantized");
    const place = M.el("div", { "aria-live": "polite" });
    M.openQuantizer = (row) => {
      const there = M.nodesOfQuantizer.get(row);
      place.replaceChildren(M.el("h3", null, D.quantizers[row].site), there ? M.el("p", null, "in the graph: ", M.nodeLink(D.graph.nodes[there.node].name)) : null,
        ...(D.ranges.note ? [] : [M.el("div", { class: "plots" }, M.scalePlot(row), M.rangePlot(row))]));
    };
    const columns = [
      { title: "site", name: true, value: (q) => q.site, show: (q) => M.link(q.site, () => M.showQuantizer(q.row)) },
      { title: "computed by", name: true, value: (q) => q.maker ?? "", show: (q) => q.maker ? M.nodeLink(q.maker) : "" },
      { title: "of", value: (q) => (q.kind === "weight" ? "weight" : "activation") }, { title: "format", tight: true, value: M.formatOf }, { title: "grain", value: M.grainOf },
      { title: "scale", tight: true, value: (q) => q.scale[0], show: M.scaleOf }, { title: "zero point", tight: true, value: M.zeroOf }, { title: "chosen by", value: (q) => q.by },
    ];
    const choices = [
      { label: "all", test: () => true }, { label: "activations", test: (q) => q.kind !== "weight" }, { label: "weights", test: (q) => q.kind === "weight" },
    ];
    return [M.table({ columns, rows, label: "quantizers", filter: true, choices, attributes: (q) => ({ "data-quantizer": q.site }) }), place];
  };
  /** Show a quantizer's node with its panel, or its row when no node has it. */
  M.showQuantizer = (row) => {
    M.openQuantizer(row);
    const there = M.nodesOfQuantizer.get(row);
    if (there) M.graph.show(there.node);
    else document.getElementById("quantizers").scrollIntoView();
  };

  const manifest = () => {
    const m = D.manifest, refused = Object.entries(m.refused);
    return [
      M.facts([["digest", M.el("code", null, m.digest)], ...Object.entries(m.versions)]),
      M.el("h3", null, "recipe"), M.el("pre", { tabindex: 0, "aria-label": "recipe" }, m.recipe),
      m.storage.length ? [M.el("h3", null, "storage"), M.table({ label: "storage", rows: m.storage, columns: [
        { title: "type", value: (r) => r.type }, { title: "size", number: true, value: (r) => r.bytes, show: (r) => M.bytes(r.bytes) },
        { title: "constants", number: true, value: (r) => r.constants }, { title: "values", number: true, value: (r) => r.values }] })] : null,
      refused.length ? [M.el("h3", null, "refused factors"), M.facts(refused)] : null,
      M.el("h3", null, "files"), M.table({ label: "files", rows: m.files, page: 15, columns: [
        { title: "file", name: true, value: (r) => r.name }, { title: "size", number: true, value: (r) => r.bytes, show: (r) => M.bytes(r.bytes) },
        { title: "sha256", value: (r) => r.sha256, show: (r) => M.el("code", null, r.sha256) }] }),
    ];
  };

  M.sections = [
    ["summary", "Summary", "", summary],
    ["pictures", "Images", "Images of both networks, sampled from the same noise.", pictures],
    ["cost", "Error by layer", "The error at the output that each layer's quantization causes, measured one by one.", cost],
    ["passes", "Passes", "The passes of the compiler, in order. Click a pass to see its changes to the graph.", passes],
    ["training", "Training", "The layers and blocks that a pass trained: relative errors of their outputs, and the loss, as means of successive iterations.", training],
    ["graph", "Graph", "The compiled graph, block by block.", graph],
    ["audit", "Fusion audit", "The kernel that runs each layer, or the reason why it is not an integer kernel.", audit],
    ["ranges", "Ranges", "The width of each quantizer's grid at each timestep, relative to its largest width.", ranges],
    ["noise", "Noise", "The error that quantization adds to the prediction, by network call, and the part that the sampler corrects.", noise],
    ["islands", "Islands", "Layers that stay in float on purpose.", islands],
    ["quantizers", "Quantizers", "", quantizers],
    ["manifest", "Manifest", "The identity of this bundle, its recipe and its files.", manifest],
  ];
})();
