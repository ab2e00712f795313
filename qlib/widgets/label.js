// The grammar of qlib.label: families as objects, each with the expression of its labels.
const compile = grammar => grammar.families.map(row => {
  const family = Object.fromEntries(grammar.columns.map((name, i) => [name, row[i]]));
  const pattern = family.pattern.replaceAll("~", () => grammar.shared);
  return { ...family, regex: new RegExp(grammar.frame.replace("@", () => pattern), "giu") };
});

// Tuples are compared as in Python.
const above = (a, b) => {
  const i = a.findIndex((x, k) => x !== b[k]);
  return i >= 0 && a[i] > b[i];
};
const telling = ({ family, start, end }) => [family.rank, end - start, start, Number(family.needs !== "")];
const better = (a, b) => (above(telling(b), telling(a)) ? b : a);

// Every label in the text that lies within no other one, in the order of the text.
const every = (families, text) => {
  const found = families.filter(family => text.toLowerCase().includes(family.needs)).flatMap(family =>
    [...text.matchAll(family.regex)].map(m => ({ family, name: m[0], start: m.index, end: m.index + m[0].length })));
  const outer = found.filter(a => !found.some(b => b.start <= a.start && b.end >= a.end && b.end - b.start > a.end - a.start));
  const spans = new Map();
  for (const match of outer) {
    const key = `${match.start} ${match.end}`;
    spans.set(key, spans.has(key) ? better(spans.get(key), match) : match);
  }
  return [...spans.values()].sort((a, b) => a.start - b.start);
};

const number = (pattern, name) => {
  const found = name.match(new RegExp(pattern, "iu"));
  return found && Number(found.slice(1).find(Boolean));
};

// What a match says: Family.label of qlib.families.
const said = (grammar, { family: f, name }) => {
  const word = name.toLowerCase(), bits = number(grammar.bits, name) || f.bits;
  const group = word.includes("nogs") ? null : number(grammar.group, name) || f.group;
  let same = f.qlib && f.qlib.replace("{bits}", bits).replace("{group}", group ?? "None"), bpw = f.expected_bpw;
  if (f.extra && group) {
    if (word.includes("asym") && same.endsWith(`g${group}`)) same += "-asym";
    bpw = bits + (f.extra + (same.endsWith("-asym") ? bits : 0)) / group;
  } else if (bits && (bpw === null || bits !== f.bits)) {
    bpw = bpw !== null && f.bits !== null ? bpw.map(x => bits + x - f.bits) : [bits, bits + 0.02];
    same = same && same.replace("-gNone", "");
  }
  const { format, containers, note, quantizes, method, bpw_of } = f;
  return { name, bits, format, group, qlib: same, containers, note, quantizes, method, expected_bpw: bpw, bpw_of };
};

// The labels of a text, the most telling one first: qlib.label.find gives that one.
const decode = (grammar, families, text) => {
  const matches = every(families, text), best = matches.length && matches.reduce(better);
  const labels = [best, ...matches.filter(match => match !== best)].filter(Boolean).map(match => said(grammar, match));
  return { matches, labels };
};

