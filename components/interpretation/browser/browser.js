"use strict";
// What is shown comes from table.js and blocks/*.js, which call the two functions below: a page from disk may load scripts, not files.
const PAGE = 100;
const state = {sort: "density", down: true, query: "", living: true, status: "", page: 0};
const waiting = new Map();
const blocks = new Map();

function block(number, features) {
  blocks.set(number, features);
  for (const resolve of waiting.get(number) || []) resolve(features);
}

function loaded(number) {
  if (blocks.has(number)) return Promise.resolve(blocks.get(number));
  return new Promise((resolve, reject) => {
    waiting.set(number, [...(waiting.get(number) || []), resolve]);
    const script = document.createElement("script");
    script.src = `blocks/${String(number).padStart(5, "0")}.js`;
    script.onerror = () => reject(new Error(`${script.src} is not there`));
    document.head.append(script);
  });
}

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);  // text is never read as markup
  return element;
}

const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u202a-\u202e\u2066-\u2069\u200e\u200f]/g, "�");
const number = (value) => value === null || value === undefined ? "-" : value === 0 ? "0" : Number(value.toPrecision(4)).toString();
const COLUMNS = [["feature", "feature"], ["density", "density"], ["max", "largest"], ["mean", "mean"], ["tokens", "fires most on"], ["logits", "makes likely"]];
const WORDS = ["tokens", "logits", "explanation"];
if (TABLE.features.some((row) => row.explanation)) COLUMNS.splice(1, 0, ["score", "score"], ["explanation", "explanation"]);

function chosen() {
  const query = state.query.trim().toLowerCase();
  const rows = TABLE.features.filter((row) => (!state.living || row.density > 0) && (!state.status || row.status === state.status)
    && (!query || String(row.feature) === query || (row.tokens + " " + row.logits + " " + row.explanation).toLowerCase().includes(query)));
  const sign = state.down ? -1 : 1;
  const key = state.sort;
  return rows.sort((a, b) => sign * (typeof a[key] === "string" ? a[key].localeCompare(b[key]) : a[key] - b[key]) || a.feature - b.feature);
}

function statuses(fill) {
  const options = ["", "persisted", "split", "new"].map((status) => make("option", {value: status, selected: status === state.status},
    status ? `${status}: ${TABLE.compared.counts[status].toLocaleString()}` : `all, compared with ${TABLE.compared.with}`));
  return make("select", {ariaLabel: "compared with the version before", onchange: (event) => {
    state.status = event.target.value;
    state.page = 0;
    fill();
  }}, ...options);
}

function explained(said) {
  if (!said) return [];
  const scores = ["detection", "fuzzing"].filter((name) => said[name] !== null).map((name) => `${name} ${number(said[name])}`);
  const origin = said.carried_from === null ? said.explainer
    : `carried over: said of feature ${said.carried_feature} of ${said.carried_from} (cosine ${number(said.carried_cosine)}) by ${said.explainer}`;
  return [make("p", {className: "explanation", dir: "auto"}, shown(said.explanation)),
    make("p", {className: "faint"}, [...scores, shown(origin)].join(" · "), scores.length ? " (balanced accuracy, 0.5 is chance)" : "")];
}

const there = (id) => TABLE.compared.browser ? make("a", {href: `${TABLE.compared.browser}#${id}`}, String(id)) : String(id);

function matched(match) {
  if (!match || !TABLE.compared) return [];
  const near = match.nearest === null ? [] : [": nearest is its feature ", there(match.nearest), ` (${number(match.cosine)})`];
  return [make("p", {}, `${match.status}, compared with ${TABLE.compared.with}`, ...near)];
}

