// Folds open for paper: what is folded on the screen would be lost in print.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll(".md-content details:not([open])")) {
    fold.open = true;
    addEventListener("afterprint", () => (fold.open = false), { once: true });
  }
});

// The theme wraps each copy button in a navigation landmark without a name: dozens of them would
// stand in the list that a screen reader offers.
new MutationObserver(() => {
  for (const bar of document.querySelectorAll("nav.md-code__nav:not([role])"))
    bar.setAttribute("role", "presentation");
}).observe(document.documentElement, { childList: true, subtree: true });
