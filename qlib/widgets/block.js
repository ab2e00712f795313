const FIELDS = [["d", 0, 2], ["dmin", 2, 4], ["scales", 4, 16], ["qs", 16, 144]];
const fieldOf = byte => FIELDS.find(([, , end]) => byte < end)[0];
const ALL = Array.from({ length: 256 }, (_, i) => i);

// Which bits make weight i: for each of its numbers pairs of a byte and a mask, the highest bits first. Everything else follows from this.
const sources = i => {
  const j = i >> 5, six = (first, rest) => (j < 4 ? [[first + j, 0x3f]] : [[first + j - 4, 0xc0], [8 + j, rest]]);
  return {
    d: [[1, 0xff], [0, 0xff]],
    dmin: [[3, 0xff], [2, 0xff]],
    sc: six(4, 0x0f),
    m: six(8, 0xf0),
    q: [[16 + 32 * (j >> 1) + i % 32, j % 2 ? 0xf0 : 0x0f]],
  };
};
const maskOf = (i, byte) => Object.values(sources(i)).flat().reduce((mask, [at, own]) => mask | (at === byte ? own : 0), 0);

// The bits under the masks, one after another, as an integer.
const join = (bytes, parts) => parts.reduce((code, [byte, mask]) => {
  const unit = mask & -mask;
  return code * (mask / unit + 1) + (bytes[byte] & mask) / unit;
}, 0);

const float16 = code => {
  const exponent = code >> 10 & 31, mantissa = code & 1023;
  const finite = (mantissa + (exponent && 1024)) * 2 ** (Math.max(exponent, 1) - 25);
  const size = exponent < 31 ? finite : mantissa ? NaN : Infinity;
  return code >> 15 ? -size : size;
};

// The products are exact in float32, so rounding once, after the subtraction, gives what ggml computes.
const weight = (bytes, i) => {
  const part = sources(i), [sc, m, q] = [part.sc, part.m, part.q].map(bits => join(bytes, bits));
  const d = float16(join(bytes, part.d)), dmin = float16(join(bytes, part.dmin));
  return { d, dmin, sc, m, q, value: Math.fround(d * sc * q - dmin * m) };
};
const decode = bytes => ALL.map(i => weight(bytes, i).value);
const reach = (byte, bit) => ALL.filter(i => maskOf(i, byte) >> bit & 1).length;

// Zero and minus zero are the same weight, NaN and NaN too.
const same = (a, b) => a === b || (Number.isNaN(a) && Number.isNaN(b));
const changes = (now, before) => ALL.filter(i => !same(now[i], before[i]));
const show = x => (Number.isFinite(x) ? String(Number(x.toPrecision(5))) : Number.isNaN(x) ? "NaN" : x < 0 ? "-infinity" : "infinity").replaceAll("-", "−");
const hex = byte => byte.toString(16).padStart(2, "0");
const plural = (n, text) => `${n} ${text}${n === 1 ? "" : "s"}`;

// One stop of the Tab key for many buttons; the arrow keys move among them, eight to a row.
const roving = buttons => {
  const stop = to => buttons.forEach(button => { button.tabIndex = button === to ? 0 : -1; });
  stop(buttons[0]);
  for (const [k, button] of buttons.entries()) {
    button.addEventListener("focus", () => stop(button));
    button.addEventListener("keydown", event => {
      const to = buttons[k + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8 }[event.key]];
      if (!to) return;
      event.preventDefault();
      to.focus();
    });
  }
};

