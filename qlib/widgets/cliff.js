const METRICS = {
  kl: { label: "KL divergence", axis: "KL divergence (nats)", error: "kl_error" },
  changed: { label: "changed favorites", axis: "tokens with another favorite (1 − top-1)", percent: true },
  perplexity: { label: "perplexity", axis: "perplexity", error: "perplexity_error" },
};
// Color and shape of each family: either alone tells them apart.
const LOOKS = { search: ["--bw-c5", "down"], small: ["--bw-c1", "circle"], large: ["--bw-c2", "square"], wide: ["--bw-c3", "up"], float: ["--bw-c4", "diamond"] };
const SHAPES = {
  circle: r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  square: r => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  up: r => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}z`,
  down: r => `M0 ${1.2 * r}L${1.2 * r} ${-r}H${-1.2 * r}z`,
  diamond: r => `M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0z`,
};
const mark = (family, filled, r) => {
  const [color, shape] = LOOKS[family];
  return svg("path", { d: SHAPES[shape](r), stroke: `var(${color})`, "stroke-width": 1.8, fill: filled ? `var(${color})` : "var(--bw-page)" });
};

const short = value => (value >= 1e6 ? value.toExponential(1) : value.toLocaleString("en-US", { maximumSignificantDigits: 3 }));
const share = value => `${(100 * value).toLocaleString("en-US", { maximumSignificantDigits: 3 })}%`;

// A scale from values to pixels; `at` are its ticks.
const axis = (low, high, from, to, log, room) => {
  const f = log ? Math.log : x => x;
  const place = value => from + (to - from) * (f(value) - f(low)) / (f(high) - f(low));
  if (!log) return { place, at: ticks(low, high, room) };
  const wide = Math.log10(high / low), at = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const lead of wide > 2 ? [1] : wide > 0.9 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9]) {
      const value = Number(`${lead}e${power}`);
      if (value >= low && value <= high) at.push(value);
    }
  }
  return { place, at };
};

// Labels that overlap neither a point, nor an earlier label, nor the frame; `must` ones come first.
const labels = (spots, frame) => {
  const taken = spots.map(({ x, y }) => [x - 5, y - 5, x + 5, y + 5]), placed = [];
  const hits = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  for (const { x, y, text, must } of spots) {
    const w = text.length * (must ? 7 : 6.4), h = 13;
    const boxes = [[x + 8, y - 7], [x - 8 - w, y - 7], [x - w / 2, y - 10 - h], [x - w / 2, y + 9], [x + 5, y - 8 - h], [x + 5, y + 7], [x - 5 - w, y + 7], [x - 5 - w, y - 8 - h]]
      .map(([a, b]) => [a, b, a + w, b + h]);
    const inside = boxes.filter(box => box[0] >= frame[0] && box[1] >= frame[1] && box[2] <= frame[2] && box[3] <= frame[3]);
    const box = inside.find(found => !taken.some(other => hits(found, other))) ?? (must && (inside[0] ?? boxes[2]));
    if (!box) continue;
    taken.push(box);
    placed.push(svg("text", { class: `bw-name${must ? " bw-bold" : ""}`, x: box[0] + w / 2, y: box[1] + 10, "text-anchor": "middle" }, text));
  }
  return placed;
};

function render({ model, el }) {
  const get = name => model.get(name), points = get("points"), models = get("models");
  const filled = point => point.model === models[0].name;
  const value = point => point[get("metric")];
  const ofModel = () => points.filter(p => get("model") === "both" || p.model === get("model"));
  const visible = () => ofModel().filter(p => get("shown").includes(p.family));
  const chosen = () => points[get("at")];
  const choose = point => point && assign(model, "at", points.indexOf(point));
  const label = point => models.find(m => m.name === point.model).label;
  const say = p => `${label(p)}, ${p.format}: ${Number(p.bits.toFixed(4))} bits per weight; KL ${short(p.kl)} ± ${short(p.kl_error)} nats; `
    + `top-1 ${share(1 - p.changed)}; perplexity ${short(p.perplexity)} ± ${short(p.perplexity_error)}.`;
  let spots = [];

  const scales = (width, height) => {
    const metric = METRICS[get("metric")], all = ofModel(), values = all.map(value).filter(v => v > 0);
    const bits = all.map(p => p.bits), [few, many] = [Math.min(...bits), Math.max(...bits)];
    const [least, most] = [Math.min(...values), Math.max(...values)], grow = (most / least) ** 0.06;
    const low = get("log_y") ? least / grow : 0, high = get("log_y") ? most * grow : most * 1.06;
    const box = [width < 450 ? 50 : 58, 26, width - 10, height - 40];
    const tick = v => (metric.percent ? share(v) : short(v));
    // More bits on the left: to the right the ground falls away.
    const x = axis(few * 0.9, many * 1.05, box[2], box[0], get("log_x"), width < 450 ? 5 : 8);
    return { metric, box, tick, low, high, x, y: axis(low, high, box[3], box[1], get("log_y"), 6) };
  };

  const frame = ({ metric, box, tick, x, y }, height) => [
    x.at.map(v => [
      svg("line", { class: "grid", x1: x.place(v), x2: x.place(v), y1: box[1], y2: box[3] }),
      svg("text", { x: x.place(v), y: box[3] + 16, "text-anchor": "middle" }, v)]),
    y.at.map(v => [
      svg("line", { class: "grid", x1: box[0], x2: box[2], y1: y.place(v), y2: y.place(v) }),
      svg("text", { x: box[0] - 5, y: y.place(v) + 4, "text-anchor": "end" }, tick(v))]),
    svg("path", { class: "axis", fill: "none", d: `M${box[0]} ${box[1]}V${box[3]}H${box[2]}` }),
    svg("text", { x: (box[0] + box[2]) / 2, y: height - 6, "text-anchor": "middle" }, "bits per weight, counted from stored bytes"),
    svg("text", { x: 2, y: 13 }, metric.axis),
  ];

  // The line through one model's groups of 32, and where it would go at the same factor for each bit.
  const path = (found, place) => found.map((p, i) => `${i ? "L" : "M"}${place(p).map(v => v.toFixed(1)).join(" ")}`).join("");
  const guide = ({ x, y, high }, first, last) => {
    const steps = Array.from({ length: 41 }, (_, i) => first.bits + (last.bits - first.bits) * i / 40)
      .map(bits => ({ bits, kl: first.kl * get("factor") ** (first.bits - bits) })).filter(p => p.kl <= high);
    const end = steps.at(-1);
    return [
      svg("path", { class: "axis", fill: "none", "stroke-dasharray": "5 4", d: path(steps, p => [x.place(p.bits), y.place(p.kl)]) }),
      filled(first) || get("model") !== "both" ? svg("text", { class: "muted bw-name", x: x.place(end.bits) - 4, y: y.place(end.kl) + 16 }, `${get("factor")}x per bit`) : [],
    ];
  };

  const draw = (width, height) => {
    const s = scales(width, height), top = v => s.y.place(Math.min(Math.max(v, s.low || 0), s.high)), now = chosen();
    const place = p => [s.x.place(p.bits), top(value(p))];
    const joined = models.map(m => visible().filter(p => p.line && p.model === m.name)).filter(found => found.length > 1);
    const rank = p => (p === now ? 0 : p.line ? 1 : 2) + (filled(p) ? 0 : 0.5);
    spots = visible().map(point => ({ point, x: place(point)[0], y: place(point)[1], text: point.format, must: point === now }));
    const ordered = [...spots].sort((a, b) => rank(a.point) - rank(b.point));
    return [
      frame(s, height),
      get("metric") === "kl" ? joined.map(found => guide(s, found[0], found.at(-1))) : [],
      joined.map(found => svg("path", { class: "line", "stroke-opacity": 0.55, d: path(found, place) })),
      spots.map(({ point, x, y }) => {
        const error = point[s.metric.error] ?? 0;
        return [
          error ? svg("line", { class: "axis", x1: x, x2: x, y1: top(value(point) - error), y2: top(value(point) + error) }) : [],
          svg("g", { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` }, mark(point.family, filled(point), width < 450 ? 4 : 4.6),
            point === now ? svg("circle", { r: 10, fill: "none", stroke: "var(--bw-ink)", "stroke-width": 2 }) : []),
        ];
      }),
      labels(ordered, [s.box[0], 0, width, s.box[3]]),
    ];
  };

  const picture = chart({ height: 400, draw, alt: () => `${METRICS[get("metric")].axis} against bits per weight, ${visible().length} points. `
    + `Chosen: ${label(chosen())}, ${chosen().format}. Left and right arrow keys walk along the bits, up and down along the ${METRICS[get("metric")].label}.` });
  // Left and right stay with one model; up and down visit every point that is shown.
  const press = event => {
    const now = chosen(), key = event.key, across = key === "ArrowLeft" || key === "ArrowRight";
    const forward = key === "ArrowRight" || key === "ArrowUp";
    if (!across && !key.startsWith("Arrow") && key !== "Home" && key !== "End") return;
    event.preventDefault();
    const same = visible().filter(p => p.model === now.model);
    const order = key.startsWith("Arrow") && !across ? visible().sort((a, b) => value(a) - value(b)) : same.sort((a, b) => b.bits - a.bits || value(a) - value(b));
    choose(key === "Home" ? order[0] : key === "End" ? order.at(-1) : order[order.indexOf(now) + (forward ? 1 : -1)]);
  };
  const click = event => {
    const box = picture.element.getBoundingClientRect();
    const far = spot => Math.hypot(spot.x - event.clientX + box.left, spot.y - event.clientY + box.top);
    const near = [...spots].sort((a, b) => far(a) - far(b))[0];
    if (near && far(near) < 32) choose(near.point);
  };
  picture.element.addEventListener("keydown", press);
  picture.element.addEventListener("click", click);
  picture.element.setAttribute("tabindex", 0);
  picture.element.setAttribute("role", "application");

  const boxes = get("families").map(({ name, label: text }) => {
    const input = h("input", { type: "checkbox", onchange: () => assign(model, "shown", get("families").map(f => f.name).filter(n => (n === name ? input.checked : get("shown").includes(n)))) });
    input.checked = get("shown").includes(name);
    return h("label", {}, input, svg("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(name, true, 4.6)), text);
  });
  const entries = [...models.map(m => ({ value: m.name, text: m.label })), ...(models.length > 1 ? [{ value: "both", text: "both" }] : [])];
  const summary = readout(), size = h("p", { class: "bw-readout" }), note = h("p", { class: "bw-note" });
  el.append(h("div", { class: "bw bw-cliff", role: "group", "aria-label": "Cliff explorer" },
    h("div", { class: "bw-controls" },
      choice(model, "metric", { label: "Show", options: Object.keys(METRICS).map(name => ({ value: name, text: METRICS[name].label })) }),
      choice(model, "model", { label: "Model", options: entries }),
      checkbox(model, "log_y", { label: "logarithmic vertical axis" }), checkbox(model, "log_x", { label: "logarithmic bits" }),
      h("fieldset", { class: "bw-control bw-families" }, h("legend", {}, "Formats"), boxes)),
    picture.element, summary,
    h("div", { class: "bw-controls" }, choice(model, "billions", { label: "At these bits, the weights of a model of", options: get("sizes").map(n => ({ value: n, text: `${n} B` })) }), size),
    note));
  const stop = watch(model, "at metric model shown log_x log_y billions", () => {
    const found = visible(), now = chosen();
    if (found.length && !found.includes(now)) {
      const far = p => Math.abs(p.bits - now.bits) + (p.format === now.format ? -1 : 0);
      return choose([...found].sort((a, b) => far(a) - far(b))[0]);
    }
    summary.textContent = found.length ? say(now) : "Choose at least one kind of format.";
    size.textContent = `take ${short(get("billions") * now.bits / 8)} GB`;
    note.textContent = `${models.length > 1 ? `Filled: ${models[0].label}; hollow: ${models[1].label}. ` : ""}Bars: one standard error. Line: int8 to int2 in groups of 32, with zero points. `
      + "Click a point, or focus the picture and use the arrow keys.";
    picture.redraw();
  });
  return () => { stop(); picture.stop(); };
}
export default { render };
