// What scrolls sideways can be reached and scrolled by keyboard.
document$.subscribe(() => requestAnimationFrame(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .highlight-ipynb, pre > code"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}));
