"""How the page looks: colours for light and dark, and a layout for phones and desks."""

from __future__ import annotations

from collections.abc import Mapping

from xbt.report.style import INK, NEW, OLD, RULE, UPGRADED

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f5f5f2",
    "ink": INK,
    "quiet": "#5c5c5c",
    "rule": RULE,
    "old": OLD,
    "upgraded": UPGRADED,
    "new": NEW,
    "good": "#0d7238",
    "bad": "#a8201a",
    "open": "#7d5200",
}
"""Colours by name; the text's own are ink, quiet, good, bad and open."""
DARK: Mapping[str, str] = {
    "paper": "#15171a",
    "panel": "#1e2125",
    "ink": "#ececec",
    "quiet": "#b3b3b3",
    "rule": "#43474d",
    "old": "#8f8f8f",
    "upgraded": "#f0a040",
    "new": "#6fa8e8",
    "good": "#5fd38d",
    "bad": "#ff8a80",
    "open": "#f0c060",
}


def style_sheet() -> str:
    """The page's CSS."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.1rem;font-weight:600;color:var(--quiet);margin:0 0 12px}
h2{font-size:1.3rem;line-height:1.3;margin:44px 0 10px}
h3{font-size:1.05rem;margin:28px 0 8px}
p,ul{margin:8px 0;max-width:75ch}
ul{padding-left:22px}
li{margin:4px 0}
.quiet{color:var(--quiet)}
.verdict{background:var(--panel);border-left:6px solid var(--open);border-radius:4px;padding:16px 18px;
  max-width:none;margin:0 0 16px}
.verdict strong{display:block;font-size:1.6rem;line-height:1.25;margin-bottom:6px;color:var(--open)}
.verdict.yes,.verdict.ensemble{border-color:var(--good)}
.verdict.yes strong,.verdict.ensemble strong{color:var(--good)}
.verdict.no{border-color:var(--bad)}
.verdict.no strong{color:var(--bad)}
.good{color:var(--good)}
.bad{color:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:20px 32px}
figure{margin:12px 0;max-width:480px}
figcaption{font-size:.9rem;color:var(--quiet);margin-top:6px}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg text{fill:var(--ink);font-size:12px}
svg text.quiet{fill:var(--quiet)}
.scroll{overflow-x:auto;margin:14px 0;border:1px solid var(--rule);border-radius:4px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--new);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding:8px 12px;color:var(--quiet);font-size:.875rem;position:sticky;left:0;
  max-width:min(100vw - 34px,72ch)}
th,td{text-align:left;padding:6px 12px;border-top:1px solid var(--rule);white-space:nowrap;
  vertical-align:top}
thead th{color:var(--quiet);font-weight:600}
tbody th{font-weight:600;position:sticky;left:0;background:var(--paper)}
summary{cursor:pointer;padding:6px 0}
pre{background:var(--panel);padding:12px;overflow-x:auto;border-radius:4px;font-size:.875rem;
  white-space:pre-wrap;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:16px}
.card{border:1px solid var(--rule);border-radius:4px;padding:12px;min-width:0}
.card p{margin:0 0 8px;overflow-wrap:anywhere}
.card ol{margin:0 0 10px;padding-left:22px;font-size:.875rem;overflow-wrap:anywhere}
.card ol.thumbs{padding:0}
.query{font-weight:600}
.small{font-size:.875rem}
.thumbs{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:8px;margin:4px 0 12px;padding:0;
  list-style:none;max-width:none}
.thumbs li{margin:0;min-width:0;font-size:.8125rem;text-align:center}
.thumbs img,.asked img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--panel);
  border:3px solid transparent;border-radius:4px}
.asked{width:96px}
img.tiny{image-rendering:pixelated}
.thumbs .right img,.thumbs .right .words{border-color:var(--good)}
.words{border:3px solid var(--rule);border-radius:4px;padding:4px;aspect-ratio:1;overflow:hidden;
  overflow-wrap:anywhere;text-align:left;line-height:1.3}
.mark{color:var(--good);font-weight:600}
footer{margin-top:44px;border-top:1px solid var(--rule);padding-top:12px}
@media print{.card{break-inside:avoid}}
"""
