// Talking to the master: calls, the stream of news, the operators' key. The key is sent in a header,
// which no other site's page can do, and is kept by this tab only.

import { byId } from "./dom.js";

const KEY = "xllm-operator-key";
const RETRY_MS = 1000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    const { error } = await response.json();
    message = error?.message ?? error ?? message;
  } catch {
    // Not JSON: the status has to do.
  }
  return new Refused(response.status, message);
}

/** A POST; the response, which may stream. Throws Refused. */
export async function post(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (response.status === 401) askForKey("The key is not right any more.");
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function act(path, body) {
  return (await post(path, body)).json();
}

/** The data of each server-sent event of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

/** Follows the cluster for ever: `onNews` gets each event, `onStatus` live or reconnecting. */
export async function follow(onNews, onStatus) {
  for (;;) {
    try {
      const response = await fetch("admin/live", { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        const had = sessionStorage.getItem(KEY) !== null;
        await askForKey(had ? "That is not the key." : "");
        continue;
      }
      if (!response.ok) throw await refusal(response);
      onStatus("live");
      let isFirst = true;
      for await (const data of events(response)) {
        onNews(JSON.parse(data), isFirst);
        isFirst = false;
      }
    } catch (error) {
      console.warn(error);
    }
    onStatus("reconnecting");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

let asking = null;

/** Resolves when a key was given. */
function askForKey(problem) {
  sessionStorage.removeItem(KEY);
  byId("forget-key").hidden = true;
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    byId("key-error").textContent = problem;
    const take = () => {
      if (!input.value) return;
      sessionStorage.setItem(KEY, input.value);
      input.value = "";
      byId("forget-key").hidden = false;
      dialog.close();
    };
    byId("key-ok").onclick = take;
    input.onkeydown = (event) => event.key === "Enter" && take();
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

export function setUpKey() {
  const button = byId("forget-key");
  button.hidden = sessionStorage.getItem(KEY) === null;
  button.addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    location.reload();
  });
}
