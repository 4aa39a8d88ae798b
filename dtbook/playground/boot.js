// Starts a playground that is plain HTML: gives it an id of its own in the page, hands the data of its box to the module, or
// says why it cannot.
(async () => {
  const host = document.currentScript.parentElement, el = host.querySelector(".dtp-stage");
  for (let n = 1; !host.id; n++) {
    const id = n > 1 ? `playground-${n}` : "playground";
    if (!document.getElementById(id)) host.id = id;
  }
  try {
    const data = JSON.parse(host.querySelector("script[type='application/json']").textContent);
    const widget = (await import("data:text/javascript;base64," + data.module)).default;
    const set = (name, value) => { data[name] = value; };
    const model = { get: (name) => data[name], set, save_changes() {}, on() {} };
    el.replaceChildren();
    widget.render({ model, el });
  } catch (error) {
    const sentence = document.createElement("p");
    sentence.setAttribute("role", "alert");
    sentence.textContent = "The playground could not start: " + error.message;
    el.replaceChildren(sentence);
  }
})();
