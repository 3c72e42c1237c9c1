// The prompt box: ask, watch the answer come, see where its blocks came from; ask again.

import { say } from "./actions.js";
import { events, post } from "./client.js";
import { byId, el, percent, seconds, setText, stackedBar, sum, TIER_LABELS, TIERS } from "./dom.js";
import { firstCached } from "./requests.js";

const MAX_SHOWN = 6;
const MAX_SQUARES = 400;

const EXAMPLE = [
  "You keep the log of a lighthouse. Answer from the log only.",
  ...Array.from({ length: 40 }, (_, i) => {
    const winds = ["north", "east", "south", "west"];
    return `Day ${i + 1}: wind from the ${winds[(i * 7) % 4]}, ${3 + ((i * 5) % 9)} ships passed, ` +
      `the lamp burned ${9 + (i % 4)} hours and took ${20 + ((i * 3) % 7)} litres of oil.`;
  }),
  "Question: what was the wind like on day 12?",
].join("\n");

export function setUpAsk(actions, getState) {
  const box = byId("prompt");
  const model = byId("model");
  const answer = byId("answer");
  box.value = "What is the capital of France?";
  let running = null;
  let asks = []; // of this prompt, the latest first

  const prompt = () => {
    const body = { messages: [{ role: "user", content: box.value }] };
    if (model.value) body.model = model.value;
    return body;
  };

  async function ask() {
    if (running) return running.abort();
    if (!box.value.trim()) return;
    running = new AbortController();
    setText(byId("ask"), "Stop");
    answer.hidden = false;
    setText(answer, "");
    answer.classList.add("waiting");
    const begun = performance.now();
    const asked = { text: box.value, id: null, ttft: null, usage: null };
    try {
      const body = {
        ...prompt(), stream: true, stream_options: { include_usage: true },
        max_tokens: Number(byId("max-tokens").value) || 48, temperature: 0,
      };
      const response = await post("admin/ask", body, running.signal);
      for await (const data of events(response)) {
        if (data === "[DONE]") break;
        take(asked, JSON.parse(data), begun);
      }
    } catch (error) {
      if (error.name !== "AbortError") say(error.message, true);
    } finally {
      running = null;
      setText(byId("ask"), "Ask");
      answer.classList.remove("waiting");
      show();
    }
  }

  function take(asked, chunk, begun) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (asked.ttft === null) {
      asked.ttft = (performance.now() - begun) / 1e3;
      asked.id = chunk.id;
      if (asks.length && asks[0].text !== asked.text) asks = [];
      asks = [asked, ...asks].slice(0, MAX_SHOWN);
      answer.classList.remove("waiting");
    }
    if (chunk.usage) asked.usage = chunk.usage;
    const delta = chunk.choices?.[0]?.delta ?? {};
    answer.append(delta.reasoning_content ?? "", delta.content ?? "");
    show();
  }

  function show() {
    const slowest = Math.max(...asks.map((asked) => asked.ttft));
    const { requests, cluster } = getState();
    byId("asked").replaceChildren(
      ...asks.map((asked, i) => {
        const request = requests.get(asked.id);
        const before = asks[i + 1];
        const sooner = before && before.ttft / asked.ttft > 1.15;
        const bar = stackedBar([["ttft-bar", asked.ttft]], slowest, "time to first token");
        return el(
          "div",
          { class: "ask-line", "data-ttft": asked.ttft },
          el("span", { class: "nth", text: `${asks.length - i}.` }),
          el("span", { class: "ttft", text: seconds(asked.ttft) }),
          bar,
          el("span", { class: "sooner", text: sooner ? `${times(before.ttft / asked.ttft)} sooner` : "" }),
          el("span", { class: "source" }, ...source(asked, request, cluster)),
        );
      }),
    );
  }

  byId("ask").addEventListener("click", ask);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) ask();
  });
  byId("example").addEventListener("click", () => {
    box.value = EXAMPLE;
    box.focus();
  });
  byId("lookup").addEventListener("click", async () => showFound(await actions.lookup(prompt())));
  byId("pin").addEventListener("click", () => actions.pin(prompt()));
  byId("unpin").addEventListener("click", () => actions.unpin(prompt()));

  return {
    draw(state, changed) {
      showModels(model, state.cluster?.models ?? []);
      if (changed.some((request) => asks.some((asked) => asked.id === request.request_id))) show();
    },
  };
}

const times = (factor) => `${factor < 10 ? factor.toFixed(1) : Math.round(factor)} ×`;

/** The prompt's blocks as squares, and in words where they came from. */
function source(asked, request, cluster) {
  if (!request) return [];
  const cached = firstCached(request);
  const worker = request.attempts[0].worker_id;
  const blockSize = cluster?.workers.find((one) => one.worker_id === worker)?.block_size ?? 32;
  const blocks = Math.ceil(request.prompt_tokens / blockSize);
  const squares = el("span", { class: "blocks", "aria-hidden": "true" });
  const kinds = TIERS.flatMap((tier) => {
    return Array(Math.round((cached[tier] ?? 0) / blockSize)).fill(tier);
  });
  while (kinds.length < blocks) kinds.push("computed");
  squares.append(...kinds.slice(0, MAX_SQUARES).map((kind) => el("i", { class: kind })));
  const texts = TIERS.filter((tier) => cached[tier]).map((tier) => {
    const lenders = request.attempts[0].fetch.map((range) => range.worker_id).join(", ");
    const from = tier === "remote" && lenders ? `peer ${lenders}` : TIER_LABELS[tier];
    return `${cached[tier]} tokens from ${from}`;
  });
  const computed = request.prompt_tokens - sum(cached);
  texts.push(`${computed} computed`);
  return [squares, el("span", { class: "fine", text: `${texts.join(", ")} on ${worker}` })];
}

function showModels(select, models) {
  select.hidden = models.length < 2;
  const known = [...select.options].map((option) => option.value);
  if (JSON.stringify(known) === JSON.stringify(models)) return;
  const chosen = select.value;
  select.replaceChildren(...models.map((id) => el("option", { value: id, text: id })));
  if (models.includes(chosen)) select.value = chosen;
}

function showFound(found) {
  const root = byId("found");
  root.hidden = found === null;
  if (found === null) return;
  const rows = Object.entries(found.workers).map(([id, worker]) => {
    if (worker.state !== "done") {
      return el("div", { class: "found-line" }, el("span", { class: "id", text: id }), worker.error || worker.state);
    }
    const held = worker.matched_tokens_by_tier;
    const parts = TIERS.map((tier) => [tier, held[tier] ?? 0]);
    parts.push(["computed", found.prompt_tokens - worker.matched_tokens]);
    const share = percent(worker.matched_tokens / found.prompt_tokens);
    const names = TIERS.filter((tier) => held[tier]).map((tier) => `${held[tier]} ${TIER_LABELS[tier]}`);
    return el(
      "div",
      { class: "found-line" },
      el("span", { class: "id", text: id }),
      stackedBar(parts, found.prompt_tokens, `${share} cached`),
      el("span", { class: "fine", text: names.join(", ") || "nothing" }),
    );
  });
  const title = `Where the ${found.prompt_tokens} tokens of this prompt are`;
  root.replaceChildren(el("h3", { text: title }), ...rows);
}
