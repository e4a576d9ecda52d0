// The strip of what a memory holds.

import { $, make } from "./ui.js";

const REGIONS = { sink: "sink: the first, kept for good", memory: "memory: condensed", window: "window: the latest", flight: "in flight: not finished" };

export class Strip {
  constructor() {
    this.pictures = new Map();
    this.items = new Map();
  }

  clear() {
    this.pictures.clear();
    this.items.clear();
    $("strip").replaceChildren();
    $("legend").replaceChildren();
    $("strip-empty").hidden = false;
  }

  show({ held, count, thumbs }) {
    for (const [latent, picture] of Object.entries(thumbs)) this.pictures.set(Number(latent), picture);
    const kept = new Set(held.map(([latent]) => latent));
    for (const latent of this.pictures.keys()) if (!kept.has(latent)) this.pictures.delete(latent);
    const counts = {}, wanted = [];
    held.forEach(([latent, region], at) => {
      counts[region] = (counts[region] ?? 0) + 1;
      const before = held[at - 1];
      if (before && before[0] >= 0 && latent > before[0] + 1) wanted.push(this.item(`gap ${latent}`, () => make("li", { class: "gap", text: "…", "aria-hidden": "true" })));
      const picture = this.pictures.get(latent);
      const key = `${latent} ${region} ${latent < 0 ? at : ""} ${picture ? 1 : 0}`;
      wanted.push(this.item(key, () => this.made(latent, region, picture)));
    });
    const strip = $("strip");
    const atEnd = strip.scrollLeft + strip.clientWidth >= strip.scrollWidth - 4;
    wanted.forEach((item, at) => { if (strip.children[at] !== item) strip.insertBefore(item, strip.children[at] ?? null); });
    while (strip.children.length > wanted.length) strip.lastChild.remove();
    const present = new Set(wanted);
    for (const [key, item] of this.items) if (!present.has(item)) this.items.delete(key);
    if (atEnd) strip.scrollLeft = strip.scrollWidth;
    $("strip-empty").hidden = held.length > 0;
    $("legend").replaceChildren(...Object.entries(counts).map(([region, number]) =>
      make("li", { "data-region": region, text: `${number} × ${REGIONS[region] ?? region}` })));
    if (count > held.length) $("legend").append(make("li", { text: `${count} in all` }));
  }

  item(key, build) {
    if (!this.items.has(key)) this.items.set(key, build());
    return this.items.get(key);
  }

  made(latent, region, picture) {
    const name = latent < 0 ? "several, folded into one" : `latent frame ${latent}`;
    const inside = picture ? make("img", { class: "pic", src: picture, alt: `${name}, ${region}` })
      : make("div", { class: "pic", role: "img", "aria-label": `${name}, ${region}`, text: latent < 0 ? "Σ" : "" });
    return make("li", { "data-region": region, title: `${name} – ${region}` }, inside, latent < 0 ? "folded" : String(latent));
  }
}
