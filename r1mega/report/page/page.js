"use strict";

const { specs, charts } = JSON.parse(document.getElementById("chart-data").textContent);
const samples = JSON.parse(document.getElementById("sample-data").textContent);

/** An element with properties and children; text is never read as markup. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---------------------------------------------------------------- colours

const themes = ["automatic", "light", "dark"];

function setTheme(theme) {
  if (theme === "automatic") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.title = `Colours: ${theme}`;
  button.setAttribute("aria-label", button.title);
  button.firstElementChild.textContent = { automatic: "◐", light: "☀", dark: "☾" }[theme];
  button.onclick = () => setTheme(themes[(themes.indexOf(theme) + 1) % themes.length]);
}

setTheme("automatic");

// ---------------------------------------------------------------- charts

const text = { labelColor: "var(--muted)", titleColor: "var(--muted)", labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 };
const config = {
  background: "transparent",
  font: getComputedStyle(document.body).fontFamily,
  view: { stroke: null },
  axis: { ...text, domainColor: "var(--rule)", tickColor: "var(--rule)", gridColor: "var(--rule)", gridOpacity: 0.8, tickSize: 4, labelPadding: 4 },
  axisY: { domain: false, ticks: false, minExtent: 40 },
  axisX: { titleAnchor: "end", titlePadding: 2 },
  legend: { ...text, symbolStrokeWidth: 2.5, symbolType: "stroke", symbolSize: 130, offset: 4, padding: 0, columnPadding: 12, rowPadding: 1 },
};

/** {a: [1, 2], b: [3, 4]} -> [{a: 1, b: 3}, {a: 2, b: 4}] */
function rows(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, index) => Object.fromEntries(names.map((name) => [name, columns[name][index]])));
}

const drawing = new Map();

function draw(plot) {
  const number = plot.dataset.chart;
  if (!drawing.has(number)) {
    const { spec, description, columns } = charts[number];
    const options = { actions: false, renderer: "svg", config };
    drawing.set(number, vegaEmbed(plot, { ...specs[spec], description, config: undefined, datasets: { values: rows(columns) } }, options));
  }
  return drawing.get(number);
}

const plots = [...document.querySelectorAll(".plot")];
const coming = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((entry) => entry.isIntersecting)) {
    coming.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "600px" });
plots.forEach((plot) => coming.observe(plot));
addEventListener("beforeprint", () => plots.filter((plot) => plot.offsetParent).forEach(draw));

// ---------------------------------------------------------------- stages of the curves

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).classList.toggle("hidden", !chosen);
  }
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
});

// ---------------------------------------------------------------- where the reader is

