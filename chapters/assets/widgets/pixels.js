// The 3x3 network of chapter 01: click pixels, see every vote (data-network.js).
(() => {
  "use strict";

  // Weighted votes, tanh between the layers, softmax at the end. Returns what each layer puts out.
  function forward(layers, pixels) {
    const outputs = [];
    let x = pixels;
    layers.forEach(([weights, bias], number) => {
      const sums = weights.map((row, o) => row.reduce((sum, w, i) => sum + w * x[i], bias[o]));
      x = number < layers.length - 1 ? sums.map(Math.tanh) : sums;
      outputs.push(x);
    });
    const top = Math.max(...x);
    const powers = x.map((logit) => Math.exp(logit - top));
    const total = powers.reduce((sum, p) => sum + p, 0);
    return { outputs, probabilities: powers.map((p) => p / total) };
  }

  if (typeof module !== "undefined") module.exports = { forward };
  if (typeof document === "undefined") return;

  function colour(value) {
    const strength = Math.min(1, Math.abs(value));
    return `color-mix(in srgb, ${value < 0 ? "#d9536f" : "#4c8bf5"} ${100 * strength}%, var(--md-code-bg-color))`;
  }

  function show(box, { layers, names, drawings }) {
    const { element } = tinychat;
    const pixels = Array(9).fill(-1);
    const grid = element("div", { className: "pixels" });
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", "Nine pixels");
    const cells = pixels.map((_, i) => {
      const cell = element("button", { type: "button" });
      cell.setAttribute("aria-label", `row ${Math.floor(i / 3) + 1}, column ${(i % 3) + 1}`);
      cell.addEventListener("click", () => ((pixels[i] = -pixels[i]), draw()));
      grid.append(cell);
      return cell;
    });
    const presets = element("div", { className: "controls" });
    names.forEach((name, i) => {
      for (const sign of [1, -1]) {
        const text = sign > 0 ? name : `${name}, inverted`;
        const button = element("button", { type: "button", textContent: text });
        button.addEventListener("click", () => {
          drawings[i].forEach((value, place) => (pixels[place] = sign * value));
          draw();
        });
        presets.append(button);
      }
    });
    const hidden = layers.slice(0, -1).map(() => element("div", { className: "neurons" }));
    const bars = element("div", { className: "bars" });
    const said = element("p", { className: "said" });
    said.setAttribute("aria-live", "polite");

    function draw() {
      const { outputs, probabilities } = forward(layers, pixels);
      cells.forEach((cell, i) => cell.setAttribute("aria-pressed", pixels[i] > 0));
      hidden.forEach((row, layer) =>
        row.replaceChildren(
          ...outputs[layer].map((value, i) => {
            const neuron = element("span", { title: `neuron ${i}: ${value.toFixed(2)}` });
            neuron.style.background = colour(value);
            return neuron;
          }),
        ),
      );
      bars.replaceChildren(
        ...names.map((name, i) => {
          const fill = element("span", { className: "fill" });
          fill.style.width = `${100 * probabilities[i]}%`;
          return element(
            "div",
            { className: "bar" },
            element("span", { className: "word", textContent: name }),
            element("span", { className: "track" }, fill),
            element("span", { className: "share", textContent: `${(100 * probabilities[i]).toFixed(1)} %` }),
          );
        }),
      );
      const best = probabilities.indexOf(Math.max(...probabilities));
      said.textContent = `It says: ${names[best]}, ${(100 * probabilities[best]).toFixed(1)} %.`;
    }
    drawings[0].forEach((value, i) => (pixels[i] = value));
    box.replaceChildren(
      presets,
      element(
        "div",
        { className: "network" },
        grid,
        element("div", { className: "layers" }, element("small", { textContent: "hidden neurons, red −1 to blue +1" }), ...hidden),
        bars,
      ),
      said,
    );
    draw();
  }
  tinychat.widget("pixels", "network", show);
})();
