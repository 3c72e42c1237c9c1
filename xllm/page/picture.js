// The cluster as a picture: masters above, workers below, their tiers as bars that fill, and blocks
// that move. A worker that has gone stays as a shadow for a while, so that nobody misses it.

import { byId, bytes, count, el, percent, seconds, setText, TIER_LABELS } from "./dom.js";
import { Flows } from "./flows.js";

const GHOST_MS = 30000;
const SHOWN_TIERS = ["device", "host", "disk"];
const MAX_DOTS = 12;

const STATE_CLASSES = {
  ready: "good",
  draining: "warn",
  suspect: "warn",
  connecting: "warn",
  unreachable: "bad",
  refused: "bad",
  gone: "bad",
};

export class Picture {
  constructor(actions) {
    this.actions = actions;
    this.masters = byId("masters");
    this.root = byId("workers");
    this.flows = new Flows(byId("stage"), byId("flows"));
    this.cards = new Map();
    this.moved = new Map(); // by worker: its counts of the last report
    this.sent = new Set(); // attempts that were drawn already
    new ResizeObserver(() => this.drawLinks()).observe(this.root);
  }

  /** After a new connection: what was counted meanwhile is not drawn as if it moved now. */
  forgetCounts() {
    this.moved.clear();
    this.sent.clear();
  }

  draw(state, changed) {
    if (!state.cluster) return;
    const running = runningByWorker(state.requests);
    this.drawMasters(state.cluster);
    this.drawWorkers(state.cluster.workers, running);
    this.drawLinks();
    this.drawMoves(state.cluster.workers);
    this.drawRequests(state.cluster, changed);
  }

  drawMasters(cluster) {
    const shown = cluster.masters.map((master) => {
      const isHere = master.master_id === cluster.answered_by;
      const roles = [master.is_leader ? "leads" : null, isHere ? "this page" : null];
      return [master.master_id, roles.filter(Boolean).join(" · "), master.is_leader, isHere];
    });
    const signature = JSON.stringify(shown);
    if (signature === this.mastersSignature) return;
    this.mastersSignature = signature;
    this.masters.replaceChildren(
      ...shown.map(([id, roles, leads, isHere]) =>
        el(
          "div",
          { class: `master${leads ? " leads" : ""}${isHere ? " here" : ""}`, "data-master": id },
          el("span", { class: "kind", text: "master" }),
          el("span", { class: "id", text: id }),
          el("span", { class: "role", text: roles || "follows" }),
        ),
      ),
    );
  }

  drawWorkers(workers, running) {
    const now = performance.now();
    const present = new Set(workers.map((worker) => worker.worker_id));
    for (const worker of workers) {
      let card = this.cards.get(worker.worker_id);
      if (!card) {
        card = new WorkerCard(worker.worker_id, this.actions);
        this.cards.set(worker.worker_id, card);
      }
      card.update(worker, running.get(worker.worker_id) ?? 0);
    }
    for (const [id, card] of this.cards) {
      if (present.has(id)) continue;
      card.goneAt ??= now;
      if (now - card.goneAt > GHOST_MS) {
        card.root.remove();
        this.cards.delete(id);
      } else {
        card.showGone();
      }
    }
    const ordered = [...this.cards.keys()].sort();
    const before = [...this.root.children].map((child) => child.dataset.worker);
    if (JSON.stringify(before) !== JSON.stringify(ordered)) {
      const nothing = el("p", { class: "empty", text: "No worker is registered." });
      const cards = ordered.map((id) => this.cards.get(id).root);
      this.root.replaceChildren(...(cards.length ? cards : [nothing]));
    }
  }

  /** From this master to each worker. */
  drawLinks() {
    const here = this.masters.querySelector(".here");
    const cards = [...this.cards.values()];
    const lost = cards.map((card) => card.root.classList.contains("lost"));
    if (here) this.flows.link(here, cards.map((card) => card.root), lost);
  }

  /** Blocks that moved since the last report of each worker. */
  drawMoves(workers) {
    const steps = new Map();
    for (const worker of workers) {
      const counts = worker.load?.moved_blocks;
      if (!counts) continue;
      const before = this.moved.get(worker.worker_id);
      this.moved.set(worker.worker_id, counts);
      if (!before) continue;
      const step = {};
      for (const [way, total] of Object.entries(counts)) {
        const moved = total - (before[way] ?? 0);
        if (moved > 0) step[way] = moved;
      }
      if (Object.keys(step).length) steps.set(worker.worker_id, step);
    }
    for (const [id, step] of steps) {
      const card = this.cards.get(id);
      for (const tier of ["host", "disk"]) {
        const [up, down] = [step[`from_${tier}`] ?? 0, step[`to_${tier}`] ?? 0];
        if (up) this.flows.move(card.bar(tier), card.bar("device"), up, tier);
        if (down) this.flows.move(card.bar("device"), card.bar(tier), down, "device");
        card.showMoves(tier, up, down);
      }
      const fetched = step.from_peer ?? 0;
      if (!fetched) continue;
      const lenders = [...steps].filter(([other, moves]) => other !== id && moves.to_peer);
      for (const [lender] of lenders) {
        this.flows.move(this.cards.get(lender).bar("device"), card.bar("device"), fetched, "remote");
      }
      card.showFetched(fetched, lenders.map(([lender]) => lender));
    }
  }

