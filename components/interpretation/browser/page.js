"use strict";
// The page of a feature, and what all pages are made of.
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

const named = (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, named);
const number = (value) => value === null || value === undefined || Number.isNaN(value) ? "-" : value === 0 ? "0" : Number(value.toPrecision(4)).toString();
const linked = (browser, id) => browser ? make("a", {href: `${browser}#${id}`}, String(id)) : String(id);
const there = (id) => linked(DATA.compared.browser, id);

function explained(said) {
  if (!said) return [];
  const scores = ["detection", "fuzzing", "intruder", "specificity"].filter((name) => typeof said[name] === "number").map((name) => `${name} ${number(said[name])}`);
  const origin = said.carried_from === null ? said.explainer
    : `carried over: said of feature ${said.carried_feature} of ${said.carried_from} (cosine ${number(said.carried_cosine)}) by ${said.explainer}`;
  return [make("p", {className: "explanation", dir: "auto"}, shown(said.explanation)),
    make("p", {className: "faint"}, [...scores, shown(origin)].join(" · "), scores.length ? " (by chance: detection and fuzzing 0.5, intruder 0.2; specificity is from 0 to 3)" : "")];
}

function matched(match) {
  if (!match || !DATA.compared) return [];
  const near = match.nearest === null ? [] : [": nearest is its feature ", there(match.nearest), ` (${number(match.cosine)})`];
  return [make("p", {}, `${match.status}, compared with ${DATA.compared.with}`, ...near)];
}

function past(rows) {
  if (!rows.length || !DATA.compared) return [];
  const line = ({version, status, feature, cosine, density, explanation}) => make("tr", {},
    make("td", {}, `version ${version}`), make("td", {className: "number"}, feature === null ? "-" : linked(DATA.compared.versions[version], feature)),
    make("td", {}, feature === null ? "not there: new since" : `${status} (${number(cosine)})`),
    make("td", {className: "number"}, density === null ? "-" : percent(density)), make("td", {className: "said-of", dir: "auto"}, shown(explanation)));
  const titles = [["in", ""], ["feature", "number"], ["this one's is", ""], ["fires on", "number"], ["was explained as", ""]];
  return [make("section", {}, make("h2", {}, "In earlier versions"), make("div", {className: "wide"}, make("table", {},
    make("thead", {}, make("tr", {}, ...titles.map(([title, className]) => make("th", {className, scope: "col"}, title)))),
    make("tbody", {}, ...rows.map(line)))))];
}

