"use strict";
// What every page of ours shares: theme, figures, and text of models put in place as text, never as markup.
const page = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures-data");
  const root = document.documentElement;

  // --- theme: system, light, dark -------------------------------------------------------------------------------
  const themes = ["system", "light", "dark"];
  const themeButton = document.getElementById("theme");
  const setTheme = (name) => {
    if (name === "system") delete root.dataset.theme;
    else root.dataset.theme = name;
    themeButton.textContent = `Theme: ${name}`;
    themeButton.dataset.name = name;
  };
  setTheme("system");
  themeButton.addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(themeButton.dataset.name) + 1) % themes.length]);
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());

  // --- figures --------------------------------------------------------------------------------------------------
  const themed = (layout) => {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const themedLayout = {
      ...layout,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name)))
      themedLayout[key] = { ...layout[key], linecolor: colour("--line"), tickcolor: colour("--line") };
    return themedLayout;
  };
  const draw = (node) => {
    const figure = figures[node.dataset.figure];
    return Plotly.react(node, figure.data, themed(figure.layout), { responsive: true, displayModeBar: false });
  };
  // One at a time with a pause between, so that the page can be read and scrolled while the lower ones are drawn.
  const drawAll = async () => {
    for (const node of document.querySelectorAll("[data-figure]")) {
      await draw(node);
      await new Promise((resume) => setTimeout(resume));
    }
  };

  // --- text -----------------------------------------------------------------------------------------------------
  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = visible(String(text));
    return node;
  };
  // Invisible characters that reorder text are shown by their code, so that what is read is what was written.
  const visible = (text) =>
    text.replace(/[\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb]/g, (mark) => `⟨U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  const textBlock = (text, className) => {
    const node = element("pre", className ? `text ${className}` : "text", text === "" ? "(empty)" : visible(text));
    node.dir = "auto"; // right-to-left text is laid out as such, and cannot reach beyond its block
    node.tabIndex = 0;
    return node;
  };
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

  const ready = () => drawAll().then(() => (root.dataset.ready = "true"));
  return { read, draw, element, textBlock, number, ready };
})();
