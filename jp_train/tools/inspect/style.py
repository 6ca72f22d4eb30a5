"""What the page of packed rows adds to the report's style sheet, whose colours and cards it shares: sources, loss
masks, bars and tokens."""

from __future__ import annotations

# One hue a source, as light page / dark page; neighbours differ in lightness too, for readers who tell hues apart
# badly.
PALETTE = (
    ("#b9d3ee", "#2f5d8c"),
    ("#f6cf9d", "#8a5a1c"),
    ("#b5dfc3", "#2c6e49"),
    ("#e6c3e4", "#7a4377"),
    ("#f3e29a", "#75661a"),
    ("#c9ccd6", "#555d70"),
    ("#f3bdb5", "#8c4038"),
    ("#b4dfe2", "#22696e"),
    ("#d3c8f2", "#574a8f"),
    ("#d8dfa5", "#5b651d"),
    ("#e3cdb8", "#6f5236"),
    ("#bcd9ff", "#24508f"),
)

_LIGHT = "".join(f".s{number}{{--c:{light}}}" for number, (light, _) in enumerate(PALETTE))
_DARK = "".join(f".s{number}{{--c:{dark}}}" for number, (_, dark) in enumerate(PALETTE))

CSS = (
    """
:root{--th:#0068a8;--thbg:#d5e9f7;--ih:#b04a00;--ihbg:#fde3cf}
"""
    + _LIGHT
    + "@media(prefers-color-scheme:dark){:root{--th:#6cb6e8;--thbg:#123a57;--ih:#f2a261;--ihbg:#512c10}"
    + _DARK
    + """}
section>h2 small{display:inline;font-size:.86rem;margin-left:8px}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;font-size:.88rem;margin:0;padding:0;list-style:none}
.legend+.legend{margin-top:10px;padding-top:10px;border-top:1px solid var(--line)}
.legend li{display:flex;align-items:center;gap:7px;overflow-wrap:anywhere}
.legend mark,.legend .slots,.legend .sp{flex:none;white-space:nowrap;padding:1px 6px}
.swatch{flex:none;display:inline-block;width:18px;height:18px;border-radius:4px;background:var(--c);border:1px solid rgba(128,128,128,.45)}
.swatch.text{background:var(--th)}.swatch.image{background:var(--ih)}
.lanes{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 12px;align-items:center;font-size:.78rem;color:var(--muted)}
.bar{position:relative;height:34px;border-radius:5px;background:repeating-linear-gradient(45deg,var(--soft) 0 5px,var(--line) 5px 6px);overflow:hidden}
.bar a{position:absolute;top:0;bottom:0;background:var(--c);color:var(--ink);border-right:1.5px solid var(--card);overflow:hidden;
display:flex;align-items:center;justify-content:center;font-weight:600;font-size:.82rem;font-variant-numeric:tabular-nums}
.bar a:hover,.bar a:focus-visible{text-decoration:none;outline:2px solid var(--ink);outline-offset:-2px}
.bar b{overflow:hidden;min-width:0}
.lanes svg{display:block;width:100%;height:11px;background:var(--soft);border-radius:3px}
.lanes svg.position{height:22px}
.lanes path{vector-effect:non-scaling-stroke}
.position path{fill:none;stroke:var(--muted);stroke-width:1.3px}
.slots-lane path{fill:var(--muted)}.text-lane path{fill:var(--th)}.image-lane path{fill:var(--ih)}
.axis{position:relative;height:1.4em;font-variant-numeric:tabular-nums}
.axis span{position:absolute;transform:translateX(-50%)}.axis span:first-child{transform:none}.axis span:last-child{transform:translateX(-100%)}
.doc{border:1px solid var(--line);border-left:6px solid var(--c);border-radius:8px;padding:10px 14px 12px;margin:10px 0 0;scroll-margin-top:10px}
.doc:target{outline:2px solid var(--accent);outline-offset:1px}
.doc h3{margin:0;display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline}
.badge{background:var(--c);border-radius:5px;padding:0 8px;font-variant-numeric:tabular-nums}
.doc h3 small{display:inline}
.facts{margin:2px 0 8px;color:var(--muted);font-size:.84rem;font-variant-numeric:tabular-nums;display:flex;flex-wrap:wrap;gap:2px 14px}
.chip{border-radius:5px;padding:0 7px;background:var(--warnbg);color:var(--warn)}
.th{color:var(--th)}.ih{color:var(--ih)}
.content{display:flex;flex-wrap:wrap;gap:12px 16px;align-items:flex-start}
.figures{display:flex;flex-wrap:wrap;gap:10px}
.figures figure{margin:0;width:150px}
.figures img{display:block;width:150px;height:auto;border-radius:5px;border:1px solid var(--line)}
.figures img.tiny{image-rendering:pixelated}
.figures figcaption{font-size:.76rem;line-height:1.35;color:var(--muted);margin-top:4px}
.tokens{flex:1 1 340px;min-width:0;max-height:24em;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;background:var(--soft);
border-radius:8px;padding:9px 12px;font:13.5px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.tokens:focus-visible{outline:2px solid var(--accent)}
.tokens i{font-style:normal}.tokens i:hover{background:var(--ink);color:var(--card)}
.tokens mark,.legend mark{background:var(--thbg);color:inherit;border-bottom:1px solid var(--th);padding:1px 0;box-decoration-break:clone;-webkit-box-decoration-break:clone}
.tokens mark.next{border-bottom-style:dashed}
.sp{font-size:.86em;color:var(--muted);border:1px solid var(--line);background:var(--card);border-radius:4px;padding:0 3px}
mark .sp{color:var(--th);border-color:var(--th)}
.slots,.sp{white-space:nowrap}.slots{font-size:.86em;border:1px dashed var(--muted);border-radius:4px;padding:0 5px;background:var(--card);color:var(--muted)}
.slots.image{background:var(--ihbg);color:var(--ih);border:1px solid var(--ih)}
.nl{color:var(--muted)}
.doc details{margin-top:8px;font-size:.84rem}.doc pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:16em;overflow:auto}
.skipped{border:1px dashed var(--bad);color:var(--bad);background:var(--badbg);border-radius:8px;padding:8px 12px;margin:10px 0 0;font-size:.88rem;overflow-wrap:anywhere}
a:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:3px}
@media(max-width:680px){.lanes{gap:4px 8px;font-size:.72rem}.tokens{flex-basis:100%}.figures figure,.figures img{width:124px}.doc{padding:9px 10px 11px}
.bar a{font-size:.68rem;font-weight:500}section>h2 small{display:block;margin:2px 0 0}.axis .minor{display:none}#summary th,#summary td{padding-right:9px;font-size:.78rem}#summary td:last-child,#summary th:last-child{padding-right:0}}
"""
)
