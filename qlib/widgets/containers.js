// Positions are bits, counted from the start of a container's bytes; lowest bit of each byte first.
const unhex = text => Array.from({ length: text.length / 2 }, (_, i) => parseInt(text.slice(2 * i, 2 * i + 2), 16));
const uint = (bytes, bit, width) => {
  if (width < 8) return bytes[bit >> 3] >> (bit & 7) & (1 << width) - 1;
  return Array.from({ length: width / 8 }, (_, i) => bytes[(bit >> 3) + i] * 2 ** (8 * i)).reduce((a, b) => a + b);
};
const float = (bytes, bit, width) => {
  const code = uint(bytes, bit, width), [wide, bias] = width === 32 ? [23, 127] : [10, 15], one = 2 ** wide;
  const mantissa = code % one, exponent = Math.floor(code / one) % (2 * bias + 2), sign = code >= 2 ** (width - 1) ? -1 : 1;
  if (exponent > 2 * bias) return mantissa ? NaN : sign * Infinity;
  return sign * (mantissa + (exponent && one)) * 2 ** (Math.max(exponent, 1) - bias - wide);
};

const start = (c, field) => 8 * c.fields.find(([name]) => name === field)[2];
// The numbers that make weight i in container c, and where they lie: [bit, width].
const weight = (c, bytes, i, columns) => {
  const column = i % columns, { rule } = c;
  const spots = { code: [c.code[i], 4] };
  if (rule.groups) spots.group = [start(c, rule.groups) + 32 * column, 32];
  const group = rule.groups ? uint(bytes, ...spots.group) : Math.floor(column / c.block);
  const at = Math.floor(i / columns) * columns / c.block + group, code = uint(bytes, ...spots.code);
  spots.scale = [c.scale[at], c.width];
  if (c.zero) spots.zero = [c.zero[at], rule.bias ? c.width : 4];
  if (rule.table) spots.entry = [start(c, rule.table) + 32 * code, 32];
  const scale = float(bytes, ...spots.scale), found = { spots, code, scale, group };
  if (rule.table) {
    const entry = float(bytes, ...spots.entry);
    return { ...found, value: Math.fround(entry * scale), text: `table[${code}] × scale = ${show(entry)} × ${show(scale)}` };
  }
  if (rule.bias) {
    const bias = float(bytes, ...spots.zero);
    return { ...found, value: code * scale + bias, text: `code × scale + bias = ${code} × ${show(scale)} + ${show(bias)}` };
  }
  const raw = c.zero && uint(bytes, ...spots.zero), zero = c.zero ? raw + rule.less & 15 : rule.known;
  const from = rule.less ? `(${raw} + ${rule.less})` : zero;
  return { ...found, raw, zero, value: (code - zero) * scale, text: `(code − zero) × scale = (${code} − ${from}) × ${show(scale)}` };
};
const decode = (c, columns) => c.code.map((_, i) => weight(c, unhex(c.bytes), i, columns).value);

const show = x => String(Number(x.toPrecision(4))).replaceAll("-", "−");
const hex = byte => byte.toString(16).padStart(2, "0");
const touches = ([bit, width], byte) => bit < 8 * byte + 8 && bit + width > 8 * byte;
const span = ([bit, width]) => Array.from({ length: Math.ceil(width / 8) }, (_, k) => (bit >> 3) + k);
const KINDS = ["code", "scale", "zero", "group", "entry"];

