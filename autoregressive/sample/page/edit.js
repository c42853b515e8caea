// The tab "Edit": an image, a mask painted over it, and completions.

import {classOf, element, follow, links, offerClasses, values} from "./page.js";

const form = document.getElementById("edit-form");
const paint = document.getElementById("paint");
const hint = document.getElementById("edit-hint");
const draw = paint.getContext("2d");
const mask = element("canvas", {width: paint.width, height: paint.height});
const maskDraw = mask.getContext("2d");
let image = null; // what is edited

function show() {
  draw.imageSmoothingEnabled = false;
  draw.clearRect(0, 0, paint.width, paint.height);
  if (!image) return;
  draw.drawImage(image, 0, 0, paint.width, paint.height);
  draw.globalAlpha = 0.6;
  draw.drawImage(mask, 0, 0);
  draw.globalAlpha = 1;
}

function clearMask() {
  maskDraw.clearRect(0, 0, mask.width, mask.height);
  show();
}

// Take the central square of a picture, of at most 1024 pixels a side.
async function setImage(url) {
  const whole = new Image();
  whole.src = url;
  await whole.decode();
  const from = Math.min(whole.width, whole.height), side = Math.min(from, 1024);
  const square = element("canvas", {width: side, height: side});
  square.getContext("2d").drawImage(whole, (whole.width - from) / 2, (whole.height - from) / 2, from, from, 0, 0, side, side);
  image = square;
  clearMask();
}

export async function takeImage(url, model, label) {
  form.elements.model.value = model;
  form.elements.model.dispatchEvent(new Event("change"));
  form.elements.class.value = label;
  await setImage(url);
}

// The mask as the server wants it: white where anything was painted, of the image's size.
function maskUrl() {
  const scaled = element("canvas", {width: image.width, height: image.height});
  const context = scaled.getContext("2d");
  const marks = maskDraw.getImageData(0, 0, mask.width, mask.height).data;
  context.fillRect(0, 0, image.width, image.height);
  context.fillStyle = "#fff";
  const step = image.width / mask.width;
  for (let i = 0; i < mask.width * mask.height; i++) {
    if (marks[4 * i + 3] > 127) {
      const x = Math.floor((i % mask.width) * step), y = Math.floor(Math.floor(i / mask.width) * step);
      context.fillRect(x, y, Math.ceil(step), Math.ceil(step));
    }
  }
  return scaled.toDataURL("image/png");
}

function paintAt(event) {
  const scale = paint.width / paint.getBoundingClientRect().width;
  maskDraw.fillStyle = "#e8590c";
  maskDraw.beginPath();
  maskDraw.arc(event.offsetX * scale, event.offsetY * scale, Number(document.getElementById("brush").value) / 2, 0, 2 * Math.PI);
  maskDraw.fill();
  show();
}

function result(facts) {
  const names = ["result", ...facts.likelihoods.map((_, i) => `candidate ${i + 1}`)];
  const best = facts.likelihoods.indexOf(Math.max(...facts.likelihoods));
  const figures = [element("figure", {}, element("img", {src: facts.covered, alt: "kept"}), "kept")];
  facts.images.slice(0, facts.likelihoods.length > 1 ? undefined : 1).forEach((url, i) => {
    const caption = i ? `${names[i]}: ${facts.likelihoods[i - 1].toFixed(1)}` : names[i];
    figures.push(element("figure", i - 1 === best ? {class: "best"} : {}, element("img", {src: url, alt: names[i]}), caption));
  });
  const what = facts.likelihoods.length > 1 ? "the number is the log likelihood of the kept codes" : "";
  const time = `${facts.calls} forward calls, ${(1000 * facts.seconds).toFixed(0)} ms`;
  return element("div", {class: "run"}, element("h3", {}, "Result", element("span", {}, time), element("span", {}, what)),
    element("div", {class: "tiles"}, ...figures), ...links(facts.job, facts.files, facts.command));
}

export function startEditing(models) {
  const fields = form.elements;
  const welcome = hint.textContent;
  const choose = () => {
    const model = models.find((m) => m.name === fields.model.value);
    offerClasses(document.getElementById("edit-classes"), fields.class, model);
    for (const name of ["cfg_scale", "top_p"]) {
      fields[name].value = model.defaults[name];
      fields[name].dispatchEvent(new Event("input"));
    }
  };
  fields.model.addEventListener("change", choose);
  choose();

  document.getElementById("upload").addEventListener("change", (event) => {
    if (event.target.files[0]) setImage(URL.createObjectURL(event.target.files[0])).catch(() => { hint.textContent = "that is no picture"; });
  });
  document.getElementById("clear-mask").addEventListener("click", clearMask);
  document.getElementById("fill-half").addEventListener("click", () => {
    maskDraw.fillStyle = "#e8590c";
    maskDraw.fillRect(mask.width / 2, 0, mask.width / 2, mask.height);
    show();
  });
  paint.addEventListener("pointerdown", (event) => { paint.setPointerCapture(event.pointerId); paintAt(event); });
  paint.addEventListener("pointermove", (event) => { if (event.buttons) paintAt(event); });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button.primary");
    button.disabled = true;
    hint.textContent = welcome;
    hint.classList.remove("error");
    try {
      if (!image) throw new Error("choose an image first");
      const model = models.find((m) => m.name === fields.model.value);
      const numbers = values(form, ["candidates", "cfg_scale", "top_p", "seed"]);
      const body = {model: model.name, class: classOf(form, model), image: image.toDataURL("image/png"), mask: maskUrl(), ...numbers};
      await follow("/api/edit", body, {
        done: (facts) => document.getElementById("edits").prepend(result(facts)),
      });
    } catch (error) {
      hint.textContent = error.message;
      hint.classList.add("error");
    }
    button.disabled = false;
  });
}
