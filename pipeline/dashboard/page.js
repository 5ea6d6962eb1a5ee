"use strict";
// Everything shown becomes a text node; no string is ever parsed as HTML.
const STATES = ["outside", "skipped", "done", "waiting", "running", "failed"];
const AXES = ["z", "y", "x"];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const POLL_MS = 2000;
const MOST_PIXELS = 64;  // on a side of a square of the map
const key = new URLSearchParams(location.search).get("run");
const id = (name) => document.getElementById(name);
let shown = key, run = null, image = null, picked = null, drawn = 0, sought = 0;
const open = new Set();

function el(tag, text, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== null && text !== undefined) node.textContent = String(text);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function fill(node, ...children) { node.replaceChildren(...children); }

// Each cell knows the heading of its column, which a narrow screen shows beside it.
function fillRows(body, rows) {
  const names = [...body.parentNode.querySelectorAll("th")].map((th) => th.textContent);
  for (const row of rows) [...row.children].forEach((cell, k) => { cell.dataset.name = names[k]; });
  fill(body, ...rows);
}

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(); }
function whole(n) { return n === null || n === undefined ? "" : Math.round(n).toLocaleString("en"); }
function short(n) { return n === null || n === undefined ? "" : Math.abs(n) < 1e-6 ? "0" : Number(n.toPrecision(3)).toLocaleString("en", {maximumSignificantDigits: 3}); }

function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return s + "s";
  if (s < 3600) return Math.floor(s / 60) + "m " + String(s % 60).padStart(2, "0") + "s";
  if (s < 86400) return Math.floor(s / 3600) + "h " + String(Math.floor(s % 3600 / 60)).padStart(2, "0") + "m";
  return Math.floor(s / 86400) + "d " + String(Math.floor(s % 86400 / 3600)).padStart(2, "0") + "h";
}

function day(seconds) { return seconds ? new Date(seconds * 1000).toLocaleString() : ""; }

