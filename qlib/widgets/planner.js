const GB = 1e9;
const digits = value => value.toLocaleString("en-US", { maximumSignificantDigits: 3 });
const gigabytes = bytes => `${digits(bytes / GB)} GB`;

// The formulas of qlib.plan, on the constants that Python computed for each model.
const sizes = (m, { bits, tables, context, step, kvBits, unshared }) => {
  const batch = 2 ** step, tableBits = tables ? bits : 16;
  const weights = ((m.dense + m.experts) * bits + m.tables * tableBits) / 8 + m.vectors * 2;
  const cache = (unshared ? m.unshared : m.cached) * context * batch * kvBits / 8;
  const linear = (m.dense + m.experts * m.share[step]) * bits / 8;
  const read = linear + (m.head + batch * m.hidden) * tableBits / 8 + m.vectors * 2 + cache;
  return { weights, cache, total: weights + cache, read, batch };
};

const stacked = (width, height, { weights, cache, total }) => {
  const left = 4, right = width - 14, limit = total / GB * 1.02, bar = 22;
  const x = value => left + (right - left) * value / limit;
  const split = x(weights / GB), end = x(total / GB);
  const parts = [
    svg("rect", { x: left, y: 4, width: split - left, height: bar, fill: "var(--bw-c1)" }),
    svg("rect", { x: split, y: 4, width: Math.max(end - split, 0), height: bar, fill: "var(--bw-c2)" }),
  ];
  for (const value of ticks(0, limit, width < 450 ? 3 : 6)) {
    parts.push(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: bar + 6, y2: bar + 11 }));
    parts.push(svg("text", { x: x(value), y: bar + 25, "text-anchor": value ? "middle" : "start" }, `${value.toLocaleString("en-US")} GB`));
  }
  return parts;
};

const swatch = color => h("span", {
  style: `display:inline-block;width:.8em;height:.8em;margin-right:.35em;background:var(${color})`, "aria-hidden": "true",
});

const row = (device, size) => {
  const share = size.total / (device.memory * GB), fits = share <= 1;
  const count = Math.ceil(share);
  const bound = size.batch * device.bandwidth * GB / size.read;
  const used = h("span", { class: "bw-meter", "aria-hidden": "true" },
    h("span", { style: `width:${Math.min(share, 1) * 100}%;background:var(${fits ? "--bw-c1" : "--bw-c5"})` }));
  return h("tr", { class: fits ? "" : "bw-out" },
    h("th", { scope: "row" }, device.name),
    h("td", {}, `${device.memory} GB`),
    h("td", {}, used, fits ? `${Math.round(share * 100)}% used` : count > 99 ? "no" : `needs ${count}`),
    h("td", {}, fits ? digits(bound) : "–"));
};

function render({ model, el }) {
  const get = name => model.get(name);
  const names = get("models").map(m => ({ value: m.name, text: `${m.name} (${digits(m.parameters / 1e9)} B)` }));
  const kinds = get("formats").map(f => ({ value: f.name, text: `${f.name}: ${digits(f.bits)} bits per weight` }));
  const tokens = step => (2 ** step).toLocaleString("en-US");
  const now = () => sizes(get("models").find(m => m.name === get("model")), {
    bits: get("formats").find(f => f.name === get("format")).bits,
    tables: get("tables"), context: 2 ** get("context"), step: get("batch"), kvBits: get("kv_bits"), unshared: get("unshared"),
  });
  const picture = chart({
    height: 54,
    alt: () => `Weights ${gigabytes(now().weights)}, cache ${gigabytes(now().cache)}`,
    draw: (width, height) => stacked(width, height, now()),
  });
  const legend = h("p", { class: "bw-note" }), note = h("p", { class: "bw-note" }), summary = readout();
  const body = h("tbody");
  const table = h("table", { class: "bw-devices" },
    h("thead", {}, h("tr", {}, ["device", "memory", "fits?", "most tokens/s"].map(text => h("th", { scope: "col" }, text)))), body);
  el.append(h("div", { class: "bw", role: "group", "aria-label": "Memory planner" },
    h("div", { class: "bw-controls" },
      select(model, "model", { label: "Model", options: names }),
      select(model, "format", { label: "Linear layers", options: kinds }),
      checkbox(model, "tables", { label: "embedding and head in this format too" }),
      slider(model, "context", { label: "Context", min: 9, max: 20, show: step => `${tokens(step)} tokens` }),
      slider(model, "batch", { label: "Batch", min: 0, max: 8, show: step => tokens(step) }),
      choice(model, "kv_bits", { label: "Cache", options: [16, 8, 4].map(bits => ({ value: bits, text: `${bits} bits` })) }),
      checkbox(model, "unshared", { label: "every query head caches its own keys and values" })),
    legend, picture.element, summary, table, note));
  const stop = watch(model, "model format tables context batch kv_bits unshared", () => {
    const m = get("models").find(entry => entry.name === get("model")), size = now();
    legend.replaceChildren(swatch("--bw-c1"), `weights ${gigabytes(size.weights)}  `, swatch("--bw-c2"), `KV cache ${gigabytes(size.cache)}`);
    const fitting = get("devices").filter(device => size.total <= device.memory * GB);
    summary.textContent = `${gigabytes(size.total)} in all; ${fitting.length ? `the smallest that fits: ${fitting[0].name}` : "no device here holds it"}. `
      + `One step reads ${gigabytes(size.read)} and yields ${size.batch === 1 ? "one token" : `${size.batch} tokens`}.`;
    body.replaceChildren(...get("devices").map(device => row(device, size)));
    note.textContent = `${m.name}: ${digits(m.parameters / 1e9)} B parameters, ${digits(m.active / 1e9)} B active per token; ${m.sharing}.`;
    picture.redraw();
  });
  return () => { stop(); picture.stop(); };
}
export default { render };
