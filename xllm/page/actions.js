// What operators do: each asks first, then says what came of it, worker by worker.

import { act } from "./client.js";
import { byId, el, sum } from "./dom.js";

const TOAST_MS = 6000;

let hiding = 0;

export function say(message, isBad = false) {
  const toast = byId("toast");
  toast.textContent = message;
  toast.className = isBad ? "toast bad" : "toast";
  toast.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (toast.hidden = true), TOAST_MS);
}

/**
 * Asks; the value of its field (or true), or null if it was not confirmed. `field` is {label, value}
 * for a number, {label, choices} for one of [value, text].
 */
export function confirm({ title, text, yes, danger = false, field = null }) {
  const dialog = byId("confirm");
  const input = byId("confirm-value");
  const choice = byId("confirm-choice");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-field").hidden = field === null;
  byId("confirm-label").textContent = field?.label ?? "";
  input.hidden = field?.choices !== undefined;
  choice.hidden = !input.hidden;
  input.value = field?.value ?? "";
  choice.replaceChildren(
    ...(field?.choices ?? []).map(([value, label]) => el("option", { value, text: label })),
  );
  const button = byId("confirm-yes");
  button.textContent = yes;
  button.className = danger ? "danger" : "primary";
  return new Promise((resolve) => {
    let answer = null;
    button.onclick = () => {
      if (field === null) answer = true;
      else answer = field.choices ? choice.value : Number(input.value);
      if (!Number.isNaN(answer)) dialog.close();
    };
    byId("confirm-no").onclick = () => dialog.close();
    dialog.onclose = () => resolve(answer);
    dialog.showModal();
  });
}

async function attempt(what) {
  try {
    return await what();
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

/** `lines`: what a worker's answer says; failures are named by worker. */
function report(answer, done) {
  if (answer === null) return;
  const failed = Object.entries(answer.workers).filter(([, worker]) => worker.state !== "done");
  if (!failed.length) return say(done(Object.values(answer.workers)));
  const reasons = failed.map(([id, worker]) => `${id}: ${worker.error || worker.state}`);
  say(reasons.join("; "), true);
}

export function setUpActions(getState) {
  const tiers = [["", "all tiers"], ["device", "device"], ["host", "host"], ["disk", "disk"]];

  async function clear(workers) {
    const tier = await confirm({
      title: workers ? `Clear the cache of ${workers[0]}?` : "Clear the caches of all workers?",
      text: "What is cached is computed again when it is asked for. Running requests go on.",
      yes: "Clear",
      danger: true,
      field: { label: "what", choices: tiers },
    });
    if (tier === null) return;
    const body = { tier: tier || null, workers };
    report(await attempt(() => act("admin/cache/clear", body)), (answers) => {
      const cleared = answers.reduce((all, answer) => all + sum(answer.cleared_blocks), 0);
      return `${cleared} blocks cleared`;
    });
  }

  async function drain(worker) {
    const others = getState().cluster.workers.filter(
      (other) => other.worker_id !== worker && other.state === "ready",
    );
    const warning = others.length ? "" : " Nobody else is ready to serve.";
    const ok = await confirm({
      title: `Drain ${worker}?`,
      text: `It takes no new requests, lets running ones end, and ends itself.${warning}`,
      yes: "Drain",
      danger: true,
    });
    if (!ok) return;
    const answer = await attempt(() => act("admin/drain", { workers: [worker] }));
    report(answer, () => `${worker} is draining`);
  }

  async function pin(prompt) {
    const minutes = await confirm({
      title: "Pin this prompt?",
      text: "Its blocks stay in every tier where they are or come to be, and cannot be evicted.",
      yes: "Pin",
      field: { label: "minutes", value: 60 },
    });
    if (!minutes) return;
    const answer = await attempt(() => act("admin/cache/pin", { ...prompt, ttl: minutes * 60 }));
    report(answer, (answers) => {
      const pinned = Math.max(0, ...answers.map((answer) => answer.pinned_blocks));
      return `${pinned} blocks pinned for ${minutes} min`;
    });
  }

  async function unpin(prompt) {
    report(await attempt(() => act("admin/cache/unpin", prompt)), () => "unpinned");
  }

  const lookup = (prompt) => attempt(() => act("admin/cache/lookup", prompt));

  byId("clear-all").addEventListener("click", () => clear(null));
  return { clear, drain, pin, unpin, lookup };
}