const HEIGHT = 52;
const LEFT = 14;
const bars = (now, before, at, width) => {
  const finite = now.filter(Number.isFinite).map(Math.abs), top = Math.max(...finite, 2 ** -126), step = (width - LEFT) / 32;
  const y = (i, v) => ((i >> 5) + 0.5) * HEIGHT - (Number.isFinite(v) ? Math.max(-1, Math.min(v / top, 1)) : 1) * (HEIGHT / 2 - 4);
  const x = i => LEFT + i % 32 * step;
  const rect = (a, b, w, hgt, style) => svg("rect", { x: a, y: b, width: w, height: hgt, ...style });
  const bar = i => {
    const changed = !same(now[i], before[i]), from = y(i, 0), to = y(i, now[i]), full = !Number.isFinite(now[i]);
    const end = full ? 2 * from - to : from, color = i === at ? "var(--bw-ink)" : changed ? "var(--bw-c5)" : "var(--bw-muted)";
    return [
      rect(x(i) + 0.5, Math.min(end, to) - 0.5, step - 1, Math.abs(to - end) + 1, { fill: color }),
      changed && rect(x(i), y(i, before[i]) - 1, step, 2, { fill: "var(--bw-ink)" }),
    ].filter(Boolean);
  };
  return [
    rect(LEFT, (at >> 5) * HEIGHT + 1, width - LEFT, HEIGHT - 2, { fill: "var(--bw-fill)" }),
    rect(x(at) - 1, (at >> 5) * HEIGHT + 1, step + 2, HEIGHT - 2, { fill: "none", stroke: "var(--bw-c1)", "stroke-width": 2 }),
    ALL.map(bar),
    ALL.filter(j => j < 8).map(j => [
      svg("line", { class: "grid", x1: LEFT, x2: width, y1: (j + 0.5) * HEIGHT, y2: (j + 0.5) * HEIGHT }),
      svg("text", { x: 0, y: (j + 0.5) * HEIGHT + 4 }, j),
    ]),
  ];
};

