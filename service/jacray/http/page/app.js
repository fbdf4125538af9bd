// Jobs with live progress, and one job with its plan, receipt and pictures. All data come from the service's own API.

import { heatMap, limitOf, scale, short, spectrum } from "./pictures.js";
import { read, singularValues } from "./tensors.js";

const FINAL = ["done", "failed", "cancelled"], KEY = "jacray-token", EVERY = 2000;
const MOST_NUMBERS = 4e6, MOST_TILES = 64, MOST_SVD = 64;
const $ = (id) => document.getElementById(id);

class Problem extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem(KEY), headers = { Accept: "*/*", ...options.headers };
  if (token && /[^!-~]/.test(token)) throw new Problem(401, "no token looks like that"); // nor can a header hold it
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, told.detail || `${answer.status} ${answer.statusText}`);
}

const json = async (path, options) => (await ask(path, options)).json();
const job_path = (id, rest = "") => `/v1/jobs/${encodeURIComponent(id)}${rest}`;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const count = (n) => Number(n).toLocaleString("en");
const ago = (seconds) => {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  for (const [size, name] of [[86400, "day"], [3600, "hour"], [60, "minute"]]) {
    const n = Math.floor(past / size);
    if (n) return `${n} ${name}${n > 1 ? "s" : ""} ago`;
  }
  return "just now";
};
const seconds = (s) => s >= 90 ? `${(s / 60).toFixed(1)} min` : s >= .1 ? `${s.toPrecision(3)} s` : s >= 1e-3 ? `${(1e3 * s).toPrecision(2)} ms` : "under 1 ms";
const bytes = (n) => {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"], i = n ? Math.min(4, Math.floor(Math.log2(n) / 10)) : 0;
  return `${Number((n / 1024 ** i).toPrecision(3))} ${units[i]}`;
};

function progress(job) {
  const share = job.state === "done" ? 1 : job.samples ? job.samples_done / job.samples : 0;
  const bar = make("div", {
    class: `bar ${job.state}`, role: "progressbar", "aria-label": "samples",
    "aria-valuenow": Math.round(100 * share), "aria-valuemin": 0, "aria-valuemax": 100,
  }, make("i"));
  bar.firstChild.style.width = `${100 * share}%`;
  const words = job.samples ? `${count(job.samples_done)} of ${count(job.samples)} samples` : "not planned yet";
  const again = job.retries ? `, ${count(job.retries)} shard${job.retries > 1 ? "s" : ""} computed again` : "";
  return make("div", { class: "progress" }, bar, make("span", { class: "count" }, words + again));
}

// The list -----------------------------------------------------------------------------------------------------------

function row(job) {
  const link = make("a", { href: `#job/${job.id}` },
    make("span", { class: "id" }, job.id), make("span", { class: `state ${job.state}` }, job.state),
    progress(job), make("span", { class: "method" }, job.method || ""), make("span", { class: "when" }, ago(job.submitted)));
  return make("li", {}, link);
}

