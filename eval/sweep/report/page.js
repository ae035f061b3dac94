// What moves on the page: clips of a prompt in step, a wipe between two of them, tables that sort.
"use strict";

const APART = 0.04; // seconds that clips may drift before they are set right
const make = (tag, options = {}, children = []) => {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...children);
  return element;
};

// One set of controls for all clips of a prompt, which play in step with the first of them.
const playTogether = (group) => {
  const videos = [...group.querySelectorAll("video")];
  if (videos.length === 0) return;
  const [leader] = videos;
  const frames = Number(group.dataset.frames);
  const button = make("button", { type: "button", className: "play" });
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0.5 });
  slider.setAttribute("aria-label", "Position in all clips of this prompt");
  const counter = make("output");
  const speed = make("select");
  for (const [name, rate] of [["full speed", 1], ["half speed", 0.5], ["quarter speed", 0.25]]) {
    speed.append(make("option", { textContent: name, value: rate }));
  }
  speed.setAttribute("aria-label", "Speed");
  group.before(make("div", { className: "player" }, [button, slider, counter, speed]));
  let playing = false;

  const seek = (share) => {
    for (const video of videos) {
      if (video.duration) video.currentTime = Math.min(share, 0.999) * video.duration;
    }
  };
  const show = () => {
    button.textContent = playing ? "Pause" : "Play all";
    const share = Math.min(Number(slider.value), 0.999);
    const second = share * (leader.duration || 0);
    counter.textContent = frames
      ? `frame ${Math.floor(share * frames) + 1} of ${frames}`
      : `${second.toFixed(1)} s`;
  };
  const tick = () => {
    if (!playing) return;
    if (leader.ended) seek(0);
    for (const video of videos) {
      const late = Math.abs(video.currentTime - leader.currentTime) > APART;
      if (video !== leader && late) video.currentTime = leader.currentTime;
      if (video.paused) video.play().catch(() => {});
    }
    slider.value = leader.duration ? leader.currentTime / leader.duration : 0;
    show();
    requestAnimationFrame(tick);
  };

  for (const video of videos) video.controls = false;
  button.addEventListener("click", () => {
    playing = !playing;
    if (playing) tick();
    else for (const video of videos) video.pause();
    show();
  });
  slider.addEventListener("input", () => {
    playing = false;
    for (const video of videos) video.pause();
    seek(Number(slider.value));
    show();
  });
  speed.addEventListener("change", () => {
    for (const video of videos) video.playbackRate = Number(speed.value);
  });
  for (const video of videos) {
    // Each by itself: the middle shows more of a clip than its first frame.
    const start = () => {
      if (video.duration) video.currentTime = Number(slider.value) * video.duration;
    };
    if (video.readyState >= 1) start();
    else video.addEventListener("loadedmetadata", start, { once: true });
  }
  leader.addEventListener("loadedmetadata", show);
  show();
};

// Dense left of a line, a method right of it, drawn from the clips that are on the page anyway.
const wipe = (box, group) => {
  const figures = [...group.querySelectorAll("figure")];
  const dense = figures.find((figure) => figure.dataset.kind === "dense");
  const others = figures.filter((figure) => figure !== dense);
  if (!dense || others.length === 0) return;
  const canvas = make("canvas");
  const line = make("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0.5 });
  line.setAttribute("aria-label", "Where dense ends and the method begins");
  const choice = make("select");
  choice.setAttribute("aria-label", "Method beside dense");
  others.forEach((figure, index) => {
    choice.append(make("option", { textContent: figure.dataset.label, value: index }));
    if (figure.dataset.label === box.dataset.pick) choice.value = index;
  });
  const left = make("span", { className: "soft", textContent: "dense" });
  const controls = make("div", { className: "choice" }, [left, line, choice]);
  box.append(make("div", { className: "stage" }, [canvas]), controls);
  box.hidden = false;
  const pencil = canvas.getContext("2d");

  const draw = () => {
    requestAnimationFrame(draw);
    if (!box.closest("details").open) return;
    const one = dense.querySelector(".clip"), other = others[choice.value].querySelector(".clip");
    const width = one.videoWidth || one.naturalWidth, height = one.videoHeight || one.naturalHeight;
    if (!width) return;
    if (canvas.width !== width) Object.assign(canvas, { width, height });
    const at = Math.round(Number(line.value) * width);
    pencil.drawImage(other, 0, 0, width, height);
    if (at > 0) pencil.drawImage(one, 0, 0, at, height, 0, 0, at, height);
    pencil.fillStyle = "#fff";
    pencil.fillRect(at - 1, 0, 2, height);
  };
  const move = (event) => {
    const place = canvas.getBoundingClientRect();
    line.value = (event.clientX - place.left) / place.width;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    move(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) move(event);
  });
  draw();
};

// A click on a heading sorts by it, the best first; another click turns the order round.
const sortable = (table) => {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [value(one, column), value(other, column)];
        if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
        const order = typeof a === "number" && typeof b === "number" ? a - b : `${a}`.localeCompare(b);
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
};

const copied = (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text }); // pages from the disk may have no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  return Promise.resolve();
};

for (const group of document.querySelectorAll(".clips")) playTogether(group);
for (const box of document.querySelectorAll(".wipe")) wipe(box, box.parentElement.querySelector(".clips"));
for (const clip of document.querySelectorAll(".clips .clip")) {
  clip.addEventListener("click", () => clip.closest("figure").classList.toggle("large"));
}
for (const table of document.querySelectorAll("table.results")) sortable(table);
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    copied(button.previousElementSibling.textContent).then(
      () => { button.textContent = "Copied"; },
      () => { button.textContent = "Select it"; },
    );
  });
}
