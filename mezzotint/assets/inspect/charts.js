/* Small plots as SVG, and bars. */
(() => {
  const M = Mezzotint;
  const WIDTH = 300, LEFT = 44, RIGHT = 6, TOP = 8, BOTTOM = 18;

  const finite = (values) => values.filter((v) => v !== null && v !== undefined);

  const span = (lists, zero) => {
    const all = finite(lists.flat());
    if (!all.length) return null;
    let low = Math.min(...all), high = Math.max(...all);
    if (zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
    return [low, high];
  };

  /** Runs of points without a gap: points that were not measured are not drawn. */
  const runs = (points) => {
    const found = [[]];
    for (const point of points) {
      if (point[1] === null || point[1] === undefined) found.push([]);
      else found[found.length - 1].push(point);
    }
    return found.filter((run) => run.length);
  };
  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  const axes = (x, across, low, high, height) => {
    const last = x.length - 1, floor = height - BOTTOM;
    const ticks = [...new Set([0, Math.round(last / 2), last])];
    return [
      M.svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${floor}H${WIDTH - RIGHT}`, style: "stroke:var(--line)" }),
      M.svg("text", { x: LEFT - 4, y: TOP + 4, "text-anchor": "end" }, M.number(high, 3)),
      M.svg("text", { x: LEFT - 4, y: floor, "text-anchor": "end" }, M.number(low, 3)),
      ticks.map((i) => M.svg("text", {
        x: across(i), y: height - 5, "text-anchor": i === 0 && last ? "start" : i === last && last ? "end" : "middle",
      }, M.number(x[i]))),
    ];
  };

  /**
   * A plot over `x` (evenly spaced, in the order given). `series` are {name, y, dash}, `bands` {name, low, high}; both
   * have a value or null for each x. `caption` stands below, with the names where there are several.
   */
  M.plot = ({ x, series = [], bands = [], caption = "", zero = false, height = 110 }) => {
    const range = span([...series.map((s) => s.y), ...bands.flatMap((b) => [b.low, b.high])], zero);
    if (!range) return M.note(`${caption}: nothing was measured`);
    const [low, high] = range;
    const across = (i) => LEFT + (x.length > 1 ? i / (x.length - 1) : 0.5) * (WIDTH - LEFT - RIGHT);
    const up = (y) => (y === null || y === undefined ? null : height - BOTTOM - (y - low) / (high - low) * (height - BOTTOM - TOP));
    const drawn = M.svg("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": caption },
      axes(x, across, low, high, height));
    bands.forEach((band, k) => {
      const there = x.map((_, i) => i).filter((i) => band.low[i] !== null && band.high[i] !== null);
      const outline = [...there.map((i) => [across(i), up(band.high[i])]), ...there.reverse().map((i) => [across(i), up(band.low[i])])];
      if (outline.length) drawn.append(M.svg("path", { class: `band s${k + series.length + 1}`, d: `${path(outline)}Z` }));
    });
    series.forEach((one, k) => {
      for (const run of runs(one.y.map((y, i) => [across(i), up(y)]))) {
        drawn.append(run.length > 1
          ? M.svg("path", { class: `s${k + 1}${one.dash ? " dash" : ""}`, d: path(run) })
          : M.svg("circle", { class: `s${k + 1}`, cx: run[0][0], cy: run[0][1], r: 2.5 }));
      }
    });
    const names = [...series, ...bands].map((one) => one.name);
    const keys = names.length > 1 ? M.el("span", { class: "keys" }, names.map((name, k) =>
      M.el("span", { class: `s${k + 1}` }, M.el("i"), name))) : null;
    return M.el("figure", null, drawn, M.el("figcaption", null, caption, keys));
  };

  /** The ranges' columns in the order of sampling: the noisiest first. */
  M.columns = () => {
    const times = M.data.ranges.timesteps ?? [];
    return times.map((_, i) => i).sort((a, b) => times[b] - times[a]);
  };

  const over = (row, columns) => columns.map((column) => M.at(row, column));

  /** A quantizer's grid and its measured values over the timesteps. */
  M.rangePlot = (row) => {
    const { ranges } = M.data, columns = M.columns();
    const pick = (name) => over(ranges[name][row], columns);
    const seen = finite(pick("seen_low")).length > 0;
    return M.plot({
      x: columns.map((i) => ranges.timesteps[i]),
      series: [{ name: "grid low", y: pick("low") }, { name: "grid high", y: pick("high") }],
      bands: seen ? [{ name: "seen", low: pick("seen_low"), high: pick("seen_high") }] : [],
      caption: seen ? "range by timestep" : "range of the grid by timestep (the measured range is not known)",
    });
  };
  M.scalePlot = (row) => {
    const { ranges } = M.data, columns = M.columns();
    return M.plot({
      x: columns.map((i) => ranges.timesteps[i]), series: [{ name: "scale", y: over(ranges.scale[row], columns) }],
      caption: "scale by timestep, the noisiest first", zero: true, height: 90,
    });
  };

  /** A stacked bar of counts by kind, as rectangles for an SVG drawing. */
  M.mixBar = (mix, x, y, width, height) => {
    const total = mix.reduce((a, b) => a + b, 0) || 1;
    let left = x;
    return mix.map((count, kind) => {
      const wide = count / total * width;
      const part = count ? M.svg("rect", { class: `part ${M.kindClass(kind)}`, x: left, y, width: wide, height }) : null;
      left += wide;
      return part;
    });
  };
})();
