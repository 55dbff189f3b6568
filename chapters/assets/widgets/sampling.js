// Temperature, top-k and top-p on real next-token distributions (data-distributions.js).
(() => {
  "use strict";

  // The scores of all tokens, best first, in thousandths below the best, as packed 16-bit numbers.
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
    const below = new Uint16Array(bytes.buffer);
    return Float64Array.from(below, (thousandths) => -thousandths / 1000);
  }

  // The package's order (tinychat.generation): temperature, then top-k, then top-p of what is left.
  // Returns the probability of each token, 0 for those that are out.
  function distribution(scores, { temperature, topK, topP }) {
    const n = scores.length;
    const result = new Float64Array(n);
    if (temperature === 0) {
      result[0] = 1;
      return result;
    }
    const kept = topK ? Math.min(topK, n) : n;
    let total = 0;
    for (let i = 0; i < kept; i++) total += result[i] = Math.exp(scores[i] / temperature);
    let before = 0;
    let left = 0;
    for (let i = 0; i < kept; i++) {
      const share = result[i] / total;
      // A token goes when those before it already hold enough; the best one always stays.
      if (i > 0 && topP < 1 && before >= topP) result[i] = 0;
      else left += result[i];
      before += share;
    }
    for (let i = 0; i < kept; i++) result[i] /= left;
    return result;
  }

  if (typeof module !== "undefined") module.exports = { unpack, distribution };
  if (typeof document === "undefined") return;

  function show(box, prompts) {
    const { element, labelled } = tinychat;
    const choice = element("select");
    prompts.forEach(({ text }, i) => choice.append(new Option(`${text} ...`, i)));
    const range = (min, max, step, value) => element("input", { type: "range", min, max, step, value });
    const temperature = range(0, 2, 0.05, 1);
    const topK = range(0, 40, 1, 0);
    const topP = range(0.05, 1, 0.05, 1);
    temperature.value = topP.value = 1;
    const outputs = [temperature, topK, topP].map(() => element("output"));
    const bars = element("div", { className: "bars" });
    const said = element("p", { className: "said" });
    said.setAttribute("aria-live", "polite");
    const draw = element("button", { type: "button", textContent: "Throw the dice" });
    const drawn = element("span", { className: "drawn" });
    let probabilities;

    function settings() {
      return { temperature: Number(temperature.value), topK: Number(topK.value), topP: Number(topP.value) };
    }
    function redraw() {
      const { scores, words } = prompts[choice.value];
      const now = settings();
      probabilities = distribution(scores, now);
      outputs[0].value = now.temperature.toFixed(2);
      outputs[1].value = now.topK || "off";
      outputs[2].value = now.topP < 1 ? now.topP.toFixed(2) : "off";
      bars.replaceChildren(
        ...words.slice(0, 12).map((word, i) => {
          const share = probabilities[i];
          const bar = element("div", { className: share ? "bar" : "bar out" });
          const fill = element("span", { className: "fill" });
          fill.style.width = `${100 * share}%`;
          const percent = share ? `${(100 * share).toFixed(1)} %` : "out";
          bar.append(
            element("span", { className: "word", textContent: word }),
            element("span", { className: "track" }, fill),
            element("span", { className: "share", textContent: percent }),
          );
          return bar;
        }),
      );
      const kept = probabilities.reduce((n, p) => n + (p > 0), 0);
      const top = probabilities.slice(0, 12).reduce((sum, p) => sum + p, 0);
      said.textContent =
        `${kept.toLocaleString("en")} of ${scores.length.toLocaleString("en")} tokens can come; ` +
        `the ${Math.min(12, kept)} best of them have ${(100 * top).toFixed(1)} % together.`;
      drawn.textContent = "";
    }
    draw.addEventListener("click", () => {
      let dice = Math.random();
      let i = 0;
      while (i < probabilities.length - 1 && (dice -= probabilities[i]) >= 0) i++;
      while (i > 0 && probabilities[i] === 0) i--;
      const word = prompts[choice.value].words[i] ?? `(number ${i + 1} in the list)`;
      drawn.textContent += ` ${word} ·`;
    });
    for (const control of [choice, temperature, topK, topP]) control.addEventListener("input", redraw);
    box.replaceChildren(
      labelled("The text so far", choice),
      element(
        "div",
        { className: "controls" },
        labelled("Temperature", temperature, outputs[0]),
        labelled("Top-k", topK, outputs[1]),
        labelled("Top-p", topP, outputs[2]),
      ),
      bars,
      said,
      element("div", { className: "controls" }, draw, drawn),
    );
    redraw();
  }
  tinychat.widget("sampling", "distributions", (box, prompts) =>
    show(box, prompts.map((prompt) => ({ ...prompt, scores: unpack(prompt.scores) }))),
  );
})();
