// What all tabs share: choosing a tab, the models, requests to the server and their events.

import {startEditing, takeImage} from "./edit.js";
import {startGenerating} from "./generate.js";
import {startOrder} from "./order.js";

export async function ask(path, body) {
  const options = body && {method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"}};
  const answer = await fetch(path, options);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

// Send a request that takes a while and call on[event](facts) for each of its events, until it has finished.
export async function follow(path, body, on) {
  const {job} = await ask(path, body);
  await new Promise((resolve, reject) => {
    const source = new EventSource(`/api/jobs/${job}`);
    source.onmessage = (message) => {
      const facts = JSON.parse(message.data);
      if (facts.event === "error" || facts.event === "finished") source.close();
      if (facts.event === "error") reject(new Error(facts.message));
      else if (facts.event === "finished") resolve();
      else on[facts.event]?.({...facts, job});
    };
    source.onerror = () => { source.close(); reject(new Error("the server does not answer any more")); };
  });
}

export function element(kind, attributes = {}, ...children) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function links(job, files, command) {
  const row = element("p", {class: "links"});
  for (const file of files) row.append(element("a", {href: `/api/files/${job}/${file}`, download: file}, file));
  const words = command.split(" ").flatMap((word) => [element("span", {}, word), " "]);
  const copy = element("button", {type: "button", class: "copy"}, "copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(command).then(() => { copy.textContent = "copied"; }));
  return [row, element("p", {class: "small"}, "The command that makes the same files, byte for byte: ", copy), element("code", {}, ...words)];
}

// Numbers of a form by the names that the server knows.
export function values(form, names) {
  return Object.fromEntries(names.map((name) => [name, Number(form.elements[name].value)]));
}

export function classOf(form, model) {
  const text = form.elements.class.value.trim().toLowerCase();
  const place = model.classes.findIndex((label, i) => label.toLowerCase() === text || String(i) === text);
  const part = model.classes.findIndex((label) => text && label.toLowerCase().includes(text));
  if (place < 0 && part < 0) throw new Error(`${model.name} has no class “${form.elements.class.value}”`);
  return place < 0 ? part : place;
}

export function offerClasses(list, input, model) {
  list.replaceChildren(...model.classes.map((label) => element("option", {value: label})));
  if (!model.classes.includes(input.value)) input.value = model.classes[Math.min(3, model.classes.length - 1)];
}

function showNumbers() {
  for (const input of document.querySelectorAll('label input[type="range"]')) {
    const output = input.parentElement.querySelector("output");
    const show = () => { output.textContent = input.value; };
    input.addEventListener("input", show);
    show();
  }
}

export function openTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) tab.setAttribute("aria-selected", tab.dataset.tab === name);
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
}

for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => openTab(tab.dataset.tab));

const {models} = await ask("/api/models");
for (const select of document.querySelectorAll("select.models")) {
  if (select.classList.contains("optional")) select.append(element("option", {value: ""}, "nothing"));
  for (const m of models) select.append(element("option", {value: m.name}, `${m.name}: ${m.steps} steps`));
}
startGenerating(models, takeImage);
startEditing(models);
startOrder();
showNumbers();
document.body.dataset.ready = "yes";
