/* Builds the sections: the first ones at once, the others when the browser is idle, all of them before printing. */
(() => {
  const M = Mezzotint;
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  const waiting = [];

  const build = (id, make, section) => {
    section.append(...[make()].flat(3).filter(Boolean));
    if (id === "graph") M.graph.start();
    section.dataset.ready = "";
  };
  const buildAll = () => { while (waiting.length) waiting.shift()(); document.body.dataset.ready = ""; };
  const later = () => {
    const when = window.requestIdleCallback ?? ((task) => setTimeout(task, 1));
    when(() => {
      waiting.shift()?.();
      if (waiting.length) later();
      else document.body.dataset.ready = "";
    }, { timeout: 200 });
  };

  for (const [id, name, what, make] of M.sections) {
    const section = M.el("section", { id, "aria-labelledby": `${id}-title` }, M.el("h2", { id: `${id}-title` }, name), what ? M.el("p", { class: "lead" }, what) : null);
    main.append(section);
    nav.append(M.el("a", { href: `#${id}` }, name));
    waiting.push(() => build(id, make, section));
  }
  // A jump needs the height of everything above its target.
  document.addEventListener("click", (event) => { if (event.target.closest?.("a[href^='#']")) buildAll(); }, true);
  window.addEventListener("beforeprint", buildAll);
  M.startSearch();
  document.getElementById("search").addEventListener("focus", buildAll);
  waiting.shift()();
  waiting.shift()();
  if (location.hash) { buildAll(); document.getElementById(location.hash.slice(1))?.scrollIntoView(); }
  else later();

  // The visible section is marked in the navigation.
  const seen = new IntersectionObserver((changes) => {
    for (const change of changes) {
      if (!change.isIntersecting) continue;
      nav.querySelectorAll("a").forEach((link) => {
        const here = link.getAttribute("href") === `#${change.target.id}`;
        if (here) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      });
    }
  }, { rootMargin: "-25% 0px -70% 0px" });
  main.querySelectorAll("section").forEach((section) => seen.observe(section));
})();
