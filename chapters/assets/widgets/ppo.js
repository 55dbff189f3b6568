// A real PPO run, step by step: the mark against the KL, and where each beta would stop (data-runs.js).
(() => {
  "use strict";

  // For each step the mean of its neighbourhood, of what was measured there: one batch is noisy.
  function smooth(values, reach) {
    return values.map((value, i) => {
      if (value === null) return null;
      const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((x) => x !== null);
      return near.reduce((sum, x) => sum + x, 0) / near.length;
    });
  }

  const column = (run, name) => run.rows.map((row) => row[run.columns.indexOf(name)]);

  // The row at which mark − beta · KL is highest along the run.
  function best(run, reach, beta) {
    const [marks, kls] = ["score", "kl"].map((name) => smooth(column(run, name), reach));
    const aims = marks.map((mark, i) =>
      mark === null || kls[i] === null ? -Infinity : mark - beta * kls[i],
    );
    return aims.indexOf(Math.max(...aims));
  }

  if (typeof module !== "undefined") module.exports = { smooth, column, best };
  if (typeof document === "undefined") return;

  const TILES = [
    ["score", "mark", (x) => x.toFixed(2)],
    ["kl", "KL, nats a reply", (x) => x.toFixed(2)],
    ["length", "tokens a reply", (x) => x.toFixed(0)],
    ["repetition", "repeated", (x) => `${(100 * x).toFixed(1)} %`],
    ["distinct_2", "distinct-2 of the step", (x) => x.toFixed(2)],
    ["entropy", "entropy, nats a token", (x) => x.toFixed(2)],
    ["clip_fraction", "clipped", (x) => `${(100 * x).toFixed(2)} %`],
    ["beta", "β of the run", (x) => x.toFixed(3)],
    ["judge", "another judge's mark", (x) => x.toFixed(2)],
  ];
  const minus = (text) => String(text).replace(/-(?=[\d.])/g, "−");

  function svg(tag, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    const made = [];
    for (let n = Math.ceil(low / step); n * step <= high + 1e-9; n++) made.push(Number((n * step).toFixed(6)));
    return made;
  }

  function path(points) {
    return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  }

  function show(box, { reach, runs }) {
    const { element, labelled } = tinychat;
    const choice = element("select");
    runs.forEach(({ title }, i) => choice.append(new Option(title, i)));
    const step = element("input", { type: "range", min: 1, step: 1 });
    const beta = element("input", { type: "range", min: 0, max: 0.5, step: 0.01 });
    beta.value = 0.1;
    const outputs = [step, beta].map(() => element("output"));
    const jump = element("button", { type: "button" });
    const chart = element("div", { className: "chart" });
    const tiles = element("div", { className: "tiles" });
    const about = element("p", { className: "about" });
    const said = element("p", { className: "said" });
    said.setAttribute("aria-live", "polite");
    let run, raw, mean, there;

    function choose() {
      run = runs[choice.value];
      raw = Object.fromEntries(run.columns.map((name) => [name, column(run, name)]));
      mean = Object.fromEntries(run.columns.map((name) => [name, smooth(raw[name], reach)]));
      step.max = run.rows.length;
      step.value = run.rows.length;
      about.textContent = run.about;
      draw();
    }

    function draw() {
      const now = Number(step.value) - 1;
      const price = Number(beta.value);
      const end = best(run, reach, price);
      const number = raw.step[now];
      there = raw.step[end];
      outputs[0].value = `${number} of ${raw.step.at(-1)}`;
      outputs[1].value = price.toFixed(2);
      step.setAttribute("aria-valuetext", `step ${outputs[0].value}`);
      jump.textContent = `Go to step ${there}`;
      const sum = (i) =>
        `${mean.score[i].toFixed(2)} − ${price.toFixed(2)} × ${mean.kl[i].toFixed(2)} = ` +
        (mean.score[i] - price * mean.kl[i]).toFixed(2);
      said.textContent = minus(
        `Around step ${number}, mark − β × KL = ${sum(now)}. With β = ${price.toFixed(2)} you would stop at step ${there}: ${sum(end)}.`,
      );
      if (raw.judge) {
        const last = mean.judge.reduce((top, x, i) => (x !== null && !(x <= mean.judge[top]) ? i : top), -1);
        said.textContent += minus(` The other judge liked step ${raw.step[last]} most: ${mean.judge[last].toFixed(2)}.`);
      }
      tiles.replaceChildren(...TILES.filter(([name]) => raw[name]).map((tile) => drawTile(tile, now)));
      drawChart(now, end, price);
    }

    function drawTile([name, label, form], now) {
      const value = raw[name][now];
      return element(
        "div",
        { className: "tile" },
        element("small", { textContent: label }),
        element("b", { textContent: value === null ? "–" : minus(form(value)) }),
        spark(raw[name], now),
      );
    }

    function spark(values, now) {
      const known = values.filter((x) => x !== null);
      const low = Math.min(...known);
      const size = Math.max(...known) - low || 1;
      const at = (x, i) => [(100 * i) / Math.max(1, values.length - 1), 22 - (20 * (x - low)) / size];
      const points = values.map((x, i) => (x === null ? null : at(x, i))).filter(Boolean);
      const x = at(0, now)[0].toFixed(1);
      return svg(
        "svg",
        { viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("path", { class: "cursor", d: `M${x} 0V24` }),
        svg("path", { class: "line", d: path(points) }),
      );
    }

    function drawChart(now, end, price) {
      const width = Math.max(260, chart.clientWidth || 600);
      const height = Math.round(Math.min(340, Math.max(230, width * 0.55)));
      const [left, right, top, bottom] = [44, 12, 12, 40];
      const judged = (raw.judge ?? []).map((mark, i) => [raw.kl[i], mark]).filter(([, mark]) => mark !== null);
      const marks = [...raw.score, ...judged.map(([, mark]) => mark)].filter((x) => x !== null);
      const spread = [Math.min(0, ...raw.kl), Math.max(...raw.kl) * 1.03];
      const room = 0.06 * (Math.max(...marks) - Math.min(...marks));
      const [low, high] = [Math.min(...marks) - room, Math.max(...marks) + room];
      const x = (kl) => left + ((width - left - right) * (kl - spread[0])) / (spread[1] - spread[0]);
      const y = (mark) => height - bottom - ((height - top - bottom) * (mark - low)) / (high - low);
      const text = (content, attributes) => svg("text", attributes, document.createTextNode(minus(content)));
      const grid = svg("g", { class: "grid" });
      for (const kl of ticks(spread[0], spread[1], Math.min(8, width / 70)))
        grid.append(
          svg("path", { d: `M${x(kl)} ${top}V${height - bottom}` }),
          text(kl, { x: x(kl), y: height - bottom + 16, "text-anchor": "middle" }),
        );
      for (const mark of ticks(low, high, height / 50))
        grid.append(
          svg("path", { d: `M${left} ${y(mark)}H${width - right}` }),
          text(mark, { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }),
        );
      const middle = (left + width - right) / 2;
      grid.append(text("KL to the reference, nats a reply", { x: middle, y: height - 6, "text-anchor": "middle" }));
      grid.append(text("mark", { x: 12, y: (height - bottom + top) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(height - bottom + top) / 2})` }));
      const dots = svg("g", { class: "dots" });
      raw.score.forEach((mark, i) => dots.append(svg("circle", { cx: x(raw.kl[i]), cy: y(mark), r: 2.2 })));
      const along = (name) =>
        mean[name].map((mark, i) => (mark === null ? null : [x(mean.kl[i]), y(mark)])).filter(Boolean);
      // All points of this line are worth the same: the path touches it where the beta stops.
      const aim = mean.score[end] - price * mean.kl[end];
      const ends = price ? [Math.max(spread[0], (low - aim) / price), Math.min(spread[1], (high - aim) / price)] : spread;
      const same = ends.map((kl) => [x(kl), y(aim + price * kl)]);
      const drawn = svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" },
        grid,
        svg("path", { class: "same", d: path(same) }),
        dots,
        svg("path", { class: "proxy", d: path(along("score")) }),
      );
      if (judged.length) {
        drawn.append(svg("path", { class: "judge", d: path(along("judge")) }));
        for (const [kl, mark] of along("judge")) drawn.append(svg("circle", { class: "judge", cx: kl, cy: mark, r: 2.5 }));
      }
      const stop = [x(mean.kl[end]), y(mean.score[end])];
      drawn.append(
        svg("path", { class: "stop", d: `M${stop[0]} ${stop[1] - 8}l8 8l-8 8l-8 -8z` }),
        svg("circle", { class: "now", cx: x(mean.kl[now]), cy: y(mean.score[now]), r: 5.5 }),
      );
      const farthest = Math.max(...raw.kl).toFixed(1);
      drawn.setAttribute(
        "aria-label",
        minus(`The mark against the KL over ${run.rows.length} steps: from ${mean.score[0].toFixed(2)} near 0 to ${mean.score.at(-1).toFixed(2)}, at most ${farthest} nats away.`),
      );
      // Whoever points sets the step too; the slider does the same for the keyboard.
      drawn.addEventListener("click", (event) => {
        const frame = drawn.getBoundingClientRect();
        const [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
        const far = mean.kl.map((kl, i) => (x(kl) - px) ** 2 + (y(mean.score[i]) - py) ** 2);
        step.value = 1 + far.indexOf(Math.min(...far));
        draw();
      });
      chart.replaceChildren(drawn);
    }

    choice.addEventListener("input", choose);
    for (const control of [step, beta]) control.addEventListener("input", draw);
    jump.addEventListener("click", () => {
      step.value = 1 + raw.step.indexOf(there);
      draw();
    });
    const key = element("p", { className: "key" });
    const entry = (name, words) => {
      const made = element("span", {}, element("i", { className: name }), words);
      key.append(made);
      return made;
    };
    entry("dot", "a step");
    entry("proxy", `mean of ${2 * reach + 1} steps`);
    entry("now", "the step you chose");
    entry("stop", "where β stops");
    entry("same", "worth the same");
    const judged = entry("judge", "another judge"); // most runs had none
    choice.addEventListener("input", showJudge);
    function showJudge() {
      judged.hidden = !runs[choice.selectedIndex].columns.includes("judge");
    }
    showJudge();
    box.replaceChildren(
      labelled("The run", choice),
      about,
      element(
        "div",
        { className: "controls" },
        labelled("Step", step, outputs[0]),
        labelled("β, the price of a nat", beta, outputs[1]),
        jump,
      ),
      chart,
      key,
      said,
      tiles,
      element("p", {
        className: "about",
        textContent:
          "The path is the one that was measured: a run with another β would have taken another. " +
          "Each run has its own reward model, so marks of two runs can't be compared.",
      }),
    );
    choose();
    let width = chart.clientWidth;
    new ResizeObserver(() => {
      if (chart.clientWidth !== width) ((width = chart.clientWidth), draw());
    }).observe(chart);
  }
  tinychat.widget("ppo", "runs", show);
})();