function render({ model, el }) {
  const get = name => model.get(name);
  const choose = at => assign(model, "at", Math.min(Math.max(Math.round(at), 0), 255));
  const before = decode(get("stored"));
  let now = decode(get("bytes")), told = "";

  const flip = (byte, bit) => {
    const bytes = [...get("bytes")], old = now;
    bytes[byte] ^= 1 << bit;
    const next = decode(bytes), moved = changes(next, old), sizes = moved.map(i => Math.abs(next[i] - old[i])).filter(Number.isFinite);
    told = `Bit ${bit} of byte ${byte} is part of ${plural(reach(byte, bit), "weight")}; flipping it changed ${moved.length}`
      + (sizes.length ? `, by up to ${show(Math.max(...sizes))}. ` : ". ");
    assign(model, "bytes", bytes);
  };

  // Left: a byte leads to a weight that it is part of, the next one at each press, and to its bits.
  const visit = byte => {
    const at = get("at"), made = ALL.filter(i => maskOf(i, byte) && (byte > 15 || i % 32 === at % 32));
    if (byte > 3) choose(made.find(i => i > at) ?? made[0]);
    bits.find(bit => bit.byte === byte && bit.own).button.focus();
  };
  const cells = get("bytes").map((_, byte) => h("button", { type: "button", onclick: () => visit(byte) }));
  roving(cells);
  const grid = FIELDS.map(([name, start, end], k) => [
    h("span", { class: "bw-note", style: `grid-area: ${["1 / 1 / auto / 3", "1 / 3 / auto / -1"][k] ?? "auto / 1 / auto / -1"}` }, name),
    cells.slice(start, end),
  ]);

  // Middle: the numbers of the chosen weight, bit by bit.
  let bits = [];
  const values = h("div", { class: "bw-numbers" });
  const build = () => {
    const at = get("at"), j = at >> 5, counts = { d: 256, dmin: 256, sc: 32, m: 32, q: 1 };
    bits = [];
    const row = ([byte, mask], name) => [h("span", { class: "bw-note" }, byte), [7, 6, 5, 4, 3, 2, 1, 0].map(bit => {
      const own = mask >> bit & 1, button = h("button", { type: "button", class: own ? `bw-${fieldOf(byte)}` : "bw-other", onclick: () => flip(byte, bit) });
      bits.push({ byte, bit, own, name, button });
      return button;
    })];
    values.replaceChildren(...Object.entries(sources(at)).map(([name, parts]) => {
      const title = h("output"), text = { sc: `sc of sub-block ${j}`, m: `m of sub-block ${j}`, q: `q of weight ${at}` }[name] ?? name;
      values[name] = title;
      return h("div", { role: "group", "aria-label": text }, h("p", {}, `${text} = `, title, h("span", { class: "bw-note" }, ` for ${plural(counts[name], "weight")}`)),
        h("div", { class: "bw-octets" }, parts.map(part => row(part, name))));
    }));
    roving(bits.map(bit => bit.button));
  };
  const pairs = h("table", { class: "bw-pairs" });
  const table = bytes => ["sub-block", "sc", "m"].map((name, k) => h("tr", {}, h("th", { scope: "row" }, name), ALL.filter(j => j < 8).map(j =>
    h(k ? "td" : "th", { scope: k ? null : "col", class: j === get("at") >> 5 ? "bw-here" : "" }, k ? weight(bytes, 32 * j)[name] : j))));

  // Right: all weights.
  const picture = chart({
    height: 8 * HEIGHT,
    alt: () => `256 weights in 8 rows of 32. Chosen: weight ${get("at")}, ${show(now[get("at")])}. Arrow keys choose another.`,
    draw: width => bars(now, before, get("at"), width),
  });
  const press = event => {
    const to = get("at") + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -32, ArrowDown: 32 }[event.key];
    if (Number.isNaN(to)) return;
    event.preventDefault();
    if (to >= 0 && to < 256) choose(to);
  };
  const click = event => {
    const box = picture.element.getBoundingClientRect(), column = (event.clientX - box.left - LEFT) / (box.width - LEFT) * 32;
    choose(32 * Math.min(Math.floor((event.clientY - box.top) / HEIGHT), 7) + Math.min(Math.max(Math.floor(column), 0), 31));
  };
  picture.element.addEventListener("keydown", press);
  picture.element.addEventListener("click", click);
  picture.element.setAttribute("tabindex", 0);
  picture.element.setAttribute("role", "application");

  const number = h("input", { type: "number", min: 0, max: 255, id: unique(), onchange: () => {
    choose(Number(number.value));
    number.value = get("at");
  } });
  const reset = h("button", { type: "button", onclick: () => {
    told = "";
    assign(model, "bytes", [...get("stored")]);
  } }, "Reset the bytes");
  const sentence = readout(), effect = readout(), scale = h("p", { class: "bw-note" });
  const part = (title, ...children) => h("div", { role: "group", "aria-label": title }, h("p", { class: "bw-title" }, title), children);
  el.append(h("div", { class: "bw bw-block", role: "group", "aria-label": "One Q4_K block, byte by byte" },
    h("div", { class: "bw-controls" }, h("div", { class: "bw-control" }, h("label", { for: number.id }, "Weight, 0 to 255"), number), reset),
    sentence, effect,
    h("div", { class: "bw-parts" },
      part("144 bytes", h("div", { class: "bw-bytes" }, grid)),
      part("Bits of the weight", values, pairs),
      part("256 weights", picture.element, scale))));

  const stopBuild = watch(model, "at", build);
  const stop = watch(model, "at bytes", () => {
    const bytes = get("bytes"), at = get("at"), w = weight(bytes, at);
    now = decode(bytes);
    const differ = changes(now, before).length;
    number.value = at;
    cells.forEach((cell, byte) => {
      const mask = maskOf(at, byte), text = hex(bytes[byte]);
      cell.className = `bw-${fieldOf(byte)}`;
      cell.setAttribute("aria-label", `${text}, byte ${byte}, ${fieldOf(byte)}${mask ? `, part of weight ${at}` : ""}`);
      cell.replaceChildren(...[0xf0, 0x0f].map((half, k) => h("span", { class: mask & half ? "bw-own" : "" }, text[k])));
    });
    for (const { byte, bit, own, name, button } of bits) {
      const on = bytes[byte] >> bit & 1;
      button.textContent = on;
      button.setAttribute("aria-pressed", Boolean(on));
      button.setAttribute("aria-label", `${on}, bit ${bit} of byte ${byte}${own ? ", part of" : ", not part of"} ${name}`);
    }
    for (const name of ["d", "dmin", "sc", "m", "q"]) values[name].textContent = show(w[name]);
    pairs.replaceChildren(...table(bytes));
    sentence.textContent = `Weight ${at} = d × sc × q − dmin × m = ${show(w.d)} × ${w.sc} × ${w.q} − ${show(w.dmin)} × ${w.m} = ${show(w.value)}`;
    effect.textContent = told + (differ ? `${plural(differ, "weight")} of 256 ${differ === 1 ? "differs" : "differ"} from the stored block.` : "These are the stored bytes: flip a bit and see which weights it changes.");
    const finite = now.filter(Number.isFinite).map(Math.abs), lost = 256 - finite.length;
    scale.textContent = `Each row is a sub-block; a full bar is ±${show(Math.max(0, ...finite))}.` + (lost ? ` Bars both ways: ${lost} are infinite or NaN.` : "");
    picture.redraw();
  });
  return () => { stopBuild(); stop(); picture.stop(); };
}
export default { render };
