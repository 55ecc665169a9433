// The board: what is open, live. It uses only the API that every client has; /docs describes it.

const byId = (id) => document.getElementById(id);
/** Make an element. Its texts become text nodes, so what people type is never read as HTML. */
function make(tag, properties, ...content) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...content);
  return element;
}

// ── Language: board.html has the Russian texts of the page beside the English ones ──────────────
const ENGLISH = {
  open: "open", in_progress: "in progress", resolved: "resolved", closed: "closed",
  created: "reported", live: "● live", offline: "Not connected", saved: "Saved",
  conflict: "Somebody was faster, so your change was not made. What happened:",
};
const RUSSIAN = {
  open: "открыт", in_progress: "в работе", resolved: "решён", closed: "закрыт",
  created: "создан", live: "● на связи", offline: "Нет связи", saved: "Сохранено",
  conflict: "Кто-то успел раньше, поэтому ваше изменение не сохранено. Вот что произошло:",
};
const language = navigator.languages.find((name) => /^(en|ru)\b/.test(name)) ?? "en";
const texts = language.startsWith("ru") ? RUSSIAN : ENGLISH;
const ageFormat = new Intl.RelativeTimeFormat(language, { numeric: "auto" });

/** Say in words how long ago something happened: "5 minutes ago". */
function sayAge(timestamp) {
  const seconds = Math.max(0, Date.now() - Date.parse(timestamp)) / 1000;
  const units = [["day", 86400], ["hour", 3600], ["minute", 60]];
  const [unit, length] = units.find(([, length]) => seconds >= length) ?? ["second", 1];
  return ageFormat.format(-Math.floor(seconds / length), unit);
}

// ── Requests ────────────────────────────────────────────────────────────────────────────────────
/** Send a request; ask for a token if one is needed. Throws the reason of a refusal (RFC 9457). */
async function send(method, path, { headers = {}, body, ...options } = {}) {
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json; charset=utf-8";
  const request = { method, headers, body: JSON.stringify(body), ...options };
  const response = await fetch(path, request).catch(() => { throw new Error(texts.offline); });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: response.statusText }));
  // 403 to a GET: this token may only send events, so another one is needed.
  if (response.status === 401 || (response.status === 403 && method === "GET")) {
    await askForToken(problem.detail);
    return send(method, path, { headers, body, ...options });
  }
  const reasons = [problem.detail, ...(problem.errors ?? []).map((error) => error.detail)];
  throw Object.assign(new Error(reasons.join("\n")), { status: response.status });
}
const fetchJson = async (path, options) => (await send("GET", path, options)).json();

async function askForToken(reason) {
  const question = byId("token");
  question.querySelector("output").textContent = reason;
  if (!question.open) question.showModal();
  await new Promise((resolve) => question.addEventListener("close", resolve, { once: true }));
  sessionStorage.setItem("token", question.querySelector("input").value);
  position = null; // so that the board is read anew: this token may allow more, or less
}

/** Show a message, such as the error of any handler, in the open dialog or in the header. */
function showMessage(text) {
  (document.querySelector("dialog[open] output") ?? byId("message")).textContent = text;
}
addEventListener("unhandledrejection", (event) => showMessage(event.reason.message));

// ── Cards, filters and keys ──────────────────────────────────────────────────────────────────────
const columns = [byId("open"), byId("in_progress"), byId("resolved")];
const filters = byId("filters");
const cards = new Map(); // by id: the <li>, with its incident, note, rank and searchText
let nextFrame;
const simplify = (text) => text.normalize("NFKC").toLowerCase().trim();
const listLabels = ({ labels }) => Object.entries(labels).map((label) => label.join(":"));
const makeLabel = (label) => make("span", { className: "label", title: label }, label);

/** Make what both a card and the dialog show of an incident. */
function makeSummary(incident) {
  const age = make("time", { dateTime: incident.created_at }, sayAge(incident.created_at));
  const origin = make("p", { className: "quiet" }, `${incident.source} · `, age);
  return [make("p", {}, incident.description), origin, ...listLabels(incident).map(makeLabel)];
}

function makeCard(id) {
  const link = make("a", { className: "card", href: `#${id}`, tabIndex: -1 });
  const card = make("li", { note: make("p", { className: "note" }) }, link);
  cards.set(id, card);
  noteObserver.observe(card);
  return card;
}

