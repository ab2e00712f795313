const GB = 1e9;
const digits = (value, least = 1) => value.toLocaleString("en-US", { minimumSignificantDigits: least, maximumSignificantDigits: 3 });
const gigabytes = bytes => digits(bytes / GB, 3);
const whole = value => value.toLocaleString("en-US");

// Bits of all keys and values of one token: in full precision, and rounded.
const perToken = (m, f) => {
  const [key, value] = f.bits[m.width];
  return { full: f.full * (m.keys + m.values), rounded: key * m.keys + value * m.values, kept: f.sinks + f.window };
};

// Bytes of the cache; the sinks and a whole window count as kept in full precision.
const cached = (m, f, tokens, batch) => {
  const { full, rounded, kept } = perToken(m, f), first = Math.min(tokens, kept);
  return batch * (first * full + (tokens - first) * rounded) / 8;
};

// The most tokens of each sequence for which weights and cache stay within `memory` bytes.
const longest = (m, f, memory, weights, batch) => {
  const { full, rounded, kept } = perToken(m, f), bits = 8 * (memory - weights) / batch;
  const tokens = bits <= full * kept ? bits / full : kept + (bits - full * kept) / rounded;
  return Math.max(Math.floor(tokens), 0);
};

// All numbers of one format: a step reads the weights and the whole cache once.
const plan = ({ m, f, kind, device, step }, tokens) => {
  const [weights, reads] = m.weights[kind], batch = 2 ** step, cache = cached(m, f, tokens, batch);
  const read = reads[step] + cache, memory = device.memory * GB, total = weights + cache;
  return {
    weights, cache, total, read, fits: total <= memory, speed: batch * device.bandwidth * GB / read,
    most: longest(m, f, memory, weights, batch), bits: 8 * cache / (batch * tokens * (m.keys + m.values)),
  };
};

const SHORTEST = 9, LONGEST = 20;

// Tokens per second against the context, a line for each format, which ends with a dot where the card is full.
const lines = (setting, formats, chosen, context, width, height) => {
  const left = 44, right = width - 10, top = 20, bottom = height - 38;
  const start = 2 ** SHORTEST, fastest = Math.max(...formats.map(f => plan({ ...setting, f }, start).speed));
  const x = tokens => left + (right - left) * (Math.log2(tokens) - SHORTEST) / (LONGEST - SHORTEST);
  const y = value => bottom + (top - bottom) * value / (fastest * 1.06);
  const order = [...formats.filter(f => f !== chosen && f !== formats[0]), formats[0], chosen];
  const curve = f => {
    const { most } = plan({ ...setting, f }, start), end = Math.min(most, 2 ** LONGEST);
    if (end < start) return [];
    const points = Array.from({ length: 61 }, (_, i) => start * (end / start) ** (i / 60)).map(n => [x(n), y(plan({ ...setting, f }, n).speed)]);
    const color = f === chosen ? "var(--bw-c1)" : f === formats[0] ? "var(--bw-c2)" : "var(--bw-muted)", strong = f === chosen || f === formats[0];
    return [
      svg("path", { d: `M${points.map(p => p.map(v => v.toFixed(1)).join(" ")).join("L")}`, fill: "none", stroke: color,
        "stroke-width": strong ? 2.5 : 1, "stroke-opacity": strong ? 1 : 0.6 }),
      most <= 2 ** LONGEST ? svg("circle", { cx: points.at(-1)[0], cy: points.at(-1)[1], r: strong ? 4.5 : 2.5, fill: color }) : [],
    ];
  };
  const label = n => (n < 2 ** 10 ? `${n}` : n < 2 ** 20 ? `${n / 2 ** 10}k` : `${n / 2 ** 20}M`);
  return [
    ticks(0, fastest * 1.06, 4).map(v => [
      svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, v < 1e4 ? whole(v) : `${digits(v / 1000)}k`)]),
    Array.from({ length: LONGEST - SHORTEST + 1 }, (_, i) => SHORTEST + i).filter(i => i % 2 === 0 || width > 450).map(i =>
      svg("text", { x: x(2 ** i), y: bottom + 16, "text-anchor": i === LONGEST ? "end" : "middle" }, label(2 ** i))),
    svg("line", { x1: x(context), x2: x(context), y1: top, y2: bottom, stroke: "var(--bw-ink)", "stroke-dasharray": "4 3" }),
    order.map(curve),
    svg("path", { class: "axis", fill: "none", d: `M${left} ${top}V${bottom}H${right}` }),
    svg("text", { x: 2, y: 12 }, "most tokens/s"),
    svg("text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, "context (k: 1,024 tokens)"),
  ];
};

