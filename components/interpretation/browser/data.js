"use strict";
// What is shown comes from index.js, words/*.js and blocks/*.js, which call the three functions below: a page from disk may load
// scripts, not files.
const DATA = {};
const STATUSES = ["", "persisted", "split", "new"];
const pieces = {words: new Map(), blocks: new Map()};
const waiting = {words: new Map(), blocks: new Map()};
const texts = [];  // of features: [tokens, logits, explanation], and of images the patches, each [image, row, column]
const lower = [];

function unpacked(text, Kind) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let place = 0; place < bytes.length; place++) bytes[place] = characters.charCodeAt(place);
  return new Kind(bytes.buffer);
}

function index(given) {
  Object.assign(DATA, given, {statuses: unpacked(given.statuses, Uint8Array)});
  for (const [name, packed] of Object.entries(given.columns)) DATA[name] = unpacked(packed, Float32Array);
  for (const [feature, ...said] of given.first) say(feature, said);
  begin();
}

function say(feature, said) {
  texts[feature] = said;
  lower[feature] = said.slice(0, 3).join(" ").toLowerCase();
}

function words(number, some) {
  some.forEach((said, place) => say(number * DATA.piece + place, said));
  arrived("words", number, true);
}

const block = (number, features) => arrived("blocks", number, features);

function arrived(kind, number, content) {
  pieces[kind].set(number, content);
  const waited = waiting[kind].get(number);
  waiting[kind].delete(number);
  if (waited) waited.resolve(content);
}

function loaded(kind, number) {
  if (pieces[kind].has(number)) return Promise.resolve(pieces[kind].get(number));
  if (!waiting[kind].has(number)) {
    const waited = Promise.withResolvers ? Promise.withResolvers() : deferred();
    waiting[kind].set(number, waited);
    const script = document.createElement("script");
    script.src = `${kind}/${String(number).padStart(5, "0")}.js`;
    script.onload = () => script.remove();
    script.onerror = () => {
      script.remove();
      waiting[kind].delete(number);
      waited.reject(new Error(`${kind}/${String(number).padStart(5, "0")}.js is not there: the folder is not whole`));
    };
    document.head.append(script);
  }
  return waiting[kind].get(number).promise;
}

function deferred() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, {resolve, reject}));
  return made;
}

const told = (features) => Promise.all([...new Set(features.filter((id) => !texts[id]).map((id) => Math.floor(id / DATA.piece)))]
  .map((number) => loaded("words", number)));
const inWords = () => Math.ceil(DATA.count / DATA.piece);
const allTold = () => pieces.words.size === inWords();

// All words, some pieces at a time; `seen` is called now and then, and once more at the end; what it gives, false, ends it.
async function tellAll(seen) {
  const numbers = [...Array(inWords()).keys()].filter((number) => !pieces.words.has(number));
  let last = performance.now();
  const take = async () => {
    while (numbers.length) {
      await loaded("words", numbers.shift());
      if (performance.now() - last < 200) continue;
      last = performance.now();
      if (!seen()) numbers.length = 0;
    }
  };
  await Promise.all(Array.from({length: 12}, take));
  seen();
}

const orders = new Map();

// All features by a column, equal ones by number.
function ordered(key, down) {
  const name = `${key} ${down}`;
  if (orders.has(name)) return orders.get(name);
  const found = Uint32Array.from({length: DATA.count}, (_, place) => place), sign = down ? -1 : 1;
  const place = WORDS.indexOf(key);
  if (place >= 0) found.sort((a, b) => sign * (texts[a] ? texts[a][place] : "").localeCompare(texts[b] ? texts[b][place] : "") || a - b);
  else if (key !== "feature") {
    const values = DATA[key].map((value) => Number.isNaN(value) ? -1 : value);
    found.sort((a, b) => sign * (values[a] - values[b]) || a - b);
  } else if (down) found.reverse();
  if (place < 0 || allTold()) orders.set(name, found);
  return found;
}
