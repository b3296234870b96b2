"use strict";
(() => {
  const table = document.getElementById("classes");
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const OBJECTS = 4, NUMBER = { AP: 2, threshold: 5, precision: 6, recall: 7 };

  const value = (row, column) => {
    const text = row.cells[column].textContent;
    return text === "–" ? null : Number(text.replaceAll(",", ""));
  };
  const name = (row) => row.cells[0].textContent.toLowerCase();
  heads[OBJECTS].firstElementChild.click(); // most objects first

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
  const by_name = [...drawable].sort((a, b) => (name(a) < name(b) ? -1 : 1));
  chosen.append(...by_name.map((row) => new Option(row.cells[0].textContent, rows.indexOf(row))));
  chosen.addEventListener("change", () => draw(rows[chosen.value]));
  drawable.forEach((row) => row.cells[0].firstElementChild.addEventListener("click", () => {
    chosen.value = rows.indexOf(row);
    draw(row);
    document.getElementById("one-class").scrollIntoView({ block: "nearest" });
  }));
  const most = drawable.reduce((best, row) => (value(row, OBJECTS) > value(best, OBJECTS) ? row : best));
  chosen.value = rows.indexOf(most);
  draw(most);
})();
