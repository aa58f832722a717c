"use strict";
// The table, the comparison with the version before, and which page is shown.
const PAGE = 100;
const state = {sort: "density", down: true, query: "", living: true, status: 0, page: 0, turn: 0};
const WORDS = ["tokens", "logits", "explanation"];
const COLUMNS = [["feature", "feature"], ["density", "density"], ["max", "largest"], ["mean", "mean"], ["tokens", "fires most on"], ["logits", "makes likely"]];
const main = document.getElementById("main");

function chosen() {
  const query = state.query.trim().toLowerCase();
  return ordered(state.sort, state.down).filter((id) => (!state.living || DATA.density[id] > 0) && (!state.status || DATA.statuses[id] === state.status)
    && (!query || String(id) === query || (lower[id] || "").includes(query)));
}

function statuses(fill) {
  const options = STATUSES.map((status, place) => make("option", {value: place, selected: place === state.status},
    status ? `${status}: ${DATA.compared.counts[status].toLocaleString()}` : `all, compared with ${DATA.compared.with}`));
  return make("select", {ariaLabel: "compared with the version before", onchange: (event) => {
    state.status = Number(event.target.value);
    state.page = 0;
    fill();
  }}, ...options);
}

function versions() {
  const {counts, gone, kept} = DATA.compared;
  const cell = (text) => make("td", {className: "number"}, text);
  const chosen = (status) => make("a", {href: "#", onclick: () => { state.status = STATUSES.indexOf(status); state.page = 0; }},
    `${counts[status].toLocaleString()} ${status}`);
  main.replaceChildren(
    make("h2", {}, `Compared with ${DATA.compared.with}`),
    make("p", {}, "Here: ", chosen("persisted"), ", ", chosen("split"), ", ", chosen("new"), "."),
    make("p", {}, `There: ${counts.persisted.toLocaleString()} persisted, ${counts.merged.toLocaleString()} merged, ${counts.vanished.toLocaleString()} vanished`
      + (kept === null ? "." : `: ${number(100 * kept)}% of what fired there is here, too.`)),
    make("h2", {}, "What is not here any more"),
    make("p", {className: "faint"}, `Those that added most to the reconstruction first${gone.length < counts.merged + counts.vanished ? `, ${gone.length} of them` : ""}.`),
    make("div", {className: "wide", tabIndex: 0}, make("table", {},
      make("thead", {}, make("tr", {}, ...["its feature", "density", "what became of it", "nearest here", "cosine"].map((text) => make("th", {className: "number"}, text)))),
      make("tbody", {}, ...gone.map(([id, status, nearest, cosine, density]) => make("tr", {}, cell(there(id)), cell(number(density)),
        cell(status), cell(nearest === null ? "-" : make("a", {href: `#${nearest}`}, String(nearest))), cell(number(cosine))))))));
}

// A patch with its neighbours, cut out of the picture by a background, or all of it.
function tile([image, row, column]) {
  const found = make("i", {className: "tile"}), [rows, columns] = DATA.grid || [1, 1];
  const part = (place, all) => all > 3 ? 100 * Math.max(0, Math.min(1, (place - 1) / (all - 3))) : 50;
  found.style.backgroundImage = `url(pictures/${image}.jpg)`;
  if (row === undefined) return found;
  found.style.backgroundSize = `${100 * Math.max(1, columns / 3)}% ${100 * Math.max(1, rows / 3)}%`;
  found.style.backgroundPosition = `${part(column, columns)}% ${part(row, rows)}%`;
  return found;
}

function row(id) {
  const said = texts[id] || ["…", "…", "…"];
  const cells = COLUMNS.slice(1).map(([name]) => name === "explanation" ? make("td", {className: "words-cell said-of"}, shown(said[2]))
    : name === "tokens" && said[3] ? make("td", {className: "words-cell tiles", title: shown(said[0])}, ...said[3].map(tile))
    : WORDS.includes(name) ? make("td", {className: "words-cell"}, make("code", {}, shown(said[WORDS.indexOf(name)])))
    : make("td", {className: "number"}, number(DATA[name][id])));
  return make("tr", {}, make("td", {className: "number"}, make("a", {href: `#${id}`}, String(id))), ...cells);
}

