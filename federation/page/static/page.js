// Keeps the page up to date, and draws. It makes no markup out of text: what changes comes from the server's templates,
// which escape it, and everything else is set as text.
"use strict";

const POLL = 1000; // milliseconds between two looks, while the page is to be seen and the run goes on
const LATER = 30000; // the longest pause after failures
const DASHES = {
  server: [], clients: [8, 4], train: [2, 3],
  run0: [], run1: [8, 4], run2: [2, 3], run3: [10, 3, 2, 3], run4: [5, 5], run5: [12, 4], run6: [1, 4],
};
const BANDS = ["lowest", "low", "high", "highest"];

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ------------------------------------------------------------------------------------------------------------- numbers

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return whole + " s";
  for (const [size, unit, smaller, part] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / smaller);
      return Math.floor(whole / size) + " " + unit + (rest ? " " + rest + " " + part : "");
    }
  }
}

function metric(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? value.toFixed(4) : value.toPrecision(4);
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return Number(value.toPrecision(3)) + " " + units[power];
}

// -------------------------------------------------------------------------------------------------------------- curves

let charts = [];

const seconds = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(3)) + " s");
const formatter = (title) => (title.startsWith("bytes") ? bytes : title.startsWith("seconds") ? seconds : metric);

function series(curve) {
  const base = { label: curve.label, value: (_, value) => curve.show(value), spanGaps: true };
  if (BANDS.includes(curve.role)) return { ...base, class: "hidden", width: 0, points: { show: false } };
  return { ...base, stroke: style("--" + curve.role), width: 2, dash: (DASHES[curve.role] || []), points: { size: 5 } };
}

function bands(curves) {
  const place = (role) => curves.findIndex((curve) => curve.role === role) + 1;
  if (!place("lowest")) return [];
  return [
    { series: [place("highest"), place("lowest")], fill: style("--band") },
    { series: [place("high"), place("low")], fill: style("--band-inner") },
  ];
}

function axes(show) {
  const colours = { stroke: style("--muted"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 } };
  const whole = [1, 2, 5].flatMap((step) => [0, 1, 2, 3, 4, 5].map((power) => step * 10 ** power)).sort((a, b) => a - b);
  const short = (value) => (show === bytes ? bytes(value) : String(Number(value.toPrecision(5))));
  return [
    { ...colours, incrs: whole, label: "round", labelSize: 18, size: 34 },
    { ...colours, size: 64, values: (_, ticks) => ticks.map(short) },
  ];
}

function scales(title) {
  const fromZero = (_, low, high) => [0, high * 1.05 || 1];
  return { x: { time: false }, y: /^(bytes|seconds)/.test(title) ? { range: fromZero } : {} };
}

function border(curve) {
  const dash = curve ? (DASHES[curve.role] || []) : [];
  return dash.length === 0 ? "solid" : dash[0] < 4 ? "dotted" : "dashed";
}

function draw(holder, data, chart) {
  const figure = document.createElement("div");
  figure.className = "chart";
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-label", chart.title + " per round");
  const heading = document.createElement("h3");
  heading.textContent = chart.title;
  figure.append(heading);
  holder.append(figure);
  const show = formatter(chart.title);
  const curves = chart.curves.map((curve) => ({ ...curve, show }));
  const options = {
    width: Math.max(200, figure.clientWidth), height: 230, scales: scales(chart.title), axes: axes(show),
    series: [{ label: "round" }, ...curves.map(series)], bands: bands(curves), cursor: { points: { size: 7 } },
    legend: { markers: { width: 2, dash: (_, place) => border(curves[place - 1]) } },
  };
  const drawn = new uPlot(options, values(data, chart), figure);
  new ResizeObserver(() => resize(drawn, figure)).observe(figure);
  showLast(drawn);
  charts.push({ drawn, shape: shape(chart) });
}

// In the legend, as long as no other round is pointed at; uPlot empties it when it has drawn.
function showLast(drawn) {
  setTimeout(() => drawn.cursor.idx ?? drawn.setLegend({ idx: drawn.data[0].length - 1 }));
}

function resize(drawn, figure) {
  const width = Math.floor(figure.clientWidth);
  if (width && width !== drawn.width) drawn.setSize({ width, height: 230 });
}

const values = (data, chart) => [data.x, ...chart.curves.map((curve) => curve.values)];
const shape = (chart) => JSON.stringify([chart.title, chart.curves.map((curve) => [curve.role, curve.label])]);

function drawAll(anew) {
  const holder = document.getElementById("charts");
  if (!holder) return;
  const data = JSON.parse(holder.dataset.charts);
  const same = !anew && data.charts.map(shape).join() === charts.map((chart) => chart.shape).join();
  if (same) {
    data.charts.forEach((chart, place) => {
      charts[place].drawn.setData(values(data, chart));
      showLast(charts[place].drawn);
    });
    return;
  }
  charts.forEach((chart) => chart.drawn.destroy());
  charts = [];
  holder.replaceChildren();
  data.charts.forEach((chart) => draw(holder, data, chart));
}

