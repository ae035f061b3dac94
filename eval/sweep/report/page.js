// One set of controls for all clips of a prompt, which play in step with the first of them.
"use strict";

const APART = 0.04; // seconds that clips may drift before they are set right

for (const group of document.querySelectorAll(".clips")) {
  const videos = [...group.querySelectorAll("video")];
  if (videos.length === 0) continue;
  const [leader] = videos;
  const player = document.createElement("div");
  player.className = "player";
  const button = document.createElement("button");
  button.type = "button";
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.001, value: 0 });
  slider.setAttribute("aria-label", "Position in all clips of this prompt");
  player.append(button, slider);
  group.before(player);
  let playing = false;

  const seek = (share) => {
    for (const video of videos) {
      if (video.duration) video.currentTime = share * video.duration;
    }
  };
  const show = () => {
    button.textContent = playing ? "Pause" : "Play all";
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
  leader.addEventListener("loadedmetadata", () => seek(Number(slider.value)), { once: true });
  show();
}
