// Four charts of the last five minutes, drawn at the width that they have.

import { count, el, percent, seconds, setText, sum, svg, TIERS } from "./dom.js";

const WINDOW_S = 300;
const BIN_S = 10;
const HEIGHT = 132;
const PAD = { left: 46, right: 8, top: 8, bottom: 18 };

export class Charts {
  constructor(root) {
    this.charts = [
      new Chart("Time to first token", drawTtft),
      new Chart("Time between tokens", drawTbt),
      new Chart("Throughput", drawThroughput),
      new Chart("Prompt tokens found, by tier", drawHits),
    ];
    root.append(...this.charts.map((chart) => chart.root));
    new ResizeObserver(() => this.state && this.draw(this.state)).observe(root);
  }

  draw(state) {
    this.state = state;
    for (const chart of this.charts) chart.draw(state);
  }
}

class Chart {
  constructor(title, draw) {
    this.drawInto = draw;
    this.figure = el("div", { class: "figure" });
    this.detail = el("div", { class: "detail" });
    this.plot = svg("svg", { class: "plot", height: HEIGHT, role: "img", "aria-label": title });
    const head = el("div", { class: "chart-head" }, el("h2", { text: title }), this.figure);
    this.root = el("figure", { class: "panel chart" }, head, this.detail, this.plot);
  }

  draw(state) {
    const width = this.plot.clientWidth || 320;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.replaceChildren();
    const x = (at) =>
      PAD.left + (width - PAD.left - PAD.right) * (1 - (state.now - at) / WINDOW_S);
    const bottom = HEIGHT - 5;
    this.plot.append(
      svg("text", { class: "tick", x: PAD.left, y: bottom, text: "5 min ago" }),
      svg("text", { class: "tick end", x: width - PAD.right, y: bottom, text: "now" }),
    );
    this.drawInto(this, state, x, width);
  }

  say(figure, detail) {
    setText(this.figure, figure);
    setText(this.detail, detail);
  }

  /** The y of a value on a logarithmic axis with a line at each of `ticks`. */
  logAxis(ticks, format, width) {
    const [low, high] = [Math.log(ticks[0]), Math.log(ticks.at(-1))];
    const y = (value) => {
      const share = (Math.log(Math.max(value, ticks[0])) - low) / (high - low);
      return HEIGHT - PAD.bottom - (HEIGHT - PAD.bottom - PAD.top) * Math.min(1, share);
    };
    for (const tick of ticks) this.grid(y(tick), format(tick), width);
    return y;
  }

  grid(y, label, width) {
    this.plot.append(
      svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }),
      svg("text", { class: "tick end", x: PAD.left - 6, y: y + 3.5, text: label }),
    );
  }

  slo(y, label, width) {
    this.plot.append(
      svg("line", { class: "slo", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }),
      svg("text", { class: "slo-label", x: PAD.left + 4, y: y - 4, text: label }),
    );
  }

  /** Points of `[x, y]`, joined where they follow each other. */
  line(points, name, maxGap) {
    let path = "";
    let last = null;
    for (const [px, py] of points) {
      path += last !== null && px - last <= maxGap ? `L${px},${py}` : `M${px},${py}`;
      last = px;
      this.plot.append(svg("circle", { class: name, cx: px, cy: py, r: 1.8 }));
    }
    this.plot.append(svg("path", { class: name, d: path || "M0,0" }));
  }
}

function plotPair(chart, state, x, y, [low, high]) {
  const gap = x(state.now) - x(state.now - 6.5);
  for (const [field, name] of [[high, "high"], [low, "low"]]) {
    const points = state.points.filter((point) => point[field] !== null);
    chart.line(points.map((point) => [x(point.at), y(point[field])]), name, gap);
  }
}

const tick = (value) => (value < 1 ? `${+(value * 1e3).toPrecision(2)} ms` : `${value} s`);

