// The tab "Generate": images that fill in, a slider over their steps, maps of what was certain.

import {ask, classOf, element, follow, links, offerClasses, openTab, values} from "./page.js";

const TILE = 240; // pixels of a canvas, two for one on the screen
const form = document.getElementById("generate-form");
const runs = document.getElementById("runs");
const overlay = document.getElementById("overlay");
const outlines = document.getElementById("outlines");

// One model's images: all of its steps, of which one is shown.
class Run {
  constructor(facts, take) {
    Object.assign(this, {facts, steps: [], shown: -1, following: true});
    this.title = element("span");
    this.slider = element("input", {type: "range", min: 0, max: 0, value: 0, "aria-label": "step"});
    this.slider.addEventListener("input", () => { this.following = false; this.show(Number(this.slider.value)); });
    this.tiles = Array.from({length: facts.count}, () => element("canvas", {width: TILE, height: TILE, class: "pick", title: "edit this image"}));
    this.tiles.forEach((tile, i) => tile.addEventListener("click", () => this.done && take(this.crop(i), facts.name)));
    const row = element("div", {class: "tiles"}, ...this.tiles);
    this.box = element("div", {class: "run", "data-model": facts.name}, element("h3", {}, facts.name, this.title), row, this.slider);
  }

  async prepare() {
    const {grid, n, schedule, layout} = this.facts;
    this.order = await ask(`/api/order?grid=${grid[0]}&n=${n}&schedule=${schedule}&layout=${layout}`);
  }

  async add({decoded, call, strip}) {
    const image = new Image();
    image.src = strip;
    await image.decode();
    this.steps.push({decoded, call, image});
    this.slider.max = this.steps.length - 1;
    if (this.following) this.show(this.steps.length - 1);
  }

  show(step) {
    this.shown = step;
    this.slider.value = step;
    const {image, decoded} = this.steps[step];
    const before = step ? this.steps[step - 1].decoded : 0;
    const size = image.height, cell = TILE / this.facts.grid[0];
    this.tiles.forEach((tile, i) => {
      const draw = tile.getContext("2d");
      draw.imageSmoothingEnabled = false;
      draw.drawImage(image, i * size, 0, size, size, 0, 0, TILE, TILE);
      if (this.done && overlay.value !== "none") this.paintMap(draw, this.done[overlay.value][i], decoded, cell);
      if (outlines.checked && !(this.done && step === this.steps.length - 1)) this.outline(draw, before, decoded, cell);
    });
    const {call} = this.steps[step];
    const fewer = this.done && this.done.calls !== this.facts.steps;
    const what = fewer ? `call ${call} of ${this.done.calls}, instead of ${this.facts.steps}` : `step ${call} of ${this.facts.steps}`;
    this.title.textContent = `${what}, ${decoded} of ${this.order.cells.length} cells${this.done ? this.time() : ""}`;
  }

  time() {
    const {seconds, decoder} = this.done;
    const text = seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(1)} s`;
    return `, ${text} for ${this.facts.count} by ${decoder}`;
  }

  outline(draw, before, decoded, cell) {
    draw.strokeStyle = getComputedStyle(document.body).getPropertyValue("--now");
    draw.lineWidth = 3;
    for (const place of this.order.cells.slice(before, decoded)) {
      draw.strokeRect((place % this.order.grid) * cell + 1.5, Math.floor(place / this.order.grid) * cell + 1.5, cell - 3, cell - 3);
    }
  }

  // A map over the decoded cells: entropy of up to log2 V bits, or a probability.
  paintMap(draw, map, decoded, cell) {
    const most = overlay.value === "entropy" ? Math.log2(this.facts.vocabulary) : 1;
    for (const place of this.order.cells.slice(0, decoded)) {
      const share = Math.min(1, map[place] / most);
      draw.fillStyle = `hsl(${260 - 210 * share} 80% ${18 + 40 * share}% / 0.85)`;
      draw.fillRect((place % this.order.grid) * cell, Math.floor(place / this.order.grid) * cell, cell, cell);
    }
  }

  crop(i) {
    const image = this.steps.at(-1).image, size = image.height;
    const canvas = element("canvas", {width: size, height: size});
    canvas.getContext("2d").drawImage(image, i * size, 0, size, size, 0, 0, size, size);
    return canvas.toDataURL("image/png");
  }

  finish(facts) {
    this.done = facts;
    this.box.append(...links(facts.job, facts.files, facts.command));
    this.show(this.shown);
  }
}

export function startGenerating(models, takeImage) {
  const byName = Object.fromEntries(models.map((m) => [m.name, m]));
  const fields = form.elements;
  const hint = document.getElementById("generate-hint");
  const welcome = hint.textContent;
  let shown = [];

  function choose() {
    const model = byName[fields.model.value];
    offerClasses(document.getElementById("classes"), fields.class, model);
    for (const [name, value] of Object.entries(model.defaults)) {
      fields[name].value = value;
      fields[name].dispatchEvent(new Event("input"));
    }
    for (const option of fields.beside.options) {
      const other = byName[option.value];
      option.hidden = Boolean(other) && (other === model || other.classes.join() !== model.classes.join());
    }
    if (fields.beside.selectedOptions[0]?.hidden) fields.beside.value = "";
  }

  async function generate(event) {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    hint.textContent = welcome;
    hint.classList.remove("error");
    try {
      const model = byName[fields.model.value];
      const names = [model.name, fields.beside.value].filter(Boolean);
      const numbers = values(form, ["images", "cfg_scale", "temperature", "top_p", "top_k", "seed"]);
      const label = fields.class.value;
      const body = {models: names, class: classOf(form, model), jacobi: fields.jacobi.checked, ...numbers};
      let queue = Promise.resolve(); // pictures are decoded one after another, in their order
      const later = (work) => { queue = queue.then(work); };
      await follow("/api/generate", body, {
        queued: ({ahead}) => { if (ahead) hint.textContent = `${ahead} before you`; },
        start: (facts) => later(async () => {
          hint.textContent = welcome;
          if (!facts.place) { runs.replaceChildren(); shown = []; }
          const run = new Run(facts, (image, name) => { takeImage(image, name, label); openTab("edit"); });
          await run.prepare();
          shown.push(run);
          runs.append(run.box);
          document.querySelector(".bar").hidden = false;
        }),
        step: (facts) => later(() => shown[facts.place].add(facts)),
        done: (facts) => later(() => shown[facts.place].finish(facts)),
      });
      await queue;
    } catch (error) {
      hint.textContent = error.message;
      hint.classList.add("error");
    }
    button.disabled = false;
  }

  fields.model.addEventListener("change", choose);
  form.addEventListener("submit", generate);
  const scale = document.getElementById("scale");
  const again = () => {
    scale.hidden = overlay.value === "none";
    const most = Math.log2(shown[0]?.facts.vocabulary ?? 2);
    scale.lastElementChild.textContent = overlay.value === "entropy" ? `${most.toFixed(1)} bits, all codes alike` : "1, certain";
    redraw();
  };
  const redraw = () => shown.forEach((run) => run.shown >= 0 && run.show(run.shown));
  overlay.addEventListener("change", again);
  outlines.addEventListener("change", again);
  choose();
  if (models[0].size <= 64) generate(new Event("submit")); // so that there is something to see
}
