// Byte-pair encoding step by step, with the pieces of the shipped tokenizer (data-tokenizer.js).
(() => {
  "use strict";

  // What SentencePiece does: of all neighbours that make a known piece when joined, join the pair
  // whose piece was learned first, from the left, until no neighbours fit. `own` are the pieces that
  // are matched before anything else (line breaks); characters without a piece become bytes.
  function encode({ pieces, first, bytes, own }, text) {
    const ids = new Map(pieces.map((piece, i) => [piece, first + i]));
    let parts = [];
    const whole = text.replaceAll(" ", "▁");
    for (let i = 0; i < whole.length; ) {
      const fixed = Object.keys(own)
        .filter((piece) => whole.startsWith(piece, i))
        .sort((a, b) => b.length - a.length)[0];
      const taken = fixed ?? String.fromCodePoint(whole.codePointAt(i));
      parts.push({ text: taken, frozen: fixed !== undefined });
      i += taken.length;
    }
    const steps = [];
    for (;;) {
      let best = -1;
      let rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        if (parts[i].frozen || parts[i + 1].frozen) continue;
        const id = ids.get(parts[i].text + parts[i + 1].text);
        if (id !== undefined && id < rank) [best, rank] = [i, id];
      }
      if (best < 0) break;
      const [left, right] = [parts[best].text, parts[best + 1].text];
      steps.push({ before: parts.map((part) => part.text), at: best, left, right, rank: rank - first });
      parts = [
        ...parts.slice(0, best),
        { text: left + right, frozen: false },
        ...parts.slice(best + 2),
      ];
    }
    const tokens = parts.flatMap(({ text }) => {
      const id = own[text] ?? ids.get(text);
      if (id !== undefined) return [{ text, id }];
      return [...new TextEncoder().encode(text)].map((byte) => ({
        text: `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`,
        id: bytes + byte,
      }));
    });
    return { tokens, steps };
  }

  if (typeof module !== "undefined") module.exports = { encode };
  if (typeof document === "undefined") return;

  function show(box, data) {
    const { element } = tinychat;
    const input = element("textarea", { rows: 2, maxLength: 200, spellcheck: false });
    input.value = box.dataset.text;
    const slider = element("input", { type: "range", min: 0, value: 0 });
    const back = element("button", { type: "button", textContent: "◀ back" });
    const next = element("button", { type: "button", textContent: "join ▶" });
    const said = element("p", { className: "said" });
    said.setAttribute("aria-live", "polite");
    const row = element("div", { className: "tokens" });
    let result;

    function draw() {
      const step = Number(slider.value);
      const { steps, tokens } = result;
      const done = step >= steps.length;
      const now = steps[step];
      const shown = done ? tokens : now.before.map((text) => ({ text }));
      row.replaceChildren(
        ...shown.map(({ text, id }, i) => {
          const here = !done && (i === now.at || i === now.at + 1);
          const chip = element("span", { className: here ? "token joined" : "token" });
          chip.append(text.replaceAll("\n", "⏎"));
          if (id !== undefined) chip.append(element("small", { textContent: id }));
          return chip;
        }),
      );
      const count = done ? tokens.length : now.before.length;
      said.textContent = done
        ? `Done: ${[...input.value].length} characters, ${tokens.length} tokens. No neighbours fit any more.`
        : `Step ${step + 1} of ${steps.length}, ${count} pieces. Next: “${now.left}” + “${now.right}”, ` +
          `number ${(now.rank + 1).toLocaleString("en")} of the learned pieces.`;
      back.disabled = step === 0;
      next.disabled = done;
    }
    function read(atEnd) {
      result = encode(data, input.value);
      slider.max = result.steps.length;
      slider.value = atEnd ? result.steps.length : 0;
      draw();
    }
    input.addEventListener("input", () => read(true));
    slider.addEventListener("input", draw);
    back.addEventListener("click", () => ((slider.value = Number(slider.value) - 1), draw()));
    next.addEventListener("click", () => ((slider.value = Number(slider.value) + 1), draw()));
    box.replaceChildren(
      tinychat.labelled("Your text", input),
      element("div", { className: "controls" }, back, tinychat.labelled("Step", slider), next),
      said,
      row,
    );
    read(false);
  }
  tinychat.widget("merges", "tokenizer", show);
})();