// The exact value of the token under the pointer, or of one that was tapped.
const tip = make("div", {className: "tip", role: "tooltip", hidden: true});
function tell(event) {
  const token = event.target.closest ? event.target.closest("b[data-value]") : null;
  tip.hidden = token === null;
  if (!token) return;
  if (!tip.isConnected) document.body.append(tip);
  tip.textContent = `${token.dataset.name || token.textContent.trim() || "space"}: ${token.dataset.value}`;
  const edge = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(edge.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${edge.top > 40 ? edge.top - tip.offsetHeight - 4 : edge.bottom + 4}px`;
}
for (const kind of ["pointerover", "click"]) document.addEventListener(kind, tell);
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});

// A picture as the model sees it: the darker a patch, the less the feature fires there; where it does, it has a frame.
function picture(found, largest) {
  const cells = found.patches.map((value, place) => {
    const strength = Math.min(1, value / largest);
    const cell = make("b", {className: place === found.cell ? "peak" : value > 0 ? "fires" : ""});
    cell.dataset.value = number(value);
    cell.dataset.name = `row ${Math.floor(place / DATA.grid[1])}, column ${place % DATA.grid[1]}`;
    cell.style.backgroundColor = `rgb(0 0 0 / ${Math.round(62 * (1 - strength))}%)`;
    return cell;
  });
  const grid = make("div", {className: "patches"}, ...cells);
  if (DATA.grid) grid.style.gridTemplate = `repeat(${DATA.grid[0]}, 1fr) / repeat(${DATA.grid[1]}, 1fr)`;
  return make("div", {className: "picture"}, make("img", {src: `pictures/${found.document}.jpg`, alt: shown(found.name), loading: "lazy"}), grid);
}

function place(found) {
  if (!DATA.pictures) return `document ${found.document}, token ${found.position}`;
  return `image ${found.document}, ${found.patch ? `patch (${found.patch.join(", ")})` : `token ${found.position}`}`;
}

function example(found, largest) {
  const line = make("div", {className: "example", dir: "auto"}, make("small", {title: found.name || ""}, `${number(found.activation)} · ${place(found)}`));
  if (DATA.pictures) line.append(picture(found, largest));
  found.tokens.forEach((token, place) => {
    const strength = found.activations[place] / largest;
    const part = make("b", {className: place === found.peak ? "peak" : ""}, shown(token));
    part.dataset.value = number(found.activations[place]);
    if (strength > 0) part.style.backgroundColor = `color-mix(in srgb, var(--glow) ${Math.round(85 * Math.min(1, strength))}%, transparent)`;
    line.append(part);
  });
  return line;
}

const unit = () => DATA.pictures && !DATA.of_text ? "patches" : "tokens";

function histogram(edges, counts) {
  const most = Math.max(...counts);
  const bars = counts.map((count, place) => {
    const bar = make("i", {title: `${number(edges[place])} to ${number(edges[place + 1])}: ${count.toLocaleString()} ${unit()}`});
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
  return [...groups.entries()].sort(([a], [b]) => b - a).map(([, some], place, all) => {
    const values = some.map((one) => one.activation);
    const title = place === 0 ? "strongest" : place === all.length - 1 ? "weakest" : "next";
    return make("details", {open: true}, make("summary", {}, `${title} group: ${number(Math.min(...values))} to ${number(Math.max(...values))}`),
      gallery(some, largest));
  });
}

const gallery = (some, largest) => make("div", {className: DATA.pictures ? "pictures" : ""}, ...some.map((one) => example(one, largest)));

const listed = (title, pairs) => make("section", {className: "words"}, make("h2", {}, title),
  ...pairs.map(([token, value]) => make("span", {}, make("code", {}, shown(token)), number(value))));
const percent = (share) => `${number(100 * share)}%`;

function tokens(rows) {
  return make("section", {className: "words"}, make("h2", {}, "Tokens it fires on"),
    ...rows.map(([token, share, mean, largest]) => make("span", {title: `mean ${number(mean)}, largest ${number(largest)}`},
      make("code", {}, shown(token)), `${percent(share)} · mean ${number(mean)}`)));
}

function together(rows) {
  return make("section", {className: "words"}, make("h2", {}, "Fires together with"),
    ...rows.map(([other, share]) => make("span", {}, make("a", {href: `#${other}`}, texts[other] ? `${other} ` : String(other),
      ...(!texts[other] ? [] : texts[other][3] ? texts[other][3].map(tile) : [make("code", {}, shown(texts[other][0].slice(0, 18)))])), `on ${percent(share)}`)));
}

async function feature(id) {
  if (!(id < DATA.count)) {
    main.replaceChildren(make("p", {}, `There is no feature ${id}.`));
    return;
  }
  main.replaceChildren(make("p", {}, "Loading …"));
  let found;
  try {
    found = (await loaded("blocks", Math.floor(id / DATA.block)))[id % DATA.block];
    await told(found.together.map(([other]) => other));
  } catch (error) {
    main.replaceChildren(make("p", {}, error.message));
    return;
  }
  if (location.hash !== `#${id}`) return;
  const largest = DATA.max[id];
  const kind = (title, name) => {
    const some = found.examples.filter((one) => one.kind === name);
    return make("section", {}, make("h2", {}, title), some.length ? gallery(some, largest) : make("p", {}, "none"));
  };
  const near = found.neighbours.flatMap(([other, cosine]) => [make("a", {href: `#${other}`}, String(other)), ` (${number(cosine)})  `]);
  const beside = [["‹ previous", id - 1], ["next ›", id + 1]].filter(([, other]) => other >= 0 && other < DATA.count);
  main.replaceChildren(
    make("h2", {}, `Feature ${id}`),
    make("p", {className: "faint"}, `fires on ${number(100 * DATA.density[id])}% of ${unit()}, in ${found.sequences.toLocaleString()} ${DATA.pictures ? "images" : "sequences"}; `
      + `largest ${number(largest)}, mean ${number(DATA.mean[id])}`),
    make("p", {}, ...beside.flatMap(([title, other]) => [make("a", {href: `#${other}`}, title), " · "]), ...(near.length ? ["nearest: ", ...near] : [])),
    ...explained(found.explained), ...matched(found.match),
    make("div", {className: "columns"}, ...(found.tokens.length ? [tokens(found.tokens)] : []),
      ...(found.likely.length ? [listed("Makes likely", found.likely), listed("Makes unlikely", found.unlikely)] : []),
      ...(found.together.length ? [together(found.together)] : [])),
    ...past(found.history),
    ...(found.histogram.counts.length ? [histogram(found.histogram.edges, found.histogram.counts)] : []),
    kind("Where it fires most", "strongest"),
    make("h2", {}, `Drawn at random from all ${unit()} on which it fires, by strength`),
    ...quantiles(found.examples.filter((one) => one.kind === "sample"), largest));
  main.focus({preventScroll: true});
  scrollTo(0, 0);
}
