// A heading sorts each group of lines by its column: highest first, or A to Z, and the other way at the second press.
// The head of a group stays at its top, and empty cells go to the end.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  heads.forEach((head, column) => {
    const text = row => row.children[column].textContent.trim();
    const sort = () => {
      const rows = [...table.querySelectorAll("tbody tr")];
      const numbers = rows.some(row => Number.isFinite(parseFloat(text(row)))) ? column !== 0 : false;
      const first = numbers ? "descending" : "ascending", second = numbers ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const known = row => numbers ? Number.isFinite(parseFloat(text(row))) : text(row) !== "";
      const compare = (one, other) => {
        if (known(one) !== known(other)) return known(one) ? -1 : 1;
        if (!known(one)) return 0;
        return sign * (numbers ? parseFloat(text(one)) - parseFloat(text(other)) : text(one).localeCompare(text(other)));
      };
      for (const body of table.tBodies) {
        const own = [...body.rows].filter(row => !row.classList.contains("kind"));
        body.append(...own.sort(compare));
      }
    };
    head.tabIndex = 0;
    head.title = "Sort";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
  table.classList.add("sortable");
}
// The page holds its numbers packed, and a press unpacks them; a browser that cannot do so saves them packed.
for (const link of "DecompressionStream" in window ? document.querySelectorAll("a[download$='.gz']") : []) {
  link.addEventListener("click", async event => {
    event.preventDefault();
    const packed = Uint8Array.from(atob(link.href.split(",")[1]), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const file = document.createElement("a");
    file.href = URL.createObjectURL(await new Response(stream).blob());
    file.download = link.download.replace(/\.gz$/, "");
    file.click();
  });
}