function updateCard(incident) {
  const { id, status, description, updated_at } = incident;
  const card = cards.get(id) ?? makeCard(id);
  card.incident = incident;
  card.rank = status === "resolved" ? Date.parse(updated_at) : id; // the newest is on top
  card.searchText = [`#${id} ${description}`, ...listLabels(incident)].map(simplify).join("\0");
  card.firstChild.replaceChildren(make("b", {}, `#${id}`), ...makeSummary(incident), card.note);
  cancelAnimationFrame(nextFrame); // many changes are shown together
  nextFrame = requestAnimationFrame(showCards);
}

/** Show the cards that match the filters. A label matches by its beginning; \0 precedes it. */
function showCards() {
  const { q, source, label } = Object.fromEntries(new FormData(filters));
  const fitting = [...cards.values()].filter(({ incident, searchText }) =>
    searchText.includes(simplify(q)) && (!source || source === incident.source)
    && (!label || searchText.includes(`\0${simplify(label)}`)));
  const focused = document.activeElement;
  for (const column of columns) {
    const chosen = fitting.filter(({ incident }) => incident.status === column.id);
    chosen.sort((one, other) => other.rank - one.rank);
    for (const card of new Set(column.children).difference(new Set(chosen))) card.remove();
    chosen.forEach((card, index) => {
      if (card !== column.children[index]) column.insertBefore(card, column.children[index]);
    });
    column.previousElementSibling.dataset.count = chosen.length;
  }
  focused.focus({ preventScroll: true }); // because a card that moves loses the focus
}

// The last note is read, with low priority, when its card is on the screen. A live note is newer.
const noteObserver = new IntersectionObserver(async (changes) => {
  for (const { target: card } of changes.filter((change) => change.isIntersecting)) {
    const path = `incidents/${card.incident.id}/timeline`;
    const timeline = await fetchJson(path, { priority: "low" }).catch(() => null);
    card.note.textContent ||= timeline?.findLast(({ kind }) => kind === "note")?.note ?? "";
    if (timeline) noteObserver.unobserve(card); // or it is read when the card is there again
  }
});

/** Write the filters into the address, so that a view can be shared: #source=partner */
function writeAddress() {
  const query = new URLSearchParams([...new FormData(filters)].filter(([, value]) => value));
  history.replaceState(null, "", `#${query}`);
}

