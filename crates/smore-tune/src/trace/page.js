"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const decoded = new Map();
let place = 0, chosen = null, token = 0;

function layers(p) {
  if (!decoded.has(p)) {
    decoded.set(p, data.places[p].layers.map((l) => {
      const raw = bytes(l.experts);
      const experts = new Uint16Array(raw.length / 2);
      for (let i = 0; i < experts.length; i++) experts[i] = raw[2 * i] + 256 * raw[2 * i + 1];
      return { nodes: l.nodes, most: l.most, experts, weights: bytes(l.weights),
        contributions: l.contributions === null ? null : bytes(l.contributions) };
    }));
  }
  return decoded.get(p);
}

function showExperts() {
  const box = byId("experts"), all = layers(place);
  box.replaceChildren();
  for (let l = all.length - 1; l >= 0; l--) {
    const row = document.createElement("div"), name = document.createElement("span");
    name.textContent = "layer " + l + (l === all.length - 1 && l > 0 ? ", top" : "");
    row.append(name);
    for (const expert of [...new Set(all[l].experts)].sort((a, b) => a - b)) {
      const button = document.createElement("button");
      button.textContent = expert;
      button.setAttribute("aria-label", "layer " + l + ", expert " + expert);
      const on = chosen && chosen.layer === l && chosen.expert === expert;
      button.setAttribute("aria-pressed", on ? "true" : "false");
      button.onclick = () => { chosen = on ? null : { layer: l, expert }; showExperts(); paint(); };
      row.append(button);
    }
    box.append(row);
  }
}

/* An expert may stand under several parents: its strongest weight counts. */
function strength(t) {
  if (!chosen || !layers(place)[chosen.layer]) return 0;
  const layer = layers(place)[chosen.layer];
  let most = 0;
  for (let i = t * layer.nodes; i < (t + 1) * layer.nodes; i++) {
    if (layer.experts[i] === chosen.expert) most = Math.max(most, layer.weights[i] / 255);
  }
  return most;
}

function paint() {
  [...byId("text").children].forEach((span, t) => {
    span.style.setProperty("--v", strength(t).toFixed(3));
  });
}

function showTree() {
  const all = layers(place), depth = all.length, leaves = all[0].nodes;
  const width = Math.max(320, leaves * 62), height = 84 + depth * 92;
  const x = (l, i) => (i + 0.5) * width / all[l].nodes;
  const y = (l) => 24 + (depth - l) * 92;
  const svg = ['<svg role="img" aria-label="residual tree" width="' + width + '" height="' + height + '">'];
  const nodes = ['<text x="' + width / 2 + '" y="20">map output</text>'];
  for (let l = depth - 1; l >= 0; l--) {
    const layer = all[l], above = l + 1 < depth ? all[l + 1].nodes : 1;
    for (let i = 0; i < layer.nodes; i++) {
      const at = token * layer.nodes + i, weight = layer.weights[at] / 255;
      const parent = Math.floor(i * above / layer.nodes);
      const px = l + 1 < depth ? x(l + 1, parent) : width / 2, py = l + 1 < depth ? y(l + 1) + 14 : 26;
      svg.push('<line x1="' + px + '" y1="' + py + '" x2="' + x(l, i) + '" y2="' + (y(l) - 14) +
        '" stroke-width="' + (0.5 + 5 * weight).toFixed(2) + '"/>');
      nodes.push('<circle cx="' + x(l, i) + '" cy="' + y(l) + '" r="14"/><text x="' + x(l, i) +
        '" y="' + (y(l) + 5) + '">' + layer.experts[at] + '</text><text class="soft" x="' + x(l, i) +
        '" y="' + (y(l) + 30) + '">' + weight.toFixed(2) + '</text>');
      if (layer.contributions) {
        const c = layer.most * (layer.contributions[at] / 255) ** 2;
        nodes.push('<text class="soft" x="' + x(l, i) + '" y="' + (y(l) + 45) + '">|' +
          c.toPrecision(2) + '|</text>');
      }
    }
  }
  byId("tree").innerHTML = svg.join("") + nodes.join("") + "</svg>";
  byId("of").textContent = "Token " + token + ": " + JSON.stringify(data.tokens[token]);
  byId("note").textContent = "At " + data.places[place].path +
    ". In a circle the expert; below it its gate weight" + (all[0].contributions
      ? " and, between bars, how far the map's output moves without it and what hangs below it." : ".");
  const before = document.querySelector("#text .now");
  if (before) before.classList.remove("now");
  byId("text").children[token].classList.add("now");
}

data.tokens.forEach((text, t) => {
  const span = document.createElement("span");
  span.textContent = text === "" ? "\u2205" : text;
  span.dataset.t = t;
  byId("text").append(span);
});
data.places.forEach((p, i) => byId("place").add(new Option(p.path, i)));
byId("place").onchange = (e) => { place = Number(e.target.value); showExperts(); paint(); showTree(); };
for (const kind of ["mouseover", "click"]) {
  byId("text").addEventListener(kind, (e) => {
    if (e.target.dataset.t !== undefined) { token = Number(e.target.dataset.t); showTree(); }
  });
}
showExperts();
showTree();
