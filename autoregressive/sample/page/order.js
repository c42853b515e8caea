// The tab "How it works": the order of the cells, which the server reads off RegionOrder.

import {ask, element} from "./page.js";

const form = document.getElementById("order-form");
const grid = document.getElementById("grid");
const slots = document.getElementById("slots");
const slider = document.getElementById("step");
const colour = (name) => getComputedStyle(document.body).getPropertyValue(`--${name}`);
let order = null, asked = 0, hovered = null, playing = true;

// Step that predicts each cell.
function stepOfCell() {
  const steps = new Array(order.cells.length);
  order.steps.forEach((step, i) => { for (let t = step.tokens[0]; t < step.tokens[1]; t++) steps[order.cells[t]] = i; });
  return steps;
}

function drawGrid(now) {
  const draw = grid.getContext("2d"), side = grid.width / order.grid, of = stepOfCell();
  draw.font = `${Math.min(15, side * 0.42)}px system-ui`;
  draw.textAlign = "center";
  draw.textBaseline = "middle";
  for (let cell = 0; cell < of.length; cell++) {
    const x = (cell % order.grid) * side, y = Math.floor(cell / order.grid) * side;
    draw.fillStyle = of[cell] === now ? colour("now") : of[cell] < now ? colour("known") : colour("line");
    draw.fillRect(x + 1, y + 1, side - 2, side - 2);
    if (side > 16) {
      draw.fillStyle = of[cell] === now ? "#1a0f06" : colour("ink");
      draw.fillText(of[cell], x + side / 2, y + side / 2);
    }
    if (cell === hovered) {
      draw.strokeStyle = colour("ink");
      draw.lineWidth = 3;
      draw.strokeRect(x + 2.5, y + 2.5, side - 5, side - 5);
    }
  }
  draw.strokeStyle = colour("ink");
  draw.lineWidth = 2;
  const [rows, columns] = order.regions;
  for (let i = 1; i < rows; i++) line(draw, 0, (i * grid.height) / rows, grid.width, (i * grid.height) / rows);
  for (let i = 1; i < columns; i++) line(draw, (i * grid.width) / columns, 0, (i * grid.width) / columns, grid.height);
}

function line(draw, ...[x1, y1, x2, y2]) {
  draw.beginPath();
  draw.moveTo(x1, y1);
  draw.lineTo(x2, y2);
  draw.stroke();
}

// The inputs of all steps in a row: those up to this step are what it attends to.
function drawSlots(now) {
  const draw = slots.getContext("2d"), total = order.steps.at(-1).slots[1], width = slots.width / total;
  draw.clearRect(0, 0, slots.width, slots.height);
  order.steps.forEach((step, i) => {
    let at = step.slots[0];
    for (const [kind, first, end] of step.inputs) {
      for (let k = first; k < end; k++, at++) {
        const plain = kind === "token" ? (i === now ? colour("now") : colour("known")) : colour(kind);
        draw.globalAlpha = i <= now ? 1 : 0.3;
        draw.fillStyle = plain;
        draw.fillRect(at * width + 0.5, i === now ? 14 : 26, Math.max(1, width - 1), i === now ? 56 : 40);
      }
    }
  });
  draw.globalAlpha = 1;
  draw.fillStyle = colour("soft");
  draw.font = "12px system-ui";
  draw.textAlign = "left";
  draw.fillText(`${order.steps[now].slots[1]} of ${total} inputs seen`, 0, slots.height - 6);
}

function describe(now) {
  const step = order.steps[now], count = step.tokens[1] - step.tokens[0];
  const kinds = {class: "the class", token: "codes", special: "special tokens"};
  const inputs = step.inputs.map(([kind, a, b]) => (kind === "class" ? kinds.class : `${b - a} ${b - a === 1 ? kinds[kind].slice(0, -1) : kinds[kind]}`));
  return `Step ${now} of 0 to ${order.steps.length - 1}: predicts ${count} ${count === 1 ? "code" : "codes at once, in different regions"}, ` +
    `from ${inputs.join(" and ")}, and attends to all ${step.slots[1]} inputs up to its own. ` +
    `${order.steps.length} forward calls make ${order.cells.length} codes; ${order.special} special tokens are learned.`;
}

function show() {
  const now = hovered === null ? Number(slider.value) : stepOfCell()[hovered];
  drawGrid(now);
  drawSlots(now);
  document.getElementById("order-text").textContent = describe(now);
  slider.parentElement.querySelector("output").textContent = slider.value;
}

async function load() {
  const {grid: side, n, schedule} = form.elements;
  const problem = document.getElementById("order-error");
  const mine = ++asked;  // answers may come in another order: only that to the last question counts
  let answer = null, said = "";
  try {
    const query = new URLSearchParams({grid: side.value, n: n.value || 4, schedule: schedule.value.trim()});
    answer = await ask(`/api/order?${query}`);
  } catch (error) {
    said = error.message;
  }
  if (mine !== asked) return;
  problem.textContent = said;
  if (!answer) return;
  order = answer;
  slider.max = order.steps.length - 1;
  slider.value = 0;
  show();
}

async function offerRegions() {
  const select = form.elements.n, before = select.value || "4";
  const side = form.elements.grid.value;
  const {fitting} = await ask(`/api/order?grid=${side}&n=1`);
  if (side !== form.elements.grid.value) return;
  select.replaceChildren(...fitting.map((n) => element("option", {value: n}, n)));
  select.value = fitting.includes(Number(before)) ? before : 1;
  await load();
}

export function startOrder() {
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.grid.addEventListener("change", offerRegions);
  form.elements.n.addEventListener("change", load);
  form.elements.schedule.addEventListener("change", load);
  slider.addEventListener("input", () => { setPlaying(false); show(); });
  document.getElementById("play").addEventListener("click", () => setPlaying(!playing));
  grid.addEventListener("pointermove", (event) => {
    const side = grid.getBoundingClientRect().width / order.grid;
    const x = Math.floor(event.offsetX / side), y = Math.floor(event.offsetY / side);
    hovered = x >= 0 && y >= 0 && x < order.grid && y < order.grid ? y * order.grid + x : null;
    show();
  });
  grid.addEventListener("pointerleave", () => { hovered = null; show(); });
  setInterval(() => {
    if (!playing || !order || hovered !== null || document.getElementById("order").hidden) return;
    slider.value = (Number(slider.value) + 1) % order.steps.length;
    show();
  }, 500);
  offerRegions();
}

function setPlaying(on) {
  playing = on;
  document.getElementById("play").textContent = on ? "Pause" : "Play";
}
