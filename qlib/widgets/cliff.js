const number = (value, digits = 3) => value.toLocaleString("en-US", { notation: value < 1e5 ? "standard" : "compact", maximumSignificantDigits: digits });
const percent = value => `${number(100 * value)}%`;

// Pixels of a value, and the ticks. Logarithmic ticks thin out as the decades grow.
const axis = (low, high, from, to, log, room) => {
  const f = log ? Math.log : x => x;
  const place = value => from + (to - from) * (f(value) - f(low)) / (f(high) - f(low));
  if (!log) return { place, at: ticks(low, high, room) };
  const decades = Math.log10(high / low), leads = decades > 2 ? [1] : decades > 0.9 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
  const first = Math.floor(Math.log10(low)), powers = Array.from({ length: Math.ceil(decades) + 2 }, (_, i) => first + i);
  return { place, at: powers.flatMap(power => leads.map(lead => Number(`${lead}e${power}`))).filter(value => value >= low && value <= high) };
};

// Texts beside their spots that overlap neither a point, nor an earlier text, nor the frame; those that must stand, stand; those that
// need to stand once are tried at every spot. Where there is room, they leave the trail of the lines free, too.
const labels = (spots, points, trail, [left, top, right, bottom]) => {
  const taken = points.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const sides = [["start", 9, 4], ["end", -9, 4], ["middle", 0, -11], ["middle", 0, 20], ["start", 6, -8], ["end", -6, -8], ["start", 6, 17], ["end", -6, 17]];
  const placed = new Set();
  return spots.map(({ x, y, text, must, once, look = "" }) => {
    if (once && placed.has(text)) return [];
    const width = text.length * (must ? 7.8 : 6.8);
    const boxes = sides.map(([anchor, dx, dy]) => {
      if (must) dx *= 1.4;
      const start = x + dx - width * { start: 0, middle: 0.5, end: 1 }[anchor];
      return { anchor, x: x + dx, y: y + dy, box: [start, y + dy - 10, start + width, y + dy + 3] };
    }).filter(({ box }) => box[0] > left && box[1] > top && box[2] < right && box[3] < bottom);
    const clear = others => boxes.find(({ box: a }) => !others.some(b => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]));
    const free = clear([...taken, ...trail]) ?? clear(taken) ?? (must && boxes[0]);
    if (!free) return [];
    taken.push(free.box);
    placed.add(text);
    return svg("text", { class: `bw-name ${look}`, x: free.x, y: free.y, "text-anchor": free.anchor }, text);
  });
};

