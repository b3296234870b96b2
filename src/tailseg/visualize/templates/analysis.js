"use strict";
(() => {
  const table = document.getElementById("classes");
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const NUMBER = { AP: 2, threshold: 5, precision: 6, recall: 7 };

  function value(row, column) {
    const text = row.cells[column].textContent;
    if ("text" in heads[column].dataset) return text.toLowerCase();
    return text === "–" ? null : Number(text.replaceAll(",", ""));
  }

  function sort(column, descending) {
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // without a value: last, either way
      return a < b ? -sign : a > b ? sign : 0;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending"));
  }

  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now === "descending" ? false : now === "ascending" ? true : !("text" in head.dataset));
    });
  });

  const search = document.getElementById("search"), shown = document.getElementById("shown");
  const names = rows.map((row) => row.cells[0].textContent.toLowerCase());
  function filter() {
    const wanted = search.value.trim().toLowerCase().replaceAll(" ", "_");
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !names[i].replaceAll(" ", "_").includes(wanted);
      count += !row.hidden;
    });
    shown.textContent = `${count} of ${rows.length} classes`;
  }
  search.addEventListener("input", filter);
  filter();

  const chosen = document.getElementById("chosen");
  if (!chosen) return; // no class has objects
  const told = document.getElementById("told"), point = document.getElementById("point");
  const x = (recall) => 46 + 304 * recall, y = (precision) => 196 - 180 * precision;
  function draw(row) {
    const curve = row.dataset.curve.split(" ").map((percent) => Number(percent) / 100);
    const points = curve.map((precision, i) => `${x(i / (curve.length - 1))},${y(precision)}`);
    document.getElementById("curve").setAttribute("points", points.join(" "));
    const threshold = value(row, NUMBER.threshold), recall = value(row, NUMBER.recall);
    point.setAttribute("visibility", threshold === null ? "hidden" : "visible");
    if (threshold !== null) {
      point.setAttribute("cx", x(recall / 100));
      point.setAttribute("cy", y(value(row, NUMBER.precision) / 100));
    }
    const place = threshold === null ? "nothing of it was found" : `the dot is its best threshold, ${threshold}`;
    told.textContent = `${row.cells[0].textContent}: AP ${row.cells[NUMBER.AP].textContent}; ${place}.`;
  }
  const drawable = rows.filter((row) => row.dataset.curve);
  const by_name = [...drawable].sort((a, b) => (value(a, 0) < value(b, 0) ? -1 : 1));
  chosen.append(...by_name.map((row) => new Option(row.cells[0].textContent, rows.indexOf(row))));
  chosen.addEventListener("change", () => draw(rows[chosen.value]));
  drawable.forEach((row) => row.cells[0].firstElementChild.addEventListener("click", () => {
    chosen.value = rows.indexOf(row);
    draw(row);
    document.getElementById("one-class").scrollIntoView({ block: "nearest" });
  }));
  const most = drawable.reduce((best, row) => (value(row, 4) > value(best, 4) ? row : best));
  chosen.value = rows.indexOf(most);
  draw(most);
  sort(4, true);
})();