function list() {
  const body = make("tbody");
  const count = make("span", {className: "faint", role: "status"});
  const pager = make("span");
  const failed = (error) => { count.textContent = error.message; };
  const here = (turn) => turn === state.turn && body.isConnected;

  function fill() {
    const turn = ++state.turn;
    show(turn);
    if ((state.query.trim() || WORDS.includes(state.sort)) && !allTold()) tellAll(() => here(turn) && (show(turn), true)).catch(failed);
  }

  function show(turn) {
    const found = chosen();
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const part = [...found.subarray(state.page * PAGE, (state.page + 1) * PAGE)];
    const draw = () => body.replaceChildren(...part.map(row));
    draw();
    if (!part.every((id) => texts[id])) told(part).then(() => { if (here(turn)) draw(); }).catch(failed);
    const searched = state.query.trim() && !allTold() ? `, ${Math.floor(100 * pieces.words.size / inWords())}% searched` : "";
    count.textContent = `${found.length.toLocaleString()} of ${DATA.count.toLocaleString()} features${searched}`;
    const turned = (step) => () => { state.page += step; fill(); };
    pager.replaceChildren(
      make("button", {onclick: turned(-1), disabled: state.page === 0, ariaLabel: "previous page"}, "‹"),
      ` ${state.page + 1} of ${last + 1} `,
      make("button", {onclick: turned(1), disabled: state.page === last, ariaLabel: "next page"}, "›"));
    for (const head of main.querySelectorAll("th")) {
      head.setAttribute("aria-sort", head.dataset.key === state.sort ? (state.down ? "descending" : "ascending") : "none");
    }
  }

  const heads = COLUMNS.map(([key, label]) => {
    const head = make("th", {className: WORDS.includes(key) ? "" : "number"}, make("button", {onclick: () => {
      state.down = state.sort === key ? !state.down : key !== "feature" && !WORDS.includes(key);
      state.sort = key;
      state.page = 0;
      fill();
    }}, label));
    head.dataset.key = key;
    return head;
  });
  main.replaceChildren(
    make("div", {className: "controls"},
      make("input", {type: "search", placeholder: DATA.of_text ? "a token, a word, or a feature's number" : "a picture's name, or a feature's number", ariaLabel: "search", value: state.query,
        oninput: (event) => { state.query = event.target.value; state.page = 0; fill(); }}),
      make("label", {}, make("input", {type: "checkbox", checked: state.living,
        onchange: (event) => { state.living = event.target.checked; fill(); }}), " only those that fire"),
      ...(DATA.compared ? [statuses(fill)] : []), count, pager),
    make("div", {className: "wide", tabIndex: 0}, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
  fill();
}

function route() {
  const id = location.hash.slice(1);
  document.title = /^\d+$/.test(id) ? `Feature ${id}` : "Features";
  if (/^\d+$/.test(id)) feature(Number(id));
  else if (id === "map") map();
  else if (id === "versions" && DATA.compared) versions();
  else list();
}

function begin() {
  if (!DATA.of_text) COLUMNS.splice(COLUMNS.findIndex(([name]) => name === "logits"), 1);
  if (DATA.explained) COLUMNS.splice(1, 0, ["score", "score"], ["explanation", "explanation"]);
  document.getElementById("about").textContent = shown(DATA.about);
  if (DATA.compared) document.querySelector("nav").append(" · ", make("a", {href: "#versions"}, "Versions"));
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    const id = Number(location.hash.slice(1));
    if (!/^#\d+$/.test(location.hash) || event.target.tagName === "INPUT") return;
    if (event.key === "ArrowLeft" && id > 0) location.hash = String(id - 1);
    if (event.key === "ArrowRight" && id + 1 < DATA.count) location.hash = String(id + 1);
    if (event.key === "Escape") location.hash = "";
  });
  route();
}
