// Repairs of the theme's markup for assistive technology, and tables that scroll instead of widening the page.
document.addEventListener("DOMContentLoaded", () => {
  const all = selector => document.querySelectorAll(selector);

  // A label that contradicts the visible text (WCAG 2.5.3), or stands on an element that cannot be named.
  for (const element of all(".search-button-field, details.hide > summary")) element.removeAttribute("aria-label");
  for (const element of all(".theme-switch-button")) element.setAttribute("aria-label", "Color theme");
  for (const element of all(".citation-list, .citation[role]")) element.removeAttribute("role");

  for (const table of all(".bd-article table")) {
    if (table.closest(".bw-scroll")) continue;
    const frame = document.createElement("div");
    frame.className = "bw-scroll";
    table.before(frame);
    frame.append(table);
  }

  // What scrolls sideways must be reachable by keyboard; the theme sees to code itself.
  const reach = () => {
    for (const box of all(".bw-scroll, .bw-figure, div.math mjx-container")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  reach();
  addEventListener("load", reach);
  addEventListener("resize", reach);
});
