// Attention of one row: an overview of layers and heads, and of one head its matrix and the lines between tokens.
"use strict";
const { tokens, segments, layers, heads, weights } = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", T = tokens.length;
const bytes = Uint8Array.from(atob(weights), c => c.charCodeAt(0));
const weight = (layer, head, query, key) => bytes[((layer * heads + head) * T + query) * T + key] / 255;
const state = { layer: 0, head: 0, token: null };

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function color() {  // the accent's red, green and blue, which light and dark differ in
  const found = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  return [1, 3, 5].map(i => parseInt(found.slice(i, i + 2), 16));
}

function paint(canvas, layer, head) {
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d"), image = context.createImageData(T, T), [r, g, b] = color();
  for (let i = 0; i < T * T; i++) {
    image.data.set([r, g, b, 255 * Math.sqrt(weight(layer, head, Math.floor(i / T), i % T))], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

const overview = document.getElementById("overview"), buttons = [];
overview.style.setProperty("--heads", heads);
for (let layer = 0; layer < layers; layer++) {
  for (let head = 0; head < heads; head++) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = `layer ${layer + 1}, head ${head + 1}`;
    button.setAttribute("aria-label", button.title);
    button.append(document.createElement("canvas"));
    button.addEventListener("click", () => choose(layer, head));
    button.addEventListener("keydown", event => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!by) return;
      event.preventDefault();
      const [l, h] = [layer + by[0], head + by[1]];
      if (l >= 0 && l < layers && h >= 0 && h < heads) { choose(l, h); buttons[l * heads + h].focus(); }
    });
    overview.append(button);
    buttons.push(button);
  }
}

function paintAll() {
  buttons.forEach((button, i) => paint(button.firstChild, Math.floor(i / heads), i % heads));
  drawMatrix();
}

function choose(layer, head) {
  Object.assign(state, { layer, head });
  buttons.forEach((button, i) => {
    const is = i === layer * heads + head;
    button.setAttribute("aria-pressed", is);
    button.tabIndex = is ? 0 : -1;
  });
  document.getElementById("which").textContent = `Layer ${layer + 1}, head ${head + 1}`;
  drawMatrix();
  drawLines();
}

const short = token => token.length > 14 ? token.slice(0, 13) + "…" : token;
const paper = () => Math.max(260, document.getElementById("matrix").clientWidth);

function widest() {  // of the tokens as they are written, in pixels
  const context = document.createElement("canvas").getContext("2d");
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return Math.max(...tokens.map(token => context.measureText(short(token)).width));
}

function drawMatrix() {
  const holder = document.getElementById("matrix"), width = paper();
  const label = T > 64 ? 0 : 10 + widest();
  const size = Math.min(36, (width - label - 4) / T), canvas = document.createElement("canvas");
  paint(canvas, state.layer, state.head);
  holder.replaceChildren();
  const svg = element(holder, "svg", { viewBox: `0 0 ${width} ${label + size * T + 4}`, role: "img",
    "aria-label": "the matrix of weights: a row a token that attends, a column a token that is attended to" });
  const image = element(svg, "image", { x: label, y: label, width: size * T, height: size * T,
    preserveAspectRatio: "none", style: "image-rendering: pixelated" });
  image.setAttribute("href", canvas.toDataURL());
  element(svg, "rect", { class: "axis", x: label, y: label, width: size * T, height: size * T });
  if (label) {
    const font = `font-size:${Math.min(12, Math.max(6, size))}px`;
    tokens.forEach((token, i) => {
      const middle = label + size * (i + .5);
      element(svg, "text", { x: label - 5, y: middle + 4, "text-anchor": "end", style: font }, short(token));
      element(svg, "text", { transform: `translate(${middle + 4} ${label - 5}) rotate(-90)`, style: font }, short(token));
    });
  }
  const mark = element(svg, "rect", { class: "mark", width: size, height: size, visibility: "hidden" });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const [key, query] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]
      .map(at => Math.floor((at - label) / size));
    const inside = key >= 0 && query >= 0 && key < T && query < T;
    mark.setAttribute("visibility", inside ? "visible" : "hidden");
    if (!inside) return;
    mark.setAttribute("x", label + key * size);
    mark.setAttribute("y", label + query * size);
    say(`${tokens[query]} → ${tokens[key]}: ${percent(weight(state.layer, state.head, query, key))}`);
  });
}

const percent = share => share > 0 && share < .005 ? "under 1%" : `${Math.round(100 * share)}%`;
const say = text => { document.getElementById("readout").textContent = text; };

function drawLines() {
  const holder = document.getElementById("lines"), width = Math.max(260, holder.clientWidth), step = T > 40 ? 16 : 22;
  const [left, right] = [Math.min(140, width * .36), width - Math.min(140, width * .36)];
  holder.replaceChildren();
  const svg = element(holder, "svg", { viewBox: `0 0 ${width} ${step * T + 26}` });
  element(svg, "text", { x: left - 8, y: 12, "text-anchor": "end" }, "attends");
  element(svg, "text", { x: right + 8, y: 12 }, "is attended to");
  const y = i => 26 + step * (i + .5), lines = element(svg, "g", {}), words = [];
  function show() {
    lines.replaceChildren();
    for (let query = 0; query < T; query++) {
      if (state.token !== null && state.token !== query) continue;
      for (let key = 0; key < T; key++) {
        const share = weight(state.layer, state.head, query, key);
        if (share < .02) continue;
        element(lines, "line", { x1: left, x2: right, y1: y(query), y2: y(key), stroke: `var(--s${(segments[query] - 1) % 8})`,
          "stroke-width": 1 + 3 * share * (state.token !== null), opacity: Math.min(1, share + .05) });
      }
    }
    const own = state.token;
    words.forEach((word, i) => {
      const share = own === null ? 1 : weight(state.layer, state.head, own, i);
      word.setAttribute("opacity", own === null ? 1 : .35 + .65 * Math.min(1, 2 * share));
    });
    if (own === null) return say("");
    const order = [...tokens.keys()].sort((a, b) => weight(state.layer, state.head, own, b)
      - weight(state.layer, state.head, own, a)).slice(0, 4);
    say(`${tokens[own]} → ${order.map(i => `${tokens[i]} ${percent(weight(state.layer, state.head, own, i))}`).join(", ")}`);
  }
  tokens.forEach((token, i) => {
    const group = element(svg, "g", { class: "token", tabindex: i ? -1 : 0, role: "button", "aria-label": token });
    element(group, "rect", { x: 0, y: y(i) - step / 2, width: left, height: step, fill: "transparent" });
    element(group, "text", { x: left - 8, y: y(i) + 4, "text-anchor": "end" }, short(token));
    words.push(element(svg, "text", { x: right + 8, y: y(i) + 4 }, short(token)));
    const enter = () => { state.token = i; show(); }, leave = () => { state.token = null; show(); };
    group.addEventListener("pointerenter", enter);
    group.addEventListener("pointerleave", leave);
    group.addEventListener("focus", enter);
    group.addEventListener("blur", leave);
    group.addEventListener("keydown", event => {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key], all = svg.querySelectorAll("g.token");
      if (!by || !all[i + by]) return;
      event.preventDefault();
      all[i + by].focus();
    });
  });
  show();
}

let drawn = 0;
new ResizeObserver(() => {
  const width = document.body.clientWidth;
  if (width !== drawn) { drawn = width; drawMatrix(); drawLines(); }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
choose(0, 0);
paintAll();
