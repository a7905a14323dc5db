// Curves of runs as SVG: over steps, tokens or minutes, with a cursor that the mouse or the arrow keys move.
"use strict";
const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", HEIGHT = 250, TOP = 22, BOTTOM = 44, RIGHT = 14;
const AXES = { steps: "step", tokens: "tokens", minutes: "training minutes" };
const state = { axis: "steps", hidden: new Set(), smooth: true };

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function shown(value, chart) {
  if (chart && chart.percent) return `${shown(100 * value)}%`;
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find(m => m * power >= rough * .999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function smoothed(values) {  // a running mean that is not drawn to its start
  const keep = .9;
  let mean = 0, weight = 0;
  return values.map(value => {
    mean = keep * mean + (1 - keep) * value;
    weight = keep * weight + 1 - keep;
    return mean / weight;
  });
}

// Where a step lies on the axis that is chosen, by the run's own log.
function place(run, step) {
  if (state.axis === "steps") return step;
  const { steps } = run.scale, values = run.scale[state.axis];
  if (!values || !steps.length) return null;
  const i = steps.findIndex(s => s >= step);
  if (i < 0) return values[values.length - 1];
  const [before, at] = i ? [steps[i - 1], values[i - 1]] : [0, 0];
  return at + (values[i] - at) * (steps[i] === before ? 1 : (step - before) / (steps[i] - before));
}

function draw(figure) {
  const chart = charts[+figure.dataset.chart], holder = figure.querySelector(".plot");
  const width = Math.max(240, holder.clientWidth), kept = [];
  holder.replaceChildren();
  const svg = element(holder, "svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, tabindex: 0, role: "img",
    "aria-label": `${chart.title}${chart.unit ? ", " + chart.unit : ""}, over ${AXES[state.axis]}. Left and right arrows `
      + "read values.",
  });
  for (const series of chart.series) {
    if (state.hidden.has(series.run)) continue;
    const xs = series.steps.map(step => place(runs[series.run], step));
    if (xs.some(x => x === null)) continue;
    kept.push({ ...series, xs, smooth: state.smooth && !series.held_out && chart.smooth && xs.length > 30
      ? smoothed(series.values) : null });
  }
  if (!kept.length) {
    element(svg, "text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" },
      state.hidden.size === runs.length ? "no run is chosen" : `the log has no ${state.axis}`);
    figure.read = null;
    return;
  }
  const all = kept.flatMap(s => s.values);
  const scale = chart.log && Math.min(...all.filter(v => v > 0)) > 0 && all.every(v => v > 0) ? Math.log10 : v => v;
  let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  if (chart.zero) low = Math.min(0, low);
  if (low === high) [low, high] = [low - (Math.abs(low) * .1 || 1) * !chart.zero, high + (Math.abs(high) * .1 || 1)];
  const room = (scale(high) - scale(low)) * .04;
  const [bottom, top] = [chart.zero && low === 0 ? 0 : scale(low) - room, scale(high) + room];
  const farthest = Math.max(...kept.map(s => s.xs[s.xs.length - 1]), 1e-9);
  let marks;
  if (scale === Math.log10) {
    const decades = [];
    for (let p = Math.floor(bottom); p <= top; p++) for (const m of [1, 2, 5]) decades.push(m * 10 ** p);
    marks = decades.filter(v => scale(v) >= bottom && scale(v) <= top);
    if (marks.length > 7) marks = marks.filter(v => Number.isInteger(Math.log10(v)) || marks.length < 12 && 1);
    if (marks.length > 9) marks = marks.filter((v, i) => i % Math.ceil(marks.length / 7) === 0);
    if (marks.length < 2) marks = ticks(low, high, 4);
  } else marks = ticks(bottom, top, 5);
  const labels = marks.map(v => shown(v, chart));
  const left = 14 + 7 * Math.max(...labels.map(l => l.length));
  const x = v => left + (width - left - RIGHT) * v / farthest;
  const y = v => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (scale(v) - bottom) / (top - bottom);

  const first = runs[kept[0].run];
  let start = 0;
  first.bands.forEach((band, i) => {
    const [from, to] = [x(place(first, start)), Math.min(x(place(first, band.end)), width - RIGHT)];
    start = band.end;
    if (to - from < 1) return;
    if (i % 2 === 0) element(svg, "rect", { class: "band", x: from, y: TOP, width: to - from,
      height: HEIGHT - BOTTOM - TOP });
    if (to - from > 6.6 * band.label.length) element(svg, "text", { x: (from + to) / 2, y: TOP - 7,
      "text-anchor": "middle" }, band.label);
  });
  marks.forEach((value, i) => {
    element(svg, "line", { class: "axis", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value) });
    element(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, labels[i]);
  });
  for (const value of ticks(0, farthest, Math.max(2, Math.floor(width / 90)))) {
    element(svg, "line", { class: "axis", x1: x(value), x2: x(value), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 5 });
    element(svg, "text", { x: x(value), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, shown(value));
  }
  element(svg, "text", { x: (left + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, AXES[state.axis]);

  const line = values => (series, i) => `${i ? "L" : "M"}${x(series).toFixed(1)} ${y(values[i]).toFixed(1)}`;
  for (const s of kept) {
    const stroke = `var(--s${s.run % 8})`, options = { fill: "none", stroke, "stroke-linejoin": "round" };
    const path = values => s.xs.map(line(values)).join("");
    if (s.smooth) {
      element(svg, "path", { ...options, d: path(s.values), "stroke-width": 1, opacity: .28 });
      element(svg, "path", { ...options, d: path(s.smooth), "stroke-width": 2 });
    } else element(svg, "path", { ...options, d: path(s.values), "stroke-width": s.held_out ? 1.2 : 1.8,
      "stroke-dasharray": s.held_out ? "4 3" : "none" });
    if (s.held_out || s.xs.length === 1) s.xs.forEach((at, i) => element(svg, "circle", { cx: x(at), cy: y(s.values[i]),
      r: 3.5, fill: "var(--card)", stroke, "stroke-width": 2 }));
  }

  const cursor = element(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const places = [...new Set(kept.flatMap(s => s.xs))].sort((a, b) => a - b), readout = figure.querySelector(".readout");
  const nearest = (xs, at) => xs.reduce((best, v, i) => Math.abs(v - at) < Math.abs(xs[best] - at) ? i : best, 0);
  let now = places.length - 1;
  function read(i) {
    now = i;
    const at = places[i];
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    const said = kept.filter(s => at >= s.xs[0] * .999 || s.xs.length < 2).map(s => {
      const value = s.values[nearest(s.xs, at)], name = s.held_out ? "held out" : "training";
      return `${runs.length > 1 ? runs[s.run].name + " " : ""}${chart.both ? name + " " : ""}${shown(value, chart)}`;
    });
    readout.textContent = `${AXES[state.axis]} ${shown(at)}: ${said.join("; ")}`;
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * width / box.width - left) / (width - left - RIGHT) * farthest;
    read(nearest(places, at));
  });
  const leave = () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) read(now); });
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    read(Math.min(places.length - 1, Math.max(0, now + by)));
  });
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
const drawAll = () => figures.forEach(draw);
for (const input of document.querySelectorAll("input[name=axis]")) {
  input.addEventListener("change", () => { state.axis = input.value; drawAll(); });
}
for (const input of document.querySelectorAll("input[data-run]")) {
  input.addEventListener("change", () => {
    state.hidden[input.checked ? "delete" : "add"](+input.dataset.run);
    drawAll();
  });
}
const smoothing = document.getElementById("smooth");
if (smoothing) smoothing.addEventListener("change", () => { state.smooth = smoothing.checked; drawAll(); });
let drawn = 0;
new ResizeObserver(() => {
  const width = document.body.clientWidth;
  if (width !== drawn) { drawn = width; drawAll(); }
}).observe(document.body);
