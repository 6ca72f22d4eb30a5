"""The page's style sheet: system fonts, light and dark by the reader's setting, one column on a phone. Card colours
match `curves.py`."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--ink:#1b1f24;--muted:#5c656f;--line:#e1e5ea;--soft:#f0f2f5;--accent:#0068a8;
--good:#0b6b50;--goodbg:#e2f3ec;--bad:#a3231b;--badbg:#fbe9e7;--warn:#7a5b00;--warnbg:#fdf3d3}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--card:#161b22;--ink:#e6edf3;--muted:#9aa4af;--line:#2b323b;--soft:#1d242d;
--accent:#6cb6e8;--good:#5fd3ab;--goodbg:#12352b;--bad:#ff9d94;--badbg:#401a18;--warn:#f0cf6b;--warnbg:#3a2f0d}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 64px}
header h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
header p{margin:0;color:var(--muted);overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 4px;font-size:.9rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{margin-top:30px;scroll-margin-top:12px}
h2{font-size:1.15rem;margin:0 0 8px}h3{font-size:.95rem;margin:18px 0 6px;overflow-wrap:anywhere}
.note{color:var(--muted);font-size:.86rem;margin:0 0 10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0 12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px;min-width:0}
.tile b{display:block;font-size:1.3rem;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{color:var(--muted);font-size:.82rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:6px 14px 6px 0;border-top:1px solid var(--line)}
thead th,thead td{border-top:0;color:var(--muted);font-weight:600;font-size:.82rem}
td.num,th.num{text-align:right;white-space:nowrap}
td.nowrap{white-space:nowrap}td.wrap{overflow-wrap:anywhere;min-width:9em}
small{display:block;color:var(--muted);font-size:.82rem;font-weight:400;overflow-wrap:anywhere}
.summary th[scope=row]{color:var(--muted);font-weight:500;white-space:nowrap;position:sticky;left:0;background:var(--card);padding-right:18px}
.summary thead th{color:var(--ink);font-size:1rem}
.summary td{min-width:200px}
.pair{display:block}.pair i{display:inline-block;min-width:7.2em;font-style:normal;color:var(--muted)}
.falls b{color:var(--good)}.rises b{color:var(--bad)}
.none{color:var(--muted)}
.state,.event,.met,.missed{display:inline-block;border-radius:5px;padding:1px 8px;font-size:.85rem;background:var(--soft);white-space:nowrap}
.state.good,.met{background:var(--goodbg);color:var(--good)}
.state.open,.e-stop,.e-stopped-early,.e-resume{background:var(--warnbg);color:var(--warn)}
.missed,.e-spike{background:var(--badbg);color:var(--bad)}
.panels{display:grid;gap:12px;grid-template-columns:repeat(var(--columns),minmax(0,1fr))}
.panels figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 6px 4px 10px}
.panels img{display:block;width:100%;height:auto}
.pictures{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));align-items:start}
.pictures figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px}
.pictures img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:4px;background:#fff}
.pictures img.tiny{image-rendering:pixelated;min-width:60%}
figcaption{font-size:.88rem;margin-top:8px;overflow-wrap:anywhere}figcaption b{display:block}
figcaption span{color:var(--muted);white-space:pre-line}
.evaluation th{font-weight:500;min-width:11em}.evaluation .bar{width:44%;min-width:170px}
.track{position:relative;height:12px;border-radius:3px;background:var(--soft);margin-top:5px}
.fill{height:12px;border-radius:3px;background:var(--accent);opacity:.75}
.track s{position:absolute;top:-3px;bottom:-3px;width:2px;margin-left:-1px;background:var(--muted)}
.track s.target,.k.target{background:var(--ink)}.track s.ceiling{background:none;border-left:2px dashed var(--ink)}
.bar small{margin-top:5px}
.k{display:inline-block;width:2px;height:.9em;background:var(--muted);margin:0 6px 0 10px;vertical-align:-1px}
.k.ceiling{background:none;border-left:2px dashed var(--ink)}
details{margin-top:10px}summary{cursor:pointer;color:var(--accent)}
pre{background:var(--soft);border-radius:8px;padding:12px;overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:10px 0 0}
footer{margin-top:36px;color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
@media(max-width:1000px){.panels{grid-template-columns:repeat(min(var(--columns),2),minmax(0,1fr))}.panels.c3{grid-template-columns:1fr}}
@media(max-width:680px){td.nowrap{white-space:normal;min-width:6.5em}main{padding:18px 12px 48px}.panels,.panels.c3{grid-template-columns:1fr}.card{padding:12px}
.tiles{grid-template-columns:repeat(2,1fr)}.summary td{min-width:172px}.summary th[scope=row]{white-space:normal;max-width:104px;padding-right:10px}
.evaluation,.evaluation tbody,.evaluation tr,.evaluation th,.evaluation td{display:block;border:0;padding:0}
.evaluation tr{border-top:1px solid var(--line);padding:8px 0}.evaluation .bar{width:100%}.evaluation td.num{text-align:left;font-size:1.1rem}}
@media print{body{background:#fff}section{break-inside:avoid-page}}
"""