function versions() {
  const {counts, gone, kept} = TABLE.compared;
  const cell = (text) => make("td", {className: "number"}, text);
  const chosen = (status) => make("a", {href: "#", onclick: () => { state.status = status; state.page = 0; }}, `${counts[status].toLocaleString()} ${status}`);
  document.getElementById("main").replaceChildren(
    make("h2", {}, `Compared with ${TABLE.compared.with}`),
    make("p", {}, "Here: ", chosen("persisted"), ", ", chosen("split"), ", ", chosen("new"), "."),
    make("p", {}, `There: ${counts.persisted.toLocaleString()} persisted, ${counts.merged.toLocaleString()} merged, ${counts.vanished.toLocaleString()} vanished`
      + (kept === null ? "." : `: ${number(100 * kept)}% of what fired there is here, too.`)),
    make("h2", {}, "What is not here any more"),
    make("p", {className: "faint"}, `Those that added most to the reconstruction first${gone.length < counts.merged + counts.vanished ? `, ${gone.length} of them` : ""}.`),
    make("div", {className: "wide"}, make("table", {},
      make("thead", {}, make("tr", {}, ...["its feature", "density", "", "nearest here", "cosine"].map((text) => make("th", {className: text ? "number" : ""}, text)))),
      make("tbody", {}, ...gone.map(([id, status, nearest, cosine, density]) => make("tr", {}, cell(there(id)), cell(number(density)),
        make("td", {}, status), cell(nearest === null ? "-" : make("a", {href: `#${nearest}`}, String(nearest))), cell(number(cosine))))))));
}

