// Runs the book's anywidgets on a static page: no kernel, no RequireJS, no html-manager.
// It reads the widget state that the notebook carries, and gives each widget's module a model that lives in the page.
(() => {
  const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';
  const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';

  class Model {
    constructor(state) {
      this.state = { ...state };
      this.listeners = new Map();
    }
    get(name) {
      return this.state[name];
    }
    set(name, value) {
      if (typeof name === "object") {
        for (const key in name) this.set(key, name[key]);
      } else if (!Object.is(this.state[name], value)) {
        this.state[name] = value;
        for (const event of [`change:${name}`, "change"]) {
          for (const listener of [...(this.listeners.get(event) ?? [])]) listener({ model: this, new: value });
        }
      }
    }
    save_changes() {} // there is no kernel to tell
    on(event, listener) {
      if (!this.listeners.has(event)) this.listeners.set(event, new Set());
      this.listeners.get(event).add(listener);
    }
    off(event, listener) {
      this.listeners.get(event)?.delete(listener);
    }
  }

  // One module and one style sheet per widget class, however often the page shows it.
  const modules = new Map();
  const load = source => {
    if (!modules.has(source)) {
      const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
      modules.set(source, import(address).then(module => module.default));
    }
    return modules.get(source);
  };
  const styles = new Set();
  const style = css => {
    if (!css || styles.has(css)) return;
    styles.add(css);
    const sheet = document.createElement("style");
    sheet.textContent = css;
    document.head.append(sheet);
  };

  async function show(model, tag) {
    const el = document.createElement("div");
    el.className = "bw-widget";
    tag.before(el);
    try {
      style(model.get("_css"));
      const widget = await load(model.get("_esm"));
      await widget.render({ model, el });
      el.dataset.ready = "true";
    } catch (error) {
      console.error("[anywidget-lite]", error);
      el.dataset.ready = "false";
      el.textContent = "This interactive figure could not start in your browser. Run the notebook to see it.";
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    const models = new Map();
    for (const script of document.querySelectorAll(STATE)) {
      for (const [id, { state }] of Object.entries(JSON.parse(script.textContent).state)) models.set(id, new Model(state));
    }
    for (const tag of document.querySelectorAll(VIEW)) {
      const model = models.get(JSON.parse(tag.textContent).model_id);
      if (model) show(model, tag);
      else console.error("[anywidget-lite] the page holds no state for", tag.textContent);
    }
  });
})();
