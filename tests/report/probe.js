// In the head of a copy of a page: once all is loaded, says what was found in an element of its own.
"use strict";
const faults = [];
addEventListener("error", (event) => faults.push(event.message));

// Films that shall play at once hold back the load event until their first picture is there.
addEventListener("DOMContentLoaded", () => {
  for (const film of document.querySelectorAll("video")) {
    film.preload = "auto";
    film.load();
  }
});

const all = (selector, found) => [...document.querySelectorAll(selector)].map(found);
const brightness = (colour) => colour.match(/\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;

addEventListener("load", () => {
  const style = getComputedStyle(document.body);
  const findings = {
    faults,
    title: document.title,
    width: innerWidth,
    overflow: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth,
    pictures: all("img", (picture) => picture.complete && picture.naturalWidth > 0),
    objects: all("object", (object) => object.innerText === ""),  // else it shows its text
    films: all("video", (film) => (film.readyState >= 2 ? [film.videoWidth, film.videoHeight] : null)),
    paper: brightness(style.backgroundColor),
    ink: brightness(style.color),
  };
  const written = document.createElement("pre");
  written.id = "findings";
  written.textContent = JSON.stringify(findings);
  document.body.append(written);
});
