// Small things that every part of the page needs.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function icon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** A short message at the edge of the page. `more` is what to do, or an element such as a link. */
export function toast(text, more = "", bad = false) {
  const box = $("toasts");
  const message = make("div", { class: bad ? "toast bad" : "toast", text });
  if (more) message.append(more instanceof Node ? more : make("small", { text: more }));
  box.append(message);
  while (box.children.length > 4) box.firstChild.remove();
  setTimeout(() => message.remove(), bad || more instanceof Node ? 12000 : 5000);
}

let bannerTimer = 0;

/** A line over the page that stays until it is replaced; `action` is [name, what it does]. */
export function banner(text, kind = "bad", action = null, seconds = 0) {
  clearTimeout(bannerTimer);
  const box = $("banner");
  box.hidden = !text;
  box.dataset.kind = kind;
  box.querySelector("span").textContent = text ?? "";
  const button = box.querySelector("button");
  button.hidden = !action;
  button.textContent = action ? action[0] : "";
  button.onclick = action ? action[1] : null;
  if (seconds) bannerTimer = setTimeout(() => banner(null), seconds * 1000);
}

export const clock = (date = new Date()) => date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export function amount(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes, unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function span(seconds) {
  const whole = Math.floor(seconds);
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export function brief(seconds) {
  return seconds == null ? "–" : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

const HUES = { red: 2, crimson: 350, orange: 28, yellow: 50, golden: 46, green: 140, turquoise: 178, cyan: 186, blue: 222, purple: 275, violet: 268, pink: 325, magenta: 310 };

/** A hue for a text, always the same one: that of the first colour it names, if any. */
export function hue(text) {
  const named = text.toLowerCase().match(/[a-z]+/g)?.find((word) => word in HUES);
  if (named) return HUES[named];
  let sum = 7;
  for (const letter of text) sum = (sum * 31 + letter.codePointAt(0)) % 997;
  return (sum * 137) % 360;
}

export function saveFile(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Offer recipes in a select, those that `reason` refuses greyed; the spec goes to `input`. Returns how to set a spec. */
export function choices(select, input, hint, list, chosen, reason = () => null) {
  const named = (spec) => list.find((one) => one.name === spec.split("(")[0].trim());
  const tell = () => {
    const choice = named(input.value), refused = choice && reason(choice);
    hint.textContent = refused ? `Not here: ${refused}.` : choice ? [choice.summary, choice.paper].filter(Boolean).join(" — ").replaceAll("`", "") : "No such name.";
    hint.classList.toggle("bad", Boolean(refused) || !choice);
  };
  const fill = () => {
    select.replaceChildren(...list.map((choice) => make("option", {
      value: choice.name, text: reason(choice) ? `${choice.name} – not here` : choice.name, disabled: Boolean(reason(choice)),
    })));
    select.value = named(input.value)?.name ?? "";
    tell();
  };
  select.onchange = () => {
    const choice = named(select.value);
    const given = Object.entries(choice.defaults).filter(([, value]) => typeof value === "number");
    input.value = given.length ? `${choice.name}(${given.map(([name, value]) => `${name}=${value}`).join(", ")})` : choice.name;
    input.dispatchEvent(new Event("input"));
  };
  input.addEventListener("input", fill);
  const set = (spec) => { input.value = spec; fill(); };
  set(chosen);
  return set;
}