function list() {
  const main = document.getElementById("main");
  const body = make("tbody");
  const count = make("span", {className: "faint"});
  const pager = make("span");
  function fill() {
    const rows = chosen();
    const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const part = rows.slice(state.page * PAGE, (state.page + 1) * PAGE);
    body.replaceChildren(...part.map((row) => make("tr", {},
      make("td", {className: "number"}, make("a", {href: `#${row.feature}`}, String(row.feature))),
      ...COLUMNS.slice(1).map(([name]) => name === "explanation" ? make("td", {className: "words-cell said-of"}, shown(row.explanation))
        : WORDS.includes(name) ? make("td", {className: "words-cell"}, make("code", {}, shown(row[name])))
        : make("td", {className: "number"}, number(row[name]))))));
    count.textContent = `${rows.length.toLocaleString()} of ${TABLE.features.length.toLocaleString()} features`;
    const turn = (step) => () => { state.page += step; fill(); };
    pager.replaceChildren(
      make("button", {onclick: turn(-1), disabled: state.page === 0, ariaLabel: "previous page"}, "‹"),
      ` ${state.page + 1} of ${last + 1} `,
      make("button", {onclick: turn(1), disabled: state.page === last, ariaLabel: "next page"}, "›"));
    for (const head of main.querySelectorAll("th")) {
      head.setAttribute("aria-sort", head.dataset.key === state.sort ? (state.down ? "descending" : "ascending") : "none");
    }
  }
  const heads = COLUMNS.map(([key, label]) => {
    const head = make("th", {className: WORDS.includes(key) ? "" : "number"}, make("button", {onclick: () => {
      state.down = state.sort === key ? !state.down : key !== "feature" && !WORDS.includes(key);
      state.sort = key;
      fill();
    }}, label));
    head.dataset.key = key;
    return head;
  });
  main.replaceChildren(
    make("div", {className: "controls"},
      make("input", {type: "search", placeholder: "a token, a word, or a feature's number", ariaLabel: "search", value: state.query,
        oninput: (event) => { state.query = event.target.value; state.page = 0; fill(); }}),
      make("label", {}, make("input", {type: "checkbox", checked: state.living,
        onchange: (event) => { state.living = event.target.checked; fill(); }}), " only those that fire"),
      ...(TABLE.compared ? [statuses(fill)] : []), count, pager),
    make("div", {className: "wide"}, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
  fill();
}

function example(found, largest) {
  const line = make("div", {className: "example", dir: "auto"},
    make("small", {}, `${number(found.activation)} · document ${found.document}, token ${found.position}`));
  found.tokens.forEach((token, place) => {
    const strength = found.activations[place] / largest;
    const part = make("b", {className: place === found.peak ? "peak" : "", title: number(found.activations[place])}, shown(token));
    if (strength > 0) part.style.backgroundColor = `color-mix(in srgb, var(--glow) ${Math.round(85 * strength)}%, transparent)`;
    line.append(part);
  });
  return line;
}

function histogram(edges, counts) {
  const most = Math.max(...counts);
  const bars = counts.map((count, place) => {
    const bar = make("i", {title: `${number(edges[place])} to ${number(edges[place + 1])}: ${count.toLocaleString()} tokens`});
    bar.style.height = count === 0 ? "0" : `max(1px, ${100 * count / most}%)`;
    return bar;
  });
  return make("section", {}, make("h2", {}, "How strongly it fires"),
    make("div", {className: "histogram", role: "img", ariaLabel: "histogram of activations"}, ...bars),
    make("p", {className: "faint ends"}, make("span", {}, number(edges[0])), make("span", {}, "activation, four bins to each doubling"),
      make("span", {}, number(edges[edges.length - 1]))));
}

function quantiles(examples, largest) {
  const groups = new Map();
  for (const one of examples) groups.set(one.quantile, [...(groups.get(one.quantile) || []), one]);
  return [...groups.entries()].sort(([a], [b]) => b - a).map(([quantile, some], place, all) => {
    const values = some.map((one) => one.activation);
    const title = place === 0 ? "strongest" : place === all.length - 1 ? "weakest" : "next";
    return make("details", {open: true}, make("summary", {}, `${title} group: ${number(Math.min(...values))} to ${number(Math.max(...values))}`),
      ...some.map((one) => example(one, largest)));
  });
}

async function feature(id) {
  const main = document.getElementById("main");
  const row = TABLE.features[id];
  if (row === undefined) {
    main.replaceChildren(make("p", {}, `There is no feature ${id}.`));
    return;
  }
  main.replaceChildren(make("p", {}, "Loading …"));
  let found;
  try {
    found = (await loaded(Math.floor(id / TABLE.block)))[id % TABLE.block];
  } catch (error) {
    main.replaceChildren(make("p", {}, `${error.message}: the folder is not whole.`));
    return;
  }
  if (location.hash !== `#${id}`) return;
  const words = (title, pairs) => make("section", {className: "words"}, make("h2", {}, title),
    ...pairs.map(([token, value]) => make("span", {}, make("code", {}, shown(token)), number(value))));
  const kind = (title, name) => {
    const some = found.examples.filter((one) => one.kind === name);
    return make("section", {}, make("h2", {}, title), ...(some.length ? some.map((one) => example(one, row.max)) : [make("p", {}, "none")]));
  };
  const near = found.neighbours.flatMap(([other, cosine]) => [make("a", {href: `#${other}`}, String(other)), ` (${number(cosine)})  `]);
  main.replaceChildren(
    make("h2", {}, `Feature ${id}`),
    make("p", {className: "faint"}, `fires on ${number(100 * row.density)}% of tokens, in ${row.sequences.toLocaleString()} sequences; `
      + `largest ${number(row.max)}, mean ${number(row.mean)}`),
    make("p", {}, make("a", {href: `#${id - 1}`}, "‹ previous"), " · ", make("a", {href: `#${id + 1}`}, "next ›"), ...(near.length ? [" · nearest: ", ...near] : [])),
    ...explained(found.explained), ...matched(found.match),
    make("div", {className: "columns"}, ...(found.likely.length ? [words("Makes likely", found.likely), words("Makes unlikely", found.unlikely)] : [])),
    ...(found.histogram.counts.length ? [histogram(found.histogram.edges, found.histogram.counts)] : []),
    kind("Where it fires most", "strongest"),
    make("h2", {}, "Drawn at random from all tokens on which it fires, by strength"),
    ...quantiles(found.examples.filter((one) => one.kind === "sample"), row.max));
  main.focus({preventScroll: true});
  scrollTo(0, 0);
}

function route() {
  const id = location.hash.slice(1);
  document.title = /^\d+$/.test(id) ? `Feature ${id}` : "Features";
  if (/^\d+$/.test(id)) feature(Number(id)); else if (id === "map") map(); else if (id === "versions" && TABLE.compared) versions(); else list();
}

document.getElementById("about").textContent = TABLE.about;
if (TABLE.compared) document.querySelector("nav").append(" · ", make("a", {href: "#versions"}, "Versions"));
addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  const id = Number(location.hash.slice(1));
  if (!/^\d+$/.test(location.hash.slice(1)) || event.target.tagName === "INPUT") return;
  if (event.key === "ArrowLeft" && id > 0) location.hash = String(id - 1);
  if (event.key === "ArrowRight" && id + 1 < TABLE.features.length) location.hash = String(id + 1);
  if (event.key === "Escape") location.hash = "";
});
route();
