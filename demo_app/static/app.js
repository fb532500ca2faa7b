// The page is served complete; this module makes its buttons work and listens to the messages.

const STRIP_LENGTH = 20;
const $ = (id) => document.getElementById(id);
const nameOf = (worker) => (worker === null ? "one process" : `worker ${worker}`);

function say(id, text) {
  $(id).textContent = text;
}

/** Ask the app; every answer that names its worker is shown in the strip. */
async function ask(path, form) {
  const response = await fetch(path, form ? { method: "POST", body: new URLSearchParams(form) } : {});
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(answer.error ?? (response.status === 503 ? "The shared state is away; try again." : `Error ${response.status}`));
  }
  if ("worker" in answer) remember(answer.worker);
  return answer;
}

/** Run what a button does; show what went wrong, if anything did. */
function on(id, event, action) {
  $(id).addEventListener(event, async (happened) => {
    happened.preventDefault();
    const button = happened.submitter ?? $(id);
    if (button.getAttribute("aria-disabled") === "true") return; // `disabled` would take the keyboard's focus away
    button.setAttribute("aria-disabled", "true");
    say("problem", "");
    try {
      await action(happened);
    } catch (error) {
      say("problem", error instanceof TypeError ? "No answer; is the server running?" : error.message);
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}

// --- who answered ---

const answers = JSON.parse(sessionStorage.getItem("answers") ?? "[]");

function remember(worker) {
  answers.push(worker);
  answers.splice(0, answers.length - STRIP_LENGTH);
  sessionStorage.setItem("answers", JSON.stringify(answers));
  const cells = answers.map((slot) => paint(document.createElement("li"), slot, slot ?? "–"));
  const rest = Array.from({ length: STRIP_LENGTH - cells.length }, () => document.createElement("li"));
  $("strip").replaceChildren(...cells, ...rest);
}

function paint(element, worker, text) {
  element.classList.add("worker");
  element.dataset.slot = worker === null ? "" : worker % 8;
  if (text !== undefined) element.textContent = text;
  return element;
}

function showAnswer({ worker, pid }) {
  say("worker", nameOf(worker));
  say("pid", pid);
  paint($("answer"), worker);
}

function count(workers) {
  const times = new Map();
  for (const worker of workers) times.set(worker, (times.get(worker) ?? 0) + 1);
  const parts = [...times].sort().map(([worker, number]) => `${nameOf(worker)}: ${number}`);
  return parts.join(", ");
}

on("ask", "click", async () => {
  showAnswer(await ask("whoami"));
  say("spread", `Answered by ${$("worker").textContent}.`);
});

on("ask-many", "click", async () => {
  const seen = [];
  for (let i = 0; i < STRIP_LENGTH; i++) {
    const answer = await ask("whoami");
    showAnswer(answer);
    seen.push(answer.worker);
  }
  say("spread", `20 answers: ${count(seen)}.`);
});

// --- session ---

function showSession({ user, count }) {
  say("count", count);
  say("me", user ?? "");
  $("login").hidden = Boolean(user);
  $("logout").hidden = !user;
}

on("increment", "click", async () => {
  const { count, worker } = await ask("counter", {});
  say("count", count);
  say("session-note", `Counted to ${count} by ${nameOf(worker)}.`);
});

on("login", "submit", async () => {
  showSession(await ask("login", { user: $("user").value }));
  $("logout").querySelector("button").focus();
});

on("logout", "submit", async () => {
  showSession(await ask("logout", {}));
  $("user").focus();
});

// --- cache ---

on("read", "click", async () => {
  const startedAt = performance.now();
  const { value, computed_by } = await ask("cached");
  const took = Math.round(performance.now() - startedAt);
  say("value", value);
  $("swatch").style.setProperty("--swatch", value);
  say("cache-note", `Computed by ${nameOf(computed_by)}, read in ${took} ms.`);
});

// --- messages ---

const messages = JSON.parse(sessionStorage.getItem("messages") ?? "[]"); // a reload goes on where the page was
const KEPT_MESSAGES = 50;

function receive(event) {
  if (messages.some(({ id }) => id === event.lastEventId)) return;
  const message = { id: event.lastEventId, ...JSON.parse(event.data) };
  messages.push(message);
  messages.splice(0, messages.length - KEPT_MESSAGES);
  sessionStorage.setItem("messages", JSON.stringify(messages));
  show(message);
}

function show({ text, user, worker }) {
  const item = document.createElement("li");
  const by = paint(document.createElement("span"), worker, nameOf(worker));
  by.classList.add("by");
  const from = document.createElement("span");
  from.className = "from";
  from.textContent = `${user ?? "somebody"}: `;
  item.append(by, from, text);
  const list = $("messages");
  list.querySelector(".empty")?.remove();
  list.append(item);
  if (list.children.length > KEPT_MESSAGES) list.firstElementChild.remove();
  list.scrollTop = list.scrollHeight;
}

function setLive(isLive) {
  $("live").dataset.live = isLive ? "yes" : "no";
  say("live", isLive ? "live" : "reconnecting");
}

/** A browser reopens a broken stream by itself, but gives up when the answer was an error; then this opens a new one. */
function listen() {
  const last = messages.at(-1);
  const stream = new EventSource(last ? `events?lastEventId=${encodeURIComponent(last.id)}` : "events");
  stream.onopen = () => setLive(true);
  stream.onmessage = receive;
  stream.onerror = () => {
    setLive(false);
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

on("broadcast", "submit", async () => {
  await ask("broadcast", { text: $("text").value });
  $("text").value = "";
  $("text").focus();
});

const served = document.body.dataset.worker;
const worker = served === "" ? null : Number(served);
paint($("answer"), worker);
remember(worker);
messages.forEach(show);
ask("me").then(showSession, (error) => say("problem", error.message));
listen();