function render({ model, el }) {
  const get = name => model.get(name), points = get("points"), models = get("models"), families = get("families");
  const metric = () => get("metrics").find(m => m.name === get("metric"));
  const value = point => point[get("metric")], chosen = () => points[get("at")], both = () => get("model") === "both";
  const filled = point => point.model === models[0].name;
  const known = () => points.filter(p => both() || p.model === get("model"));
  const visible = () => known().filter(p => get("shown").includes(p.family));
  const title = point => models.find(m => m.name === point.model).label;
  const choose = point => point && assign(model, "at", points.indexOf(point));
  const mark = ({ color, shape }, fill, radius) => svg("path", {
    d: shape, transform: `scale(${radius})`, stroke: `var(${color})`, "stroke-width": 1.8, fill: fill ? `var(${color})` : "var(--bw-page)" });
  const say = p => `${title(p)}, ${p.format}: ${number(p.bits, 6)} bits per weight; KL ${number(p.kl)} ± ${number(p.kl_error, 2)} nats; `
    + `top-1 ${percent(1 - p.changed)}; perplexity ${number(p.perplexity)} ± ${number(p.perplexity_error, 2)}. `
    + `At these bits ${get("billions")} billion weights take ${number(get("billions") * p.bits / 8)} GB.`;
  let spots = [];

  const scales = (width, height) => {
    const all = known(), bits = all.map(p => p.bits), values = all.map(value).filter(v => v > 0);
    const [least, most] = [Math.min(...values), Math.max(...values)], log = get("log_y"), grow = Math.max((most / least) ** 0.05, 1.05);
    const low = log ? least / grow : 0, high = log ? most * grow : most * 1.06;
    const left = width < 450 ? 52 : 58, right = width - 8, top = 26, bottom = height - 40;
    // More bits on the left: to the right the ground falls away.
    const x = axis(Math.min(...bits) * 0.85, Math.max(...bits) * 1.04, right, left, get("log_x"), width < 450 ? 5 : 8);
    const y = axis(low, high, bottom, top, log, 6);
    return { left, right, top, bottom, high, x, y, height: v => y.place(Math.min(Math.max(v, low), high)) };
  };
  const frame = ({ left, right, top, bottom, x, y }, width, height) => [
    x.at.map(v => [
      svg("line", { class: "grid", x1: x.place(v), x2: x.place(v), y1: top, y2: bottom }),
      svg("text", { x: x.place(v), y: bottom + 16, "text-anchor": "middle" }, v)]),
    y.at.map(v => [
      svg("line", { class: "grid", x1: left, x2: right, y1: y.place(v), y2: y.place(v) }),
      svg("text", { x: left - 5, y: y.place(v) + 4, "text-anchor": "end" }, get("metric") === "changed" ? percent(v) : number(v))]),
    svg("path", { class: "axis", fill: "none", d: `M${left} ${top}V${bottom}H${right}` }),
    svg("text", { x: width / 2, y: height - 6, "text-anchor": "middle" }, "bits per weight, from stored bytes"),
    svg("text", { x: 2, y: 13 }, metric().axis),
  ];
  // From a model's first point, where it would go at the same factor for each bit.
  const guide = ([first, ...rest], s) => Array.from({ length: 41 }, (_, i) => first.bits + (rest.at(-1).bits - first.bits) * i / 40)
    .map(bits => ({ bits, kl: first.kl * get("factor") ** (first.bits - bits) })).filter(p => p.kl <= s.high);
  const path = (found, place) => found.map((p, i) => `${i ? "L" : "M"}${place(p).map(v => v.toFixed(1)).join(" ")}`).join("");

  const draw = (width, height) => {
    const s = scales(width, height), now = chosen(), narrow = width < 450;
    const place = p => [s.x.place(p.bits), s.height(value(p))];
    const spot = (p, more) => ({ x: place(p)[0], y: place(p)[1], point: p, text: p.format, ...more });
    const lines = models.map(m => visible().filter(p => p.line && p.model === m.name)).filter(found => found.length > 1);
    const guides = get("metric") === "kl" ? lines.map(found => guide(found, s)) : [];
    const trail = lines.flatMap(found => found.slice(1).flatMap((p, i) => {
      const [a, b] = [place(found[i]), place(p)];
      return Array.from({ length: 30 }, (_, k) => [0, 1, 0, 1].map(j => a[j] + (b[j] - a[j]) * k / 30));
    }));
    spots = visible().map(p => spot(p));
    // What deserves its label first; with two models the second one's line says enough.
    const texts = [
      ...spots.filter(({ point }) => point === now).map(found => ({ ...found, must: true, look: "bw-bold" })),
      ...(both() ? lines.flat().map(p => spot(p, { text: title(p), once: true, look: "bw-bold" })) : []),
      ...guides.flat().filter((_, i) => i % 4 === 2).map(p => spot(p, { text: `dashed: ${get("factor")}x per bit`, once: true, look: "muted" })),
      ...spots.filter(({ point }) => point !== now && point.line),
      ...spots.filter(({ point }) => point !== now && !point.line && (!both() || (filled(point) && !narrow))),
    ];
    return [
      frame(s, width, height),
      guides.map(steps => svg("path", { class: "axis", fill: "none", "stroke-dasharray": "5 4", d: path(steps, place) })),
      lines.map(found => svg("path", { class: "line", "stroke-opacity": 0.7, d: path(found, place) })),
      labels(texts, spots, trail, [s.left, 0, width, s.bottom]),
      spots.map(({ point, x, y }) => {
        const error = point[metric().error] ?? 0;
        return [
          svg("line", { class: "axis", x1: x, x2: x, y1: s.height(value(point) - error), y2: s.height(value(point) + error) }),
          svg("g", { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` },
            mark(families.find(f => f.name === point.family), filled(point), narrow ? 4 : 4.6),
            point === now ? svg("circle", { r: 10, fill: "none", stroke: "var(--bw-ink)", "stroke-width": 2 }) : []),
        ];
      }),
    ];
  };

  const picture = chart({ height: 400, draw, alt: () => `${metric().axis} against bits per weight, ${visible().length} points; chosen: ${title(chosen())}, `
    + `${chosen().format}. Left and right arrow keys walk along one model's bits, up and down along the ${metric().label} of all points.` });
  const press = event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const same = visible().filter(p => p.model === chosen().model).sort((a, b) => b.bits - a.bits || value(a) - value(b));
    const order = /Up|Down/.test(event.key) ? visible().sort((a, b) => value(a) - value(b)) : same;
    choose(order[Math.min(Math.max(order.indexOf(chosen()) + step, 0), order.length - 1)]);
  };
  const click = event => {
    const box = picture.element.getBoundingClientRect();
    const far = ({ x, y }) => Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top);
    const [near] = [...spots].sort((a, b) => far(a) - far(b));
    if (near && far(near) < 32) choose(near.point);
  };
  picture.element.addEventListener("keydown", press);
  picture.element.addEventListener("click", click);
  picture.element.setAttribute("tabindex", 0);
  picture.element.setAttribute("role", "application");

  const toggle = family => {
    const input = h("input", { type: "checkbox", onchange: () => assign(model, "shown", families.map(f => f.name)
      .filter(name => (name === family.name ? input.checked : get("shown").includes(name)))) });
    input.checked = get("shown").includes(family.name);
    return h("label", {}, input, svg("svg", { class: "bw-mark", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(family, true, 4.6)), family.label);
  };
  const options = list => list.map(({ name, label }) => ({ value: name, text: label }));
  const group = (name, ...children) => h("fieldset", { class: "bw-control" }, h("legend", {}, name), children);
  const summary = readout();
  el.append(h("div", { class: "bw bw-cliff", role: "group", "aria-label": "Cliff explorer" },
    h("div", { class: "bw-controls" },
      choice(model, "metric", { label: "Show", options: options(get("metrics")) }),
      choice(model, "model", { label: "Model", options: options(models.length > 1 ? [...models, { name: "both", label: "both" }] : models) }),
      group("Formats", families.map(toggle)),
      group("Logarithmic", checkbox(model, "log_y", { label: "vertical" }), checkbox(model, "log_x", { label: "horizontal" })),
      select(model, "billions", { label: "Size of a model", options: get("sizes").map(n => ({ value: n, text: `${n} billion weights` })) })),
    picture.element, summary,
    h("p", { class: "bw-note" }, models.length > 1 ? `Filled: ${models[0].label}; hollow: ${models[1].label}. ` : "",
      "Bars: one standard error. Solid: integers in groups of 32 with zero points. Click a point, or focus the picture and use the arrow keys.")));
  const stop = watch(model, "at metric model shown log_x log_y billions", () => {
    const found = visible(), now = chosen();
    if (found.length && !found.includes(now)) {
      const far = p => Math.abs(p.bits - now.bits) + (p.format === now.format ? 0 : 1) + (p.model === now.model ? 0 : 1);
      return choose([...found].sort((a, b) => far(a) - far(b))[0]);
    }
    summary.textContent = found.length ? say(now) : "Choose at least one kind of format.";
    picture.redraw();
  });
  return () => { stop(); picture.stop(); };
}
export default { render };
