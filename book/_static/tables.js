// Below each figure that is drawn from data: a table of them, made when a reader opens it, and as a CSV file.
(() => {
  const ARRAYS = {
    i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array,
  };
  const MOST_ROWS = 200; // shown; the file has them all

  // Plotly's arrays as plain ones: lists, or typed arrays in base64, which may have two dimensions.
  function decode(values) {
    if (values == null || Array.isArray(values)) return values;
    if (typeof values !== "object" || !values.bdata) return undefined;
    const bytes = Uint8Array.from(atob(values.bdata), (letter) => letter.charCodeAt(0));
    const flat = [...new ARRAYS[values.dtype](bytes.buffer)];
    const columns = Number(String(values.shape ?? "").split(",")[1]);
    if (!columns) return flat;
    return Array.from({ length: flat.length / columns }, (_, row) => flat.slice(row * columns, (row + 1) * columns));
  }

  const plain = (text) => String(text ?? "").replace(/<[^>]*>/g, " ").trim();
  const number = (value) =>
    typeof value !== "number" || Number.isNaN(value) ? plain(value || "") : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));

  // The title of the panel that a trace lies in: figures.py writes it as an annotation in the corner of the axes.
  function panel(trace, layout) {
    const domain = (trace.xaxis ?? "x") + " domain";
    const titles = (layout.annotations ?? []).filter((note) => note.xref === domain && note.y === 1);
    return plain(titles[0]?.text);
  }

  function axisTitle(layout, name, letter) {
    const title = (key) => plain(layout[key]?.title?.text ?? layout[key]?.title);
    return title((name ?? letter).replace(letter, letter + "axis")) || title(letter + "axis") || letter;
  }

  // The rows of one trace as objects, column → value; nothing for what was drawn around data (bands, guides).
  function rows(trace, layout, several) {
    const [x, y, z] = [decode(trace.x), decode(trace.y), decode(trace.z)];
    const where = {};
    if (panel(trace, layout)) where.panel = panel(trace, layout);
    if (several && trace.name) where.series = plain(trace.name);
    if (z && Array.isArray(z[0])) {
      return z.flatMap((line, row) =>
        line.map((value, column) => ({ ...where, column: x?.[column] ?? column, row: y?.[row] ?? row, value })));
    }
    const labels = decode(trace.labels ?? trace.text);
    const [names, error] = [[axisTitle(layout, trace.xaxis, "x"), axisTitle(layout, trace.yaxis, "y")], decode(trace.error_y?.array)];
    if (names[0] === names[1]) names[1] += " (y)";
    const length = Math.max(x?.length ?? 0, y?.length ?? 0);
    return Array.from({ length }, (_, k) => ({
      ...where,
      ...(x && { [names[0]]: x[k] }),
      ...(y && { [names[1]]: y[k] }),
      ...(z && { z: z[k] }),
      ...(error && { "±": error[k] }),
      ...(Array.isArray(labels) && { label: labels[k] }),
    }));
  }

  // The rows of attention patterns: what each token gives to itself and to those before it.
  function attention({ attention, attentionHeadNames, tokens }) {
    const all = attention.flatMap((pattern, head) =>
      pattern.flatMap((line, query) =>
        line.slice(0, query + 1).map((value, key) => ({ head: attentionHeadNames[head], from: tokens[query], to: tokens[key], attention: value }))));
    return { columns: ["head", "from", "to", "attention"], all: all.reverse() }; // the last token's first
  }

  function collect({ data, layout, props }) {
    if (props) return attention(props);
    const drawn = data.filter((trace) => trace.fill !== "toself" && (trace.z || trace.name || trace.hoverinfo !== "skip"));
    const several = new Set(drawn.map((trace) => trace.name)).size > 1;
    const all = drawn.flatMap((trace) => rows(trace, layout, several));
    const columns = [...new Set(all.flatMap(Object.keys))];
    return { columns, all };
  }

  function element(tag, content, attributes = {}) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...[content].flat());
    return made;
  }

  function table({ columns, all }, caption) {
    const head = element("tr", columns.map((name) => element("th", name, { scope: "col" })));
    const body = all.slice(0, MOST_ROWS).map((row) => element("tr", columns.map((name) => element("td", number(row[name]), { className: typeof row[name] }))));
    return element("table", [element("caption", caption), element("thead", head), element("tbody", body)], { className: "table" });
  }

  function csv({ columns, all }) {
    const quoted = (value) => `"${plain(value).replaceAll('"', '""')}"`;
    const lines = [columns, ...all.map((row) => columns.map((name) => row[name]))];
    return new Blob([lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" });
  }

  function fill(details) {
    const figure = details.closest("figure");
    const found = [...figure.querySelectorAll(".book-figure script[type='application/json']")].map((script) => collect(JSON.parse(script.textContent)));
    for (const part of found) {
      const more = part.all.length - MOST_ROWS;
      const caption = more > 0 ? `The first ${MOST_ROWS} of ${part.all.length} rows; the file has all.` : `${part.all.length} rows.`;
      const frame = element("div", table(part, caption), { className: "figure-data-frame", tabIndex: 0, role: "region", ariaLabel: "The data of the figure" });
      const file = element("a", "Download as CSV", { href: URL.createObjectURL(csv(part)), download: (figure.id || "figure") + ".csv" });
      details.append(frame, element("p", file));
    }
  }

  for (const details of document.querySelectorAll("details.figure-data"))
    details.addEventListener("toggle", () => fill(details), { once: true });

  // All folded code of a page at once.
  for (const button of document.querySelectorAll("button.show-code")) {
    const cells = [...document.querySelectorAll("div.cell details.hide")];
    button.hidden = cells.length === 0;
    button.addEventListener("click", () => {
      const open = cells.some((cell) => !cell.open);
      for (const cell of cells) cell.open = open;
      button.textContent = open ? "fold all code" : "show all code";
    });
  }
})();
