const digits = value => value.toLocaleString("en-US", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });

// The first stages of the fast Walsh-Hadamard transform: stage s makes (a + b, a - b) / sqrt(2) of all channels 2^s apart.
const mixed = (x, stages) => {
  const y = [...x];
  for (let far = 1; far < 2 ** stages; far *= 2) {
    for (let i = 0; i < y.length; i++) {
      if (i & far) continue;
      const a = y[i], b = y[i + far];
      y[i] = (a + b) * Math.SQRT1_2;
      y[i + far] = (a - b) * Math.SQRT1_2;
    }
  }
  return y;
};

// The token before the rotation: ordinary channels and outliers, on channels or on rows of the Hadamard matrix.
const vector = ({ channels, unit, spread, places, count, scale, basis }) => {
  const x = channels.map(whole => whole * unit);
  for (const place of places.slice(0, count)) x[place] = scale * spread;
  return basis === "rows" ? mixed(x, Math.log2(x.length)) : x;
};

// The rule of qlib's symmetric integers: scale = largest magnitude / largest code, in float32, stored in float16.
const round = (x, { bottom, top }) => {
  const exact = x.map(Math.fround), largest = Math.max(...exact.map(Math.abs));
  const scale = largest ? half(Math.fround(largest / top)) : 1;
  const codes = exact.map(v => even(Math.min(Math.max(Math.fround(v / scale), bottom), top)));
  const values = codes.map(code => Math.fround(code * scale));
  const sum = f => exact.reduce((total, v, i) => total + f(v, i), 0);
  const energy = sum(v => v * v), noise = sum((v, i) => (v - values[i]) ** 2);
  return { exact, values, codes, largest, scale, energy, noise, zeros: codes.filter(code => !code).length, snr: 10 * Math.log10(energy / noise) };
};

// The token as it is and as it is after the stages, both rounded to the same grid.
const both = state => {
  const x = vector(state), signs = state.sign ?? x.map(() => 1);
  return [x, mixed(x.map((v, i) => v * signs[i]), state.stages)].map(y => round(y, state.grid));
};

// Bars over the levels of the grid; what is rounded to zero has its own color, and a tick marks each rounded value.
const bars = ({ exact, values, codes, largest, scale }, { bottom, top }, width, height) => {
  const left = 50, right = width - 4, limit = largest * 1.08 || 1, slot = (right - left) / exact.length;
  const y = value => height / 2 * (1 - value / limit);
  const levels = Array.from({ length: top - bottom + 1 }, (_, i) => (bottom + i) * scale).filter(level => Math.abs(level) <= limit);
  const lines = y(0) - y(scale) < 3 ? [] : levels.map(level => svg("line", { class: "grid", x1: left, x2: right, y1: y(level), y2: y(level) }));
  return [
    svg("rect", { x: left, y: 0, width: right - left, height, fill: "var(--bw-fill)" }),
    lines,
    exact.map((v, i) => [
      svg("rect", { x: left + (i + 0.12) * slot, y: y(Math.max(v, 0)), width: slot * 0.76, height: Math.max(Math.abs(y(v) - y(0)), 1),
        fill: `var(${codes[i] ? "--bw-c1" : "--bw-c5"})` }),
      codes[i] ? svg("rect", { x: left + i * slot, y: y(values[i]) - 1, width: slot, height: 2, fill: "var(--bw-ink)" }) : []]),
    svg("line", { class: "axis", x1: left, x2: right, y1: y(0), y2: y(0) }),
    ticks(-limit, limit, 4).map(v => svg("text", { x: left - 6, y: Math.min(Math.max(y(v) + 4, 11), height - 2), "text-anchor": "end" }, v.toLocaleString("en-US"))),
  ];
};