  /** A spark from this master to a worker for each attempt that was sent. */
  drawRequests(cluster, changed) {
    const here = this.masters.querySelector(".here");
    for (const request of changed) {
      request.attempts.forEach((attempt, i) => {
        const name = `${request.request_id}/${attempt.worker_id}/${attempt.sent_s}/${i}`;
        if (this.sent.has(name)) return;
        this.sent.add(name);
        if (this.sent.size > 1000) this.sent.delete(this.sent.values().next().value);
        const card = this.cards.get(attempt.worker_id);
        if (here && card) this.flows.move(here, card.root.firstElementChild, 1, "request");
      });
    }
  }
}

function runningByWorker(requests) {
  const running = new Map();
  for (const request of requests.values()) {
    for (const { worker_id: id, state } of request.attempts) {
      if (state === "running") running.set(id, (running.get(id) ?? 0) + 1);
    }
  }
  return running;
}

class WorkerCard {
  constructor(id, actions) {
    this.state = el("span", { class: "chip" });
    this.load = el("span", { class: "load" });
    this.dots = el("span", { class: "dots" });
    this.note = el("span", { class: "note" });
    this.tiers = el("div", { class: "tiers" });
    this.bars = new Map();
    this.goneAt = null;
    this.wasReady = false;
    const clear = () => actions.clear([id]);
    const drain = () => actions.drain(id);
    this.clearButton = el("button", { class: "quiet", type: "button", text: "Clear…", click: clear });
    this.drainButton = el("button", { class: "quiet", type: "button", text: "Drain…", click: drain });
    this.root = el(
      "article",
      { class: "worker", "data-worker": id, "aria-label": `worker ${id}` },
      el("div", { class: "head" }, el("span", { class: "id", text: id, title: id }), this.state),
      el("div", { class: "line" }, this.load, this.dots),
      this.tiers,
      el("div", { class: "foot" }, this.note, this.clearButton, this.drainButton),
    );
  }

  update(worker, running) {
    this.goneAt = null;
    this.wasReady ||= worker.state === "ready";
    // A worker that is just starting connects; one that served before is not reached any more.
    const isLost = worker.state === "connecting" && this.wasReady;
    this.show(isLost ? "unreachable" : worker.state, worker.refusal ?? "");
    const load = worker.load;
    const texts = [`${load?.running_requests ?? 0} running`];
    if (load?.waiting_requests) texts.push(`${load.waiting_requests} waiting`);
    if (load?.queue_s > 0.001) texts.push(`queue ${seconds(load.queue_s)}`);
    setText(this.load, load ? texts.join(" · ") : "no report yet");
    this.root.title = `${worker.model}, ${worker.kv_dtype}, blocks of ${worker.block_size} tokens`;
    setText(this.dots, "●".repeat(Math.min(running, MAX_DOTS)) + (running > MAX_DOTS ? "+" : ""));
    this.dots.title = `${running} requests of this master`;
    for (const tier of SHOWN_TIERS) {
      const usage = worker.tiers[tier];
      if (usage && usage.total_blocks) this.showTier(tier, usage, worker.block_bytes);
    }
  }

  show(state, title) {
    setText(this.state, state);
    this.state.title = title;
    this.state.className = `chip ${STATE_CLASSES[state] ?? ""}`;
    this.root.classList.toggle("lost", state === "unreachable" || state === "gone");
    this.drainButton.disabled = state !== "ready" && state !== "suspect";
    this.clearButton.disabled = state === "gone";
  }

  showGone() {
    this.show("gone", "its lease has ended");
    setText(this.load, "not in the cluster any more");
    setText(this.dots, "");
  }

  showTier(tier, usage, blockBytes) {
    const row = this.bars.get(tier) ?? this.addTier(tier);
    const share = usage.used_blocks / usage.total_blocks;
    row.fill.style.width = `${100 * share}%`;
    setText(row.text, `${count(usage.used_blocks)} / ${count(usage.total_blocks)}`);
    const size = bytes(usage.total_blocks * blockBytes);
    row.root.title = `${tier}: ${percent(share)} of ${size}, ${usage.indexed_blocks ?? 0} known here`;
  }

  addTier(tier) {
    const fill = el("span", { class: `fill ${tier}` });
    const row = {
      fill,
      bar: el("span", { class: "bar" }, fill),
      text: el("span", { class: "used" }),
      moves: el("span", { class: "moves" }),
    };
    row.root = el(
      "div",
      { class: "tier", "data-tier": tier },
      el("span", { class: "name", text: TIER_LABELS[tier] }),
      row.bar,
      row.text,
      row.moves,
    );
    this.bars.set(tier, row);
    const ordered = SHOWN_TIERS.filter((name) => this.bars.has(name));
    this.tiers.replaceChildren(...ordered.map((name) => this.bars.get(name).root));
    return row;
  }

  bar(tier) {
    return this.bars.get(tier)?.bar ?? null;
  }

  showMoves(tier, up, down) {
    const row = this.bars.get(tier);
    if (!row || !(up || down)) return;
    const texts = [up ? `↑${count(up)}` : "", down ? `↓${count(down)}` : ""];
    flash(row.moves, texts.join(" ").trim());
  }

  showFetched(blocks, lenders) {
    flash(this.note, `${count(blocks)} blocks from ${lenders.join(", ") || "a peer"}`);
  }
}

/** Shows `text`, which fades away. */
function flash(node, text) {
  node.textContent = text;
  node.getAnimations().forEach((animation) => animation.cancel());
  node.animate([{ opacity: 1 }, { opacity: 1, offset: 0.7 }, { opacity: 0 }], {
    duration: 4000,
    fill: "forwards",
  });
}
