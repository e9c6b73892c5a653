"use strict";
document.documentElement.classList.add("scripted");
for (const slider of document.querySelectorAll("input[data-slices]")) {
  const card = slider.closest(".pair");
  const show = () => {
    const text = `slice ${Number(slider.value) + 1} of ${slider.dataset.slices}`;
    card.style.setProperty("--slice", slider.value);
    slider.setAttribute("aria-valuetext", text);
    card.querySelector("output").textContent = text;
  };
  slider.addEventListener("input", show);
  show();
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
