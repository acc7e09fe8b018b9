/* Tables that show some rows at a time: thousands of rows are kept as data, and become elements on request. */
(() => {
  const M = Mezzotint;
  const PRINTED = 120;
  const printed = [];

  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const cell = (column, row) => {
    const shown = column.show ? column.show(row) : column.value(row);
    const kind = column.number ? "number" : column.name ? "name" : column.tight ? "tight" : null;
    const empty = shown === "" || shown === null || shown === undefined;
    return M.el("td", { class: empty ? `${kind ?? ""} empty` : kind, "data-title": column.title }, typeof shown === "number" ? M.number(shown) : shown ?? "");
  };

  /**
   * `columns` are {title, value(row), show(row), and `number`, `name`, `tight`, `most` for how to show and sort it}, `rows` any data. With `filter` there is a box that
   * keeps the rows in which all words occur, and `choices` ({label, test}) are buttons that keep some rows.
   * `attributes(row)` become attributes of the row.
   */
  M.table = ({ columns, rows, label, filter = false, choices = [], page = 25, attributes = () => null, empty = "nothing" }) => {
    let shown = page, sorted = -1, upwards = true, words = [], choice = choices[0] ?? null;
    const body = M.el("tbody"), more = M.el("div", { class: "tools more" }), count = M.el("span", { class: "soft" });
    const left = M.el("p", { class: "soft printed" });
    const text = (row) => columns.map((column) => column.value(row)).join(" ").toLowerCase();
    const kept = () => {
      const found = rows.filter((row) => (!choice || choice.test(row)) && (!words.length || words.every((w) => text(row).includes(w))));
      if (sorted < 0) return found;
      const value = columns[sorted].value, sign = upwards ? 1 : -1;
      return [...found].sort((a, b) => sign * compare(value(a), value(b)));
    };
    const draw = () => {
      const found = kept();
      body.replaceChildren(...found.slice(0, shown).map((row) => M.el("tr", attributes(row), columns.map((column) => cell(column, row)))));
      if (!found.length) body.append(M.el("tr", null, M.el("td", { colspan: columns.length, class: "soft" }, empty)));
      left.textContent = found.length > shown ? `${found.length - shown} more rows: on a screen only` : "";
      count.textContent = `${found.length} of ${rows.length}`;
      const rest = found.length - shown;
      more.replaceChildren(...(rest > 0 ? [M.tool(`${Math.min(rest, 100)} more of ${rest}`, () => { shown += 100; draw(); })] : []));
    };
    const heads = columns.map((column, i) => {
      const head = M.el("th", { scope: "col", class: column.number ? "number" : null }, M.el("button", {
        type: "button",
        onclick: () => {
          upwards = sorted === i ? !upwards : !(column.number || column.most);
          sorted = i;
          heads.forEach((other) => other.removeAttribute("aria-sort"));
          head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
          draw();
        },
      }, column.title));
      return head;
    });
    const buttons = choices.map((one) => M.tool(one.label, () => {
      choice = one;
      buttons.forEach((button, k) => button.setAttribute("aria-pressed", choices[k] === one));
      draw();
    }, { "aria-pressed": one === choice }));
    const box = filter ? M.el("input", {
      type: "search", placeholder: `filter ${label}`, "aria-label": `filter ${label}`,
      oninput: (event) => { words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); shown = page; draw(); },
    }) : null;
    draw();
    printed.push(() => { const before = shown; shown = Math.max(shown, PRINTED); draw(); return () => { shown = before; draw(); }; });
    return M.el("div", null,
      filter || choices.length ? M.el("div", { class: "tools" }, box, buttons, count) : null,
      M.el("div", { class: "wide" }, M.el("table", { "aria-label": label }, M.el("thead", null, M.el("tr", null, heads)), body)), more, left);
  };

  /** Print more rows: paper has no buttons. */
  let restore = [];
  window.addEventListener("beforeprint", () => { restore = printed.map((expand) => expand()); });
  window.addEventListener("afterprint", () => { restore.forEach((back) => back()); restore = []; });

  /** A pass's diff, coloured, in pieces: a million lines at once would block the page. */
  M.diffText = (text, piece = 1500) => {
    const lines = text.split("\n");
    if (lines[lines.length - 1] === "") lines.pop();
    const kinds = { "+": "added", "-": "removed", "@": "hunk" };
    const kind = (line) => (/^(---|\+\+\+) /.test(line) ? "hunk" : kinds[line[0]] ?? "");
    const shown = M.el("pre", { tabindex: 0, "aria-label": "graph diff" }), more = M.el("div", { class: "tools more" });
    let next = 0;
    const draw = () => {
      shown.append(...lines.slice(next, next + piece).map((line) => M.el("span", { class: `line ${kind(line)}` }, line || " ")));
      next += piece;
      more.replaceChildren(...(next < lines.length ? [M.tool(`${Math.min(piece, lines.length - next)} more of ${lines.length - next} lines`, draw)] : []));
    };
    draw();
    return M.el("div", { class: "diff" }, shown, more);
  };
})();
