"use strict";
// The curves of a report: panels of SVG with one x range. No library, no request.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "dark" : "light";
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });

  const X_NAMES = { step: "step", tokens: "tokens", flops: "FLOPs", time: "hours of training" };
  const view = { x: "tokens", raw: true, log: false, range: null, hidden: new Set() };
  const panels = [];

  // --- numbers ---------------------------------------------------------------------------------

  const short = (v, digits = 4) => {
    if (v === 0) return "0";
    const a = Math.abs(v);
    if (a >= 1e15 || a < 1e-3) return v.toExponential(2).replace("e+", "e");
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
      if (a >= size) return trim((v / (letter === "k" ? 1e3 : size)).toPrecision(digits)) + letter;
    }
    return trim(v.toPrecision(Math.max(digits, Math.min(15, Math.ceil(Math.log10(a + 1))))));
  };
  const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

  function ticks(low, high, count) {
    const span = high - low;
    if (!(span > 0)) return [low];
    const rough = span / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * span; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const m of [1, 1.5, 2, 3, 5, 7]) {
        const v = m * 10 ** e;
        if (v >= low && v <= high) found.push(v);
      }
    }
    return found.length > 1 ? found : ticks(low, high, 4);
  }

  // --- points ----------------------------------------------------------------------------------

  /** Where a step of a run stands on the present axis; NaN where that is not known. */
  function place(run, step) {
    if (view.x === "step") return step;
    const axis = run.axis;
    const values = view.x === "time" ? axis.seconds : axis.tokens;
    const scale = view.x === "flops" ? run.flops ?? NaN : view.x === "time" ? 1 / 3600 : 1;
    let low = 0, high = axis.step.length - 1;
    if (high < 0) return NaN;
    if (step >= axis.step[high]) return values[high] * scale;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (axis.step[middle] <= step) low = middle; else high = middle;
    }
    const part = (step - axis.step[low]) / (axis.step[high] - axis.step[low] || 1);
    return (values[low] + part * (values[high] - values[low])) * scale;
  }

  function unpack(packed) {
    let step = 0;
    return { step: packed[0].map((d) => (step += d)), y: packed[1] };
  }
  for (const run of data.runs) {
    run.curves = {};
    for (const [key, kinds] of Object.entries(run.series)) {
      run.curves[key] = { raw: unpack(kinds.raw), smooth: kinds.smooth && unpack(kinds.smooth) };
    }
  }
  function placeAll() {
    for (const run of data.runs) {
      for (const curve of Object.values(run.curves)) {
        for (const kind of [curve.raw, curve.smooth]) {
          if (kind) kind.x = kind.step.map((s) => place(run, s));
        }
      }
    }
  }

  /** Index of the point nearest to x; -1 where there is none. */
  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    if (high < 0) return -1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  }

  // --- panels ----------------------------------------------------------------------------------

  const el = (parent, name, attributes = {}, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };
  const html = (parent, name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };

  const isDots = (key, curve) => /^(val|eval)\//.test(key) || curve.raw.y.length === 1;

  /** The curves of a panel that are shown: run, key, how they are drawn. */
  function shown(panel) {
    const found = [];
    data.runs.forEach((run, i) => {
      if (view.hidden.has(i)) return;
      for (const key of panel.keys) {
        const curve = run.curves[key];
        if (!curve) continue;
        const dots = isDots(key, curve);
        const pattern = dash(key, dots, panel.kinds);
        found.push({ run, i, key, curve, dots, main: curve.smooth || curve.raw, pattern });
      }
    });
    return found;
  }

  /** The keys of a panel that are lines, and those that are dots. */
  const kindsOf = (panel) => {
    const curveOf = (key) => data.runs.find((run) => run.curves[key]).curves[key];
    return [false, true].map((dots) => panel.keys.filter((key) => isDots(key, curveOf(key)) === dots));
  };

  /** How the curves of a panel with several per run are told apart. */
  function drawKey(parent, panel) {
    const kinds = kindsOf(panel);
    for (const key of panel.keys) {
      const dots = kinds[1].includes(key);
      const item = html(parent, "span");
      const svg = el(item, "svg", { width: 30, height: 8 });
      el(svg, "line", { class: "line", x1: 1, x2: 29, y1: 4, y2: 4, "stroke-dasharray": dash(key, dots, kinds) });
      if (dots) el(svg, "circle", { class: "dots", cx: 15, cy: 4, r: 3 });
      item.append(key);
    }
    if (panel.id === "loss" && data.runs.some((run) => run.marks.length)) {
      const item = html(parent, "span");
      const svg = el(item, "svg", { width: 8, height: 12 });
      el(svg, "line", { class: "mark", x1: 4, x2: 4, y1: 0, y2: 12 });
      item.append("restart, spike or batch left out");
    }
  }
  const DASHES = ["", "6 3", "2 3", "8 3 2 3", "12 3", "8 3 2 3 2 3", "1 6", "12 3 4 3"];
  const dash = (key, dots, kinds) => {
    const n = kinds[Number(dots)].indexOf(key);
    return dots && n === 0 ? "1 4" : DASHES[n % DASHES.length];
  };

  function makePanel(panel, wide) {
    const box = html(document.getElementById("panels"), "figure", wide ? "panel wide" : "panel");
    box.dataset.panel = panel.id;
    const head = html(box, "h3", "", panel.title + " ");
    if (panel.unit) html(head, "span", "", panel.unit);
    if (panel.keys.length > 1 || panel.id === "loss") drawKey(html(box, "p", "key"), panel);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", panel.title);
    box.appendChild(svg);
    const tip = html(box, "div", "tip");
    tip.hidden = true;
    const kinds = kindsOf(panel);
    const made = { ...panel, kinds, box, svg, tip, height: wide ? 340 : 190 };
    listen(made);
    panels.push(made);
  }

  function bounds(panel) {
    let x0 = Infinity, x1 = -Infinity;
    for (const other of panels) {
      for (const { curve } of shown(other)) {
        for (const x of curve.raw.x) { if (x < x0) x0 = x; if (x > x1) x1 = x; }
      }
    }
    if (view.range) [x0, x1] = view.range;
    if (!(x1 > x0)) { x0 -= 0.5; x1 += 0.5; }
    const ys = [];
    for (const { curve, main, dots } of shown(panel)) {
      const kind = view.raw || dots ? curve.raw : main;
      kind.x.forEach((x, i) => { if (x >= x0 && x <= x1) ys.push(kind.y[i]); });
    }
    let y0 = Infinity, y1 = -Infinity;
    for (const y of ys) { if (y < y0) y0 = y; if (y > y1) y1 = y; }
    const log = view.log && panel.id === "loss" && y0 > 0;
    if (!(y1 >= y0)) { y0 = 0; y1 = 1; }
    if (panel.id === "lr" && y0 > 0) y0 = 0;
    const pad = y1 > y0 ? 0.05 * (y1 - y0) : Math.abs(y0) * 0.05 || 0.5;
    if (log) { y0 /= 1.03; y1 *= 1.03; } else { y0 -= panel.id === "lr" ? 0 : pad; y1 += pad; }
    return { x0, x1, y0, y1, log };
  }

  function draw(panel) {
    const { svg, height } = panel;
    const width = panel.box.clientWidth - 26;
    const left = 54, right = 8, top = 8, bottom = 34;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    const b = bounds(panel);
    const px = (x) => left + ((x - b.x0) / (b.x1 - b.x0)) * (width - left - right);
    const f = b.log ? Math.log : (v) => v;
    const py = (y) => top + (1 - (f(y) - f(b.y0)) / (f(b.y1) - f(b.y0))) * (height - top - bottom);
    panel.scale = { ...b, px, left, right, top, bottom, width, height };

    for (const y of b.log ? logTicks(b.y0, b.y1) : ticks(b.y0, b.y1, height > 250 ? 6 : 4)) {
      el(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) });
      el(svg, "text", { class: "axis", x: left - 8, y: py(y) + 4, "text-anchor": "end" }, short(y));
    }
    for (const x of ticks(b.x0, b.x1, width > 600 ? 8 : 4)) {
      el(svg, "line", { class: "grid", x1: px(x), x2: px(x), y1: top, y2: height - bottom });
      el(svg, "text", { class: "axis", x: px(x), y: height - bottom + 15, "text-anchor": "middle" }, short(x));
    }
    el(svg, "text", { class: "axis", x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, X_NAMES[view.x]);

    const id = `clip-${panel.id}`;
    el(el(svg, "clipPath", { id }), "rect", { x: left - 4, y: 0, width: width - left - right + 8, height: height - bottom + 4 });
    const area = el(svg, "g", { "clip-path": `url(#${id})` });
    const path = (kind) => {
      let d = "", pen = "M";
      for (let i = 0; i < kind.x.length; i++) {
        if (Number.isNaN(kind.x[i])) { pen = "M"; continue; }
        const outside = (kind.x[i + 1] ?? Infinity) < b.x0 || (kind.x[i - 1] ?? -Infinity) > b.x1;
        if (outside) continue;
        d += `${pen}${px(kind.x[i]).toFixed(1)} ${py(kind.y[i]).toFixed(1)}`;
        pen = "L";
      }
      return d;
    };
    if (panel.id === "loss") {
      data.runs.forEach((run, i) => {
        if (view.hidden.has(i)) return;
        for (const mark of run.marks) {
          const x = px(place(run, mark.step));
          if (Number.isNaN(x)) continue;
          const line = el(area, "line", { class: `mark ${mark.kind} c${i % 10}`, x1: x, x2: x, y1: top, y2: height - bottom });
          el(line, "title", {}, mark.text);
        }
      });
    }
    for (const { i, key, curve, dots, main, pattern } of shown(panel)) {
      const common = { "data-run": i, "data-key": key };
      if (curve.smooth && view.raw) el(area, "path", { ...common, class: `raw c${i % 10}`, d: path(curve.raw) });
      el(area, "path", {
        ...common, class: `line c${i % 10}`, d: path(dots ? curve.raw : main),
        "stroke-dasharray": pattern,
      });
      if (dots) {
        curve.raw.x.forEach((x, n) => {
          if (x >= b.x0 && x <= b.x1) el(area, "circle", { ...common, class: `dots c${i % 10}`, cx: px(x), cy: py(curve.raw.y[n]), r: 3 });
        });
      }
    }
    panel.cross = el(svg, "line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
    panel.zoom = el(svg, "rect", { class: "zoom", y: top, height: height - top - bottom, width: 0 });
  }

  const redraw = () => {
    panels.forEach(draw);
    document.getElementById("reset").disabled = !view.range;
  };

  // --- hover and zoom --------------------------------------------------------------------------

  function hover(panel, x) {
    for (const other of panels) {
      const at = other.scale.px(x);
      other.cross.setAttribute("x1", at);
      other.cross.setAttribute("x2", at);
      other.cross.setAttribute("visibility", "visible");
    }
    const { tip } = panel;
    tip.replaceChildren();
    html(tip, "p", "", `${X_NAMES[view.x]} ${short(x, 5)}`);
    const body = html(html(tip, "table"), "tbody");
    for (const { run, i, key, curve, main } of shown(panel)) {
      const n = nearest(main.x, x);
      if (n < 0 || Number.isNaN(main.x[n])) continue;
      const beyond = x < main.x[0] || x > main.x[main.x.length - 1];
      const far = Math.abs(main.x[n] - x) > 0.02 * (panel.scale.x1 - panel.scale.x0);
      if (beyond && far) continue; // the run has nothing there
      const row = html(body, "tr");
      const name = html(row, "td");
      html(name, "span", `dot c${i % 10}`);
      name.append(run.name);
      html(row, "td", "", panel.keys.length > 1 ? key : "");
      html(row, "td", "number", short(main.y[n], 5));
      html(row, "td", "number", `step ${main.step[n].toLocaleString("en")}`);
    }
    tip.hidden = false;
    const at = panel.scale.px(x) + 12;
    const space = panel.box.clientWidth;
    tip.style.left = `${at + 26 + tip.offsetWidth > space ? Math.max(4, at - tip.offsetWidth - 4) : at + 14}px`;
    tip.style.top = "40px";
  }
  function leave() {
    for (const panel of panels) {
      panel.tip.hidden = true;
      panel.cross?.setAttribute("visibility", "hidden");
    }
  }

  function listen(panel) {
    const { svg } = panel;
    let from = null;
    const valueAt = (event) => {
      const s = panel.scale, box = svg.getBoundingClientRect();
      const p = ((event.clientX - box.left) / box.width) * s.width;
      const part = (p - s.left) / (s.width - s.left - s.right);
      return s.x0 + Math.min(1, Math.max(0, part)) * (s.x1 - s.x0);
    };
    svg.addEventListener("pointerdown", (event) => {
      if (event.button === 0) from = valueAt(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const x = valueAt(event);
      hover(panel, x);
      if (from !== null) {
        const [a, b] = [panel.scale.px(from), panel.scale.px(x)].sort((m, n) => m - n);
        panel.zoom.setAttribute("x", a);
        panel.zoom.setAttribute("width", b - a);
      }
    });
    svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const range = [from, valueAt(event)].sort((m, n) => m - n);
      from = null;
      panel.zoom.setAttribute("width", 0);
      if (panel.scale.px(range[1]) - panel.scale.px(range[0]) <= 6) return; // a click: no stretch
      view.range = range;
      redraw();
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("dblclick", () => { view.range = null; redraw(); });
  }

  // --- controls --------------------------------------------------------------------------------

  const legend = document.getElementById("legend");
  data.runs.forEach((run, i) => {
    const button = html(legend, "button");
    button.type = "button";
    button.dataset.run = i;
    button.setAttribute("aria-pressed", "true");
    html(button, "span", `dot c${i % 10}`);
    button.append(run.name);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(i)) view.hidden.add(i);
      button.setAttribute("aria-pressed", String(!view.hidden.has(i)));
      redraw();
    });
  });
  for (const button of document.querySelectorAll("#x-axis button")) {
    if (button.dataset.x === "flops" && !data.runs.some((run) => run.flops)) button.disabled = true;
    button.addEventListener("click", () => {
      for (const each of document.querySelectorAll("#x-axis button")) {
        each.setAttribute("aria-pressed", String(each === button));
      }
      view.x = button.dataset.x;
      view.range = null;
      placeAll();
      redraw();
    });
  }
  document.getElementById("raw").addEventListener("change", (e) => { view.raw = e.target.checked; redraw(); });
  document.getElementById("log").addEventListener("change", (e) => { view.log = e.target.checked; redraw(); });
  document.getElementById("reset").addEventListener("click", () => { view.range = null; redraw(); });

  placeAll();
  data.panels.forEach((panel, i) => makePanel(panel, i === 0));
  if (!panels.length) html(document.getElementById("panels"), "p", "quiet", "No training step is on record.");
  redraw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } });
})();
