"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
let split = 0, step = 0, chosen = 0;

const made = (name, text, kind) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const short = (place) => place.replace("model.layers.", "");
const cell = (share, text, most) => {
  const td = made("td", text, "cell");
  td.style.setProperty("--v", Math.min(1, share / most).toFixed(3));
  return td;
};

/* Layers of one place lie together, leaves first. */
function places() {
  const all = [];
  data[split].layers.forEach((layer, i) => {
    if (all.length === 0 || all[all.length - 1].path !== layer.place) {
      all.push({ path: layer.place, layers: [] });
    }
    all[all.length - 1].layers.push(i);
  });
  return all;
}

function showMap() {
  const table = byId("map"), now = data[split].windows[step], all = places();
  const depth = Math.max(...all.map((p) => p.layers.length));
  table.replaceChildren();
  const head = made("tr");
  head.append(made("td", "", "corner"));
  for (let l = 0; l < depth; l++) {
    const experts = Math.max(...all.map((p) => l < p.layers.length ? data[split].layers[p.layers[l]].experts : 0));
    const th = made("th", "layer " + l + (l + 1 === depth && l > 0 ? ", top" : ""));
    th.colSpan = experts;
    head.append(th, made("th", "evenness"));
  }
  const thead = made("thead");
  thead.append(head);
  const body = made("tbody");
  all.forEach((place, i) => {
    const row = made("tr"), th = made("th"), button = made("button", short(place.path));
    button.setAttribute("aria-pressed", i === chosen ? "true" : "false");
    button.onclick = () => { chosen = i; show(); };
    th.append(button);
    row.append(th);
    for (const l of place.layers) {
      const usage = now.layers[l], most = Math.max(2 / usage.share.length, 0.5);
      usage.share.forEach((share) => row.append(cell(share, Math.round(100 * share), most)));
      row.append(made("td", usage.even.toFixed(2), "soft"));
    }
    body.append(row);
  });
  table.append(thead, body);
}

function showTime() {
  const box = byId("time"), place = places()[chosen], windows = data[split].windows;
  box.replaceChildren();
  if (windows.length < 2) return;
  for (const l of place.layers) {
    const experts = data[split].layers[l].experts;
    box.append(made("p", "Layer " + data[split].layers[l].layer + ", a row for each expert, over time", "about"));
    const table = made("table", undefined, "strip");
    for (let e = 0; e < experts; e++) {
      const row = made("tr");
      row.append(made("th", e));
      windows.forEach((w, i) => {
        const share = w.layers[l].share[e];
        const td = cell(share, "", Math.max(2 / experts, 0.5));
        td.title = "steps " + w.first + "-" + w.last + ": " + share;
        if (i === step) td.classList.add("now");
        td.onclick = () => { step = i; byId("step").value = i; show(); };
        row.append(td);
      });
      table.append(row);
    }
    box.append(table);
  }
}

/* Parents above, children below; a band's width is the share of the layer's nodes. */
function showFlow() {
  const box = byId("flow"), place = places()[chosen], now = data[split].windows[step];
  box.replaceChildren();
  for (const l of [...place.layers].reverse()) {
    const { experts, parents, layer } = data[split].layers[l], usage = now.layers[l];
    if (!parents) continue;
    const width = 60 * Math.max(experts, parents), height = 150;
    const x = (i, n) => (i + 0.5) * width / n;
    const lines = [], nodes = [];
    usage.flow.forEach((share, i) => {
      if (share <= 0) return;
      const a = x(Math.floor(i / experts), parents), b = x(i % experts, experts);
      lines.push('<path d="M' + a + " 42C" + a + " 90 " + b + " 70 " + b + ' 118" stroke-width="' +
        (40 * share).toFixed(1) + '"><title>' + (100 * share).toFixed(1) + "%</title></path>");
    });
    for (let p = 0; p < parents; p++) nodes.push('<text x="' + x(p, parents) + '" y="34">' + p + "</text>");
    for (let e = 0; e < experts; e++) nodes.push('<text x="' + x(e, experts) + '" y="136">' + e + "</text>");
    box.append(made("p", "From the experts of layer " + (layer + 1) + " (above) to those of layer " + layer, "about"));
    const svg = made("div");
    svg.innerHTML = '<svg role="img" aria-label="flow from parents to children" width="' + width +
      '" height="' + height + '">' + lines.join("") + nodes.join("") + "</svg>";
    box.append(svg);
  }
}

function show() {
  const now = data[split].windows[step], place = places()[chosen];
  const last = now.last === now.first ? now.last : now.first + " to " + now.last;
  const what = { train: "Steps ", held_out: "Evaluation after step ", reference: "Held-out sample ",
    generation: "Generation " }[data[split].name];
  byId("when").textContent = what + last + ": " + now.tokens.toLocaleString("en") + " tokens" +
    (data[split].of > data[split].windows.length ? " (" + data[split].windows.length + " of " +
      data[split].of + " windows are shown)" : "");
  byId("of").textContent = place.path;
  byId("facts").textContent = place.layers.map((l) => {
    const u = now.layers[l];
    return "Layer " + data[split].layers[l].layer + ": evenness " + u.even.toFixed(2) +
      ", coefficient of variation " + u.cv.toFixed(2) + (u.parent ? ", parent and child share " +
      u.parent[0].toFixed(3) + " nats (" + u.parent[1].toPrecision(2) + " by chance)" : "") + ".";
  }).join(" ") + " " + now.layers[place.layers[0]].trees.toLocaleString("en") + " different trees.";
  showMap();
  showTime();
  showFlow();
}

function choose(number) {
  split = number;
  step = data[split].windows.length - 1;
  chosen = Math.min(chosen, places().length - 1);
  byId("step").max = step;
  byId("step").value = step;
  byId("step").hidden = step === 0;
  show();
}

data.forEach((s, i) => byId("split").add(new Option(
  { train: "training", held_out: "evaluations", reference: "held-out samples", generation: "generation" }[s.name], i)));
byId("split").onchange = (e) => choose(Number(e.target.value));
byId("step").oninput = (e) => { step = Number(e.target.value); show(); };
choose(0);
