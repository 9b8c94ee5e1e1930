"""A picture of the table of updates: one bar for each way to average. An SVG of a few kilobytes, without matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

#: The rows of the recorded table that the picture shows, and what they are called there.
SHOWN = {
    "bound": "the memory's own speed",
    "**`ShardedEMA`**": "ShardedEMA",
    "timm ModelEmaV3's form": "timm ModelEmaV3",
    "torch AveragedModel (bf16 shadow of bf16 weights)": "torch AveragedModel",
    "ema-pytorch 0.8.3": "ema-pytorch",
    "NeMo's form (bf16 shadow of bf16 weights)": "NeMo EMA",
    "diffusers 0.42.1 EMAModel": "diffusers EMAModel",
    "Composer compute_ema's form, FSDP on one process": "Composer EMA under FSDP",
}
WIDTH, LEFT, BAR, GAP, TOP = 640, 250, 16, 8, 46
STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.t{font-weight:600}.n{fill:#57606a}
rect{fill:#c2792d}.o{fill:#0b6e99}.b{fill:#8c959f}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.n{fill:#9da7b3}.o{fill:#39a0cc}}"""


def recorded(file: Path) -> dict[str, float]:
    """Milliseconds of an update of fp32 weights, from the table in the README of the measurements."""
    rows = re.findall(r"^\| (.+?) \| \**([\d.]+)\** \|", file.read_text(), flags=re.MULTILINE)
    found = {name: float(value) for name, value in rows if name in SHOWN}
    missing = SHOWN.keys() - found.keys()
    if missing:
        raise ValueError(f"{file}: the table of updates has no row {min(missing)!r}")
    return {label: found[name] for name, label in SHOWN.items()}


def draw(milliseconds: Mapping[str, float], title: str) -> str:
    """The SVG, in the colours of a light or a dark page. The first row is the bound, the second ours."""
    longest = max(milliseconds.values())
    height = TOP + len(milliseconds) * (BAR + GAP) + 6
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="t" x="8" y="22">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(milliseconds.items()):
        y = TOP + number * (BAR + GAP)
        length = (WIDTH - LEFT - 60) * value / longest
        kind = ("b", "o")[number] if number < 2 else ""
        lines.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        lines.append(f'<text class="n" x="{LEFT + length + 6:.1f}" y="{y + 13}">{value:g} ms</text>')
    return "\n".join([*lines, "</svg>", ""])


def picture(readme: Path) -> str:
    """What ``dist_ema/guide/speed.svg`` holds."""
    return draw(recorded(readme), "One update of 100 M fp32 weights on a CPU: less is better")
