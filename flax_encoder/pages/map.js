// Texts as points in the plane: text on hover or by the arrow keys, labels that can be hidden.
"use strict";
const { points, texts, labels, axes } = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", MARGIN = 34, hidden = new Set();
const hue = i => labels.length <= 8 ? `var(--s${i % 8})` : `hsl(${(i * 137.508) % 360} 62% 52%)`;
const order = points.map((_, i) => i).sort((a, b) => points[a][0] - points[b][0]);
let now = -1, circles = [];

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function tell(i) {
  circles.forEach((circle, j) => circle && circle.setAttribute("r", j === i ? 7 : radius()));
  now = i;
  const label = labels.length ? labels[points[i][2]] : "";
  document.getElementById("readout").textContent = (label ? `${label}: ` : "") + texts[i];
}

const radius = () => points.length > 1500 ? 2.5 : points.length > 300 ? 3.5 : 4.5;

function draw() {
  const holder = document.getElementById("map"), width = Math.max(260, holder.clientWidth);
  const height = Math.round(Math.min(760, Math.max(320, width * .68)));
  holder.replaceChildren();
  const svg = element(holder, "svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", class: "points",
    "aria-label": `${points.length} texts in the plane; left and right arrows read them` });
  const [low, high] = [0, 1].map(k => points.map(p => p[k])).reduce(([l, h], values) => [
    [...l, values.reduce((a, b) => Math.min(a, b), Infinity)], [...h, values.reduce((a, b) => Math.max(a, b), -Infinity)],
  ], [[], []]);
  const at = (point, k) => {
    const share = (point[k] - low[k]) / (high[k] - low[k] || 1), size = k ? height : width;
    return MARGIN + (k ? 1 - share : share) * (size - 2 * MARGIN);
  };
  element(svg, "rect", { class: "axis", x: 18, y: 14, width: width - 28, height: height - 44 });
  element(svg, "text", { x: width / 2, y: height - 10, "text-anchor": "middle" }, axes[0]);
  element(svg, "text", { transform: `translate(12 ${height / 2}) rotate(-90)`, "text-anchor": "middle" }, axes[1]);
  circles = points.map((point, i) => {
    if (hidden.has(point[2])) return null;
    return element(svg, "circle", { cx: at(point, 0), cy: at(point, 1), r: radius(), fill: hue(point[2]), opacity: .78,
      stroke: "var(--card)", "stroke-width": .8 });
  });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let best = -1, near = 900;
    points.forEach((point, i) => {
      const far = (at(point, 0) - x) ** 2 + (at(point, 1) - y) ** 2;
      if (circles[i] && far < near) [best, near] = [i, far];
    });
    if (best >= 0 && best !== now) tell(best);
  });
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], shown = order.filter(i => circles[i]);
    if (!by || !shown.length) return;
    event.preventDefault();
    tell(shown[Math.min(shown.length - 1, Math.max(0, shown.indexOf(now) + by))]);
  });
}

for (const input of document.querySelectorAll("input[data-label]")) {
  input.addEventListener("change", () => {
    hidden[input.checked ? "delete" : "add"](+input.dataset.label);
    draw();
  });
  input.nextElementSibling.style.background = hue(+input.dataset.label);
}
let drawn = 0;
new ResizeObserver(() => {
  const width = document.body.clientWidth;
  if (width !== drawn) { drawn = width; draw(); }
}).observe(document.body);