function drawTtft(chart, state, x, width) {
  const y = chart.logAxis([0.01, 0.1, 1, 10], tick, width);
  const target = state.cluster?.targets.ttft_s;
  if (target) chart.slo(y(target), `target ${seconds(target)}`, width);
  plotPair(chart, state, x, y, ["ttft_p50_s", "ttft_p95_s"]);
  const ttft = state.summary.ttft_s;
  chart.say(seconds(ttft?.p50), `p95 ${seconds(ttft?.p95)} · ${ttft?.num ?? 0} ${ttft?.num === 1 ? "request" : "requests"}`);
}

function drawTbt(chart, state, x, width) {
  const y = chart.logAxis([0.001, 0.01, 0.1, 1], tick, width);
  const target = state.cluster?.targets.tpot_s;
  if (target) chart.slo(y(target), `target ${seconds(target)}`, width);
  plotPair(chart, state, x, y, ["tbt_p50_s", "tbt_p99_s"]);
  const tbt = state.summary.tbt_s;
  chart.say(seconds(tbt?.p50), `p99 ${seconds(tbt?.p99)} · ${count(tbt?.num ?? 0)} gaps`);
}

function drawThroughput(chart, state, x, width) {
  const rates = state.points.flatMap((p) => [p.output_tokens_per_s, p.prompt_tokens_per_s]);
  const decades = Math.max(2, Math.ceil(Math.log10(Math.max(1, ...rates))));
  const ticks = Array.from({ length: decades + 1 }, (_, i) => 10 ** i);
  const y = chart.logAxis(ticks, count, width);
  const gap = x(state.now) - x(state.now - 6.5);
  for (const [field, name] of [["prompt_tokens_per_s", "high"], ["output_tokens_per_s", "low"]]) {
    const points = state.points.filter((point) => point[field] > 0);
    chart.line(points.map((point) => [x(point.at), y(point[field])]), name, gap);
  }
  const late = state.points.slice(-5);
  const mean = (field) => late.reduce((all, p) => all + p[field], 0) / Math.max(1, late.length);
  const [output, prompt] = [mean("output_tokens_per_s"), mean("prompt_tokens_per_s")];
  chart.say(`${count(output)} tok/s`, `output; prompts ${count(prompt)} tok/s`);
}

function drawHits(chart, state, x, width) {
  const y = (share) => HEIGHT - PAD.bottom - (HEIGHT - PAD.bottom - PAD.top) * share;
  for (const share of [0, 0.5, 1]) chart.grid(y(share), percent(share), width);
  const bins = new Map();
  for (const point of state.points) {
    if (!point.prompt_tokens) continue;
    const start = Math.floor(point.at / BIN_S) * BIN_S;
    const bin = bins.get(start) ?? { tokens: 0, cached: {} };
    bin.tokens += point.prompt_tokens;
    for (const tier of TIERS) {
      bin.cached[tier] = (bin.cached[tier] ?? 0) + (point.cached_tokens_by_tier[tier] ?? 0);
    }
    bins.set(start, bin);
  }
  for (const [start, bin] of bins) {
    const left = Math.max(PAD.left, x(start) + 1);
    const wide = Math.max(0, Math.min(x(start + BIN_S), width - PAD.right) - left - 1);
    let share = 0;
    const rect = (name, from, to) =>
      svg("rect", { class: name, x: left, width: wide, y: y(to), height: y(from) - y(to) });
    chart.plot.append(rect("computed", 0, 1));
    for (const tier of TIERS) {
      const part = bin.cached[tier] / bin.tokens;
      if (part > 0) chart.plot.append(rect(tier, share, Math.min(1, share + part)));
      share += part;
    }
  }
  const { prompt_tokens: tokens = 0, cached_tokens_by_tier: cached = {} } = state.summary;
  const parts = TIERS.filter((tier) => cached[tier]).map((tier) => {
    return `${tier === "remote" ? "peer" : tier} ${percent(cached[tier] / tokens)}`;
  });
  chart.say(tokens ? percent(sum(cached) / tokens) : "–", parts.join(" · ") || "nothing found yet");
}
