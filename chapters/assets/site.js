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

// Tables that are wider than the screen scroll: the keyboard must get there. The theme wraps them when
// the page has loaded.
const scrolling = new ResizeObserver((entries) => {
  for (const { target } of entries)
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
});
const wrapped = new WeakSet();
new MutationObserver(() => {
  for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap"))
    if (!wrapped.has(wrap)) (wrapped.add(wrap), scrolling.observe(wrap));
}).observe(document.documentElement, { childList: true, subtree: true });
