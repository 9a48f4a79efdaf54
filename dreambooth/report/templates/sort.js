// Puts a button into each heading of the table; without this the page only cannot sort.
"use strict";
const table = document.getElementById("table");
const body = table.tBodies[0];
const value = (row, column) => row.cells[column].dataset.value ?? "";
const numeric = (text) => text !== "" && Number.isFinite(Number(text));
const compare = (a, b) => (numeric(a) && numeric(b) ? a - b : String(a).localeCompare(String(b), "en"));
[...table.tHead.rows[0].cells].forEach((head, column) => {
  if (head.dataset.sort === "no") return;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      if (a === "" || b === "") return (a === "") - (b === "");  // what was not measured stays last
      return down ? compare(b, a) : compare(a, b);
    });
    [...table.tHead.rows[0].cells].forEach((cell) => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
    const way = down ? "descending" : "ascending";
    document.getElementById("sorted").textContent = `Sorted by ${button.textContent.trim()}, ${way}.`;
  });
});
