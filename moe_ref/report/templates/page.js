"use strict";
// An enhancement only: filters the rows of cases and the cards of failures, and copies commands.
(() => {
  const box = document.getElementById("filter");
  const [words, verdict, count] = box.querySelectorAll("input, select, output");
  const items = [...document.querySelectorAll(".failure, tbody[data-verdict] > tr:not(.group)")].map(node => ({
    node, verdict: node.closest("[data-verdict]").dataset.verdict, text: node.textContent.toLowerCase()}));
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const active = wanted.length > 0 || verdict.value !== "";
    let rows = 0, all = 0;
    for (const item of items) {
      const hit = (!verdict.value || item.verdict === verdict.value) && wanted.every(word => item.text.includes(word));
      item.node.hidden = !hit;
      if (item.node.tagName === "TR") { all += 1; rows += hit; }
    }
    for (const group of document.querySelectorAll("section.group, .others, tbody[data-verdict]")) {
      group.hidden = !group.querySelector(".failure:not([hidden]), tr:not(.group):not([hidden])");
      if (group.matches(".others")) group.open = active;
    }
    count.textContent = active ? `${rows} of ${all} cases` : "";
  };
  words.addEventListener("input", apply);
  verdict.addEventListener("change", apply);
  box.hidden = false;
  if (!navigator.clipboard) return;
  for (const command of document.querySelectorAll(".copy")) {
    const button = document.createElement("button");
    button.textContent = "Copy";
    button.addEventListener("click", () => navigator.clipboard.writeText(command.textContent.trim())
      .then(() => { button.textContent = "Copied"; }));
    command[command.tagName === "PRE" ? "before" : "after"](button);
  }
})();
