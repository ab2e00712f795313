// Shared helpers: stands above every widget's own code, in the same module.
const make = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(child => child != null).map(child => (child instanceof Node ? child : String(child))));
  return node;
};

// h("p", { class: "bw-note", onclick: f }, "text", child): an HTML element. svg(...) the same for SVG.
const h = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

let serial = 0;
const unique = () => `bw-${Math.random().toString(36).slice(2, 8)}-${serial++}`;

// Calls f now and whenever one of the traits changes; returns a function that stops it.
const watch = (model, names, f) => {
  const events = names.split(" ").map(name => `change:${name}`);
  for (const event of events) model.on(event, f);
  f();
  return () => events.forEach(event => model.off(event, f));
};

// Round half to even, as torch does.
const even = x => {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
};

// The float16 nearest to a positive number; scales are stored so.
const half = x => {
  const step = 2 ** (Math.max(Math.floor(Math.log2(x)), -14) - 10);
  return Math.max(even(x / step), 1) * step;
};

const assign = (model, name, value) => {
  model.set(name, value);
  model.save_changes();
};

// slider(model, "bits", { label, min, max, step, show: v => `${v} bits` }): a labeled range input bound to a trait.
const slider = (model, name, { label, min, max, step = 1, show = String }) => {
  const id = unique();
  const input = h("input", { type: "range", id, min, max, step, oninput: () => assign(model, name, Number(input.value)) });
  const output = h("output", { for: id });
  watch(model, name, () => {
    input.value = model.get(name);
    output.textContent = show(model.get(name));
    input.setAttribute("aria-valuetext", output.textContent);
  });
  return h("div", { class: "bw-control" }, h("label", { for: id }, label), input, output);
};

// select(model, "format", { label, options: ["nf4", { value: "mxfp4", text: "MXFP4" }] })
const select = (model, name, { label, options }) => {
  const id = unique();
  const entries = options.map(option => (typeof option === "object" ? option : { value: option, text: option }));
  const list = h("select", { id, onchange: () => assign(model, name, entries[list.selectedIndex].value) },
    entries.map(entry => h("option", {}, entry.text)));
  watch(model, name, () => { list.selectedIndex = entries.findIndex(entry => entry.value === model.get(name)); });
  return h("div", { class: "bw-control" }, h("label", { for: id }, label), list);
};

// choice(...): the same as a row of radio buttons, for two to five options.
const choice = (model, name, { label, options }) => {
  const group = unique();
  const entries = options.map(option => (typeof option === "object" ? option : { value: option, text: option }));
  const radios = entries.map(entry => h("input", { type: "radio", name: group, onchange: () => assign(model, name, entry.value) }));
  watch(model, name, () => radios.forEach((radio, i) => { radio.checked = entries[i].value === model.get(name); }));
  return h("fieldset", { class: "bw-control" }, h("legend", {}, label), entries.map((entry, i) => h("label", {}, radios[i], entry.text)));
};

// checkbox(model, "signed", { label })
const checkbox = (model, name, { label }) => {
  const input = h("input", { type: "checkbox", onchange: () => assign(model, name, input.checked) });
  watch(model, name, () => { input.checked = model.get(name); });
  return h("label", { class: "bw-control" }, input, label);
};

// A line of text that screen readers announce: box.textContent = "...".
const readout = () => h("p", { class: "bw-readout", role: "status" });

// Round axis values between low and high, about `count` of them.
const ticks = (low, high, count = 5) => {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * ([1, 2, 5].find(factor => factor * unit >= raw * 0.999) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
};

// chart({ alt, height, draw }): an SVG as wide as its column; draw(width, height) returns its children, at every new width.
// The result has .element, .redraw() and .stop(); `alt` is a string or a function that describes the picture.
const chart = ({ alt, height, draw }) => {
  const element = svg("svg", { class: "bw-chart", role: "img", height });
  let width = 0;
  const redraw = () => {
    if (!width) return;
    element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    element.setAttribute("aria-label", typeof alt === "function" ? alt() : alt);
    element.replaceChildren(...[draw(width, height)].flat(Infinity));
  };
  const observer = new ResizeObserver(() => {
    const now = Math.floor(element.getBoundingClientRect().width);
    if (now && now !== width) { width = now; redraw(); }
  });
  observer.observe(element);
  return { element, redraw, stop: () => observer.disconnect() };
};
