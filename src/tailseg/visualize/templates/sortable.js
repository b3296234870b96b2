"use strict";
// A heading's button sorts the rows of its table; the page's search field hides those of other names.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const text = row.cells[column].textContent;
    if ("text" in heads[column].dataset) return text.toLowerCase();
    const number = parseFloat(text.replaceAll(",", "").replace("−", "-").replace("±", ""));
    return Number.isNaN(number) ? null : number;
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const descending = now ? now !== "descending" : !("text" in head.dataset);
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // without a value: last, either way
      return a < b ? -sign : a > b ? sign : 0;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
  const search = document.getElementById("search"), shown = document.getElementById("shown");
  const names = rows.map((row) => row.cells[0].textContent.toLowerCase().replaceAll(" ", "_"));
  const filter = () => {
    const wanted = search.value.trim().toLowerCase().replaceAll(" ", "_");
    rows.forEach((row, i) => { row.hidden = !names[i].includes(wanted); });
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} classes`;
  };
  search.addEventListener("input", filter);
  filter();
}
