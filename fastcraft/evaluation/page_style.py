"""The report's style sheet: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #e2e4e9; --paper: #ffffff; --card: #f7f8fa; --accent: #2f6fde;
  --thin: #2f6fde55; --note: #fff6df; --note-line: #e8c660; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceef1; --soft: #a2a8b2; --line: #33383f; --paper: #14171a;
  --card: #1c2025; --accent: #74a7ff; --thin: #74a7ff55; --note: #2d2716; --note-line: #8a7431; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 18px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; }
small { font-size: .8em; color: var(--soft); font-weight: 400; }
figure, dl, dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { font-size: 1.35rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .78rem; }
.notes { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 6px; margin: 16px 0 0;
  padding: 10px 14px 10px 32px; overflow-wrap: anywhere; }
.legend, .empty { color: var(--soft); font-size: .88rem; margin: 0 0 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
.cards + .legend, .scroll + .legend { margin-top: 10px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px 4px; }
.card figcaption { display: flex; justify-content: space-between; gap: 12px; overflow-wrap: anywhere; }
.card span { font-variant-numeric: tabular-nums; white-space: nowrap; }
.curve { display: block; width: 100%; height: auto; }
.curve .grid { stroke: var(--line); stroke-width: 1; }
.curve .tick { fill: var(--soft); font-size: 11px; }
.curve polyline { fill: none; stroke-linejoin: round; }
.curve .raw { stroke: var(--thin); stroke-width: 1; }
.curve .smooth { stroke: var(--accent); stroke-width: 2; }
.curve .dot { fill: var(--accent); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 22px 18px; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.strip { margin-bottom: 18px; }
.strip + .cards { margin-top: 26px; }
.cells { display: grid; grid-template-columns: repeat(6, minmax(0, 150px)); gap: 6px; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line); }
img.pixels { image-rendering: pixelated; }
.halves span, .cells span { display: block; color: var(--soft); font-size: .8rem; margin-top: 2px; }
.pair figcaption, .strip figcaption { margin-top: 4px; font-size: .92rem; overflow-wrap: anywhere; }
summary { cursor: pointer; }
figcaption summary { list-style: none; }
figcaption summary::-webkit-details-marker { display: none; }
figcaption em { color: var(--accent); font-style: normal; white-space: nowrap; }
figcaption details[open] em { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 22px 6px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { text-align: left; font-weight: 500; white-space: normal; }
thead td { color: var(--soft); font-size: .88rem; }
td:last-child { padding-right: 0; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.bars { width: 100%; max-width: 640px; }
.bars .bar { width: 60%; }
.bars i { display: block; height: 12px; min-width: 2px; border-radius: 3px; background: var(--accent); }
section > details { margin-top: 14px; }
section > details > summary { font-weight: 500; padding: 4px 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 6px 0 0;
  overflow-x: auto; font-size: .84rem; line-height: 1.45; }
@media (max-width: 560px) { main { padding: 18px 14px 40px; } h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .cells { grid-template-columns: repeat(3, 1fr); }
  th, td { padding-right: 12px; } table { width: 100%; } th { overflow-wrap: anywhere; } td small { display: block; }
  .bars .bar { width: 45%; } .facts td { min-width: 50%; } }
@media print { :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --card: #fff; --accent: #1d4fa8;
  --thin: #1d4fa855; --note: #fff; }
  main { max-width: none; padding: 0; } figure, tr, .tiles > div { break-inside: avoid; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; } .cards { grid-template-columns: 1fr 1fr; } .pairs { grid-template-columns: 1fr 1fr; } }
"""