/** "/" goes to the search, ↑ and ↓ to a card, ← and → to a column. Tab also stops at columns. */
document.addEventListener("keydown", (event) => {
  const places = event.key === "ArrowDown" ? "select, dialog" : "input, select, dialog";
  if (event.target.closest(places)) return; // the keys have a meaning of their own there
  const card = event.target.closest("li");
  const column = columns.indexOf(event.target.closest("ul"));
  const targets = {
    "/": filters.elements.q,
    ArrowUp: card?.previousSibling?.firstChild,
    ArrowDown: (card?.nextSibling ?? columns[column] ?? document).querySelector(".card"),
    ArrowLeft: columns[column - 1],
    ArrowRight: columns[column + 1],
  };
  if (!targets[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  targets[event.key].focus();
});

// ── One incident ────────────────────────────────────────────────────────────────────────────────
const dialog = byId("incident");
const makeKey = () => crypto.getRandomValues(new Uint32Array(4)).join("-");
let requestKey = makeKey(); // with it, a note or a report that is sent twice is stored once
let seen = null; // as it was last read: without live changes, so that If-Match notices them

/** Do what the address says: open the dialog of an incident (#42), or else set the filters. */
async function readAddress() {
  const address = location.hash.slice(1);
  showMessage("");
  if (!Number(address)) {
    const wanted = new URLSearchParams(address);
    for (const field of filters.elements) field.value = wanted.get(field.name) ?? "";
    showCards();
    return dialog.close();
  }
  await readIncident(Number(address)).catch((error) => { writeAddress(); throw error; });
  if (!dialog.open && location.hash.slice(1) === address) dialog.showModal();
  showMessage("");
}

async function readIncident(id) {
  // The incident comes first: what changes in between is on the timeline, and If-Match notices it.
  const incident = await fetchJson(`incidents/${id}`);
  const timeline = await fetchJson(`incidents/${id}/timeline`);
  if (Number(location.hash.slice(1)) !== id) return; // another one was opened meanwhile
  if (seen?.incident.id !== id) dialog.querySelectorAll("form").forEach((form) => form.reset());
  seen = { incident, timeline };
  byId("timeline").replaceChildren();
  showIncident(incident, timeline);
}

/** Show an incident in the dialog, and further entries of its timeline, the newest on top. */
function showIncident(incident, entries) {
  byId("incident-title").textContent = `#${incident.id} ${texts[incident.status]}`;
  byId("summary").replaceChildren(...makeSummary(incident));
  const buttons = byId("note-form").elements.status;
  for (const button of buttons) button.hidden = button.value === incident.status;
  if (document.activeElement === document.body) byId("timeline").focus(); // lost by a hidden button
  for (const entry of entries) {
    const time = new Date(entry.created_at).toLocaleString(language);
    const head = make("p", { className: "quiet" }, `${entry.actor} · ${time}`);
    byId("timeline").prepend(make("li", {}, head, make("p", {}, describeEntry(entry))));
  }
}

function describeEntry({ kind, note, field, from = "–", to = "–" }) {
  if (kind === "status") return `${texts[from]} → ${texts[to]}`;
  return note ?? (field ? `${field}: ${from} → ${to}` : texts.created);
}

/** Change the incident in the dialog. If it changed since it was read, show what happened. */
async function changeIncident(method, path, body) {
  const { incident: { id, version }, timeline } = seen;
  const headers = { PATCH: { "If-Match": `"${version}"` }, POST: { "Idempotency-Key": requestKey } };
  try {
    await send(method, `incidents/${id}${path}`, { headers: headers[method], body });
  } catch (error) {
    if (error.status !== 412) throw error;
    await readIncident(id);
    const news = seen.timeline.slice(timeline.length);
    const lines = news.map((entry) => `${entry.actor}: ${describeEntry(entry)}`);
    throw new Error([texts.conflict, ...lines].join("\n"));
  }
  await readIncident(id);
  showMessage(texts.saved);
}

/** When a form is sent, call a function with its fields, and then empty the form. */
function onSubmit(id, act) {
  const form = byId(id);
  form.addEventListener("input", () => { requestKey = makeKey(); showMessage(""); });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.ariaBusy) return; // because a double click must send the form once
    form.ariaBusy = "true";
    const fields = Object.fromEntries(new FormData(form, event.submitter));
    const sentKey = requestKey;
    await act(fields).finally(() => { form.ariaBusy = null; });
    if (requestKey === sentKey) form.reset(); // otherwise more was typed meanwhile
    requestKey = makeKey();
  });
}

onSubmit("note-form", ({ note, status }) => {
  if (!status) return changeIncident("POST", "/notes", { note });
  return changeIncident("PATCH", "/status", { status, note: note || undefined });
});

onSubmit("label-form", ({ name, value }) =>
  changeIncident("PATCH", "", { labels: { [name]: value || null } }));

onSubmit("report-form", async (body) => {
  const headers = { "Idempotency-Key": requestKey };
  const response = await send("POST", "incidents/", { headers, body });
  byId("report").close();
  location.hash = (await response.json()).id;
});

// ── Live ────────────────────────────────────────────────────────────────────────────────────────
let position = null; // the id of the last entry that the board knows; null: read everything anew
let isBuffered = false; // a proxy keeps the stream back, so ask for what is new again and again
const pause = () => new Promise((resolve) => setTimeout(resolve, 2000));

/** Read the board anew. `start` was read before, so that no later change is missed. */
async function readBoard(start) {
  const recent = `limit=1000&after=${Math.max(0, start - 1000)}`;
  const moves = await fetchJson(`timeline?kind=status&include=incident&${recent}`);
  const unresolved = await fetchJson("incidents/?status=open,in_progress");
  cards.clear();
  [...moves.map(({ incident }) => incident), ...unresolved].forEach(updateCard);
  // A request without a body shows what the token allows: a writer gets 415, a reader 403.
  const refusal = await send("POST", "incidents/").catch((error) => error);
  document.body.classList.toggle("read-only", refusal.status === 403);
  position = start;
  showCards();
}

