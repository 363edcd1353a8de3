"""Draw ``docs/cache.svg``: what each attention keeps of one token, to scale, for heads of 128.

python docs/draw_cache.py
"""

from __future__ import annotations

from pathlib import Path

HEADS, DIM = 32, 128
ROWS = [
    ("MHA", "a key and a value for each of 32 heads", [("key", HEADS * DIM), ("value", HEADS * DIM)]),
    ("GQA", "8 of each, shared by 4 heads", [("key", 8 * DIM), ("value", 8 * DIM)]),
    ("MQA", "one of each, shared by all", [("key", DIM), ("value", DIM)]),
    ("MLA", "one latent, from which all are made, and one roped key", [("latent", 512), ("rope", 64)]),
]
COLOUR = {"key": "#4c78a8", "value": "#9ecae9", "latent": "#e45756", "rope": "#f2a59d"}
SCALE, LEFT, TOP, STEP = 560 / (2 * HEADS * DIM), 64, 44, 54


def main() -> None:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 290" font-family="system-ui, sans-serif" '
        'role="img" aria-label="Cached values per token and layer: MHA 8192, GQA 2048, MQA 256, MLA 576">',
        "<style>text{fill:#24292f}.dim{fill:#57606a;font-size:12px}"
        "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.dim{fill:#9198a1}}</style>",
        '<text x="0" y="20" font-size="15">Cached values per token and layer, 32 heads of 128</text>',
    ]
    for number, (name, what, blocks) in enumerate(ROWS):
        y, x = TOP + STEP * number, float(LEFT)
        parts.append(f'<text x="0" y="{y + 16}" font-size="15" font-weight="600">{name}</text>')
        for kind, size in blocks:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{size * SCALE:.1f}" height="22" fill="{COLOUR[kind]}"/>')
            x += size * SCALE
        total = sum(size for _, size in blocks)
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 16}" font-size="14">{total:,}</text>')
        parts.append(f'<text class="dim" x="{LEFT}" y="{y + 37}">{what}</text>')
    legend = LEFT
    for kind, label in (("key", "keys"), ("value", "values"), ("latent", "latent"), ("rope", "roped key")):
        parts.append(f'<rect x="{legend}" y="266" width="12" height="12" fill="{COLOUR[kind]}"/>')
        parts.append(f'<text class="dim" x="{legend + 18}" y="276">{label}</text>')
        legend += 100
    parts.append("</svg>")
    Path(__file__).with_name("cache.svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
