"use strict";
// The map of decoder directions: drag or arrow keys to pan, wheel, pinch, + and - to zoom, a click opens a feature.
const HUES = {persisted: "--link", split: "--split", new: "--new", "": "--link"};
const MANY = 20_000;
const view = {x: 0, y: 0, zoom: 1};

function map() {
  const points = [];
  for (let id = 0; id < DATA.count; id++) if (!Number.isNaN(DATA.x[id])) points.push(id);
  const canvas = make("canvas", {tabIndex: 0, role: "img", ariaLabel: "map of the features; the table lists the same ones"});
  const said = make("p", {className: "faint said"}, "");
  const legend = DATA.compared ? Object.keys(HUES).filter((status) => status).flatMap((status) => {
    const dot = make("i", {className: "dot"});
    dot.style.background = `var(${HUES[status]})`;
    return [dot, `${status} `];
  }) : [];
  main.replaceChildren(
    make("p", {className: "faint"}, "Each point is a feature; those that write in similar directions mostly lie together. "
      + "Larger points fire more often. Drag to pan, scroll to zoom, click to open. ", ...legend), canvas, said);
  if (!points.length) {
    said.textContent = "There is no map of these features.";
    return;
  }
  function hue(name) {  // a canvas knows no variables, nor light-dark()
    said.style.color = `var(${name})`;
    const found = getComputedStyle(said).color;
    said.style.color = "";
    return found;
  }
  const hues = STATUSES.map((status) => hue(HUES[status]));
  const text = hue("--text");
  const spot = (id) => {
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) * 0.47 * view.zoom;
    return [canvas.clientWidth / 2 + (DATA.x[id] - view.x) * side, canvas.clientHeight / 2 + (DATA.y[id] - view.y) * side];
  };
  let chosen = null;
  function draw() {
    const sharp = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * sharp;
    canvas.height = canvas.clientHeight * sharp;
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    pen.globalAlpha = 0.7;
    for (const id of points) {
      const [x, y] = spot(id);
      if (x < -9 || y < -9 || x > canvas.clientWidth + 9 || y > canvas.clientHeight + 9) continue;
      pen.fillStyle = id === chosen ? text : hues[DATA.statuses[id]];
      const radius = (id === chosen ? 3 : 0) + Math.max(1.5, Math.min(7, 6 + Math.log10(DATA.density[id]))) * Math.sqrt(view.zoom);
      if (points.length > MANY && id !== chosen) {  // squares are much faster
        pen.fillRect(x - radius / 2, y - radius / 2, radius, radius);
        continue;
      }
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.fill();
    }
  }
  function nearest(event) {
    const edge = canvas.getBoundingClientRect();
    let best = null, least = 15 ** 2;
    for (const id of points) {
      const [x, y] = spot(id);
      const far = (x - event.clientX + edge.left) ** 2 + (y - event.clientY + edge.top) ** 2;
      if (far < least) [best, least] = [id, far];
    }
    return best;
  }
  function zoom(factor, event) {
    const edge = canvas.getBoundingClientRect();
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) * 0.47;
    const [dx, dy] = event ? [event.clientX - edge.left - canvas.clientWidth / 2, event.clientY - edge.top - canvas.clientHeight / 2] : [0, 0];
    const next = Math.max(0.5, Math.min(60, view.zoom * factor));
    view.x += dx / side * (1 / view.zoom - 1 / next);
    view.y += dy / side * (1 / view.zoom - 1 / next);
    view.zoom = next;
    draw();
  }
  function pan(dx, dy) {
    const side = Math.min(canvas.clientWidth, canvas.clientHeight) * 0.47 * view.zoom;
    view.x -= dx / side;
    view.y -= dy / side;
    draw();
  }
  function name(id) {
    const [tokens, , explanation] = (id === null ? null : texts[id]) || ["", "", ""];
    said.textContent = id === null ? "" : `Feature ${id}: fires on ${shown(tokens || "…")}` + (explanation ? `: ${shown(explanation)}` : "");
    if (id !== null && !texts[id]) told([id]).then(() => { if (chosen === id) name(id); }).catch(() => {});
  }
  const held = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, event);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (before) {
      moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
      const other = [...held.values()].find((one) => one.pointerId !== event.pointerId);
      const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
      if (other) zoom(apart(event) / apart(before), event);
      else pan(event.clientX - before.clientX, event.clientY - before.clientY);
      held.set(event.pointerId, event);
      return;
    }
    const found = nearest(event);
    if (found === chosen) return;
    chosen = found;
    name(found);
    canvas.style.cursor = found !== null ? "pointer" : "grab";
    draw();
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => {
    held.delete(event.pointerId);
    const found = kind === "pointerup" && moved < 5 ? nearest(event) : null;
    if (found !== null) location.hash = String(found);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event);
  }, {passive: false});
  canvas.addEventListener("keydown", (event) => {
    const steps = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]};
    if (event.key in steps) pan(...steps[event.key]);
    else if (event.key === "+") zoom(1.3);
    else if (event.key === "-") zoom(1 / 1.3);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(draw).observe(canvas);
}