async function get(path) {
  const answer = await fetch(path, {credentials: "same-origin"});
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

function api(part, query = {}) {
  const text = new URLSearchParams(query).toString();
  return "/api/run/" + encodeURIComponent(shown) + part + (text ? "?" + text : "");
}

function pill(node, state) { node.textContent = state; node.className = "pill " + state; }

// The list of runs

function showList(runs) {
  id("list").hidden = false;
  id("run").hidden = true;
  id("name").textContent = runs.length + (runs.length === 1 ? " run" : " runs");
  fillRows(id("runs"), runs.map((r) => {
    const state = el("span"); pill(state, r.state);
    const part = r.blocks_total ? ` (${Math.floor(100 * r.done / r.blocks_total)}\u00a0%)` : "";
    return el("tr", null, {}, el("td", null, {}, r.stranger ? el("span", `${r.name} (of ${r.stranger}, not trusted)`, {title: `agq dashboard ${r.run_dir}`}) : el("a", r.name, {href: "/?run=" + encodeURIComponent(r.key)})),
      el("td", String(r.id || "").slice(0, 8), {class: "quiet whole"}), el("td", r.user || ""),
      el("td", null, {}, el("span", null, {}, state, document.createTextNode(r.stage ? " " + r.stage : ""))),
      el("td", r.blocks_total ? `${whole(r.done)} of ${whole(r.blocks_total)}${part}` : ""),
      el("td", r.failed || "", {class: "n"}), el("td", r.blocks_per_s ? `${short(r.blocks_per_s)}/s` : "", {class: "n"}),
      el("td", r.eta_s === null ? "" : span(r.eta_s), {class: "n"}), el("td", day(r.heard)), el("td", day(r.created)), el("td", r.problem || r.run_dir, {class: "quiet"}));
  }));
}

// One run

function showRun() {
  id("run").hidden = false;
  document.title = `${run.name}: ${run.state}`;
  id("name").textContent = run.name;
  id("folder").textContent = run.run_dir;
  pill(id("state"), run.state);
  id("updated").textContent = [run.note, `from the ${run.source}, ${span(run.now - run.updated)} ago`].filter(Boolean).join("; ");
  fill(id("stages"), ...run.stages.map(stageRow));
  showWorkers(); showFailures(); showReport(); showSettings(); drawChart();
  if (run.blocks) {
    const axis = Number(id("axis").value);
    id("index").max = run.blocks[axis] - 1;
  }
}

function stageRow(s) {
  const total = s.blocks_total || 0;
  const bar = el("div", null, {class: "bar", role: "img", "aria-label": `${s.done} of ${total} blocks done`});
  const parts = [["done", s.done], ["skipped", s.skipped], ["failed", s.failed], ["running", s.running]];
  if (!s.done && s.state === "done") parts.splice(0, 4, ["done", total || 1]);
  for (const [name, n] of parts) {
    if (!n) continue;
    const piece = el("span");
    piece.style.width = `${100 * n / Math.max(total, 1)}%`;
    piece.style.background = css(name);
    bar.append(piece);
  }
  const words = [s.state];
  if (s.step) words.push(`${s.step} ${whole(s.step_done)} of ${whole(s.step_total)}`);
  if (total && s.done + s.skipped) words.push(`${whole(s.done + s.skipped)} of ${whole(total)}`);
  if (s.failed) words.push(`${whole(s.failed)} failed`);
  if (s.blocks_per_s_now !== null && s.state === "running") words.push(`${short(s.blocks_per_s_now)} blocks/s`, `${short(s.voxels_per_s_now / 1e6)} Mvoxel/s`);
  if (s.still_since !== null) words.push(`time left unknown: nothing moves since ${new Date(1000 * s.still_since).toLocaleString()}`);
  else if (s.eta_s !== null) words.push(`${span(s.eta_s)} left`);
  else if (s.started && s.finished) words.push(`in ${span(s.finished - s.started)}`);
  if (s.error) words.push(s.error);
  return el("div", null, {class: "stage"}, el("b", s.name), bar, el("span", words.join(", "), {class: "quiet"}));
}

// A worker has several blocks in hand: it computes one while others are read and written.
function held() {
  const alive = run.workers.filter((w) => w.state !== "ended"), n = alive.reduce((sum, w) => sum + w.current.length, 0);
  return n > alive.length ? ` on ${whole(n)} blocks (read, computed and written side by side)` : "";
}

function showWorkers() {
  const alive = run.workers.filter((w) => w.state !== "ended");
  const slow = alive.filter((w) => w.lags).length;
  id("nworkers").textContent = `${alive.length} at work${held()}` + (slow ? `, ${slow} lagging` : "") + `, ${run.workers.length - alive.length} ended`;
  fillRows(id("workers"), run.workers.slice(0, 200).map((w) => {
    const heard = el("td", w.state === "ended" ? "ended" : span(run.now - w.last) + " ago");
    if (w.lags) heard.append(el("span", " " + w.lags, {class: "lags"}));
    return el("tr", null, {class: w.state}, el("td", w.name), el("td", w.host), el("td", w.job || ""), el("td", w.gpu ? `${w.device}, ${w.gpu}` : w.device),
      el("td", whole(w.done), {class: "n"}), el("td", w.failed || "", {class: "n"}), el("td", short(w.rate), {class: "n"}),
      el("td", w.current.length ? w.current.slice(0, 6).join(", ") + (w.current.length > 6 ? ", ..." : "") + (w.held_s === null ? "" : ` for ${span(w.held_s)}`) : ""), heard);
  }));
}

function command(at) { return `agq view ${run.run_dir} --at ${at.join(",")}`; }

function look(at, segments = []) {
  const chosen = segments.map((s) => `&segment=${s}`).join("");
  return el("a", "open in the viewer", {href: `/view/${encodeURIComponent(shown)}?at=${at.join(",")}${chosen}`, title: command(at), target: "_blank", rel: "noopener"});
}

function logButton(worker, box) {
  const button = el("button", `end of the log of ${worker}`);
  button.addEventListener("click", async () => {
    const text = await (await get(api("/log", {worker}))).text();
    box.replaceChildren(el("pre", text));
  });
  return button;
}

function showFailures() {
  id("failed").hidden = !run.failed;
  if (!run.failed) return;
  id("nfailed").textContent = `${whole(run.failed)} blocks, ${run.failures.length} kind${run.failures.length === 1 ? "" : "s"} of error`;
  const mark = JSON.stringify(run.failures);
  if (id("failures").dataset.mark === mark) return;  // Keep what the reader has opened.
  id("failures").dataset.mark = mark;
  fill(id("failures"), ...run.failures.map((group, k) => {
    const box = el("details", null, {class: "failure"});
    if (k === 0 || open.has(group.summary)) box.open = true;
    box.addEventListener("toggle", () => open[box.open ? "add" : "delete"](group.summary));
    box.append(el("summary", null, {}, el("span", `${whole(group.count)} × `, {class: "count"}), document.createTextNode(group.summary)));
    const body = el("tbody");
    box.append(el("div", null, {class: "scroll"}, el("table", null, {class: "cards"}, el("thead", null, {}, el("tr", null, {}, el("th", "block"), el("th", "ROI (world units, z, y, x)"), el("th", "attempt"), el("th", "worker"), el("th", "look"))), body)));
    fillRows(body, group.blocks.map((b) => {
        const log = el("div");
        const worker = el("td");
        if (b.worker) worker.append(run.here ? logButton(b.worker, log) : document.createTextNode(b.worker));
        worker.append(log);
        const place = el("td", null, {}, ...(b.at && run.here ? [look(b.at)] : []));
        return el("tr", null, {}, el("td", b.block), el("td", b.offset ? `(${b.offset.join(", ")}) + (${b.shape.join(", ")})` : ""), el("td", b.attempt), worker, place);
    }));
    if (group.count > group.blocks.length) box.append(el("p", `and ${whole(group.count - group.blocks.length)} more`, {class: "quiet"}));
    if (group.error) box.append(el("pre", group.error));
    return box;
  }));
}

function figures(title, entries) {
  const rows = entries.map(([name, value]) => el("tr", null, {}, el("td", name.replace(/_s$/, " (s)").replaceAll("_", " "), {class: "quiet"}), el("td", typeof value === "number" ? (Number.isInteger(value) ? whole(value) : short(value)) : value, {class: "n"})));
  return el("div", null, {class: "report"}, el("h3", title), el("table", null, {}, el("tbody", null, {}, ...rows)));
}

const VARIANTS = [["as_is", "as is"], ["background_filled", "filled"], ["background_ignored", "ignored"]];

function scoreTable(scores) {
  const columns = VARIANTS.filter(([key]) => scores[key]), names = Object.keys(scores[columns[0][0]]).filter((name) => typeof scores[columns[0][0]][name] === "number");
  const head = el("tr", null, {}, el("th", "background"), ...columns.map(([, title]) => el("th", title, {class: "n"})));
  const rows = names.map((name) => el("tr", null, {}, el("td", name.replaceAll("_", " "), {class: "quiet"}), ...columns.map(([key]) => el("td", short(scores[key][name]), {class: "n"}))));
  return el("div", null, {class: "report"}, el("h3", "scores"), el("table", null, {}, el("thead", null, {}, head), el("tbody", null, {}, ...rows)));
}

async function showSuspects() {
  const mark = run.suspects;
  id("suspected").hidden = !mark;
  if (!mark || id("suspects").dataset.mark === String(mark)) return;  // Pictures are loaded once.
  const rows = await (await get(api("/suspects"))).json();
  id("suspects").dataset.mark = mark;
  id("suspected").hidden = !rows.length;
  id("nsuspects").textContent = rows.length ? `${whole(rows.length)}, the largest expected error first; pictures: raw, now, mended` : "";
  fill(id("suspects"), ...rows.map((row) => {
    const at = [row.z, row.y, row.x], segments = row.kind === "merge" ? [row.segment] : [row.segment, row.other_segment];
    const text = el("figcaption", null, {}, el("b", `${row.rank}. ${row.kind}`), document.createTextNode(` of ${segments.join(" and ")}: probability ${row.probability.toFixed(2)}, ${whole(row.voxels)} voxels; ${row.why}; ${at.join(", ")} `), look(at, segments));
    const picture = row.drawn ? [el("img", null, {src: api("/suspect", {rank: row.rank, of: mark}), alt: `raw, now and mended at ${at.join(", ")}`, loading: "lazy"})] : [];
    return el("figure", null, {}, ...picture, text);
  }));
}

function showPicture() {
  const link = id("picture"), address = api("/picture", {of: run.picture || ""});
  link.hidden = !run.picture;
  // Drawn anew by a later command, it has another address.
  if (run.picture && link.getAttribute("href") !== address) link.href = link.firstChild.src = address;
}

function showReport() {
  const stages = Object.entries(run.results), evaluation = run.results.evaluate, look = run.plausibility;
  id("results").hidden = stages.length === 0 && !look && !run.picture;
  // What has come out stands first when there is nothing more to wait for.
  const finished = run.state === "done", before = id(finished ? "stages" : "settings");
  if (before.previousElementSibling !== id("results")) before.before(id("results"));
  showPicture();
  showSuspects().catch((error) => { id("nsuspects").textContent = error.message; });
  const parts = [];
  if (evaluation && Object.keys(evaluation.scores || {}).length) parts.push(scoreTable(evaluation.scores));
  if (look) parts.push(figures("is it plausible?", look.facts));
  const largest = (run.results.stitch || {}).largest;
  if (largest) parts.push(figures("largest segments (voxels)", largest.map((s) => ["segment " + s.id, s.voxels])));
  fill(id("scores"), ...parts);
  fill(id("advice"), ...(look ? look.advice : []).map((a) => el("p", null, {class: "advice"}, el("b", a.title), document.createTextNode(": " + a.text), el("code", a.command))));
  const counts = stages.filter(([stage]) => stage !== "evaluate");
  id("figures").hidden = counts.length === 0;
  fill(id("report"), ...counts.map(([stage, report]) => figures(stage, Object.entries(report).filter(([, v]) => typeof v === "number"))));
}

function showSettings() {
  id("config").textContent = run.settings.config;
  fill(id("versions"), ...Object.entries(run.settings.versions).map(([n, v]) => el("tr", null, {}, el("td", n), el("td", v))));
  id("commands").textContent = run.settings.commands.map((c) => `${day(c.time)}  ${c.user}@${c.host}  ${(c.argv || []).join(" ")}`).join("\n");
}

function drawChart() {
  const canvas = id("chart"), h = run.history, ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight, left = 46, right = width - 50, low = 18, top = 14;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  c.font = "11px system-ui, sans-serif"; c.strokeStyle = css("line");
  const values = h.blocks_per_s, voxels = h.voxels_per_s.map((v) => v / 1e6), n = values.length;
  const most = Math.max(...values, 1e-9), mostVoxels = Math.max(...voxels, 1e-9);
  const stage = run.stages.find((s) => s.name === "predict");
  id("speed").textContent = stage && stage.blocks_per_s !== null ? `mean ${short(stage.blocks_per_s)} blocks/s, ${short(stage.voxels_per_s / 1e6)} Mvoxel/s` : "";
  const x = (k) => left + k * (right - left) / Math.max(n, 1), y = (part) => height - low - part * (height - low - top);
  for (const part of [0, 0.5, 1]) {
    c.beginPath(); c.moveTo(left, y(part)); c.lineTo(right, y(part)); c.stroke();
    c.fillStyle = css("done"); c.textAlign = "right"; c.fillText(part && most <= 1e-9 ? "" : short(part * most), left - 6, y(part) + 4);
    c.fillStyle = css("voxels"); c.textAlign = "left"; c.fillText(part && mostVoxels <= 1e-9 ? "" : short(part * mostVoxels), right + 6, y(part) + 4);
  }
  c.fillStyle = css("done");
  values.forEach((v, k) => c.fillRect(x(k), y(v / most), Math.max(x(k + 1) - x(k) - 0.5, 0.5), height - low - y(v / most)));
  c.strokeStyle = css("voxels"); c.lineWidth = 1.5; c.beginPath();
  voxels.forEach((v, k) => c.lineTo((x(k) + x(k + 1)) / 2, y(v / mostVoxels)));
  c.stroke();
  c.fillStyle = css("quiet");
  c.textAlign = "left"; c.fillText(new Date(h.start * 1000).toLocaleTimeString(), left, height - 4);
  c.textAlign = "right"; c.fillText(new Date((h.start + n * h.seconds) * 1000).toLocaleTimeString(), right, height - 4);
}

// The block map

function rgb(text) {
  const c = document.createElement("canvas").getContext("2d");
  c.fillStyle = text;
  return [1, 3, 5].map((k) => parseInt(c.fillStyle.slice(k, k + 2), 16));
}

function ramp(t) {
  const at = Math.min(t * (VIRIDIS.length - 1), VIRIDIS.length - 1.001), k = Math.floor(at);
  return VIRIDIS[k].map((v, i) => Math.round(v + (at - k) * (VIRIDIS[k + 1][i] - v)));
}

async function loadMap() {
  const axis = Number(id("axis").value), by = id("by").value, asked = ++sought;
  // The server chooses the layer that is shown first: one where something happens.
  const answer = await get(api("/map", image ? {by, axis, index: id("index").value} : {by, axis}));
  const cells = new Uint8Array(await answer.arrayBuffer());
  if (asked < drawn) return;  // A later request was answered first.
  drawn = asked;
  if (!image) id("index").value = JSON.parse(answer.headers.get("X-Map")).index;
  image = Object.assign(JSON.parse(answer.headers.get("X-Map")), {cells, axis, by});
  id("layer").value = `${image.index + 1} of ${run.blocks[axis]}`;
  drawMap();
}

function drawMap() {
  const [rows, columns] = image.shape;
  const colours = image.by === "state" ? STATES.map((name) => rgb(css(name))) : Array.from({length: 256}, (_, v) => v ? ramp((v - 1) / 254) : rgb(css("outside")));
  const scale = Math.max(1, Math.floor(Math.min((id("mapbox").clientWidth - 12) / columns, 640 / Math.max(rows, columns), MOST_PIXELS)));
  const gap = scale >= 5 ? 1 : 0, canvas = id("map");
  canvas.width = columns * scale; canvas.height = rows * scale;
  const c = canvas.getContext("2d"), data = c.createImageData(canvas.width, canvas.height);
  const back = rgb(css("outside"));
  for (let r = 0; r < canvas.height; r++) {
    for (let k = 0; k < canvas.width; k++) {
      const border = gap && (r % scale === scale - 1 || k % scale === scale - 1);
      const colour = border ? back : colours[image.cells[Math.floor(r / scale) * columns + Math.floor(k / scale)]] || back;
      data.data.set([colour[0], colour[1], colour[2], 255], 4 * (r * canvas.width + k));
    }
  }
  c.putImageData(data, 0, 0);
  const sides = AXES.filter((_, a) => a !== image.axis);
  const note = el("span", `${sides[0]} down, ${sides[1]} across` + (image.step > 1 ? `; a square is ${image.step} × ${image.step} blocks` : ""), {class: "quiet"});
  if (image.by === "state") {
    fill(id("legend"), ...STATES.map((name, k) => [name, k]).filter(([, k]) => run.states[k]).map(([name, k]) => {
      const box = el("i"); box.style.background = css(name);
      return el("span", null, {class: "key"}, box, document.createTextNode(`${name} ${whole(run.states[k])}`));
    }), note);
  } else {
    const box = el("i", null, {class: "ramp"});
    box.style.background = `linear-gradient(90deg, ${VIRIDIS.map((v) => `rgb(${v})`).join(",")})`;
    const unit = image.by === "seconds" ? " s" : "";
    fill(id("legend"), el("span", null, {class: "key"}, document.createTextNode(short(image.low) + unit), box, document.createTextNode(short(image.high) + unit)), note);
  }
}

function cellAt(event) {
  const canvas = id("map"), box = canvas.getBoundingClientRect(), [rows, columns] = image.shape;
  const row = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
  const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
  const at = [row * image.step, column * image.step];
  at.splice(image.axis, 0, image.index);
  return {at, value: image.cells[row * columns + column]};
}

async function pick(event) {
  if (!image) return;
  picked = {at: cellAt(event).at, axis: image.axis, step: image.step};
  await showBlock();
}

async function showBlock() {
  const b = await (await get(api("/block", {at: picked.at.join(","), axis: picked.axis, step: picked.step}))).json();
  const r = b.record || {}, box = id("block");
  box.hidden = false;
  const words = [STATES[b.code]];
  if (r.finished) words.push(`in ${short(r.finished - r.started)} s`);
  if (r.labels !== undefined) words.push(`${whole(r.labels)} labels`, `${whole(r.dropped)} dropped queries`);
  if (r.worker) words.push("by " + r.worker);
  if (r.attempt > 1) words.push(`attempt ${r.attempt}`);
  fill(box, el("b", `Block ${b.block}`), document.createTextNode(` at ${b.index.join(", ")}: ${words.join(", ")}`),
    el("div", `ROI (${b.offset.join(", ")}) + (${b.shape.join(", ")})`, {class: "quiet"}));
  if (run.here) box.append(look(b.at), el("div", command(b.at), {class: "quiet"}));
  if (r.reason || r.error) box.append(el("pre", [r.reason, r.error].filter(Boolean).join("\n")));
}

function hover(event) {
  if (!image) return;
  const {at, value} = cellAt(event);
  id("map").title = `block ${at.join(", ")}: ` + (image.by === "state" ? STATES[value] : value ? short(image.low + (value - 1) / 254 * (image.high - image.low)) : "none");
}

// The loop

async function tick() {
  try {
    if (!document.hidden || !run) {
      const runs = key ? null : await (await get("/api/runs")).json();
      if (runs && runs.length !== 1) {
        showList(runs);
      } else {
        if (runs) shown = runs[0].key;
        const found = await (await get(api(""))).json();
        if (found.loading) {
          id("name").textContent = found.name;
          throw new Error("Reading the journal of this run.");
        }
        run = found;
        showRun();
        if (run.blocks) await loadMap();
      }
      id("problem").hidden = true;
      document.body.dataset.ready = "yes";
    }
  } catch (error) {
    id("problem").hidden = false;
    id("problem").textContent = error instanceof TypeError ? "The server does not answer (is agq dashboard still running?). Trying again." : error.message;
  }
  setTimeout(tick, POLL_MS);
}

function again() { if (run && run.blocks) loadMap().catch(() => {}); }
id("by").addEventListener("change", again);
id("index").addEventListener("input", again);
id("axis").addEventListener("change", () => { image = null; showRun(); again(); });
id("map").addEventListener("click", (event) => pick(event).catch(() => {}));
id("map").addEventListener("mousemove", hover);
addEventListener("resize", () => { if (run && run.history) drawChart(); if (image) drawMap(); });
tick();
