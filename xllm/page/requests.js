// The last requests: one line each, which opens to where it was routed and why.

import {
  clock, count, el, PHASES, seconds, stackedBar, sum, TIER_LABELS, TIERS,
} from "./dom.js";

const MAX_ROWS = 40;
const STATES = {
  running: ["running", ""],
  moving: ["moving", "warn"],
  done: ["done", "good"],
  cancelled: ["stopped", ""],
  failed: ["failed", "bad"],
};

export class Requests {
  constructor(root, empty) {
    this.root = root;
    this.empty = empty;
    this.rows = new Map();
  }

  draw(state, changed) {
    for (const request of changed) {
      let row = this.rows.get(request.request_id);
      if (!row) {
        row = new Row();
        this.rows.set(request.request_id, row);
        this.root.prepend(row.root);
      }
      row.update(request, state);
    }
    for (const [id, row] of this.rows) {
      if (state.requests.has(id) && this.rows.size <= MAX_ROWS) continue;
      row.root.remove();
      this.rows.delete(id);
    }
    this.empty.hidden = this.rows.size > 0;
  }
}

class Row {
  constructor() {
    this.summary = el("summary", {});
    this.body = el("div", { class: "why" });
    this.root = el("details", { class: "request", toggle: () => this.explain() }, this.summary, this.body);
  }

  update(request, state) {
    this.request = request;
    this.state = state;
    const last = request.attempts.at(-1);
    const [label, tone] = STATES[request.state] ?? [request.state, ""];
    const isOver = request.state !== "running" && request.state !== "moving";
    const moved = new Set(request.attempts.map((attempt) => attempt.worker_id)).size > 1;
    this.summary.replaceChildren(
      el("span", { class: "at", text: clock(request.started_at) }),
      el("span", { class: `chip ${tone}`, text: label }),
      el("span", { class: "to id" }, way(request)),
      el("span", { class: "ttft", text: seconds(request.ttft_s), title: "time to first token" }),
      el("span", { class: "prompt", text: count(request.prompt_tokens), title: "prompt tokens" }),
      el("span", { class: "cached" }, cachedBar(request)),
      el("span", { class: "line" }, timeLine(last, request)),
      el("span", { class: "total", text: isOver ? seconds(request.seconds) : "…", title: "in all" }),
    );
    this.root.classList.toggle("moved", moved);
    this.root.dataset.request = request.request_id;
    this.root.dataset.state = request.state;
    this.explain();
  }

  explain() {
    if (this.root.open) this.body.replaceChildren(...explanation(this.request, this.state));
  }
}

function way(request) {
  const ids = request.attempts.map((attempt) => attempt.worker_id);
  return ids.filter((id, i) => id !== ids[i - 1]).join(" → ");
}

export function cachedBar(request) {
  const cached = firstCached(request);
  const tokens = request.prompt_tokens;
  const parts = TIERS.map((tier) => [tier, cached[tier] ?? 0]);
  const found = sum(cached);
  parts.push(["computed", tokens - found]);
  const names = TIERS.filter((tier) => cached[tier]);
  const text = names.map((tier) => `${cached[tier]} ${TIER_LABELS[tier]}`).join(", ");
  return stackedBar(parts, tokens, `${tokens} prompt tokens: ${text || "none cached"}`);
}

/** What the first attempt that began has found. */
export function firstCached(request) {
  const begun = request.attempts.find((attempt) => attempt.ttft_s !== null);
  return begun?.cached_tokens_by_tier ?? {};
}

function timeLine(attempt, request) {
  const phases = attempt.phases;
  if (phases) {
    const text = PHASES.map((phase) => `${phase} ${seconds(phases[phase])}`).join(" → ");
    return stackedBar(PHASES.map((phase) => [phase, phases[phase]]), sum(phases), text);
  }
  const ttft = attempt.ttft_s;
  if (ttft === null) return stackedBar([["queue", 1]], 1, "no token yet");
  const rest = Math.max(attempt.seconds - ttft, 0.001);
  const text = `first token after ${seconds(ttft)}, tokens for ${seconds(rest)}`;
  return stackedBar([["prefill", ttft], ["decode", rest]], ttft + rest, text);
}

function explanation(request, state) {
  return [
    el("p", { class: "because", text: because(request, state) }),
    candidates(request),
    attempts(request),
    el("p", { class: "fine id", text: `${request.request_id} · ${request.model}` }),
  ].filter(Boolean);
}

/** In words: why there, and whether it came as expected. */
function because(request, state) {
  const last = request.attempts.at(-1);
  const [chosen, next] = request.candidates;
  const words = [];
  if (chosen && next && next.worker_id !== chosen.worker_id) {
    const [ours, theirs] = [chosen.cost_s, next.cost_s];
    const isTie = Math.abs(ours - theirs) < 0.001;
    words.push(
      isTie
        ? `${chosen.worker_id} and ${next.worker_id} cost the same (${seconds(ours)}): a tie.`
        : `${chosen.worker_id} costs least: ${seconds(ours)}, ${next.worker_id} ${seconds(theirs)}.`,
    );
    const more = sum(chosen.prefix_blocks) - sum(next.prefix_blocks);
    if (more > 0) words.push(`It holds ${more} more blocks of the prompt.`);
    if (more < 0) words.push(`It holds ${-more} fewer blocks, and is less busy.`);
  } else {
    words.push(`Sent to ${last.worker_id} (${state.cluster?.policy ?? "one candidate"}).`);
  }
  for (const { worker_id: id, blocks } of last.fetch) words.push(`${blocks} blocks to fetch from ${id}.`);
  if (last.ttft_s !== null) {
    words.push(`First token expected after ${seconds(last.estimated_s)}, came after ${seconds(last.ttft_s)}.`);
  }
  return words.join(" ");
}

function table(heads, rows) {
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { text })))),
      el("tbody", {}, ...rows),
    ),
  );
}

function candidates(request) {
  const last = request.attempts.at(-1).worker_id;
  if (!request.candidates.length) return null;
  const rows = request.candidates.map((one) => {
    const held = TIERS.filter((tier) => one.prefix_blocks[tier]);
    const texts = held.map((tier) => `${one.prefix_blocks[tier]} ${TIER_LABELS[tier]}`);
    const cells = [
      seconds(one.cost_s), seconds(one.ttft_s), seconds(one.backlog_s),
      seconds(one.loading_s + one.fetching_s), seconds(one.computing_s),
      texts.join(" + ") || "–",
    ];
    return el(
      "tr",
      { class: one.worker_id === last ? "chosen" : "" },
      el("td", { class: "id", text: one.worker_id }),
      ...cells.map((text) => el("td", { text })),
    );
  });
  return table(
    ["estimate", "cost", "TTFT", "backlog", "loading", "computing", "blocks held"], rows,
  );
}

function attempts(request) {
  const rows = request.attempts.map((one, i) => {
    const phases = one.phases;
    const cells = [
      one.error || (one.finish_reason ? `${one.state}: ${one.finish_reason}` : one.state),
      ...PHASES.map((phase) => (phases ? seconds(phases[phase]) : "–")),
      one.output_tokens ? count(one.output_tokens) : "–",
    ];
    return el(
      "tr",
      {},
      el("td", { class: "id", text: `${i + 1}. ${one.worker_id}` }),
      ...cells.map((text) => el("td", { text })),
    );
  });
  return table(["what happened", "end", ...PHASES, "tokens"], rows);
}
