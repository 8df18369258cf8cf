"use strict";
(() => {
  const all = (selector) => Array.from(document.querySelectorAll(selector));
  const detail = document.getElementById("detail");
  const marks = all(".m");
  const rows = all("#entries tbody tr");
  const byEntry = new Map(rows.map((row) => [row.id.slice(1), row]));
  for (const mark of marks) {
    const title = mark.querySelector("title");
    mark.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  detail.hidden = false;
  const nothing = "Point at a mark, or press Tab and the arrow keys, to see its entry.";
  detail.textContent = nothing;
  let shown = null;
  const show = (mark) => {
    if (shown) shown.classList.remove("on");
    shown = mark;
    if (!mark) return;
    mark.classList.add("on");
    const row = byEntry.get(mark.dataset.e);
    detail.textContent = mark.getAttribute("aria-label") + (row ? "\n" + row.querySelector(".what").textContent : "");
  };
  const place = (mark) => mark.getBoundingClientRect().left;
  const lanes = all(".row > svg").map((svg) => marks.filter((mark) => mark.parentNode === svg)).filter((lane) => lane.length);
  for (const lane of lanes) lane.sort((a, b) => place(a) - place(b));
  if (lanes.length) lanes[0][0].setAttribute("tabindex", "0");
  let current = lanes.length ? lanes[0][0] : null;
  const go = (mark) => {
    if (!mark) return;
    current.setAttribute("tabindex", "-1");
    current = mark;
    mark.setAttribute("tabindex", "0");
    mark.focus();
    show(mark);
  };
  const jump = (mark) => {
    const row = byEntry.get(mark.dataset.e);
    if (!row) return;
    row.hidden = false;
    location.hash = row.id;
    row.focus({ preventScroll: true });
  };
  const plot = document.querySelector(".plot");
  plot.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(".m");
    if (mark) show(mark);
  });
  plot.addEventListener("focusin", (event) => {
    const mark = event.target.closest(".m");
    if (mark) show(mark);
  });
  plot.addEventListener("click", (event) => {
    const mark = event.target.closest(".m");
    if (mark) jump(mark);
  });
  plot.addEventListener("keydown", (event) => {
    const mark = event.target.closest(".m");
    if (!mark) return;
    const at = lanes.findIndex((lane) => lane.includes(mark));
    const lane = lanes[at];
    const index = lane.indexOf(mark);
    const near = (other) => other && other.reduce((a, b) => (Math.abs(place(b) - place(mark)) < Math.abs(place(a) - place(mark)) ? b : a));
    const keys = {
      ArrowRight: () => go(lane[index + 1]),
      ArrowLeft: () => go(lane[index - 1]),
      ArrowDown: () => go(near(lanes[at + 1])),
      ArrowUp: () => go(near(lanes[at - 1])),
      Home: () => go(lane[0]),
      End: () => go(lane[lane.length - 1]),
      Enter: () => jump(mark),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  const zoom = document.querySelector(".zoom");
  zoom.hidden = false;
  zoom.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    plot.className = "plot z" + button.dataset.z;
    for (const other of zoom.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  });
  const form = document.querySelector(".filter");
  form.hidden = false;
  const find = document.getElementById("find");
  const boxes = all(".filter [data-g]");
  const filter = () => {
    const text = find.value.toLowerCase();
    const on = new Set(boxes.filter((box) => box.checked).map((box) => box.dataset.g));
    let count = 0;
    for (const row of rows) {
      const fits = on.has(row.dataset.g) && (!on.has("bad") || row.classList.contains("bad")) && row.textContent.toLowerCase().includes(text);
      row.hidden = !fits;
      if (fits) count++;
    }
    document.getElementById("shown").textContent = count + " of " + rows.length;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
