"""Draws idea.svg beside it: what is frozen, trained and stored; how far backpropagation goes."""

from pathlib import Path

BLUE, ORANGE, RED, INK = "#d3e6f8", "#f8bd7f", "#c8102e", "#1f2933"
COLUMNS = [  # title, its cost in the paper, trained layers, y of the cut, y of frozen layers
    ("full", "90.2 M trained, 2.98 h", 12, 582, 0),
    ("last 3 layers", "26.4 M trained, 2.52 h", 3, 582, 249),
    ("last 3, from a cache", "21.3 M trained, 1.02 h*", 3, 269, 0),
    ("LoRA", "0.3 M trained, 2.48 h", 0, 516, 173),
]
NOTES = """All but the CNN is trained:/nothing frozen is crossed.
The embedding is trained,/too. To reach it, all nine/frozen stages are crossed.
The faded part runs once, and/is read from disk. Same cut,/no disk: --freeze-embedding.
Few weights are trained,/A and B beside each layer,/yet all twelve are crossed."""
SNOW = "M0 -7V7M-6 -3.5L6 3.5M-6 3.5L6 -3.5M-2 -6L0 -4L2 -6M-2 6L0 4L2 6"
FLAME = "M0 -8C1 -4 6 -3 5 3C4 8 -4 8 -5 3C-5 0 -3 -1 -3 -4C-1 -3 1 -4 0 -8Z"


def text(x, y, words, size=17, more=f'fill="{INK}"'):
    """Centred at x; a slash begins a new line."""
    lines = [f'<tspan x="{x}" dy="{1.2 * size}">{line}</tspan>' for line in words.split("/")]
    return f'<text y="{y - 1.2 * size}" font-size="{size}" {more}>{"".join(lines)}</text>'


def path(shape, color=INK, width=2.0, fill="none", more=""):
    return f'<path d="{shape}" stroke="{color}" stroke-width="{width}" fill="{fill}" {more}/>'


def arrow(x, y, end, color=INK, width=2):
    neck = end - 3 * width if end > y else end + 3 * width
    head = path(f"M{x - 2 * width} {neck}H{x + 2 * width}L{x} {end}Z", color, 0, color)
    return path(f"M{x} {y}V{neck}", color, width) + head


def box(x, y, height, words, frozen, width=200):
    shape, middle = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"', y + height / 2
    look = (SNOW, "#1f6fb5", 1.5, "none") if frozen else (FLAME, INK, 0, "#d9480f")
    rect = f'<rect {shape} stroke="{INK}" fill="{BLUE if frozen else ORANGE}"/>'
    rect += path(*look, f'transform="translate({x + 17} {middle})"')
    return rect + text(x + width / 2 + 8, middle + 5 - 9 * words.count("/"), words, 15)


def disk(x, y):
    body = path(f"M{x - 36} {y - 7}v14a36 6 0 0 0 72 0v-14", INK, 1.5, "#cddba6")
    return body + path(f"M{x - 36} {y - 7}a36 6 0 0 0 72 0a36 6 0 0 0 -72 0Z", INK, 1.5, "#e6efcb")


# its own panel makes it legible on a light and on a dark page
svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 840" text-anchor="middle" '
svg += 'font-family="sans-serif"><rect width="1180" height="840" rx="14" fill="#fbfcfe"/>'
for number, (title, cost, trained, cut, crossed) in enumerate(COLUMNS):
    x, middle = 44 + 284 * number, 144 + 284 * number
    lower = text(middle, 660, "speech") + box(x, 594, 30, "CNN", True)
    lower += arrow(middle, 643, 627) + arrow(middle, 592, 573) + arrow(middle, 526, 507)
    lower += box(x, 526, 44, "stage 0: embedding/(pos. convolution)", cut < 582)
    upper = text(middle, 48, title, 22, 'font-weight="bold"') + text(middle, 78, cost)
    upper += text(middle, 118, "CCC loss") + box(x, 144, 26, "pooling, head", False)
    upper += arrow(middle, 142, 126) + arrow(middle, 289, 248)
    layers = [box(x, 507 - 24 * i, 21, f"stage {i}", i <= 12 - trained) for i in range(1, 10)]
    layers += [box(x, 464 - 24 * i, 21, f"stage {i}", i <= 12 - trained) for i in range(10, 13)]
    for i in range(0 if trained else 12):  # LoRA's adapters
        y = (483 if i < 9 else 440) - 24 * i
        layers[i] += f'<rect x="{x + 158}" y="{y + 2}" width="38" height="17" fill="{ORANGE}"/>'
        layers[i] += text(x + 177, y + 15.5, "A B", 13)
    svg += f'<g opacity="{0.4 if cut < 500 else 1}">{lower}{"".join(layers[:9])}</g>'
    svg += upper + "".join(layers[9:])
    svg += path(f"M{x - 14} {cut}H{x + 240}", more='stroke-dasharray="7 5"')
    svg += disk(middle, cut) if cut < 500 else ""
    svg += path(f"M{x + 146} 112H{x + 222}V{crossed or 120}", width=4)
    svg += arrow(x + 222, crossed or 118, cut - 2, RED if crossed else INK, 4)
    if crossed:
        where = f'fill="{RED}" font-weight="bold" transform="rotate(90 {x + 238} 380)"'
        svg += text(x + 238, 380, f"crosses {12 - trained} frozen stages", 15, where)
    svg += text(x + 108, 694, NOTES.split("\n")[number])
svg += box(44, 770, 26, "frozen", True, 110) + box(170, 770, 26, "trained", False, 110)
svg += disk(346, 783) + text(456, 788, "stored on disk") + path("M544 783H584", width=4)
svg += text(668, 788, "backpropagation") + text(966, 788, "cut: prefix below, suffix above")
svg += path("M776 783H816", more='stroke-dasharray="7 5"')
svg += text(590, 822, "hours: the paper's, 5 epochs in fp32 on an A40 (*on an RTX 2080 Ti)", 15)
Path(__file__).with_name("idea.svg").write_text(svg + "</svg>\n", encoding="utf-8")
