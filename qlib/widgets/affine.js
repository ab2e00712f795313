// Ties go to the even code, as in torch.round.
const roundEven = x => {
  const nearest = Math.round(x);
  return Math.abs(x % 1) === 0.5 && nearest % 2 ? nearest - 1 : nearest;
};
const short = value => (Math.abs(value) < 5e-5 ? "0" : value.toFixed(3)).replace("-", "−");

// Scale, zero point and ends of the codes, as in the chapter's definition.
const gridOf = ({ bits, symmetric, low, high }) => {
  const half = 2 ** (bits - 1), count = 2 ** bits;
  if (symmetric) return { scale: high / (half - 1), zero: 0, first: -half, last: half - 1 };
  const scale = (high - low) / (count - 1);
  return { scale, zero: Math.min(Math.max(roundEven(-low / scale), 0), count - 1), first: 0, last: count - 1 };
};

const quantize = (x, { scale, zero, first, last }) => {
  const wanted = roundEven(x / scale) + zero;
  const code = Math.min(Math.max(wanted, first), last);
  return { code, value: scale * (code - zero), clipped: wanted !== code };
};

const summarize = (weights, grid) => {
  let signal = 0, noise = 0, clipped = 0;
  for (const x of weights) {
    const q = quantize(x, grid);
    signal += x * x;
    noise += (x - q.value) ** 2;
    clipped += q.clipped;
  }
  return { snr: 10 * Math.log10(signal / noise), noise: noise / signal, clipped: clipped / weights.length };
};

const histogram = (weights, limit, bins) => {
  const counts = new Array(bins).fill(0);
  for (const x of weights) counts[Math.min(Math.floor((x / limit + 1) / 2 * bins), bins - 1)]++;
  return counts;
};

const picture = (width, height, { weights, chosen, limit, grid }) => {
  const left = 6, right = width - 6, base = height - 26, top = 44, reach = 1.06 * limit;
  const x = value => left + (right - left) * (value / reach + 1) / 2;
  const bins = width < 450 ? 48 : 80, counts = histogram(weights, reach, bins), most = Math.max(...counts);
  const parts = counts.map((count, i) => svg("rect", {
    x: left + (right - left) * i / bins, width: (right - left) / bins - 1, fill: "var(--bw-c1)", opacity: 0.45,
    y: base - (base - top) * count / most, height: (base - top) * count / most,
  }));
  const { scale, zero, first, last } = grid;
  const edges = [x(scale * (first - zero - 0.5)), x(scale * (last - zero + 0.5))];
  const clip = (from, to) => svg("rect", { x: from, width: Math.max(to - from, 0), y: 4, height: base - 4, fill: "var(--bw-c5)", opacity: 0.22 });
  parts.push(clip(left, Math.min(edges[0], right)), clip(Math.max(edges[1], left), right));
  const levels = [];
  for (let code = first; code <= last; code++) levels.push(x(scale * (code - zero)));
  const dense = levels[1] - levels[0] < 3;
  for (const at of levels.filter(at => at >= left && at <= right)) {
    parts.push(svg("line", { x1: at, x2: at, y1: 26, y2: base, stroke: "var(--bw-ink)", "stroke-width": dense ? 0.5 : 1.2, opacity: dense ? 0.35 : 0.8 }));
  }
  for (const i of chosen) {
    const to = x(quantize(weights[i], grid).value);
    parts.push(svg("line", { x1: x(weights[i]), x2: to, y1: 12, y2: 26, stroke: "var(--bw-c2)", "stroke-width": 2 }));
    parts.push(svg("circle", { cx: x(weights[i]), cy: 12, r: 4, fill: "var(--bw-c2)" }));
  }
  parts.push(svg("line", { class: "axis", x1: left, x2: right, y1: base, y2: base }));
  for (const value of ticks(-limit, limit, width < 450 ? 4 : 8)) {
    parts.push(svg("text", { x: x(value), y: base + 18, "text-anchor": "middle" }, String(value).replace("-", "−")));
  }
  return parts;
};

function render({ model, el }) {
  const weights = model.get("weights"), chosen = model.get("chosen"), limit = model.get("limit");
  const range = [Math.min(...weights), Math.max(...weights)];
  const state = () => Object.fromEntries(["bits", "symmetric", "low", "high"].map(name => [name, model.get(name)]));
  const step = limit / 250;
  const lowEnd = slider(model, "low", { label: "Low end", min: -limit, max: 0, step, show: short });
  const highEnd = slider(model, "high", { label: "High end", min: limit / 25, max: limit, step, show: short });
  const whole = h("button", { type: "button", onclick: () => {
    assign(model, "low", range[0]);
    assign(model, "high", model.get("symmetric") ? limit : range[1]);
  } }, "Clip nothing");
  const view = chart({
    height: 214,
    alt: () => `Histogram of ${weights.length} weights with ${2 ** model.get("bits")} levels between ${short(model.get("symmetric") ? -model.get("high") : model.get("low"))} and ${short(model.get("high"))}`,
    draw: (width, height) => picture(width, height, { weights, chosen, limit, grid: gridOf(state()) }),
  });
  const summary = readout(), body = h("tbody");
  const table = h("table", { class: "bw-affine" },
    h("thead", {}, h("tr", {}, ["weight", "code", "value", "error in steps"].map(text => h("th", { scope: "col" }, text)))), body);
  el.append(h("div", { class: "bw", role: "group", "aria-label": "Affine quantization of one row of weights" },
    h("div", { class: "bw-controls" },
      slider(model, "bits", { label: "Bits", min: 2, max: 8, show: bits => `${bits} (${2 ** bits} codes)` }),
      checkbox(model, "symmetric", { label: "symmetric" }), lowEnd, highEnd, whole),
    view.element,
    h("p", { class: "bw-note" }, "Lines: levels. Dots: eight of the weights, joined to their level. Shaded: clipped."),
    summary, table));
  const stop = watch(model, "bits symmetric low high", () => {
    const grid = gridOf(state()), found = summarize(weights, grid);
    lowEnd.style.display = model.get("symmetric") ? "none" : "";
    summary.textContent = `Scale ${grid.scale.toPrecision(3)}, zero point ${grid.zero}. Clipped: ${(100 * found.clipped).toFixed(1)}% of the weights. `
      + `SNR ${found.snr.toFixed(1)} dB: ${(100 * found.noise).toPrecision(2)}% of the energy is noise.`;
    body.replaceChildren(...chosen.map(i => {
      const q = quantize(weights[i], grid), off = (q.value - weights[i]) / grid.scale;
      const error = Math.abs(off) < 0.005 ? 0 : off;
      return h("tr", {}, [short(weights[i]), String(q.code).replace("-", "−"), short(q.value), `${error.toFixed(2).replace("-", "−")}${q.clipped ? " (clipped)" : ""}`]
        .map(text => h("td", {}, text)));
    }));
    view.redraw();
  });
  return () => { stop(); view.stop(); };
}
export default { render };