function applyEntry(entry) {
  position = entry.id;
  updateCard(entry.incident);
  if (entry.kind === "note") cards.get(entry.incident_id).note.textContent = entry.note;
  const isNews = seen?.incident.id === entry.incident_id && seen.timeline.at(-1).id < entry.id;
  if (isNews) showIncident(entry.incident, [entry]);
}

function showConnection(text) {
  const output = byId("connection");
  output.classList.toggle("live", text === texts.live);
  if (output.textContent !== text) output.textContent = text; // or a screen reader says it again
}

/** Apply entries as they come, each in a line: `data: {"id":7}` in the stream, or `{"id":7}`. */
async function readTimeline() {
  const controller = new AbortController();
  const stop = () => controller.abort(new Error(texts.offline));
  document.addEventListener("visibilitychange", stop, { signal: controller.signal });
  let timer = setTimeout(() => { isBuffered = true; stop(); }, isBuffered ? 40000 : 5000);
  try {
    const headers = { Accept: isBuffered ? "application/x-ndjson" : "text/event-stream" };
    const path = `timeline?include=incident&wait=25&after=${position}`;
    const response = await send("GET", path, { headers, signal: controller.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ""; ;) {
      const { value, done } = await reader.read();
      clearTimeout(timer);
      timer = setTimeout(stop, 40000); // the service sends something every 15 seconds
      if (done && isBuffered) return;
      if (done) throw new Error(texts.offline);
      const lines = (text + value).split("\n");
      text = lines.pop();
      const entries = lines.map((line) => line.match(/^(?:data: )?({.*)/s)?.[1]).filter(Boolean);
      for (const entry of entries) applyEntry(JSON.parse(entry));
    }
  } finally {
    clearTimeout(timer);
    stop();
  }
}

async function followTimeline() {
  for (;;) {
    // A browser opens six connections to a host for all tabs, so a hidden one gives up its own.
    while (document.hidden) await pause();
    try {
      const latest = await send("GET", "timeline?after=latest");
      const newest = Number(latest.headers.get("Timeline-Position"));
      // A position after the newest entry is of another database, such as one before a restore.
      if (position === null || position > newest) await readBoard(newest);
      showConnection(texts.live);
      await readTimeline();
    } catch (error) {
      showConnection(error.status ? error.message : texts.offline);
      await pause();
    }
  }
}

// ── Figures, and the start ───────────────────────────────────────────────────────────────────────
/** Draw a bar for each day. Its value is 0 when there was nothing to count or measure. */
function drawChart(figure, days, values) {
  const highest = Math.max(...values) || 1;
  const bars = values.map((value, day) => `M${16 * day + 8} 35v${(-35 * value) / highest}`);
  const lines = values.map((value, day) => `${days[day].date}: ${value.toFixed(1)}`);
  figure.querySelector("b").textContent = `≤ ${highest.toFixed(1)}`;
  figure.querySelector("path").setAttribute("d", bars.join(""));
  figure.querySelector("title").textContent = lines.join("\n");
}

async function showFigures() {
  const since = new Date(Date.now() - 13 * 86400000).toISOString().slice(0, 10);
  const { days } = await fetchJson(`stats?by=day&since=${since}`); // days in UTC
  const timeZone = "UTC";
  for (const day of days) day.date = new Date(day.day).toLocaleDateString(language, { timeZone });
  const [reported, started, resolved] = document.querySelectorAll("figure");
  drawChart(reported, days, days.map((day) => day.incidents));
  drawChart(started, days, days.map((day) => day.seconds_to.in_progress.p50 / 60));
  drawChart(resolved, days, days.map((day) => day.seconds_to.resolved.p50 / 3600));
}

document.documentElement.lang = language;
const translated = texts === RUSSIAN ? document.querySelectorAll("[data-ru]") : [];
for (const element of translated) element.firstChild.data = element.dataset.ru;
filters.addEventListener("input", () => { showCards(); writeAddress(); });
addEventListener("hashchange", readAddress);
dialog.addEventListener("close", writeAddress);
byId("figures").addEventListener("toggle", ({ target }) => target.open && showFigures());
byId("report-button").addEventListener("click", () => byId("report").showModal());
setInterval(() => {
  for (const time of document.querySelectorAll("time")) time.textContent = sayAge(time.dateTime);
}, 30000);
followTimeline();
readAddress();
