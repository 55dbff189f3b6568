// Where each token looks, in every layer and head of the shipped model (data-attention.js).
(() => {
  "use strict";

  // The weights of one head come as hundredths, the rows of a triangle laid end to end: token t sees
  // tokens 0 to t. Returns the row of `token` as shares of its attention.
  function look(weights, token) {
    const start = (token * (token + 1)) / 2;
    return weights.slice(start, start + token + 1).map((hundredths) => hundredths / 100);
  }

  if (typeof module !== "undefined") module.exports = { look };
  if (typeof document === "undefined") return;

  function show(box, { texts, begin }) {
    const { element, labelled } = tinychat;
    const choice = element("select");
    texts.forEach(({ text }, i) => choice.append(new Option(text, i)));
    const layer = element("select");
    const head = element("select");
    texts[0].layers.forEach((_, i) => layer.append(new Option(i + 1, i)));
    texts[0].layers[0].forEach((_, i) => head.append(new Option(i + 1, i)));
    [layer.value, head.value] = begin;
    const row = element("div", { className: "tokens" });
    const said = element("p", { className: "said" });
    said.setAttribute("aria-live", "polite");
    let chosen;

    function mark() {
      const { tokens, layers } = texts[choice.value];
      const shares = look(layers[layer.value][head.value], chosen);
      [...row.children].forEach((chip, i) => {
        chip.setAttribute("aria-pressed", i === chosen);
        const share = shares[i] ?? 0;
        chip.style.background = `color-mix(in srgb, #e07b39 ${Math.round(55 * share)}%, var(--md-code-bg-color))`;
        chip.querySelector("small").textContent = i > chosen ? "·" : `${Math.round(100 * share)} %`;
      });
      const best = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3);
      said.textContent =
        `“${tokens[chosen]}” looks at ` +
        best.map(([share, i]) => `“${tokens[i]}” (${Math.round(100 * share)} %)`).join(", ") + ".";
    }
    function draw() {
      const { tokens } = texts[choice.value];
      chosen = Math.min(chosen ?? texts[choice.value].token, tokens.length - 1);
      row.replaceChildren(
        ...tokens.map((token, i) => {
          const chip = element("button", { type: "button", className: "token" }, token, element("small"));
          for (const event of ["mouseenter", "focus", "click"])
            chip.addEventListener(event, () => ((chosen = i), mark()));
          return chip;
        }),
      );
      mark();
    }
    choice.addEventListener("input", () => ((chosen = undefined), draw()));
    for (const control of [layer, head]) control.addEventListener("input", mark);
    box.replaceChildren(
      labelled("Text", choice),
      element("div", { className: "controls" }, labelled("Layer", layer), labelled("Head", head)),
      row,
      said,
    );
    draw();
  }
  tinychat.widget("attention", "attention", show);
})();
