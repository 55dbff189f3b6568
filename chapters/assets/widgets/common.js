// What the widgets share. Each replaces the table that stands in the page for readers without scripts.
globalThis.tinychat ??= { data: {} };

tinychat.element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

tinychat.labelled = (text, control, ...rest) =>
  tinychat.element("label", {}, tinychat.element("span", { textContent: text }), control, ...rest);

tinychat.widget = (name, data, show) => {
  for (const box of document.querySelectorAll(`[data-widget="${name}"]`)) show(box, tinychat.data[data]);
};