async function showList() {
  const { jobs } = await json("/v1/jobs?limit=200");
  $("empty").hidden = jobs.length > 0;
  const focused = document.activeElement?.getAttribute?.("href");
  $("jobs").replaceChildren(...jobs.map(row));
  if (focused?.startsWith("#job/")) [...$("jobs").querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus();
}

// One job ------------------------------------------------------------------------------------------------------------

let shown = null; // what is drawn now: {id, state}
let listening = null; // the reader of a running job's events

function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

async function showJob(id) {
  const job = await json(job_path(id));
  $("job-title").replaceChildren("Job ", make("span", { class: "id" }, id), " ", make("span", { class: `state ${job.state}` }, job.state));
  $("job-progress").replaceChildren(progress(job));
  if (shown?.id === id && shown.state === job.state && shown.planned === job.planned) return;
  shown = { id, state: job.state, planned: job.planned };
  const body = $("job-body"), parts = [];
  if (!FINAL.includes(job.state)) parts.push(cancelButton(id));
  if (job.problem) parts.push(make("p", { class: "problem" }, job.problem.detail));
  parts.push(facts([
    ["Submitted", `${new Date(1000 * job.submitted).toLocaleString()}${job.user ? `, by ${job.user}` : ""}`],
    ["Took", FINAL.includes(job.state) ? seconds(job.elapsed) : null], ["Method", job.method],
    ["Result", job.bytes_out ? bytes(job.bytes_out) : null],
  ]));
  body.replaceChildren(...parts);
  const here = () => shown?.id === id && shown.state === job.state;
  if (job.state === "done") {
    const receipt = await json(job_path(id, "/receipt"));
    await attempt(body, here, () => picturesPart(id, receipt));
    await attempt(body, here, () => receiptPart(receipt));
  }
  if (job.planned) await attempt(body, here, () => planPart(id));
  if (!FINAL.includes(job.state)) listen(id);
}

/** Add a part of the page unless the reader has gone on; one that fails says so and leaves the rest. */
async function attempt(body, here, part) {
  try {
    const made = await part();
    if (made && here()) body.append(...[made].flat());
  } catch (error) {
    if (here()) body.append(make("p", { class: "problem" }, error.message));
  }
}

function cancelButton(id) {
  const button = make("button", { type: "button" }, "Cancel this job");
  button.addEventListener("click", async () => {
    button.disabled = true;
    await ask(job_path(id, "/cancel"), { method: "POST" }).catch((error) => { button.textContent = error.message; });
    tick();
  });
  return make("p", {}, button);
}

async function listen(id) {
  if (listening?.id === id) return;
  listening?.stop.abort();
  listening = { id, stop: new AbortController() };
  const mine = listening;
  try {
    // Not an EventSource: that cannot send the token.
    const stream = (await ask(job_path(id, "/events"), { signal: mine.stop.signal })).body.getReader();
    while (!(await stream.read()).done) soon();
  } catch { /* the clock below asks again */ } finally {
    if (listening === mine) listening = null;
    tick();
  }
}

async function planPart(id) {
  const plan = await json(job_path(id, "/plan"));
  return plan.explained ? [make("h3", {}, "The plan"), make("pre", {}, plan.explained)] : null;
}

function receiptPart(receipt) {
  const check = receipt.verified, lost = receipt.nonfinite?.length ?? 0, parts = [make("h3", {}, "The receipt")];
  if (check?.checks) {
    const words = check.passed
      ? `✓ All ${check.checks} independent checks passed; the largest relative error is ${short(check.worst_error)}.`
      : `✗ A check failed; the largest relative error is ${short(check.worst_error)}.`;
    parts.push(make("p", { class: `verdict ${check.passed ? "good" : "bad"}` }, words));
  } else parts.push(make("p", {}, "Not checked: verify was off."));
  const versions = Object.entries(receipt.versions ?? {}).map(([name, v]) => `${name} ${v}`).join(", ");
  const times = Object.entries(receipt.seconds ?? {}).map(([name, s]) => `${name} ${seconds(s)}`).join(", ");
  parts.push(facts([
    ["NaN, infinity", lost ? `in ${lost} place${lost > 1 ? "s" : ""}; the receipt lists them` : "none"],
    ["Speed", receipt.samples_per_second ? `${count(Math.round(receipt.samples_per_second))} samples per second` : null],
    ["Seconds", times], ["Computed on", receipt.device && `${receipt.device}, ${receipt.threads} thread${receipt.threads > 1 ? "s" : ""} a worker`],
    ["Seed", receipt.seed], ["Versions", versions],
  ]));
  return parts;
}

// Pictures -----------------------------------------------------------------------------------------------------------

const drawable = (array) => array.axis === 0 && !array.factored && array.dims.length > 1
  && array.shape.slice(1).reduce((a, b) => a * b, 1) <= MOST_NUMBERS && ["jacobian", "weighted_gradient"].includes(array.name);

function picturesPart(id, receipt) {
  const arrays = receipt.plan.arrays.filter(drawable), samples = receipt.plan.samples;
  if (!arrays.length || !samples) return [make("h3", {}, "Pictures"), make("p", {}, "No result of this job is small enough, per sample, to be drawn here.")];
  const which = make("select", { id: "which" }, ...arrays.map((a) => make("option", { value: a.key }, a.key)));
  const sample = make("input", { id: "sample", type: "number", min: 0, max: samples - 1, value: 0 });
  const box = make("div"), panel = make("div", { class: "panel" },
    make("div", { class: "choice" }, make("span", {}, make("label", { for: "which" }, "Array"), which),
      make("span", {}, make("label", { for: "sample" }, "Sample"), sample, make("span", { class: "small" }, ` 0 to ${count(samples - 1)}`))),
    box);
  let latest = 0;
  const draw = async () => {
    const turn = ++latest, array = arrays.find((a) => a.key === which.value);
    const i = Math.min(Math.max(0, Math.trunc(Number(sample.value)) || 0), samples - 1);
    try {
      const found = await picture(id, array, i);
      if (turn === latest) box.replaceChildren(...found);
    } catch (error) {
      if (turn === latest) box.replaceChildren(make("p", { class: "problem" }, error.message));
    }
  };
  which.addEventListener("change", draw);
  sample.addEventListener("input", draw);
  draw();
  return [make("h3", {}, "Pictures"), panel];
}

async function picture(id, array, i) {
  const query = new URLSearchParams({ array: array.key, start: i, stop: i + 1 });
  const answer = await ask(`${job_path(id, "/result")}?${query}`, { headers: { Accept: "application/x-safetensors" } });
  const { data, shape } = read(await answer.arrayBuffer())[array.key], inside = shape.slice(1);
  const outs = array.dims.slice(1).filter((d) => d.startsWith("output") || d.startsWith("weight")).length;
  const rows = inside.slice(0, outs).reduce((a, b) => a * b, 1), columns = data.length / rows, limit = limitOf(data);
  const lines = Array.from({ length: rows }, (_, r) => data.subarray(r * columns, (r + 1) * columns));
  const words = array.name === "jacobian"
    ? "How each output changes when one input number is raised: red raises it, blue lowers it, white does nothing."
    : "How the weighted output changes when one input number is raised: red raises it, blue lowers it.";
  const drawn = [make("p", { class: "small" }, words), ...drawing(lines, inside.slice(outs), limit), scale(limit)];
  if (array.name === "jacobian") drawn.push(...spectrumOf(lines, columns));
  return drawn;
}

/** Tiles where the input is a picture, else the matrix as it is: a row per output number, a column per input number. */
function drawing(lines, leaf, limit) {
  const side = leaf.filter((n) => n > 1);
  if (side.length >= 2 && lines.length <= MOST_TILES) return [tiles(lines, leaf, limit)];
  const columns = lines[0].length, flat = new Float64Array(lines.length * columns);
  lines.forEach((line, r) => flat.set(line, r * columns));
  const map = heatMap(flat, lines.length, columns, limit);
  map.className = "matrix";
  map.style.setProperty("--width", `${Math.max(1, Math.min(24, Math.floor(640 / columns), Math.floor(400 / lines.length))) * columns}px`);
  map.setAttribute("aria-label", `${lines.length} by ${columns} numbers`);
  return [make("figure", {}, map, make("figcaption", {}, `${count(lines.length)} row${lines.length > 1 ? "s" : ""}, one per output number; ${count(columns)} columns, one per input number`))];
}

function tiles(lines, leaf, limit) {
  const [height, width] = leaf.slice(-2), planes = lines[0].length / (height * width);
  return make("div", { class: "tiles" }, ...lines.map((line, r) => {
    const map = heatMap(line, height * planes, width, limit); // planes one below the other
    map.setAttribute("aria-label", `output ${r}`);
    return make("figure", {}, map, make("figcaption", {}, lines.length > 1 ? `output ${r}` : "the gradient"));
  }));
}

function spectrumOf(lines, columns) {
  const finite = lines.every((line) => line.every(Number.isFinite));
  if (Math.min(lines.length, columns) > MOST_SVD || lines.length * columns > 1e6 || !finite) return [];
  const few = lines.length <= columns ? lines : Array.from({ length: columns }, (_, c) => lines.map((line) => line[c]));
  const values = singularValues(few);
  if (!values[0]) return [];
  return [make("div", { class: "charts" }, make("figure", {}, spectrum(values),
    make("figcaption", {}, `Singular values of this sample's Jacobian, from ${short(values[0])} to ${short(values[values.length - 1])}`)))];
}

// The clock ----------------------------------------------------------------------------------------------------------

let timer = 0, busy = false, again = false;
const soon = () => { again = true; if (!busy) { clearTimeout(timer); timer = setTimeout(tick, 150); } };

async function tick() {
  clearTimeout(timer);
  if (busy) { again = true; return; }
  busy = true; again = false;
  const id = location.hash.startsWith("#job/") ? location.hash.slice(5) : null; // ids have no character to decode
  try {
    if (id) await showJob(id); else { shown = null; listening?.stop.abort(); await showList(); }
    $("list").hidden = id !== null; $("job").hidden = id === null; $("sign-in").hidden = true;
    state("", location.host);
    document.title = id ? `jacray: job ${id}` : "jacray";
  } catch (error) { lost(error, id); }
  busy = false;
  timer = setTimeout(tick, again ? 150 : document.hidden ? 5 * EVERY : EVERY);
}

function state(kind, text) { $("connection").className = kind; $("connection").textContent = text; }

function lost(error, id) {
  if (error.status === 401) {
    const known = sessionStorage.getItem(KEY) !== null;
    sessionStorage.removeItem(KEY);
    $("list").hidden = $("job").hidden = true; $("sign-in").hidden = false;
    state(known ? "lost" : "", known ? "That token is not known here." : "");
  } else if (error.status === 404 && id) {
    $("list").hidden = true; $("job").hidden = false; shown = null;
    $("job-title").textContent = "No such job"; $("job-progress").replaceChildren();
    $("job-body").replaceChildren(make("p", {}, "It was deleted, or it is not yours."));
  } else state("lost", error.status ? error.message : "The service does not answer; trying again.");
}

$("here").textContent = location.origin;
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("token").value.trim());
  $("token").value = "";
  tick();
});
addEventListener("hashchange", tick);
document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
tick();
