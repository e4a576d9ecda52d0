// Puts the page together: tabs, theme, keys.

import { Live } from "./live.js";
import { Read } from "./read.js";
import { $, banner, clock } from "./ui.js";

let live = null, read = null;

function theme(next) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const chosen = next ?? localStorage.getItem("evenflow.theme") ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = chosen;
  if (next) localStorage.setItem("evenflow.theme", next);
  for (const chart of [live?.drift, read?.loss]) chart?.draw();
  read?.held();
}

function tab(name, focus = false) {
  for (const one of ["live", "read"]) {
    const chosen = one === name, button = $(`tab-${one}`);
    $(one).hidden = !chosen;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
    if (chosen && focus) button.focus();
  }
  sessionStorage.setItem("evenflow.tab", name);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("shortcuts").open) return;
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (live?.drawing) live.draw();
    return event.target.blur();
  }
  if (typing) return;
  const onButton = event.target.closest("button, summary, a");
  if (onButton && (event.key === " " || event.key === "Enter")) return;
  const press = (id) => { if (!$("live").hidden && !$(id).disabled) $(id).click(); };
  const actions = {
    " ": () => press("play"), r: () => press("restart"), v: () => press("record"), d: () => press("draw"), x: () => press("pixels"),
    f: () => press("full"), s: () => press("keep"), b: () => press("blend"), e: () => live?.erase(),
    l: () => $("theme").click(), "?": () => $("help").click(), "/": () => $($("live").hidden ? "text" : "prompt").focus(),
  };
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (/^[1-9]$/.test(key) && !$("live").hidden) $("suggestions").children[Number(key) - 1]?.click();
  else if (actions[key]) actions[key]();
  else return;
  event.preventDefault();
}

async function options() {
  let since = null;
  for (let wait = 500; ; wait = Math.min(5000, wait * 1.6)) {
    try {
      const answer = await fetch("/v1/options");
      if (answer.ok) {
        if (since) banner(null);
        return await answer.json();
      }
      throw new Error(String(answer.status));
    } catch {
      since ??= new Date();
      banner(`No answer from the server since ${clock(since)}; trying again…`);
      await new Promise((go) => setTimeout(go, wait));
    }
  }
}

theme();
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("help").onclick = () => $("shortcuts").showModal();
for (const one of ["live", "read"]) {
  $(`tab-${one}`).onclick = () => tab(one);
  $(`tab-${one}`).onkeydown = (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") tab(one === "live" ? "read" : "live", true);
  };
}
document.addEventListener("keydown", keys);

const what = await options();
if (what.video) live = new Live(what);
if (what.text) read = new Read(what);
$("tab-live").hidden = !what.video;
$("tab-read").hidden = !what.text;
if (!what.video) { $("status").dataset.state = "open"; $("status").querySelector("span").textContent = "Connected"; }
const last = sessionStorage.getItem("evenflow.tab");
tab(what.video && !(last === "read" && what.text) ? "live" : "read");
document.documentElement.dataset.ready = "1";
