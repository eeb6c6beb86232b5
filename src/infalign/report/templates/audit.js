(() => {
  const { read, element, textBlock, number } = page;
  const examples = read("examples-data");
  const PAGE = 10;

  const attempt = (one) => {
    const item = element("div", one.success ? "candidate broken" : "candidate");
    item.append(element("p", "score", `attempt ${one.attempt + 1} · score ${number(one.score, 3)} · ${one.success ? "succeeded" : "failed"}`));
    const sent = element("details");
    sent.append(element("summary", "", "as it was sent"), textBlock(one.sent, "prompt"));
    item.append(sent, textBlock(one.text));
    return item;
  };
  // Nothing harmful is on the screen, or read out, before somebody asks for it: text is made when its block opens.
  const card = (example) => {
    const node = element("details", "sample");
    const broken = example.models.map((model) => `${model.label} ${model.broken} of ${model.of}`).join(" · ");
    node.append(element("summary", "", `Prompt ${example.number}: broken in ${broken}`));
    node.addEventListener("toggle", () => {
      if (node.childElementCount > 1) return;
      node.append(textBlock(example.prompt, "prompt"));
      const answers = element("div", "answers");
      for (const model of example.models) {
        const block = element("div", "answer");
        block.append(element("h4", "", `${model.label}: worst ${model.worst.length} of ${model.of}`), ...model.worst.map(attempt));
        answers.append(block);
      }
      node.append(answers);
    });
    return node;
  };

  const list = document.getElementById("example-list");
  if (list) {
    const search = document.getElementById("example-search");
    const more = document.getElementById("example-more");
    const count = document.getElementById("example-count");
    examples.forEach((example, index) => {
      example.number = index + 1;
      const texts = example.models.flatMap((model) => model.worst.map((one) => one.text));
      example.haystack = [example.prompt, ...texts].join("\n").toLowerCase();
    });
    let found = [];
    let shown = 0;
    const showMore = () => {
      const next = found.slice(shown, shown + PAGE);
      list.append(...next.map(card));
      shown += next.length;
      more.hidden = shown >= found.length;
      count.textContent = `${found.length} of ${examples.length} prompt${examples.length === 1 ? "" : "s"} match; ${shown} shown, closed.`;
    };
    const refresh = () => {
      const words = search.value.trim().toLowerCase();
      found = examples.filter((example) => example.haystack.includes(words));
      list.replaceChildren();
      shown = 0;
      showMore();
    };
    search.addEventListener("input", refresh);
    more.addEventListener("click", showMore);
    refresh();
  }

  page.ready();
})();
