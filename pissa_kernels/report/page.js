"use strict";

// Elements of the class "scripted" are useless without this script, so the page hides them.
for (const element of document.querySelectorAll(".scripted")) element.hidden = false;

const json = document.getElementById("report").textContent;
document.getElementById("download").href = URL.createObjectURL(new Blob([json], { type: "application/json" }));

for (const block of document.querySelectorAll("pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    // Select the text first, so that the reader can copy it where the browser denies access to the clipboard.
    getSelection().selectAllChildren(block);
    try {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
  });
  block.parentElement.append(button);
}

const table = document.getElementById("layers");
const heads = [...table.tHead.rows[0].cells];
const rows = [...table.tBodies[0].rows];
const byText = new Intl.Collator("en", { numeric: true }).compare;
// The sort key of a shape is its number of elements.
const number = (text) => text.split("×").reduce((product, factor) => product * Number(factor), 1);
const byNumber = (one, other) => number(one) - number(other);

heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  head.setAttribute("aria-sort", "none");
  const compare = head.classList.contains("number") ? byNumber : byText;
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  button.addEventListener("click", () => {
    const order = next[head.getAttribute("aria-sort")];
    for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
    const sign = { none: 0, ascending: 1, descending: -1 }[order];
    // The sort is stable, so a sign of 0 restores the original order.
    const sorted = [...rows].sort(
      (one, other) => sign * compare(one.cells[column].textContent, other.cells[column].textContent),
    );
    table.tBodies[0].append(...sorted);
  });
});
