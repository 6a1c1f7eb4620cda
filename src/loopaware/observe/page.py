"""The frame of a report: head, style, script and the one template that joins them.

In: a title and finished markup. Out: one html page that asks for nothing from outside; its own security policy forbids
it. Deliberately elsewhere: what a report says (`report`), how a figure becomes markup (`figures`).
"""

from __future__ import annotations

import html

# In the dark, figures are inverted and their hues turned back: white paper becomes dark, colours keep their names.
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1f23; --faint: #5c636b; --line: #d5d9de; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #121212; --ink: #e4e6e9; --faint: #a3a9b1; --line: #3b4046; }
  figure svg, figure img { filter: invert(.93) hue-rotate(180deg); }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1.2rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2rem 0 .6rem; }
h1 { margin-top: 0; }
p { max-width: 44rem; }
figure { margin: 1.4rem 0; }
figure svg, figure img { display: block; height: auto; max-width: 100%; }
figure svg * { stroke-linecap: butt; stroke-linejoin: round; }
figcaption, caption, footer { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1.4rem 0; }
caption { padding-bottom: .4rem; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
tbody th { font-weight: normal; }
.number { padding: .3rem .9rem; text-align: right; }
td.number { white-space: nowrap; }
.controls { align-items: center; display: flex; gap: .7rem; }
.controls[hidden], .frames .off { display: none; }
.controls input { flex: 1; max-width: 20rem; }
.controls button { font: inherit; padding: .15rem .8rem; }
footer { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: .8rem; }
dl { display: grid; gap: .1rem 1rem; grid-template-columns: max-content 1fr; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  .controls { display: none !important; }
  .frames .off { display: block !important; }
  figure, tr { break-inside: avoid; }
}
"""

# Without it every frame is simply shown, one below the other.
SCRIPT = """
for (const box of document.querySelectorAll(".frames")) {
  const frames = box.querySelectorAll("figure"), slider = box.querySelector("input");
  const [back, on] = box.querySelectorAll("button"), where = box.querySelector("output");
  const show = () => {
    const now = Number(slider.value);
    frames.forEach((frame, i) => frame.classList.toggle("off", i !== now));
    where.value = `${now + 1} of ${frames.length}`;
    back.disabled = now === 0;
    on.disabled = now === frames.length - 1;
  };
  slider.addEventListener("input", show);
  back.addEventListener("click", () => { slider.value = Number(slider.value) - 1; show(); });
  on.addEventListener("click", () => { slider.value = Number(slider.value) + 1; show(); });
  box.querySelector(".controls").hidden = false;
  show();
}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, footer: str) -> str:
    """The whole page. `title` is plain text; `body` and `footer` are markup."""
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
{body}
</main>
<footer>
{footer}
</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""