function render({ model, el }) {
  const get = name => model.get(name), formats = get("formats"), tokens = step => whole(2 ** step);
  const setting = () => ({
    m: get("models").find(m => m.name === get("model")), kind: get("kinds").findIndex(kind => kind.name === get("weights")),
    device: get("devices").find(d => d.name === get("device")), step: get("batch"),
  });
  const chosen = () => formats.find(f => f.name === get("format"));
  const now = f => plan({ ...setting(), f }, 2 ** get("context"));
  const picture = chart({
    height: 220, draw: (width, height) => lines(setting(), formats, chosen(), 2 ** get("context"), width, height),
    alt: () => `Most tokens per second against the context, a line for each cache format; ${chosen().name} ends at ${whole(now(chosen()).most)} tokens, `
      + `${formats[0].name} at ${whole(now(formats[0]).most)}.`,
  });
  // A picture has a name before it has a width and is drawn.
  picture.element.setAttribute("aria-label", "Most tokens per second against the context");
  const group = unique(), body = h("tbody"), legend = h("p", { class: "bw-note" }), summary = readout(), note = h("p", { class: "bw-note" });
  // The radio buttons stay while the numbers beside them change, so that the keyboard's focus stays.
  const entries = formats.map(f => {
    const radio = h("input", { type: "radio", name: group, onchange: () => assign(model, "format", f.name) });
    const cells = Array.from({ length: 4 }, () => h("td")), row = h("tr", {}, h("th", { scope: "row" }, h("label", {}, radio, f.name)), cells);
    body.append(row);
    return { f, radio, cells, row };
  });
  const models = get("models").map(m => ({ value: m.name, text: `${m.name} (${digits(m.parameters / 1e9)} B)` }));
  const kinds = get("kinds").map(({ name, bits }) => ({ value: name, text: `${name} (${digits(bits)} bits)` }));
  const devices = get("devices").map(d => ({ value: d.name, text: `${d.name} (${d.memory} GB)` }));
  const heads = ["cache", "bits", "GB", "longest context", "most tokens/s"];
  el.append(h("div", { class: "bw bw-kv", role: "group", "aria-label": "KV planner" },
    h("div", { class: "bw-controls" },
      select(model, "model", { label: "Model", options: models }),
      select(model, "weights", { label: "Weights", options: kinds }),
      select(model, "device", { label: "Card", options: devices }),
      slider(model, "context", { label: "Context", min: SHORTEST, max: LONGEST, show: step => `${tokens(step)} tokens` }),
      slider(model, "batch", { label: "Batch", min: 0, max: 8, show: tokens })),
    legend, picture.element, summary,
    h("div", { role: "radiogroup", "aria-label": "Cache format" },
      h("table", {}, h("thead", {}, h("tr", {}, heads.map(text => h("th", { scope: "col" }, text)))), body)),
    note));
  const swatch = (color, text) => h("span", { class: "bw-key" }, h("span", { style: `background:var(${color})`, "aria-hidden": "true" }), text);
  const stop = watch(model, "model weights device format context batch", () => {
    const { m, device } = setting(), f = chosen(), mine = now(f), [key, value] = f.bits[m.width];
    for (const { f, radio, cells, row } of entries) {
      const { bits, cache, most, fits, speed } = now(f);
      radio.checked = f === chosen();
      row.className = fits ? "" : "bw-out";
      [bits.toFixed(2), gigabytes(cache), whole(most), fits ? digits(speed) : "–"].forEach((text, i) => { cells[i].textContent = text; });
    }
    legend.replaceChildren(...[swatch("--bw-c1", f.name), f === formats[0] ? null : swatch("--bw-c2", formats[0].name), "a dot: the card is full"].filter(Boolean));
    const alone = mine.weights > device.memory * GB;
    summary.textContent = `Weights ${gigabytes(mine.weights)} GB, ${f.name} cache ${gigabytes(mine.cache)} GB: ${mine.fits ? "fits" : "does not fit"} in ${device.memory} GB. `
      + (alone ? "The weights alone are too large for this card." : `The longest context is ${whole(mine.most)} tokens${get("batch") ? ` for each of ${tokens(get("batch"))} sequences` : ""}; `
        + `one step reads ${gigabytes(mine.read)} GB.`);
    note.textContent = `In each layer ${m.name} caches ${m.sharing}. ${f.name}: ${digits(key)} bits for a number of a key${m.values ? `, ${digits(value)} of a value` : ""}`
      + `${f.window ? `, the newest ${f.window} tokens in ${f.full} bits` : ""}${f.sinks ? `, the first ${f.sinks} in ${f.full} bits` : ""}. `
      + "Embedding and head have 16 bits. Tokens per second are an upper bound: a step must read the weights and the whole cache. "
      + "A model may be trained for less context than fits.";
    picture.redraw();
  });
  return () => { stop(); picture.stop(); };
}
export default { render };