function render({ model, el }) {
  const get = name => model.get(name), count = get("channels").length, most = Math.log2(count);
  const fields = "channels unit spread places count basis stages".split(" ");
  const now = () => both({
    ...Object.fromEntries(fields.map(name => [name, get(name)])),
    scale: get("scales")[get("size")], sign: get("draws")[get("signs") - 1], grid: grid(),
  });
  const grid = () => get("grids").find(entry => entry.bits === get("bits"));
  let pair = now();
  const says = ({ largest, zeros, snr }) => `largest ${digits(largest)}, ${zeros} of ${count} rounded to zero, SNR ${decibels(snr)}`;
  const decibels = snr => (isFinite(snr) ? `${snr.toFixed(1)} dB` : "exact");
  const pictures = ["Original token", "Rotated token"].map((name, k) => chart({
    height: 130, alt: () => `${name}: ${count} channels, ${says(pair[k])}`, draw: (width, height) => bars(pair[k], grid(), width, height),
  }));
  // A picture has a name before it has a width and is drawn.
  pictures.forEach(({ element }, k) => element.setAttribute("aria-label", k ? "Rotated token" : "Original token"));
  const buttons = get("presets").map(({ label, ...preset }) => ({ preset, button: h("button", { type: "button", onclick: () => {
    model.set(preset);
    model.save_changes();
  } }, label) }));
  const holds = ({ basis, count, size }) => basis === get("basis") && count === get("count") && (size === get("size") || !count);
  const title = h("p", { class: "bw-title" }), summary = readout(), body = h("tbody");
  const key = (color, text) => h("span", { class: "bw-key" }, h("span", { style: `background:var(${color})`, "aria-hidden": "true" }), text);
  const signs = [{ value: 0, text: "none" }, ...get("draws").map((_, i) => ({ value: i + 1, text: `draw ${i + 1}` }))];
  el.append(h("div", { class: "bw bw-rotate", role: "group", "aria-label": "Rotate an outlier away" },
    h("div", { class: "bw-controls", role: "group", "aria-label": "Examples" }, buttons.map(({ button }) => button)),
    h("div", { class: "bw-controls" },
      slider(model, "count", { label: "Outliers", min: 0, max: get("places").length }),
      slider(model, "size", { label: "Their size", min: 0, max: get("scales").length - 1, show: i => `${get("scales")[i].toLocaleString("en-US")} × typical` }),
      slider(model, "stages", { label: "Stages", min: 0, max: most, show: s => `${s} of ${most}` }),
      slider(model, "bits", { label: "Grid", min: get("grids")[0].bits, max: get("grids").at(-1).bits, show: b => `${b} bits` }),
      choice(model, "signs", { label: "Random signs first", options: signs })),
    h("p", { class: "bw-title" }, "Original"), pictures[0].element, title, pictures[1].element,
    h("p", { class: "bw-note" }, key("--bw-c1", "channel"), key("--bw-c5", "channel rounded to zero"), key("--bw-ink", "rounded value"), "lines: levels of the grid"),
    summary,
    h("table", { class: "bw-numbers" },
      h("thead", {}, h("tr", {}, ["", "original", "rotated"].map(text => (text ? h("th", { scope: "col" }, text) : h("td", {}))))), body),
    h("p", { class: "bw-note" }, "A stage makes (a + b, a − b) / √2 of pairs of channels. The last row is the typical (root mean square) error of the dot product "
      + "with weights of variance 1: the length of the error.")));
  const rows = [
    ["energy (sum of squares)", p => digits(p.energy)], ["largest magnitude", p => digits(p.largest)], ["step of the grid", p => digits(p.scale)],
    ["rounded to zero", p => `${p.zeros} of ${count}`], ["SNR", p => decibels(p.snr)], ["error of a dot product", p => digits(Math.sqrt(p.noise))],
  ];
  const stop = watch(model, "basis count size stages signs bits", () => {
    pair = now();
    const [before, after] = pair, gain = after.snr - before.snr, done = get("stages");
    title.textContent = `After ${done} of ${most} stages: ${done ? `each channel a mix of ${2 ** done}` : "nothing is mixed yet"}`;
    const verdict = !(Math.abs(gain) >= 1) ? "changes little" : `${gain > 0 ? "gains" : "loses"} ${Math.abs(gain).toFixed(1)} dB`;
    summary.textContent = `At ${get("bits")} bits the rotation ${verdict}: SNR ${decibels(before.snr)} before, ${decibels(after.snr)} after. `
      + `The largest channel goes from ${digits(before.largest)} to ${digits(after.largest)}; the energy stays ${digits(before.energy)}.`;
    body.replaceChildren(...rows.map(([name, f]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, f(before)), h("td", {}, f(after)))));
    for (const { preset, button } of buttons) button.setAttribute("aria-pressed", holds(preset));
    pictures.forEach(picture => picture.redraw());
  });
  return () => { stop(); pictures.forEach(picture => picture.stop()); };
}
export default { render };
