// Headings become buttons. A column of numbers goes by the first number in each cell, any other by its text;
// cells without a number (a dash) stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const text = (row, i) => row.cells[i].textContent.trim();
  const number = (words) => Number.parseFloat(words.replace("\u2212", "-").replace(/^< /, ""));
  const missing = (words) => words === "" || words === "\u2013";
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const keys = new Map([...body.rows].map((row) => [row, text(row, i)]));
      const words = [...keys.values()].some((key) => !missing(key) && Number.isNaN(number(key)));
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        const order = words ? x.localeCompare(y) : number(x) - number(y);
        return rising ? order : -order;
      }));
    });
  });
}
