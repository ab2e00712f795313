const bitsOf = f => f.signed + f.exponent + f.mantissa;
const bit = (code, i) => Math.floor(code / 2 ** i) % 2;
const sup = n => String(n).replace(/./g, c => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

// The fields of a code and the number: value = (-1)^sign * whole * 2^(power - mantissa bits).
const read = (f, code) => {
  const sign = f.signed && bit(code, f.exponent + f.mantissa);
  const field = Math.floor(code / 2 ** f.mantissa) % 2 ** f.exponent, mantissa = code % 2 ** f.mantissa;
  const top = field === 2 ** f.exponent - 1, full = mantissa === 2 ** f.mantissa - 1;
  const subnormal = f.signed && field === 0;
  const whole = mantissa + (subnormal ? 0 : 2 ** f.mantissa), power = Math.max(field, f.signed) - f.bias;
  let value = whole * 2 ** (power - f.mantissa);
  if (top && f.specials === "ieee") value = mantissa ? NaN : Infinity;
  if (top && full && f.specials === "nan") value = NaN;
  return { sign, field, mantissa, subnormal, whole, power, value: sign ? -value : value };
};

// The code nearest to x: ties to the even code, saturating, as qlib's grids round.
const nearest = (f, x) => {
  if (Number.isNaN(x)) return f.marks.find(mark => mark.text === "NaN")?.code ?? 0;
  const least = f.signed - f.bias, negative = x < 0 || Object.is(x, -0);
  const size = f.signed ? Math.min(Math.abs(x), f.largest) : Math.min(Math.max(x, 2 ** least), f.largest);
  const power = Math.max(Math.floor(Math.log2(size)), least);
  const steps = size / 2 ** (power - f.mantissa), rest = steps - Math.floor(steps);
  const low = Math.floor(steps) + (power - least) * 2 ** f.mantissa - (1 - f.signed);
  return low + (rest > 0.5 || (rest === 0.5 && low % 2) ? 1 : 0) + (f.signed && negative ? 2 ** (bitsOf(f) - 1) : 0);
};

// Codes in the order of their values: -0 is place -1, +0 place 0.
const place = (f, code) => {
  const half = 2 ** (bitsOf(f) - 1);
  return f.signed && code >= half ? half - 1 - code : code;
};
const codeAt = (f, at) => (at < 0 ? 2 ** (bitsOf(f) - 1) - 1 - at : at);
const stepped = (f, code, by) => {
  const half = 2 ** (bitsOf(f) - 1), [low, high] = f.signed ? [-half, half - 1] : [0, 2 * half - 1];
  return codeAt(f, Math.min(Math.max(place(f, code) + by, low), high));
};

// All digits of whole * 2^power, or nine of them where there are too many to read.
const digits = (whole, power) => {
  let text;
  if (power < 0) {
    const all = (BigInt(whole) * 5n ** BigInt(-power)).toString().padStart(1 - power, "0");
    text = `${all.slice(0, power)}.${all.slice(power)}`.replace(/\.?0+$/, "");
  } else text = (BigInt(whole) << BigInt(power)).toString();
  return text.length > 34 ? `about ${Number((whole * 2 ** power).toPrecision(9))}` : text;
};
const exact = (f, r) => {
  if (Number.isNaN(r.value)) return "NaN";
  return (r.sign ? "−" : "") + (Number.isFinite(r.value) ? digits(r.whole, r.power - f.mantissa) : "infinity");
};
const short = (x, count = 4) => {
  const rounded = Number(x.toPrecision(count));
  return (x && Math.abs(x) < 1e-4 ? rounded.toExponential() : String(rounded)).replaceAll("-", "−");
};

// Texts at the given places of a line, leaving out those that would overlap an earlier one.
const labels = (entries, y, width) => {
  const taken = [];
  return entries.map(([x, text, look]) => {
    const half = text.length * 4.1 + 3, at = Math.min(Math.max(x, half), width - half);
    if (taken.some(([low, high]) => at + half > low && at - half < high)) return null;
    taken.push([at - half, at + half]);
    return svg("text", { x: at, y, "text-anchor": "middle", class: look ?? "" }, text);
  }).filter(Boolean);
};
const tick = (x, y, size, look) => svg("line", { x1: x, x2: x, y1: y - size, y2: y + size, class: look });
const marker = (x, y) => svg("path", { d: `M${x} ${y}l-6 -10h12z`, fill: "var(--bw-c2)" });

// The magnitudes of a whole format, every power of two equally far from the next.
const range = (f, r, width) => {
  const least = f.signed - f.bias, low = least - f.mantissa, high = Math.log2(f.largest);
  const zero = f.signed ? 26 : 0, at = size => 8 + zero + (Math.log2(size) - low) / (high - low) * (width - 16 - zero);
  const half = 2 ** (f.exponent + f.mantissa), y = 38;
  // Every value of a small format; of a large one, powers of two at least 4 pixels apart.
  const apart = Math.ceil(4 * (high - low) / (width - 16 - zero)), first = Math.ceil(low / apart) * apart;
  const sizes = bitsOf(f) > 8
    ? Array.from({ length: Math.floor((high - first) / apart) + 1 }, (_, i) => 2 ** (first + i * apart))
    : Array.from({ length: half }, (_, code) => read(f, code).value).filter(v => v > 0 && v < Infinity);
  const size = Math.abs(r.value), where = size ? at(size) : 8;
  const names = [[at(2 ** low), `2${sup(low)}`], [at(f.largest), short(f.largest, 5)], [at(1), "1"], [8, f.signed ? "0" : ""], [at(2 ** least), `2${sup(least)}`]];
  return [
    f.signed && svg("rect", { x: 0, y: y - 9, width: at(2 ** least), height: 18, fill: "var(--bw-fill)" }),
    svg("line", { x1: 8 + zero, x2: width - 8, y1: y, y2: y, class: "axis" }),
    f.signed && tick(8, y, 7, "axis"),
    sizes.map(v => tick(at(v), y, Number.isInteger(Math.log2(v)) ? 7 : 4, "axis")),
    Number.isFinite(size) && marker(where, y - 9),
    labels(names.filter(([, text]) => text), y + 24, width),
    labels([[where, Number.isFinite(size) ? short(size) : ""]], y - 23, width),
  ].filter(Boolean);
};

// The value between its neighbors, all distances true.
const near = (f, code, width) => {
  const all = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map(by => read(f, stepped(f, code, by)).value);
  const values = [...new Set(all.map(v => v + 0))].filter(Number.isFinite);
  const here = read(f, code).value + 0, y = 38;
  if (!Number.isFinite(here) || values.length < 2) return [svg("text", { x: 8, y }, "Not a number on the line: it has no neighbors.")];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const at = v => 24 + (v - low) / (high - low) * (width - 48);
  const order = [here, low, high, ...values];
  // As many digits as it takes to tell two neighbors apart.
  const count = Math.max(4, Math.ceil(Math.log10(8 * Math.max(high, -low) / (high - low))) + 1);
  return [
    svg("line", { x1: 24, x2: width - 24, y1: y, y2: y, class: "axis" }),
    values.map(v => tick(at(v), y, 7, "axis")),
    marker(at(here), y - 9),
    labels([...new Set(order)].map(v => [at(v), short(v, count)]), y + 24, width),
  ];
};

function render({ model, el }) {
  const get = name => model.get(name);
  const format = () => get("formats").find(f => f.name === get("format"));
  const choose = (code, asked = null) => {
    model.set("asked", asked);
    model.set("code", code);
    model.save_changes();
  };
  let shown = { f: format(), code: get("code") }, buttons = [];
  const says = {};

  const press = event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], to = buttons[buttons.indexOf(event.target) + by];
    if (!to) return;
    event.preventDefault();
    buttons.forEach(button => { button.tabIndex = button === to ? 0 : -1; });
    to.focus();
  };
  const group = (name, count, first, color) => {
    const own = Array.from({ length: count }, (_, k) => {
      const i = first - k;
      return h("button", { type: "button", tabindex: -1, onkeydown: press, onclick: () => choose(get("code") + (bit(get("code"), i) ? -1 : 1) * 2 ** i) });
    });
    buttons.push(...own);
    says[name] = h("span", { class: "bw-note" });
    return count ? h("div", { class: "bw-field", role: "group", "aria-label": name, style: `border-color: var(--bw-${color})` },
      h("span", {}, name), h("span", { class: "bw-bits" }, own), says[name]) : null;
  };
  const fields = h("div", { class: "bw-fields" }), jumps = h("div", { class: "bw-controls" });
  const build = f => {
    buttons = [];
    fields.replaceChildren(...[group("sign", f.signed, bitsOf(f) - 1, "c1"), group("exponent", f.exponent, f.exponent + f.mantissa - 1, "c2"),
      group("mantissa", f.mantissa, f.mantissa - 1, "c3")].filter(Boolean));
    buttons[0].tabIndex = 0;
    const jump = (text, code) => h("button", { type: "button", onclick: () => choose(code()) }, text);
    jumps.replaceChildren(jump("previous value", () => stepped(f, get("code"), -1)), jump("next value", () => stepped(f, get("code"), 1)),
      ...f.marks.map(mark => jump(mark.text, () => mark.code)));
  };

  const number = h("input", { type: "number", step: "any", id: unique(), onchange: () => {
    if (number.value !== "") choose(nearest(format(), Number(number.value)), Number(number.value));
  } });
  const formula = h("p", { class: "bw-readout" }), result = readout();
  const whole = chart({ height: 68, alt: () => `Magnitudes of ${format().label} on a logarithmic line, with a mark at ${exact(format(), read(format(), get("code")))}.`,
    draw: width => range(format(), read(format(), get("code")), width) });
  const zoom = chart({ height: 68, alt: () => `The value ${exact(format(), read(format(), get("code")))} between its nearest neighbors, drawn to scale.`,
    draw: width => near(format(), get("code"), width) });

  const describe = (f, code) => {
    const r = read(f, code), base = `2${sup(r.power)}`;
    const lead = f.mantissa ? `(${r.subnormal ? 0 : 1} + ${r.mantissa}/${2 ** f.mantissa}) × ${base}` : base;
    says.sign && (says.sign.textContent = r.sign ? "minus" : "plus");
    says.exponent.textContent = r.subnormal ? "0: counts as 1, no leading one" : `${r.field} − ${f.bias} = ${short(r.field - f.bias)}`;
    says.mantissa && (says.mantissa.textContent = `${r.mantissa} of ${2 ** f.mantissa}`);
    buttons.forEach((button, k) => {
      const i = bitsOf(f) - 1 - k, on = bit(code, i);
      button.textContent = on;
      button.setAttribute("aria-pressed", Boolean(on));
      button.setAttribute("aria-label", `bit ${i}`);
    });
    const name = `0x${code.toString(16).toUpperCase().padStart(Math.ceil(bitsOf(f) / 4), "0")}`;
    const kind = r.subnormal && r.whole ? ", a subnormal" : "";
    formula.textContent = Number.isFinite(r.value) ? `Code ${name}: ${r.sign ? "−" : ""}${lead}${kind}` : `Code ${name}: a code reserved for a special value`;
    const asked = get("asked"), error = (r.value - asked) / Math.abs(asked);
    result.textContent = `Value: ${exact(f, r)}` + (asked === null ? "" : `, the nearest to ${short(asked, 12)}`
      + (asked && Number.isFinite(error) ? `; relative error ${short(100 * error, 2)}%` : ""));
    number.value = asked ?? "";
  };

  const convert = () => {
    const f = format();
    if (f === shown.f) return;
    const from = get("asked") ?? read(shown.f, shown.code).value;
    shown = { f, code: nearest(f, from) };
    build(f);
    model.set("code", shown.code);
    model.save_changes();
  };
  build(shown.f);
  model.on("change:format", convert);
  el.append(h("div", { class: "bw", role: "group", "aria-label": "Click the bits" },
    h("div", { class: "bw-controls" }, select(model, "format", { label: "Format", options: get("formats").map(f => ({ value: f.name, text: f.label })) }),
      h("div", { class: "bw-control" }, h("label", { for: number.id }, "Nearest to"), number)),
    fields, formula, result, jumps,
    h("p", { class: "bw-note" }, "All magnitudes of the format, by powers of two (shaded: zero and the subnormals)"), whole.element,
    h("p", { class: "bw-note" }, "The value and its neighbors, to scale"), zoom.element));
  const stop = watch(model, "format code asked", () => {
    shown = { f: format(), code: get("code") };
    describe(shown.f, shown.code);
    whole.redraw();
    zoom.redraw();
  });
  return () => { stop(); model.off("change:format", convert); whole.stop(); zoom.stop(); };
}
export default { render };
