"use strict";
// Text of models reaches the page through textContent alone; nothing here writes markup.
(() => {
  const { read, draw, element, textBlock, number } = page;
  const { samples, reference } = read("samples-data");

  const choice = document.getElementById("frontier-choice");
  choice.addEventListener("change", () => {
    const node = document.getElementById("frontier-plot");
    node.dataset.figure = choice.value;
    draw(node);
  });

  // --- samples --------------------------------------------------------------------------------------------------
  const PAGE = 8;
  const score = (candidate) =>
    `reward ${number(candidate.reward, 3)} · calibrated ${number(candidate.calibrated, 2)}` +
    Object.entries(candidate.gold).map(([name, score]) => ` · ${name} ${number(score, 3)}`).join("") +
    (candidate.finish ? ` · ended: ${candidate.finish}` : "");
  const chosen = (method) => method.candidates.find((candidate) => candidate.chosen) ?? method.candidates[0];
  const colours = {};
  for (const row of document.querySelectorAll(".headline tbody tr"))
    colours[row.querySelector("th").textContent.trim()] = row.style.getPropertyValue("--method");

  const answer = (method) => {
    const block = element("div", "answer");
    if (colours[method.label]) block.style.setProperty("--method", colours[method.label]);
    const title = element("h4", "", method.label);
    if (method.outcome) title.append(element("span", `chip ${method.outcome}`, method.outcome));
    block.append(title);
    const best = chosen(method);
    if (!best) return block;
    block.append(textBlock(best.text), element("p", "score", score(best)));
    if (method.candidates.length > 1) {
      const more = element("details");
      more.append(element("summary", "", `all ${method.candidates.length} candidates`));
      more.addEventListener("toggle", () => {
        if (more.childElementCount > 1) return;
        for (const candidate of method.candidates) {
          const item = element("div", candidate.chosen ? "candidate chosen" : "candidate");
          item.append(textBlock(candidate.text));
          item.append(element("p", "score", (candidate.chosen ? "✓ chosen · " : "") + score(candidate)));
          more.append(item);
        }
      });
      block.append(more);
    }
    return block;
  };
  const card = (sample) => {
    const node = element("article", "sample");
    node.append(element("h3", "", `Prompt ${sample.index + 1}`), textBlock(sample.prompt, "prompt"));
    const answers = element("div", "answers");
    answers.append(...sample.methods.map(answer));
    node.append(answers);
    return node;
  };

  const list = document.getElementById("sample-list");
  if (list) {
    const control = (name) => document.getElementById(`sample-${name}`);
    const labels = [];
    for (const sample of samples)
      for (const method of sample.methods)
        if (method.label !== reference && !labels.includes(method.label)) labels.push(method.label);
    for (const label of labels) control("method").append(new Option(label, label));
    samples.forEach((sample, index) => {
      sample.index = index;
      const texts = sample.methods.flatMap((method) => method.candidates.map((candidate) => candidate.text));
      sample.haystack = [sample.prompt, ...texts].join("\n").toLowerCase();
    });
    const gain = (sample, label) => {
      const value = (name) => {
        const method = sample.methods.find((entry) => entry.label === name);
        return (method && chosen(method)?.calibrated) ?? (method && chosen(method)?.reward) ?? null;
      };
      const ours = value(label), theirs = value(reference) ?? 0;
      return ours === null ? 0 : ours - theirs;
    };
    let found = [];
    let shown = 0;
    const showMore = () => {
      const next = found.slice(shown, shown + PAGE);
      list.append(...next.map(card));
      shown += next.length;
      control("more").hidden = shown >= found.length;
      control("count").textContent = `${found.length} of ${samples.length} prompt${samples.length === 1 ? "" : "s"} match; ${shown} shown.`;
    };
    const refresh = () => {
      const words = control("search").value.trim().toLowerCase();
      const label = control("method").value;
      const outcome = control("outcome").value;
      const order = control("order").value;
      const quarter = control("quantile").value;
      const inQuarter = (method) => {
        const value = chosen(method)?.calibrated ?? null;
        return value !== null && Math.min(3, Math.floor(4 * value)) === Number(quarter);
      };
      const matches = (method) => (!label || method.label === label) && (!outcome || method.outcome === outcome) && (!quarter || inQuarter(method));
      found = samples.filter((sample) => sample.haystack.includes(words) && sample.methods.some(matches));
      if (order !== "given") {
        const sign = order === "worst" ? 1 : -1;
        const by = label || labels[0];
        found = [...found].sort((a, b) => sign * (gain(a, by) - gain(b, by)));
      }
      list.replaceChildren();
      shown = 0;
      showMore();
    };
    control("form").addEventListener("submit", (event) => event.preventDefault());
    control("form").addEventListener("input", refresh);
    control("more").addEventListener("click", showMore);
    refresh();
  }

  page.ready();
})();