// Letters in common, block by block, and the names that have many of them: Python's difflib.
const common = (a, b) => {
  let size = 0, at = 0, other = 0;
  for (let i = 0; i < a.length; i++) for (let j = 0; j < b.length; j++) {
    let k = 0;
    while (i + k < a.length && a[i + k] === b[j + k]) k++;
    if (k > size) [size, at, other] = [k, i, j];
  }
  return size && size + common(a.slice(0, at), b.slice(0, other)) + common(a.slice(at + size), b.slice(other + size));
};
const close = (word, names) => {
  const ratio = name => {
    const total = name.length + word.length;
    return 2 * Math.min(name.length, word.length) < 0.6 * total ? 0 : 2 * common(name, word) / total;
  };
  const scored = names.map(name => [ratio(name), name]).filter(([score]) => score >= 0.6);
  return scored.sort((a, b) => (above(a, b) ? -1 : 1)).slice(0, 2).map(([, name]) => name);
};
const near = (families, text) => {
  const known = new Map(families.map(family => [family.name.toUpperCase(), family.name])), names = [...known.keys()];
  const words = [text, ...text.split(/[\s/]|\.gguf$/u), ...text.match(/[\p{L}\p{N}_#]+/gu) ?? []];
  return [...new Set(words.flatMap(word => close(word.toUpperCase(), names)))].slice(0, 3).map(name => known.get(name));
};

// Billions of weights that a name tells: 7B, 0.6B, 270M, 8x7B (an upper bound: experts share the rest).
const told = text => {
  const found = text.match(/(?<![A-Za-z0-9]|\d\.)(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])/iu);
  if (!found) return null;
  const billions = (found[1] ?? 1) * found[2] / (/b/i.test(found[3]) ? 1 : 1000);
  return billions > 0 ? { name: found[0], billions, experts: Boolean(found[1]) } : null;
};

const figures = (value, rule = { maximumFractionDigits: 5 }) => value.toLocaleString("en-US", rule);
const UNTOLD = "not told by the label";
const range = (bpw, show) => [...new Set([bpw].flat().map(show))].join(" to ");
const UNITS = {
  "whole file": "bits per weight of the whole file",
  "quantized weights": "bits per weight in this format",
  "cached values": "bits per cached value",
};
const bpwText = ({ expected_bpw, bpw_of }) => (expected_bpw === null ? UNTOLD : `${range(expected_bpw, x => figures(x))} ${UNITS[bpw_of]}`);
const sizeText = (label, billions) => {
  if (label.bpw_of === "cached values") return "depends on model and context";
  if (label.expected_bpw === null) return UNTOLD;
  const gigabytes = range(label.expected_bpw, x => figures(billions * x / 8, { maximumSignificantDigits: 3 }));
  const model = `${figures(billions)} billion weights`;
  return `${gigabytes} GB ${label.bpw_of === "whole file" ? `for ${model}` : `if all ${model} are in it`}`;
};
const groupText = ({ group, bpw_of }) => (group ? `${group} ${bpw_of === "cached values" ? "values" : "weights"}` : "none fixed by the label");

const card = (label, billions) => {
  const facts = [
    ["Bits of a code", label.bits ?? UNTOLD],
    ["Number format", label.format],
    ["Block or group", groupText(label)],
    ["Quantized", label.quantizes],
    ["Expected", bpwText(label)],
    ["Size", sizeText(label, billions)],
    ["Container", label.containers.join(", ") || UNTOLD],
    ["Method", label.method ?? UNTOLD],
    ["Equal in qlib", label.qlib ? h("code", {}, label.qlib) : "none"],
  ];
  return h("div", { class: "bw-card", role: "group", "aria-label": label.name }, h("p", { class: "bw-title" }, label.name),
    h("dl", {}, facts.map(([term, fact]) => [h("dt", {}, term), h("dd", {}, fact)])), h("p", { class: "bw-note" }, label.note));
};

// The text with its labels marked; labels may overlap.
const marked = (text, matches) => {
  const edges = [...new Set([0, text.length, ...matches.flatMap(m => [m.start, m.end])])].sort((a, b) => a - b);
  return edges.slice(1).map((end, i) => {
    const piece = text.slice(edges[i], end), inside = matches.some(m => m.start <= edges[i] && m.end >= end);
    return inside ? h("mark", {}, piece) : piece;
  });
};

const summary = (text, labels, hints, billions) => {
  if (!text.trim()) return "Type a label or a name, or press one of the examples.";
  if (!labels.length) {
    return `No label found in “${text}”; ${hints.length ? `nearest: ${hints.join(", ")}.` : "labels look like Q4_K_M or FP8."}`;
  }
  const count = labels.length > 1 ? `${labels.length} labels: ${labels.map(label => label.name).join(", ")}. ` : "";
  const size = labels[0].bpw_of === "cached values" ? "" : `; ${sizeText(labels[0], billions)}`;
  return `${count}${labels[0].name}: ${bpwText(labels[0])}${size}.`;
};

function render({ model, el }) {
  const grammar = model.get("grammar"), families = compile(grammar);
  const type = text => {
    // A size in the new name counts; without one, the reader's own stays.
    if (told(text)) model.set("billions", null);
    assign(model, "text", text);
  };
  const button = (text, onclick) => h("button", { type: "button", onclick }, text);
  const input = h("input", { type: "text", id: unique(), maxlength: 300, spellcheck: "false", autocomplete: "off", autocapitalize: "off", oninput: () => type(input.value) });
  const size = h("input", { type: "number", id: unique(), min: 0, max: 100000, step: "any", onchange: () => {
    const value = Number(size.value);
    model.set("billions", null);
    assign(model, "billions", value > 0 && size.validity.valid ? value : null);
    show();
  } });
  const source = h("span", { class: "bw-note" }), result = readout(), name = h("p", { class: "bw-name" }), cards = h("div", { class: "bw-cards" });
  const show = () => {
    const text = model.get("text"), own = model.get("billions"), found = told(text);
    const billions = own ?? found?.billions ?? 8, { matches, labels } = decode(grammar, families, text);
    const hints = labels.length ? [] : near(families, text);
    if (input.value !== text) input.value = text;
    size.value = billions;
    source.textContent = own !== null ? "not from the name" : !found ? "the name does not tell"
      : `${found.name} in the name${found.experts ? ": at most, as experts share the rest" : ""}`;
    result.textContent = summary(text, labels, hints, billions);
    name.replaceChildren(...labels.length ? marked(text, matches) : []);
    cards.replaceChildren(...labels.length ? labels.map(label => card(label, billions)) : hints.map(hint => button(hint, () => {
      // A label alone tells no size: that of the name before it stays.
      model.set("billions", billions);
      type(hint);
      input.focus();
    })));
  };
  const examples = model.get("examples").map(text => button(decode(grammar, families, text).labels[0].name, () => type(text)));
  el.append(h("div", { class: "bw bw-decode", role: "group", "aria-label": "Decode a label" },
    h("div", { class: "bw-control" }, h("label", { for: input.id }, "Label, or name of a file or repository"), input),
    h("div", { class: "bw-controls bw-examples", role: "group", "aria-label": "Examples" }, h("span", {}, "Examples"), examples),
    h("div", { class: "bw-control" }, h("label", { for: size.id }, "Billions of weights"), size, source),
    result, name, cards));
  return watch(model, "text billions", show);
}
export default { render };
