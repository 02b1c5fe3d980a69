"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const tokens = data.tokens;
const MOST_KEYS = 12;

const at = (id) => document.getElementById(id);

function make(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}

function digitsFor(most) {
  if (!(most > 0)) return 2;
  return Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(most))));
}

function number(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) !== 0 ? "\u2212" + text : text;
}

function signed(value, digits) {
  const text = number(value, digits);
  return text[0] === "\u2212" || Number(text) === 0 ? text : "+" + text;
}

function percent(part) {
  const text = (100 * part).toFixed(1);
  if (text === "100.0" && part < 1) return "> 99.9 %";
  return text === "0.0" && part > 0 ? "< 0.1 %" : text + " %";
}

/* What a token is called where it stands alone. */
const nameOf = (place) => tokens[place].text || tokens[place].token;

/* The last token of a word that has a label, which its first one has. */
function endOfWord(place) {
  let last = place;
  while (last + 1 < tokens.length && !data.labels[last + 1] && tokens[last + 1].segment !== null) last++;
  return last;
}

/* ---- a text of tokens, of which one is chosen by pointer or keys ---- */

function showText(box, describe, choose) {
  const spans = [];
  let current = 0;
  const segments = data.rest.length;
  const names = data.task === "qa" ? ["Question", "Context"] : ["First text", "Second text"];
  const parts = data.rest.map((_, segment) => {
    const part = make("p");
    part.dir = "auto";
    part.setAttribute("role", "none");
    if (segments > 1) {
      const name = make("span", "part", names[segment]);
      name.dir = "ltr"; // so that the text alone gives the part its direction
      name.setAttribute("aria-hidden", "true");
      part.append(name);
    }
    return part;
  });
  let segment = 0;
  tokens.forEach((token, place) => {
    if (token.segment !== null) segment = token.segment;
    const part = parts[segment];
    if (token.before) part.append(make("span", "", token.before));
    const added = token.segment === null;
    const span = make("span", "token", token.text || token.token);
    if (added) {
      span.classList.add("added");
      span.dir = "ltr";
    } else if (!token.text) span.classList.add("bit");
    span.setAttribute("role", "option");
    span.tabIndex = -1;
    span.dataset.place = place;
    spans.push(span);
    part.append(span);
    if (added) part.append(" ");
  });
  (data.labels || []).forEach((label, place) => {
    if (!label || tokens[place].segment === null || label[0] === "O") return;
    const tag = make("span", "tag", label[0]);
    tag.dir = "ltr";
    tag.setAttribute("aria-hidden", "true");
    spans[endOfWord(place)].after(tag);
  });
  data.rest.forEach((rest, segment) => {
    if (!rest) return;
    /* Behind the last token of the text itself, before the tokenizer's own. */
    const own = spans.filter((_, place) => tokens[place].segment === segment);
    const piece = make("span", data.cut && rest.trim() ? "rest" : "", rest);
    if (own.length) {
      const last = own[own.length - 1];
      const tag = last.nextElementSibling;
      (tag && tag.classList.contains("tag") ? tag : last).after(piece);
    } else parts[segment].append(piece);
  });
  box.replaceChildren(...parts);
  /* A text that turns its direction by control characters would turn what stands behind them. */
  box.classList.toggle("isolated", /[\u202a-\u202e\u2066-\u2069]/.test(box.textContent));

  function select(place, focus) {
    spans[current].tabIndex = -1;
    spans[current].setAttribute("aria-selected", "false");
    current = place;
    spans[place].tabIndex = 0;
    spans[place].setAttribute("aria-selected", "true");
    if (focus) spans[place].focus();
    choose(place);
  }

  const placeOf = (event) => {
    const span = event.target.closest(".token");
    return span && box.contains(span) ? Number(span.dataset.place) : null;
  };
  box.addEventListener("pointerover", (event) => {
    const place = placeOf(event);
    if (place !== null && event.pointerType === "mouse") select(place, false);
  });
  box.addEventListener("click", (event) => {
    const place = placeOf(event);
    if (place !== null) select(place, true);
  });
  box.addEventListener("focusin", (event) => {
    const place = placeOf(event);
    if (place !== null && place !== current) select(place, false);
  });
  box.addEventListener("keydown", (event) => {
    const right = spans[current].parentElement.matches(":dir(rtl)") ? -1 : 1;
    const moves = {
      ArrowRight: current + right, ArrowLeft: current - right, ArrowDown: current + 1, ArrowUp: current - 1,
      Home: 0, End: tokens.length - 1,
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    select(Math.min(tokens.length - 1, Math.max(0, moves[event.key])), true);
  });

  return {
    select,
    paint() {
      spans.forEach((span, place) => {
        const { kind, weight, label, about } = describe(place);
        span.classList.remove("for", "against", "weight");
        if (kind) span.classList.add(kind);
        span.classList.toggle("about", Boolean(about));
        span.style.setProperty("--w", weight);
        span.setAttribute("aria-label", label);
      });
    },
  };
}

function row(place, text, kind, weight) {
  const line = make("tr");
  line.append(make("td", "", String(place)));
  const token = make("td", "", nameOf(place));
  token.dir = "auto";
  const graph = make("td", "graph");
  graph.setAttribute("aria-hidden", "true");
  const area = make("div");
  const bar = make("i", kind);
  bar.style.setProperty("--w", weight);
  area.append(bar);
  graph.append(area);
  line.append(token, make("td", "number", text), graph);
  return line;
}

/* ---- attributions ---- */

let target = data.targets[0];

const most = () => Math.max(...target.scores.map(Math.abs));

const attributionText = showText(
  at("text"),
  (place) => {
    const score = target.scores[place];
    const largest = most();
    const about = target.span && target.span[0] <= place && place <= target.span[1];
    return {
      kind: score > 0 ? "for" : score < 0 ? "against" : "",
      weight: largest ? Math.abs(score) / largest : 0,
      label: `${nameOf(place)}, ${signed(score, digitsFor(largest))}`,
      about,
    };
  },
  (place) => {
    const token = tokens[place];
    const label = data.labels && data.labels[place];
    const told = [`${nameOf(place)}: ${signed(target.scores[place], digitsFor(most()))}`];
    told.push(token.segment === null ? "added by the tokenizer" : `token ${token.token}`);
    told.push(`place ${place}`);
    if (label && token.segment !== null) told.push(`label ${label[0]}, ${percent(label[1])}`);
    at("readout").textContent = told.join(" \u00b7 ");
  },
);

function nameOfTarget(made) {
  if (data.task !== "tag") return made.name;
  const word = tokens.slice(made.span[0], endOfWord(made.span[0]) + 1);
  return `${word.map((token) => token.text).join("")} \u2192 ${made.name}`;
}

function showTarget(chosen) {
  target = data.targets[chosen];
  const largest = most();
  const digits = digitsFor(largest);
  const precise = Math.max(digits, digitsFor(Math.abs(target.output)));
  at("least").textContent = signed(-largest, digits);
  at("most").textContent = signed(largest, digits);
  at("output").textContent = number(target.output, precise);
  at("baseline").textContent = number(target.baseline, precise);
  at("sum").textContent = signed(target.sum, precise);
  at("delta").textContent = signed(target.delta, Math.max(precise, 5));
  at("steps").textContent = String(target.steps);
  at("outlined").hidden = !target.span;
  const order = tokens.map((_, place) => place);
  order.sort((a, b) => Math.abs(target.scores[b]) - Math.abs(target.scores[a]) || a - b);
  at("ranking").replaceChildren(...order.map((place) => {
    const score = target.scores[place];
    const weight = largest ? Math.abs(score) / largest : 0;
    return row(place, signed(score, digits), score < 0 ? "against" : "for", weight);
  }));
  attributionText.paint();
  attributionText.select(order[0], false);
}

function listTargets() {
  const made = data.targets.map((one, index) => {
    const line = make("label", "target");
    const input = make("input");
    input.type = "radio";
    input.name = "target";
    input.value = String(index);
    input.checked = index === 0;
    input.addEventListener("change", () => {
      showTarget(index);
      if (attention && one.span) attention.text.select(one.span[0], false);
    });
    const name = make("span", "name", nameOfTarget(one));
    name.dir = "auto";
    const told = one.probability === null ? number(one.output, 3) : percent(one.probability);
    line.append(input, name, make("span", "number", told));
    if (one.probability !== null) {
      const meter = make("span", "meter");
      const bar = make("i");
      bar.style.setProperty("--w", one.probability);
      meter.append(bar);
      line.append(meter);
    }
    return line;
  });
  at("targets").replaceChildren(...made);
  if (data.unexplained > 0) {
    const what = data.task === "tag" ? "words" : "labels, less probable,";
    at("unexplained").textContent = `${data.unexplained} more ${what} are not explained.`;
    at("unexplained").hidden = false;
  }
}

function showHeader() {
  const tasks = { classify: "Classification", pair: "Classification of a pair", tag: "Tagging", qa: "Question answering" };
  const first = data.targets[0];
  at("task").textContent = tasks[data.task];
  at("model").textContent = data.model;
  let headline;
  if (data.task === "tag") {
    const own = data.labels.filter((label, place) => label && tokens[place].segment !== null);
    headline = `${own.filter(([label]) => label !== "O").length} of ${own.length} words have a label`;
  } else if (data.task === "qa") {
    const answer = tokens.slice(first.span[0], first.span[1] + 1).map((token) => token.before + token.text);
    headline = `Answer: \u201c${answer.join("").trim()}\u201d, ${percent(first.probability)}`;
  } else if (first.probability === null) {
    headline = `Predicted: ${first.name} ${number(first.output, 3)}`;
  } else {
    headline = `Predicted: ${first.name}, ${percent(first.probability)}`;
  }
  at("headline").textContent = headline;
  const notes = [];
  if (data.cut) {
    notes.push(`The text was cut: ${data.cut} of ${data.cut + tokens.length} tokens are beyond the ${data.limit} that are read. What was left out is struck through.`);
  }
  if (data.noAnswer !== null && data.noAnswer > first.probability) {
    notes.push(`\u201cNo answer\u201d is more probable: ${percent(data.noAnswer)}.`);
  }
  const loose = data.targets.filter((one) => !one.converged).map(nameOfTarget);
  if (loose.length) {
    notes.push(`The integral did not converge for ${loose.join(", ")}: the attributions miss the outputs' difference by more than 1 % of their sizes' sum (see the convergence delta).`);
  }
  at("notes").replaceChildren(...notes.map((note) => make("li", "", note)));
  at("notes").hidden = !notes.length;
}

/* ---- attention ---- */

let attention = null;

async function unpack() {
  const packed = Uint8Array.from(atob(data.attention.bytes), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function showAttention(bytes) {
  const { layers, heads, mean } = data.attention;
  const size = tokens.length;
  const kept = mean ? 1 : heads;
  const byByte = Float64Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);
  let weights;
  let largest;
  let query = 0;

  const option = (value, text) => {
    const made = make("option", "", text);
    made.value = String(value);
    return made;
  };
  for (let layer = 0; layer < layers; layer++) at("layer").append(option(layer, `${layer + 1} of ${layers}`));
  at("layer").value = String(layers - 1);
  at("head").append(option(-1, `mean of all ${heads}`));
  for (let head = 0; head < kept && !mean; head++) at("head").append(option(head, `${head + 1} of ${heads}`));
  at("means").hidden = !mean;
  if (data.attention.outside > 0.001) {
    const outside = percent(data.attention.outside);
    at("outside").textContent = `Positions that an adapter puts before the text take ${outside} on average.`;
    at("outside").hidden = false;
  }

  function read() {
    const layer = Number(at("layer").value);
    const head = Number(at("head").value);
    const chosen = head >= 0 ? [head] : Array.from({ length: kept }, (_, one) => one);
    weights = new Float64Array(size * size);
    for (const one of chosen) {
      const start = (layer * kept + one) * size * size;
      for (let place = 0; place < weights.length; place++) {
        weights[place] += byByte[bytes[start + place]] / chosen.length;
      }
    }
    largest = weights.reduce((most, weight) => Math.max(most, weight), 0) || 1;
    at("quarter").textContent = percent(largest / 4); // the middle of a scale by square roots
    at("largest").textContent = percent(largest);
  }

  const text = showText(
    at("queries"),
    (place) => {
      const weight = weights[query * size + place];
      return { kind: "weight", weight: Math.sqrt(weight / largest), label: `${nameOf(place)}, ${percent(weight)}` };
    },
    (place) => {
      query = place;
      show();
    },
  );

  function show() {
    const line = weights.subarray(query * size, (query + 1) * size);
    const order = Array.from(line, (_, place) => place).sort((a, b) => line[b] - line[a] || a - b);
    const shown = order.slice(0, MOST_KEYS);
    at("attends").textContent = `\u201c${nameOf(query)}\u201d (place ${query}) attends to`;
    at("keys").replaceChildren(...shown.map((place) => row(place, percent(line[place]), "weight", line[place] / largest)));
    const left = order.slice(MOST_KEYS);
    const sum = left.reduce((total, place) => total + line[place], 0);
    at("others").textContent = left.length ? `${left.length} others: ${percent(sum)}` : "";
    text.paint();
    map.draw();
  }

  const map = heatmap(size, () => ({ weights, largest, query }), (place) => text.select(place, false));

  function change() {
    read();
    const head = at("head").selectedOptions[0].textContent;
    at("map").setAttribute("aria-label", `Weights of layer ${at("layer").value * 1 + 1}, head ${head}. The numbers of a chosen token are in the table.`);
    show();
  }
  at("layer").addEventListener("change", change);
  at("head").addEventListener("change", change);
  read();
  attention = { text };
  text.select(target.span ? target.span[0] : 0, false);
  change();
}

function heatmap(size, state, choose) {
  const canvas = at("map");
  let margin = 0;
  let cell = 1;

  const small = make("canvas");
  let painted = [];

  /* One dot for each weight, kept until the weights or the colours change. */
  function picture(weights, largest, colour) {
    if (painted[0] === weights && painted[1] === colour) return small;
    painted = [weights, colour];
    small.width = size;
    small.height = size;
    const context = small.getContext("2d");
    const dots = context.createImageData(size, size);
    const [red, green, blue] = colour.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
    weights.forEach((weight, place) => {
      dots.data.set([red, green, blue, 255 * Math.sqrt(weight / largest)], 4 * place);
    });
    context.putImageData(dots, 0, 0);
    return small;
  }

  function draw() {
    const { weights, largest, query } = state();
    const width = canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    margin = (width - 64) / size >= 11 ? 64 : 0;
    cell = (width - margin) / size;
    canvas.style.height = `${width}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(width * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingEnabled = cell * scale < 1;
    context.drawImage(picture(weights, largest, colour("--weight")), margin, margin, width - margin, width - margin);
    context.strokeStyle = colour("--line");
    context.strokeRect(margin + 0.5, margin + 0.5, width - margin - 1, width - margin - 1);
    context.strokeStyle = colour("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(margin + 0.75, margin + query * cell, width - margin - 1.5, Math.max(cell, 2));
    if (margin) label(context, colour("--soft"), colour("--ink"), query);
  }

  function label(context, soft, ink, query) {
    context.font = `${Math.min(12, cell - 1)}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const short = (text) => {
      let shown = Array.from(text);
      while (shown.length > 1 && context.measureText(shown.join("")).width > margin - 8) shown = shown.slice(0, -1);
      return shown.join("");
    };
    for (let place = 0; place < size; place++) {
      const middle = margin + (place + 0.5) * cell;
      context.fillStyle = place === query ? ink : soft;
      context.textAlign = "right";
      context.fillText(short(nameOf(place)), margin - 4, middle);
      context.save();
      context.translate(middle, margin - 4);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillStyle = soft;
      context.fillText(short(nameOf(place)), 0, 0);
      context.restore();
    }
  }

  const cellAt = (event) => {
    const area = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - area.left - margin) / cell);
    const line = Math.floor((event.clientY - area.top - margin) / cell);
    return column >= 0 && line >= 0 && column < size && line < size ? [line, column] : null;
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = cellAt(event);
    if (!found) return;
    const [line, column] = found;
    if (line !== state().query) choose(line);
    at("cell").textContent = `${nameOf(line)} \u2192 ${nameOf(column)}: ${percent(state().weights[line * size + column])}`;
  });
  canvas.addEventListener("pointerleave", () => { at("cell").textContent = ""; });
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return { draw };
}

async function start() {
  showHeader();
  listTargets();
  showTarget(0);
  if (data.attention === null) {
    at("weights").hidden = true;
    at("without").hidden = false;
  } else if (!("DecompressionStream" in window)) {
    at("weights").hidden = true;
    at("without").textContent = "This browser is too old to unpack the attention weights.";
    at("without").hidden = false;
  } else {
    showAttention(await unpack());
  }
  document.documentElement.dataset.ready = "true";
}

start();
