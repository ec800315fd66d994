// Draws a card for every image of the list in `props.value`, and writes what is typed back into it. All texts are set as
// text: nothing of a file's name or caption is ever read as markup.
const list = element.querySelector(".image-cards");
const part = (tag, kind, text) => {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
};
const button = (card, text, event) => {
  const made = part("button", "card-button", text);
  made.type = "button";
  made.setAttribute("aria-label", `${text}: ${card.name}`);
  made.addEventListener("click", () => trigger(event, { key: card.key }));
  return made;
};
const caption = (card) => {
  const made = part("textarea", "card-caption");
  made.rows = 2;
  made.value = card.caption;
  made.placeholder = "Caption; empty: the trigger prompt";
  made.dataset.key = card.key;
  made.setAttribute("aria-label", `Caption of ${card.name}`);
  made.addEventListener("input", () => {
    props.value = props.value.map((one) => (one.key === card.key ? { ...one, caption: made.value } : one));
  });
  return made;
};
const drawn = (card) => {
  const made = part("div", `image-card ${card.level}`);
  made.setAttribute("role", "listitem");
  if (card.thumb) {
    const shown = part("img", "card-image");
    shown.src = card.thumb;
    shown.alt = `Image ${card.name}`;
    made.append(shown);
  } else made.append(part("div", "card-image card-empty", "No image"));
  const words = part("div", "card-words");
  words.append(part("div", "card-name", card.name), part("div", "card-size", card.size));
  words.append(part("div", "card-verdict", card.says), caption(card));
  const buttons = part("div", "card-buttons");
  if (card.thumb) buttons.append(button(card, "Look closer", "look"));
  buttons.append(button(card, "Remove", "remove"));
  words.append(buttons);
  made.append(words);
  return made;
};
const draw = () => {
  const held = list.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  list.replaceChildren(...(props.value || []).map(drawn));
  const again = held && [...list.querySelectorAll("textarea")].find((one) => one.dataset.key === held);
  if (again) again.focus();
};
watch("value", draw);
draw();