function render({ model, el }) {
  const get = name => model.get(name), [rows, columns] = get("shape"), size = rows * columns;
  const every = get("containers").map(c => ({ ...c, raw: unhex(c.bytes) }));
  const ALL = Array.from({ length: size }, (_, i) => i);
  for (const c of every) {
    c.weights = ALL.map(i => weight(c, c.raw, i, columns));
    c.users = c.raw.map((_, byte) => KINDS.map(kind => ALL.filter(i => c.weights[i].spots[kind] && touches(c.weights[i].spots[kind], byte))));
  }
  const here = () => every[get("chosen")];
  const label = i => `[${Math.floor(i / columns)}, ${i % columns}]`;
  const choose = at => assign(model, "at", Math.min(Math.max(Math.round(at) || 0, 0), size - 1));
  let told = "";

  // A byte leads to a weight that needs it, the next one at each press.
  const visit = byte => {
    const users = here().users[byte], kind = users.findIndex(list => list.length), at = get("at");
    told = kind < 0 ? `Byte ${byte} says nothing of a single weight.` : `Byte ${byte} is part of the ${KINDS[kind]} of ${users[kind].length} weight${users[kind].length > 1 ? "s" : ""}.`;
    choose(kind < 0 ? at : users[kind].find(i => i > at) ?? users[kind][0]);
    draw();
  };
  // One stop of the Tab key for all bytes of a tensor; arrow keys move among them.
  const roving = cells => cells.forEach((cell, k) => {
    cell.tabIndex = k ? -1 : 0;
    cell.addEventListener("focus", () => cells.forEach(one => { one.tabIndex = one === cell ? 0 : -1; }));
    cell.addEventListener("keydown", event => {
      const wide = getComputedStyle(cell.parentNode).gridTemplateColumns.split(" ").length;
      const to = cells[k + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key]];
      if (!to) return;
      event.preventDefault();
      to.focus();
    });
  });
  let cells = [];
  const panel = h("div", {}), title = h("p", { class: "bw-title" });
  const build = () => {
    const c = here();
    cells = c.raw.map((value, byte) => h("button", { type: "button", onclick: () => visit(byte) }));
    c.fields.forEach(([, , from, to]) => roving(cells.slice(from, to)));
    panel.replaceChildren(...c.fields.map(([name, kind, from, to]) => h("div", { role: "group", "aria-label": name },
      h("p", { class: "bw-note" }, h("b", {}, name), ` ${kind}, ${from} to ${to - 1}`),
      h("div", { class: "bw-bytes" }, cells.slice(from, to)))));
    title.textContent = `${c.raw.length} bytes in ${c.name}`;
  };

  // The bytes of a number, its own halves marked.
  const halves = (value, byte, spots) => [4, 0].map((low, k) =>
    h("span", { class: spots.some(([bit, width]) => bit < 8 * byte + low + 4 && bit + width > 8 * byte + low) ? "bw-own" : "" }, hex(value)[k]));
  const cell = (c, spot, text = "") => {
    if (!spot) return h("td", {}, h("span", { class: "bw-note" }, `${text}, not stored`));
    const at = span(spot);
    return h("td", {}, h("code", {}, at.map((byte, k) => [k ? " " : "", halves(c.raw[byte], byte, [spot])])),
      h("span", { class: "bw-note" }, text, at.length > 1 ? `${at[0]}–${at.at(-1)}` : at[0]));
  };
  const names = every.map((c, k) => h("button", { type: "button", onclick: () => { told = ""; assign(model, "chosen", k); draw(); } }, c.name));
  const lines = every.map(() => h("tr", {}));
  const table = h("table", { class: "bw-where" }, h("thead", {}, h("tr", {}, ["container", "code", "scale", "zero", "value"].map(name => h("th", { scope: "col" }, name)))), h("tbody", {}, lines));

  const picture = chart({
    height: rows * 16,
    alt: () => `${rows} rows of ${columns} weights. Chosen: ${label(get("at"))}. Arrow keys choose another.`,
    draw: width => {
      const c = here(), at = get("at"), step = width / columns, top = Math.max(...c.weights.map(w => Math.abs(w.value)), 2 ** -126);
      const rect = (i, n, style) => svg("rect", { x: i % columns * step, y: Math.floor(i / columns) * 16, width: n * step, height: 15, ...style });
      const first = ALL.find(i => c.weights[i].spots.scale[0] === c.weights[at].spots.scale[0]);
      const byte = c.weights[at].spots.code[0] >> 3;
      return [
        ALL.map(i => rect(i, 1, { fill: c.weights[i].value < 0 ? "var(--bw-c2)" : "var(--bw-c1)", "fill-opacity": Math.abs(c.weights[i].value) / top })),
        rect(first, c.block, { fill: "none", stroke: "var(--bw-muted)", "stroke-width": 1.5 }),
        c.users[byte][0].map(i => rect(i, 1, { fill: "none", stroke: "var(--bw-ink)", "stroke-width": i === at ? 3 : 1.5, "stroke-dasharray": i === at ? "" : "2 2" })),
      ];
    },
  });
  const picked = (x, y) => choose(Math.min(Math.max(y, 0), rows - 1) * columns + Math.min(Math.max(x, 0), columns - 1));
  const spot = () => [get("at") % columns, Math.floor(get("at") / columns)];
  picture.element.addEventListener("keydown", event => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    told = "";
    picked(spot()[0] + move[0], spot()[1] + move[1]);
  });
  picture.element.addEventListener("click", event => {
    const box = picture.element.getBoundingClientRect();
    told = "";
    picked(Math.floor((event.clientX - box.left) / box.width * columns), Math.floor((event.clientY - box.top) / 16));
  });
  picture.element.setAttribute("tabindex", 0);
  picture.element.setAttribute("role", "application");
  const numbers = ["Row", "Column"].map((name, k) => {
    const input = h("input", { type: "number", min: 0, max: [rows, columns][k] - 1, id: unique(), onchange: () => {
      const [x, y] = spot(), value = Math.round(Number(input.value));
      told = "";
      picked(k ? value : x, k ? y : value);
      draw();
    } });
    return { input, element: h("div", { class: "bw-control" }, h("label", { for: input.id }, `${name}, 0 to ${[rows, columns][k] - 1}`), input) };
  });
  const sentence = readout(), effect = readout();
  const part = (head, ...children) => h("div", { role: "group", "aria-label": head }, children);
  el.append(h("div", { class: "bw bw-containers", role: "group", "aria-label": "One weight in six containers" },
    h("div", { class: "bw-controls" }, numbers.map(one => one.element)),
    sentence, effect, picture.element,
    h("div", { class: "bw-parts" }, part("Bytes of a container", title, panel), part("The weight in every container", h("p", { class: "bw-title" }, "The same weight in each"), table))));

  const draw = () => {
    const c = here(), at = get("at"), w = c.weights[at], spots = Object.values(w.spots);
    const others = c.users[w.spots.code[0] >> 3][0].filter(i => i !== at).map(label);
    spot().reverse().forEach((value, k) => { numbers[k].input.value = value; });
    cells.forEach((button, byte) => {
      const kind = KINDS[c.users[byte].findIndex(list => list.length)] ?? "other", own = spots.some(one => touches(one, byte));
      button.className = `bw-${kind}${own ? " bw-used" : ""}`;
      button.setAttribute("aria-label", `${hex(c.raw[byte])}, byte ${byte}, ${kind}${own ? `, part of weight ${label(at)}` : ""}`);
      button.replaceChildren(...halves(c.raw[byte], byte, spots));
      // Bring it into view within its own list, and leave the page where it is.
      const list = button.parentNode, top = button.offsetTop;
      if (own && (top < list.scrollTop || top + 24 > list.scrollTop + list.clientHeight)) list.scrollTop = top - list.clientHeight / 2;
    });
    lines.forEach((line, k) => {
      const one = every[k], its = one.weights[at], { zero, entry } = its.spots;
      names[k].setAttribute("aria-pressed", k === get("chosen"));
      line.replaceChildren(h("th", { scope: "row" }, names[k]), cell(one, its.spots.code), cell(one, its.spots.scale),
        cell(one, zero ?? entry, one.rule.known ?? (entry ? "table, " : one.rule.bias ? "bias, " : "")), h("td", {}, show(its.value)));
    });
    sentence.textContent = `${c.name}: weight ${label(at)} = ${w.text} = ${show(w.value)}`;
    effect.textContent = told || `Byte ${w.spots.code[0] >> 3} holds its code in the ${w.spots.code[0] & 4 ? "high" : "low"} half, and that of ${others.join(", ")}.`;
    picture.redraw();
  };
  const stopBuild = watch(model, "chosen", build);
  const stop = watch(model, "at chosen", draw);
  return () => { stopBuild(); stop(); picture.stop(); };
}
export default { render };
