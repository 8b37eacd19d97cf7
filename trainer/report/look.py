"""How the pages of reports look and move: one style sheet for light and dark, wide and narrow, and one small script.

The script turns every group of slides into a slider over them; without it all slides are shown, one below the other.
"""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --soft: #5d6673; --line: #dfe3e8;
  --accent: #0072b2; --good: #00785a; --bad: #b84a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1115; --card: #171a21; --text: #e4e8ee; --soft: #98a2b0;
  --line: #2b303a; --accent: #56b4e9; --good: #2cc295; --bad: #f08c4a; }
  .chart img { filter: brightness(1.35); } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 12px 0 0; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
a, summary { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 18px 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 3px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 18px 0 0; }
.tiles dt { color: var(--soft); font-size: 12.5px; }
.tiles dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible, input:focus-visible, a:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th { white-space: normal; vertical-align: bottom; }
th.number, td.number { text-align: right; }
img { display: block; max-width: 100%; height: auto; margin: 10px 0 18px; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.soft { color: var(--soft); }
.missing { border-left: 3px solid var(--bad); padding-left: 12px; margin: 8px 0; }
.bars { display: inline-flex; align-items: flex-end; gap: 2px; height: 26px; vertical-align: middle; }
.bars i { display: block; width: 6px; background: var(--line); height: 100%; position: relative; }
.bars i b { position: absolute; bottom: 0; left: 0; right: 0; background: var(--accent); }
.share { display: block; width: 100px; padding: 0 6px; margin: 1px 0; font-size: 12.5px;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 28%, transparent) var(--share), transparent 0);
}
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin: 8px 0; }
.slider input { flex: 1 1 200px; max-width: 420px; min-height: 32px; accent-color: var(--accent); }
.sliding h3 { display: none; }
.slider output { font-weight: 600; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; margin-top: 10px; }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 700px) {
  main { padding: 20px 8px 48px; }
  section { padding: 16px 12px; border-radius: 10px; }
  h1 { font-size: 24px; }
  .scroll > img { width: 760px; max-width: none; }
  .slide .scroll > img { width: auto; max-width: 100%; }
  .slide { margin: 0 -4px; }
  th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); white-space: normal;
    max-width: 45vw; }
}
@media print { .slider { display: none; } .slide, .sliding h3 { display: block !important; } }
"""

SCRIPT = """
for (const group of document.querySelectorAll(".slides")) {
  const slides = [...group.children];
  if (slides.length < 2) continue;
  const label = document.createElement("label");
  const range = document.createElement("input");
  const shown = document.createElement("output");
  range.type = "range";
  range.max = slides.length - 1;
  range.value = 0;
  const show = () => {
    slides.forEach((slide, number) => { slide.style.display = number == range.value ? "" : "none"; });
    const name = slides[range.value].dataset.name;
    shown.textContent = `${name} (${+range.value + 1} of ${slides.length})`;
    range.setAttribute("aria-valuetext", name);
  };
  range.addEventListener("input", show);
  label.className = "slider";
  label.append(group.dataset.label, range, shown);
  group.classList.add("sliding");
  group.before(label);
  show();
}
"""
