// Tables of the class book-sortable: a press on a column's title sorts by it, a second one the other way.
(() => {
  const number = (text) => {
    const found = text.replace(/−/g, "-").match(/^-?\d+(\.\d+)?(e-?\d+)?/);
    return found ? Number(found[0]) : NaN;
  };

  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  const sortBy = (table, column, header) => {
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const body = table.tBodies[0];
    const cell = (row) => row.cells[column].textContent.trim();
    [...body.rows].sort((a, b) => direction * compare(cell(a), cell(b))).forEach((row) => body.append(row));
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  };

  for (const table of document.querySelectorAll("table.book-sortable")) {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sortBy(table, column, header));
    });
  }
})();