// ------------------------------------------------------------------------------------------------------ who holds what

function drawMap() {
  const canvas = document.getElementById("map");
  if (!canvas) return;
  const clients = Number(canvas.dataset.clients), classes = Number(canvas.dataset.classes);
  canvas.width = clients;
  canvas.height = classes;
  const context = canvas.getContext("2d");
  const colours = [...Array(11).keys()].map((level) => style("--h" + level));
  [...canvas.dataset.shades].forEach((level, place) => {
    context.fillStyle = colours[parseInt(level, 16)];
    context.fillRect(Math.floor(place / classes), place % classes, 1, 1);
  });
}

// ------------------------------------------------------------------------------------------------------------ up to date

const known = new Map(); // what the server sent last of each part, by its id
let etag = "", failures = 0, timer = 0, asked = false;
let rendered = performance.now();

function remember(part) {
  known.set(part.id, part.outerHTML);
}

function isSelected(part) {
  const selection = getSelection();
  return selection.type === "Range" && part.contains(selection.anchorNode);
}

function carryOver(old, part) {
  old.querySelectorAll("details[id]").forEach((details) => {
    const same = part.querySelector("#" + CSS.escape(details.id));
    if (same) same.open = details.open;
  });
  const focusable = "a, summary, [tabindex]";
  const focused = [...old.querySelectorAll(focusable)].indexOf(document.activeElement);
  const scrolls = [...old.querySelectorAll(".scroll")].map((scroll) => {
    const atEnd = scroll.matches(".end") && scroll.scrollTop + scroll.clientHeight >= scroll.scrollHeight - 4;
    return { top: atEnd ? 1e9 : scroll.scrollTop, left: scroll.scrollLeft };
  });
  return () => {
    part.querySelectorAll(".scroll").forEach((scroll, place) => {
      if (scrolls[place]) scroll.scrollTo(scrolls[place].left, scrolls[place].top);
    });
    if (focused >= 0) part.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
  };
}

function replace(old, part) {
  if (known.get(old.id) === part.outerHTML || isSelected(old)) return;
  remember(part);
  const before = old.querySelector("#charts"), after = part.querySelector("#charts");
  if (before && after) {
    if (before.dataset.charts === after.dataset.charts) return;
    before.dataset.charts = after.dataset.charts;
    drawAll(false);
    return;
  }
  const settle = carryOver(old, part);
  old.replaceWith(document.adoptNode(part));
  settle();
  if (part.querySelector("#charts")) drawAll(true);
  if (part.id === "held") drawMap();
}

function update(text) {
  const page = new DOMParser().parseFromString(text, "text/html");
  rendered = performance.now();
  page.querySelectorAll("[data-part]").forEach((part) => {
    const old = document.getElementById(part.id);
    if (old) replace(old, part);
  });
  document.title = page.title;
  document.body.dataset.live = page.body.dataset.live;
}

async function look() {
  if (asked) return;
  asked = true;
  try {
    const answer = await fetch(location.href, { headers: etag ? { "If-None-Match": etag } : {}, cache: "no-store" });
    if (answer.status !== 304 && !answer.ok) throw new Error(String(answer.status));
    if (answer.ok) {
      etag = answer.headers.get("ETag") || "";
      update(await answer.text());
    }
    failures = 0;
    say("");
  } catch {
    failures += 1;
    if (failures > 1) say("The server does not answer any more: it has ended, or the connection is cut. This is what it said last.");
  } finally {
    asked = false;
  }
  plan();
}

function say(text) {
  const notice = document.getElementById("offline");
  notice.textContent = text;
  notice.hidden = !text;
}

function plan() {
  clearTimeout(timer);
  if (document.hidden || (document.body.dataset.live !== "yes" && !failures)) return;
  timer = setTimeout(look, Math.min(POLL * 2 ** Math.max(0, failures - 1), LATER));
}

function tick() {
  document.querySelectorAll("time[data-count]").forEach((time) => {
    if (document.body.dataset.live !== "yes" || failures) return;
    time.textContent = duration(Number(time.dataset.seconds) + (Number(time.dataset.count) * (performance.now() - rendered)) / 1000);
  });
}

document.querySelectorAll("[data-part]").forEach(remember);
document.querySelectorAll(".end").forEach((scroll) => scroll.scrollTo(0, scroll.scrollHeight));
drawAll(true);
drawMap();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawAll(true);
  drawMap();
});
document.addEventListener("visibilitychange", () => document.hidden || look());
setInterval(tick, 1000);
plan();
