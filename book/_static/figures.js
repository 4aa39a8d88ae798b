// Draws the plotly figures of a page: each when it comes near the window, in the theme's colours, with the layout that
// fits the width; again when theme or width class changes. Attention patterns are drawn by CircuitsVis, once, on paper
// that is light in both themes. Either library is loaded once, from the book's own files.
(() => {
  const root = document.documentElement;
  const narrow = matchMedia("(max-width: 600px)"); // the same width as in book.css
  const boxes = [...document.querySelectorAll(".book-figure")];

  const libraries = {};
  const library = (file, name) =>
    (libraries[name] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = root.dataset.content_root + "_static/" + file;
      script.onload = () => resolve(window[name]);
      script.onerror = reject;
      document.head.append(script);
    }));

  // Puts the theme's colours in the place of those that dtbook/figures/display.py draws with.
  const COLORS = {
    ink: "#1f2328", grid: "#d9dee3", paper: "#fefefe",
    blue: "#0072b2", vermillion: "#d55e00", green: "#009e73", purple: "#b8609a", grey: "#57606a",
  };
  function themed(text) {
    const style = getComputedStyle(root);
    for (const [name, color] of Object.entries(COLORS))
      text = text.replaceAll(color, style.getPropertyValue("--" + name).trim());
    return text;
  }

  // Sets layout["a"]["b"] for the path "a.b".
  function assign(layout, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    keys.reduce((part, key) => (part[key] ??= {}), layout)[last] = value;
  }

  async function drawAttention(box) {
    const { component, props } = JSON.parse(box.querySelector("script").textContent);
    const CircuitsVis = await library("circuitsvis.js", "CircuitsVis");
    if (!box.dataset.drawn) {
      const place = box.querySelector("div");
      place.style.visibility = "hidden"; // it builds itself up piece by piece, and is shown when nothing moves any more
      CircuitsVis.render(place.id, CircuitsVis[component], props);
      for (let still = 0, before = 0; still < 10; before = place.scrollHeight) {
        await new Promise(requestAnimationFrame);
        still = place.scrollHeight > 0 && place.scrollHeight === before ? still + 1 : 0;
      }
      place.style.visibility = "";
    }
    box.dataset.drawn = root.dataset.theme;
  }

  async function draw(box) {
    box.dataset.asked = "";
    if (box.matches(".book-attention")) return drawAttention(box);
    const { data, layout, config } = JSON.parse(themed(box.querySelector("script").textContent));
    const changes = narrow.matches ? (layout.meta.narrow ?? {}) : {};
    for (const [path, value] of Object.entries(changes)) assign(layout, path, value);
    delete layout.height; // the box has it, in CSS, before anything is drawn
    let plot = box.querySelector(".book-figure-plot");
    if (!plot) {
      plot = document.createElement("div");
      plot.className = "book-figure-plot";
      box.append(plot);
    }
    const Plotly = await library("plotly.min.js", "Plotly");
    await Plotly.react(plot, data, layout, config);
    box.dataset.drawn = root.dataset.theme;
  }

  const redraw = () => boxes.filter((box) => "asked" in box.dataset).forEach(draw);
  new MutationObserver(redraw).observe(root, { attributeFilter: ["data-theme"] });
  narrow.addEventListener("change", redraw);
  addEventListener("beforeprint", () => boxes.filter((box) => !("asked" in box.dataset)).forEach(draw));

  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        near.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "100% 0px" },
  );
  boxes.forEach((box) => near.observe(box));

  // Plotly follows the window's width; what slides beside the figure, such as the menu, changes the box's alone.
  const fit = new ResizeObserver((entries) => {
    for (const { target } of entries)
      if (target.dataset.drawn) window.Plotly?.Plots?.resize(target.querySelector(".book-figure-plot"));
  });
  boxes.filter((box) => !box.matches(".book-attention")).forEach((box) => fit.observe(box));
})();