const links = new Map([...document.querySelectorAll("nav.sections a")].map((link) => [link.getAttribute("href").slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((entry) => entry.isIntersecting)) {
    links.forEach((link, id) => (id === entry.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }
}, { rootMargin: "-20% 0px -75% 0px" });
links.forEach((_, id) => reading.observe(document.getElementById(id)));

// ---------------------------------------------------------------- samples

/** What is marked in a text: [pattern, element maker] in order of precedence. */
function marker(words, show) {
  const either = (list) => `(?<![\\p{L}\\p{N}])(?:${list.join("|")})(?![\\p{L}\\p{N}])`;
  const [first, second] = words.languages ? words.languages.map(either) : ["\\p{Script=Latin}+", "[\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Hangul}]+"];
  const pattern = new RegExp(`(?<r>${either(words.reflection)})|(?<a>${first})|(?<b>${second})`, "giu");
  const inFirst = new RegExp(`^(?:${first})$`, "iu");
  return (target, content) => {
    let end = 0;
    for (const found of content.matchAll(pattern)) {
      target.append(content.slice(end, found.index));
      end = found.index + found[0].length;
      const language = show.language ? (inFirst.test(found[0]) ? "a" : "b") : "";
      const word = language ? element("span", { className: language }, found[0]) : found[0];
      target.append(found.groups.r && show.reflection ? element("mark", {}, word) : word);
    }
    target.append(content.slice(end));
    return target;
  };
}

const verdicts = new Map([[true, ["right", "✓ right"]], [false, ["wrong", "✗ wrong"]], [null, ["unjudged", "not judged"]]]);

class Browser {
  constructor(root) {
    this.root = root;
    this.show = { reflection: true, language: true };
    this.open(0);
    root.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && event.target.tagName !== "SELECT" && !event.target.classList.contains("text")) this.go(step);
    });
  }

  open(suite) {
    this.suite = suite;
    this.data = samples[suite];
    // Before and after: the first checkpoint, and of the others the one that was right most often.
    const right = this.data.rows.map((found) => found.reduce((sum, answers) => sum + (answers ? answers.right / answers.k : 0), 0));
    this.sides = [0, right.length > 1 ? right.lastIndexOf(Math.max(...right.slice(1))) : 0];
    this.wanted = ["any", "any"];
    this.at = 0;
    this.build();
  }

  /** [prompt, number of the response] of what the filters let through; all first responses before any second. */
  list() {
    const most = Math.max(0, ...this.data.rows.flat().map((found) => (found ? found.first.length : 0)));
    const pairs = Array.from({ length: most }, (_, k) => this.data.prompts.map((_, prompt) => [prompt, k])).flat();
    return pairs.filter(([prompt, k]) => {
      const shown = this.sides.map((side) => this.data.rows[side][prompt]?.first[k]);
      return shown.some(Boolean) && this.wanted.every((wanted, side) => wanted === "any" || shown[side]?.correct === (wanted === "right"));
    });
  }

  go(step) {
    this.at = Math.min(Math.max(this.at + step, 0), Math.max(this.list().length - 1, 0));
    this.fill();
  }

  choice(label, options, value, onchange) {
    const select = element("select", { ariaLabel: label }, ...options.map(([key, shown]) => element("option", { value: key }, shown)));
    select.value = value;
    select.addEventListener("change", () => onchange(select.value));
    return select;
  }

  toggle(name, shown) {
    const box = element("input", { type: "checkbox", checked: this.show[name] });
    box.addEventListener("change", () => { this.show[name] = box.checked; this.fill(); });
    return element("label", {}, box, ...shown);
  }

  build() {
    const refilter = () => { this.at = 0; this.fill(); };
    this.back = element("button", { type: "button", onclick: () => this.go(-1) }, "← Previous");
    this.next = element("button", { type: "button", onclick: () => this.go(1) }, "Next →");
    this.place = element("span", { className: "place", ariaLive: "polite" });
    const suites = samples.map((data, index) => [String(index), data.suite]);
    const languages = this.data.words.languages ? ["English", "Chinese"] : ["Latin", "Chinese, Japanese, Korean"];
    const key = element("span", { className: "key push" },
      this.toggle("reflection", [element("mark", {}, "reflection")]),
      this.toggle("language", [element("span", { className: "a" }, languages[0]), " ", element("span", { className: "b" }, languages[1])]));
    this.body = element("div");
    this.sideBodies = this.sides.map(() => element("div"));
    const heads = this.sides.map((_, side) => element("header", {},
      this.choice(`Checkpoint on the ${["left", "right"][side]}`, this.data.checkpoints.map((found, index) => [String(index), found.label]),
        String(this.sides[side]), (value) => { this.sides[side] = Number(value); refilter(); }),
      this.choice(`Answers on the ${["left", "right"][side]}`, [["any", "right or wrong"], ["right", "right only"], ["wrong", "wrong only"]],
        this.wanted[side], (value) => { this.wanted[side] = value; refilter(); })));
    this.pair = element("div", { className: "pair" }, ...heads.map((head, side) => element("div", { className: "side" }, head, this.sideBodies[side])));
    this.root.replaceChildren(
      element("div", { className: "controls" }, this.back, this.next, this.place,
        samples.length > 1 ? this.choice("Suite", suites, String(this.suite), (value) => this.open(Number(value))) : null, key),
      this.body, this.pair);
    this.fill();
  }

  fill() {
    const list = this.list();
    const mark = marker(this.data.words, this.show);
    this.back.disabled = this.at <= 0;
    this.next.disabled = this.at >= list.length - 1;
    this.place.textContent = list.length ? `${this.at + 1} of ${list.length}` : "none";
    if (!list.length) {
      this.body.replaceChildren(element("p", { className: "empty" }, "No prompt has such answers from both checkpoints."));
      this.sideBodies.forEach((body) => body.replaceChildren());
      return;
    }
    const [prompt, k] = list[this.at];
    const { id, prompt: question, answer } = this.data.prompts[prompt];
    this.body.replaceChildren(element("div", { className: "question" },
      element("div", { className: "text", tabIndex: 0 }, question),
      element("small", {}, [answer ? `expected ${answer}` : null, `response ${k + 1}`, id].filter(Boolean).join(" · "))));
    this.sideBodies.forEach((body, side) => body.replaceChildren(...this.response(this.data.rows[this.sides[side]][prompt], k, mark)));
  }

  response(found, k, mark) {
    const shown = found?.first[k];
    if (!shown) return [element("p", { className: "empty" }, "This checkpoint was not asked.")];
    const [name, verdict] = verdicts.get(shown.correct);
    const block = (kind, heading, content) => element("div", { className: kind },
      element("h5", {}, heading), mark(element("div", { className: "text", tabIndex: 0, role: "region", ariaLabel: heading }), content));
    const facts = [`${shown.length} tokens${shown.cut ? ", cut off there" : ""}`, `${found.right} of ${found.k} right`];
    if (shown.extracted !== null && shown.extracted !== shown.answer) facts.unshift(`read as ${shown.extracted}`);
    return [
      element("p", {}, element("span", { className: `verdict ${name}` }, verdict), " ", element("span", { className: "meta" }, facts.join(" · "))),
      element("div", { className: "response" },
        shown.thought === null ? null : block("thought", "thought", shown.thought),
        block("said", shown.thought === null ? "response" : "answer", shown.answer || "(nothing)")),
    ];
  }
}

if (samples.length) new Browser(document.getElementById("browser"));
