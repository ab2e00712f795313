// The rule of qlib's symmetric formats: scale = largest magnitude / largest code, every step in float32.
const quantize = (weights, size, top, bottom) => {
  const values = new Array(weights.length);
  for (let start = 0; start < weights.length; start += size) {
    const block = weights.slice(start, start + size);
    const largest = Math.max(...block.map(Math.abs));
    const scale = largest ? half(Math.fround(largest / top)) : 1;
    block.forEach((w, i) => {
      const code = even(Math.min(Math.max(Math.fround(w / scale), bottom), top));
      values[start + i] = Math.fround(code * scale);
    });
  }
  return values;
};

const LEVELS = 16;

const state = model => {
  const get = name => model.get(name);
  const weights = get("tile").map(whole => whole * get("unit"));
  if (get("size")) weights[get("at")] = Math.fround(get("size") * get("spread"));
  const block = get("blocks").find(entry => entry.format === get("block"));
  const values = quantize(weights, block.size, get("top"), get("bottom"));
  let signal = 0, noise = 0, zeros = 0;
  const first = Math.floor(get("at") / block.size) * block.size;
  weights.forEach((w, i) => {
    if (i === get("at")) return;
    signal += w * w;
    noise += (w - values[i]) ** 2;
    if (i >= first && i < first + block.size && values[i] === 0) zeros += 1;
  });
  return { weights, values, block, first, zeros, snr: 10 * Math.log10(signal / noise) };
};

// One path per shade: far fewer elements than one per weight.
const heatmap = ({ weights, values }, columns, cell, full) => {
  const paths = Array.from({ length: LEVELS }, () => "");
  weights.forEach((w, i) => {
    const level = Math.min(Math.round(Math.abs(w - values[i]) / full * LEVELS), LEVELS);
    const x = (i % columns * cell).toFixed(2), y = (Math.floor(i / columns) * cell).toFixed(2);
    if (level) paths[level - 1] += `M${x} ${y}h${cell.toFixed(2)}v${cell.toFixed(2)}H${x}z`;
  });
  return paths.map((d, k) => svg("path", { d, fill: "var(--bw-c5)", "fill-opacity": ((k + 1) / LEVELS).toFixed(3) }));
};

const legend = () => h("p", { class: "bw-note bw-shades" }, "error: 0 ",
  [0, 0.25, 0.5, 0.75, 1].map(share => h("span", {}, h("span", { style: `opacity:${share}` }))), " one standard deviation or more");

function render({ model, el }) {
  const columns = model.get("columns"), count = model.get("tile").length, rows = count / columns;
  let now = state(model);
  const where = () => `row ${Math.floor(model.get("at") / columns) + 1}, column ${model.get("at") % columns + 1}`;
  const picture = chart({
    height: 100,
    alt: () => `Errors of ${rows} by ${columns} weights. The outlier is in ${where()}. Arrow keys move it.`,
    draw: width => {
      const cell = (width - 2) / columns, at = model.get("at");
      picture.element.setAttribute("height", Math.ceil(rows * cell + 2));
      picture.element.setAttribute("viewBox", `-1 -1 ${width} ${Math.ceil(rows * cell + 2)}`);
      const across = Math.min(now.block.size, columns) * cell, down = Math.max(now.block.size / columns, 1) * cell;
      const ring = (x, y, w, hgt, style) => svg("rect", { x, y, width: w, height: hgt, fill: "none", ...style });
      return [
        svg("rect", { width: columns * cell, height: rows * cell, fill: "var(--bw-fill)" }),
        heatmap(now, columns, cell, model.get("spread")),
        ring(now.first % columns * cell, Math.floor(now.first / columns) * cell, across, down, { stroke: "var(--bw-c1)", "stroke-width": 2 }),
        ring(at % columns * cell - 2, Math.floor(at / columns) * cell - 2, cell + 4, cell + 4, { stroke: "var(--bw-ink)", "stroke-width": 2 }),
      ];
    },
  });
  const move = at => {
    model.set("at", at);
    model.save_changes();
  };
  const press = event => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }, step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const at = model.get("at"), to = at + step;
    const stays = Math.abs(step) > 1 ? to >= 0 && to < count : Math.floor(to / columns) === Math.floor(at / columns);
    if (stays) move(to);
  };
  const click = event => {
    const box = picture.element.getBoundingClientRect(), cell = (box.width - 2) / columns;
    const column = Math.floor((event.clientX - box.left - 1) / cell), row = Math.floor((event.clientY - box.top - 1) / cell);
    if (column >= 0 && column < columns && row >= 0 && row < rows) move(row * columns + column);
  };
  picture.element.addEventListener("keydown", press);
  picture.element.addEventListener("click", click);
  picture.element.setAttribute("tabindex", 0);
  picture.element.setAttribute("role", "application");
  picture.element.classList.add("bw-tile");
  const summary = readout(), note = h("p", { class: "bw-note" });
  const entries = model.get("blocks").map(entry => ({ value: entry.format, text: entry.label }));
  el.append(h("div", { class: "bw", role: "group", "aria-label": "One outlier" },
    h("div", { class: "bw-controls" },
      choice(model, "block", { label: "One scale per", options: entries }),
      slider(model, "size", { label: "Outlier", min: 0, max: 48, show: size => (size ? `${size} std` : "none") })),
    picture.element, legend(), summary, note));
  const stop = watch(model, "block size at", () => {
    now = state(model);
    summary.textContent = `${now.block.format}: ${Number(now.block.bits.toFixed(3))} bits per weight; SNR of the other `
      + `${(count - 1).toLocaleString("en-US")} weights ${now.snr.toFixed(1)} dB.`;
    note.textContent = `${(now.block.size - 1).toLocaleString("en-US")} weights share the scale of ${where()} (blue frame); `
      + `${now.zeros.toLocaleString("en-US")} of them are rounded to zero. Click, or focus the picture and use the arrow keys, to move the outlier.`;
    picture.redraw();
  });
  return () => { stop(); picture.stop(); };
}
export default { render };
