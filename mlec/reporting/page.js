"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const views = all(".view").map((view) => {
    const svg = view.querySelector("svg");
    return { view, svg, width: svg.width.baseVal.value, height: svg.height.baseVal.value, scale: 1 };
  });
  const READABLE = 0.9; // The smallest scale that a picture starts with.
  const words = (node) => node.querySelector("title").textContent;
  all(".tools, .buttons").forEach((element) => (element.hidden = false));

  // Zoom: the picture is resized inside its scrolling frame, the point (x, y) of the frame stays where it is.
  function zoom(v, scale, x = v.view.clientWidth / 2, y = v.view.clientHeight / 2) {
    const box = v.svg.getBoundingClientRect(), frame = v.view.getBoundingClientRect();
    const at = [(x + frame.left - box.left) / v.scale, (y + frame.top - box.top) / v.scale];
    v.scale = Math.min(4, Math.max(0.004, scale));
    v.svg.setAttribute("width", v.width * v.scale);
    v.svg.setAttribute("height", v.height * v.scale);
    const moved = v.svg.getBoundingClientRect();
    v.view.scrollLeft += moved.left - frame.left + at[0] * v.scale - x;
    v.view.scrollTop += moved.top - frame.top + at[1] * v.scale - y;
  }
  const fit = (v) => zoom(v, Math.min(1, (v.view.clientWidth - 16) / v.width), 0, 0);

  function reveal(v, node) {
    if (v.scale < READABLE / 2) zoom(v, READABLE, 0, 0);
    const box = node.getBoundingClientRect(), frame = v.view.getBoundingClientRect();
    v.view.scrollLeft += box.left + box.width / 2 - frame.left - frame.width / 2;
    v.view.scrollTop += box.top + box.height / 2 - frame.top - frame.height / 2;
  }

  for (const v of views) {
    const { view } = v;
    if (v.width > view.clientWidth) zoom(v, Math.max(READABLE, (view.clientWidth - 16) / v.width), 0, 0);
    reveal(v, v.svg.querySelector(".node")); // An input.
    all("[data-zoom]", view.parentElement).forEach((button) =>
      button.addEventListener("click", () => {
        const step = { in: 1.3, out: 1 / 1.3 }[button.dataset.zoom];
        step ? zoom(v, v.scale * step) : fit(v);
      }));
    view.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const frame = view.getBoundingClientRect();
      zoom(v, v.scale * Math.exp(-event.deltaY / 300), event.clientX - frame.left, event.clientY - frame.top);
    }, { passive: false });
    view.addEventListener("keydown", (event) => {
      const step = { "+": 1.3, "=": 1.3, "-": 1 / 1.3 }[event.key];
      if (step) zoom(v, v.scale * step);
      else if (event.key === "0") fit(v);
      else if (event.key === "Enter" && event.target.closest(".node")) pick(event.target.closest(".node"));
    });
    // A mouse drags the picture; fingers scroll it by themselves.
    let drag = null;
    view.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0)
        drag = { x: event.clientX, y: event.clientY, left: view.scrollLeft, top: view.scrollTop, moved: false };
    });
    addEventListener("pointermove", (event) => {
      if (!drag) return;
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.abs(dx) + Math.abs(dy) > 4;
      if (!drag.moved) return;
      view.classList.add("dragging");
      view.scrollLeft = drag.left - dx;
      view.scrollTop = drag.top - dy;
    });
    addEventListener("pointerup", () => {
      view.classList.remove("dragging");
      const moved = drag?.moved;
      drag = null;
      if (moved) view.addEventListener("click", (event) => event.stopPropagation(), { capture: true, once: true });
    });
    view.addEventListener("click", (event) => pick(event.target.closest(".node")));
  }

  // A node is selected: its facts are shown, and the nodes of both graphs that come from the same source lines are marked.
  const picked = document.querySelector("[data-picked]");
  const places = (node) => new Set((node.dataset.places || "").split(" ").filter(Boolean));
  function pick(node) {
    all(".node.now, .node.same").forEach((other) => other.classList.remove("now", "same"));
    picked.hidden = !node;
    if (!node) return;
    picked.textContent = words(node);
    node.classList.add("now");
    const own = places(node);
    for (const v of views) {
      const same = all(".node", v.svg).filter((other) => other !== node && [...places(other)].some((place) => own.has(place)));
      same.forEach((other) => other.classList.add("same"));
      if (same.length && !v.svg.contains(node)) reveal(v, same[0]);
    }
  }

  // A click on the title of a column sorts: numbers from the largest on, words from A on; the next click turns it round.
  for (const table of all("[data-sortable]")) {
    const body = table.querySelector("tbody");
    all("th", table).forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const rows = [...body.rows], cell = (row) => row.cells[column];
        const numeric = rows.some((row) => cell(row).dataset.sort);
        const up = head.ariaSort ? head.ariaSort === "descending" : !numeric;
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const order = (a, b) => numeric
          ? (Number(cell(a).dataset.sort ?? -Infinity) || 0) - (Number(cell(b).dataset.sort ?? -Infinity) || 0)
          : cell(a).textContent.localeCompare(cell(b).textContent, undefined, { numeric: true });
        body.append(...rows.sort((a, b) => (up ? order(a, b) : order(b, a))));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }

  // Search: matching nodes are marked in both graphs, Enter goes from one to the next.
  const field = document.querySelector("[data-find]"), found = document.querySelector("[data-found]");
  let hits = [], current = -1;
  function go(step, show = false) {
    if (!hits.length) return;
    current = (current + step + hits.length) % hits.length;
    all(".node.now").forEach((node) => node.classList.remove("now"));
    const [v, node] = hits[current];
    node.classList.add("now");
    if (show) v.view.parentElement.scrollIntoView({ block: "nearest" });
    reveal(v, node);
    found.textContent = `${current + 1} of ${hits.length}: Enter for the next`;
  }
  field?.addEventListener("input", () => {
    const text = field.value.trim().toLowerCase();
    hits = [];
    current = -1;
    for (const v of views) {
      v.view.classList.toggle("searching", text !== "");
      for (const node of all(".node", v.svg)) {
        const hit = text !== "" && words(node).toLowerCase().includes(text);
        node.classList.toggle("hit", hit);
        node.classList.remove("now");
        if (hit) hits.push([v, node]);
      }
      const first = hits.find(([where]) => where === v);
      if (first) reveal(...first);
    }
    found.textContent = text && !hits.length ? "nothing found" : "";
    go(1);
  });
  field?.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go(event.shiftKey ? -1 : 1, true);
    if (event.key === "Escape") { field.value = ""; field.dispatchEvent(new Event("input")); }
  });
})();
