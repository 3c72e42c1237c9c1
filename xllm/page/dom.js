// Elements, and numbers for people. Text from outside becomes text nodes only: there is no way here
// to make markup of it.

const SVG = "http://www.w3.org/2000/svg";

export const TIERS = ["device", "host", "disk", "remote"];
export const TIER_LABELS = { device: "device", host: "host", disk: "disk", remote: "peer" };
export const PHASES = ["queue", "load", "prefill", "decode"];

export const byId = (id) => document.getElementById(id);

/** An element; `props` are attributes, but for `text` and functions, which listen to events. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Changes the text only if it is another one: what somebody has selected stays selected. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.00005) return "0";
  if (value < 0.0095) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1e3)} ms`;
  if (value < 99.5) return `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
  return `${Math.round(value / 60)} min`;
}

export function count(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(0)} k`;
  return value >= 100 || Number.isInteger(value) ? `${Math.round(value)}` : value.toFixed(1);
}

export function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 1 : 0)} ${unit}`;
  }
  return `${value} B`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export const sum = (counts) => Object.values(counts ?? {}).reduce((a, b) => a + b, 0);

export function clock(unix) {
  return new Date(unix * 1e3).toLocaleTimeString([], { hour12: false });
}

/** A bar of parts that fill `total`: [class, amount, title]. */
export function stackedBar(parts, total, label) {
  const bar = el("span", { class: "stacked", role: "img", "aria-label": label, title: label });
  for (const [name, amount] of parts) {
    if (!(amount > 0)) continue;
    const part = el("span", { class: name });
    part.style.width = `${Math.max(1.5, (100 * amount) / Math.max(total, 1e-9))}%`;
    bar.append(part);
  }
  return bar;
}

export function legend(list, names, labels = {}) {
  list.replaceChildren(
    ...names.map((name) => el("li", {}, el("i", { class: name }), labels[name] ?? name)),
  );
}
