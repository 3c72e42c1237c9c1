// The live page of one master: what it is told, and who draws it.

import { setUpAsk } from "./ask.js";
import { setUpActions } from "./actions.js";
import { Charts } from "./charts.js";
import { follow, setUpKey } from "./client.js";
import { byId, legend, PHASES, setText, TIER_LABELS, TIERS } from "./dom.js";
import { Picture } from "./picture.js";
import { Requests } from "./requests.js";

const MAX_REQUESTS = 100;

/** All that this master has said, for whoever draws. */
const state = { cluster: null, requests: new Map(), points: [], summary: {}, now: 0 };

const actions = setUpActions(() => state);
const picture = new Picture(actions);
const charts = new Charts(byId("charts"));
const requests = new Requests(byId("requests"), byId("no-requests"));
const ask = setUpAsk(actions, () => state);

legend(byId("tier-legend"), TIERS, TIER_LABELS);
legend(byId("phase-legend"), PHASES);
setUpKey();

function take(news, isFirst) {
  if (isFirst) {
    state.requests.clear();
    state.points = [];
    picture.forgetCounts();
  }
  state.now = news.now;
  const changed = news.requests ?? [];
  for (const request of changed) state.requests.set(request.request_id, request);
  for (const id of state.requests.keys()) {
    if (state.requests.size <= MAX_REQUESTS) break;
    state.requests.delete(id);
  }
  if (news.cluster) {
    state.cluster = news.cluster;
    state.summary = news.cluster.serving;
    showFacts(news.cluster);
  }
  if (news.points) {
    const since = state.now - 300;
    state.points = [...state.points, ...news.points].filter((point) => point.at > since);
    charts.draw(state);
  }
  picture.draw(state, isFirst ? [] : changed);
  if (changed.length || isFirst) requests.draw(state, changed);
  ask.draw(state, changed);
}

function showFacts(cluster) {
  const etcd = cluster.etcd.connected ? "etcd ok" : "etcd away";
  const facts = [cluster.models.join(", ") || "no model yet", cluster.policy, etcd];
  setText(byId("facts"), facts.join("  ·  "));
  byId("facts").title = `namespace ${cluster.namespace}, answered by ${cluster.answered_by}`;
}

follow(take, (status) => {
  const chip = byId("status");
  setText(chip, status);
  chip.className = `chip ${status === "live" ? "good" : "bad"}`;
  document.body.classList.toggle("stale", status !== "live");
});
