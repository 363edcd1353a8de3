"""One page that says what a conversion did: no script, no request, light and dark, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentize.attention.spec import kv_cache_bytes
from latentize.checkpoint import MANIFEST_NAME, Manifest
from latentize.checkpoint.places import require_file, write_file
from latentize.errors import CheckpointError
from latentize.report.chart import bit_map, layer_bars, line_chart, rope_map
from latentize.report.evaluation import named, positions, probes, tasks
from latentize.report.html import figure, table
from latentize.report.measurements import MEASUREMENTS_NAME, measured
from latentize.report.origin import limits, origin

__all__ = ["REPORT_NAME", "page", "speed_chart", "verdict", "write_report"]

REPORT_NAME = "report.html"
_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--dim:#57606a;--paper:#fff;--card:#f6f8fa;--line:#d0d7de}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9198a1;--paper:#0d1117;--card:#161b22;--line:#30363d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
p.lead{font-size:1.1rem;margin:.5rem 0 1rem}.dim,figcaption{color:var(--dim);font-size:.9rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.facts b{display:block;font-size:1.35rem;line-height:1.3}
.scroll{overflow-x:auto}table:not(.keys) td:first-child{min-width:8rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
table:not(.keys) td:not(:first-child),th{white-space:nowrap;overflow-wrap:normal}
td:last-child,th:last-child{padding-right:0}th{font-weight:600}
table.keys td:first-child{color:var(--dim);width:14rem}
@media (max-width:40rem){table.keys td{display:block;width:auto!important;border:0;padding:0}
table.keys tr{display:block;border-bottom:1px solid var(--line);padding:.35rem 0}
table:not(.keys){font-size:.85rem}table:not(.keys) td:first-child{min-width:5.5rem}
table:not(.keys) td,table:not(.keys) th{padding-right:.6rem}}
figure{margin:1rem 0}figure svg{width:100%;max-width:32rem;height:auto;display:block}
figure.wide svg{max-width:44rem}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem;white-space:pre-wrap;
font-size:.85rem;margin:.3rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
details{margin:.5rem 0}summary{cursor:pointer}
@media print{body{max-width:none;font-size:11pt}figure,tr{break-inside:avoid}details>*{display:block}}
"""
# Nats per token above the source, and what that means to somebody who uses the model.
_VERDICTS = (
    (0.01, "as good as the source", "No difference that text generation would show."),
    (0.05, "close to the source", "Hardly a difference; check it on what you use the model for."),
    (0.2, "usable, with a loss", "The loss can be seen. Keep more of the cache, or heal the model on some text."),
    (1.0, "damaged", "It needs healing before it is used, or a larger share of the cache."),
    (float("inf"), "not usable as it is", "Keep more of the cache, or train the model further."),
)


def verdict(excess: float) -> tuple[str, str]:
    """What an excess loss in nats per token means, in few words and in a sentence."""
    return next((short, long) for bound, short, long in _VERDICTS if excess < bound)


def write_report(folder: Path, *, name: str = "") -> Path:
    """Write ``report.html`` of an output from its manifest and what was measured since.

    Args:
        folder: The output.
        name: What it is called, if not as the folder.

    Raises:
        CheckpointError: the folder is not an output of latentize, or what it says of itself is damaged.
        OutputError: it cannot be written.
    """
    path = folder / REPORT_NAME
    write_file(path, _checked_page(folder, name or folder.name))
    return path


def require_report(folder: Path) -> None:
    """That :func:`write_report` can write, and has all that it writes of; raises as it does."""
    require_file(folder / REPORT_NAME)
    _checked_page(folder, folder.name)


def _checked_page(folder: Path, name: str) -> str:
    manifest, found = Manifest.load(folder), measured(folder)
    try:
        if "layers" not in manifest.source:
            raise CheckpointError(
                "the manifest does not describe the source",
                code="LZ118",
                where=str(folder / MANIFEST_NAME),
                fix="convert again",
            )
        return page(manifest, found, name=name)
    # What is drawn of it is not there, or is something else: which of both files it was in cannot be told.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"what was written of the model makes no report: {(str(error) or repr(error)).splitlines()[0]}",
            code="LZ118",
            where=f"{folder / MANIFEST_NAME}, {folder / MEASUREMENTS_NAME}",
            fix=f"remove {MEASUREMENTS_NAME}; if that does not help, convert again",
        ) from error


def page(manifest: Manifest, found: Mapping[str, Sequence[dict[str, Any]]], *, name: str) -> str:
    """The page as HTML.

    Args:
        manifest: Of the output.
        found: What was measured since, by kind.
        name: Of the output.
    """
    m, source = manifest.measurements, manifest.source
    title = f"{_base(source['model'])}, {name}"
    sections = [
        _head(manifest),
        _cache(source, m),
        _quality(m, found.get("eval", ()), healed=bool(manifest.healing)),
        _healing(manifest.healing),
        positions(found.get("eval", ())),
        probes(found.get("eval", ())),
        tasks(found.get("eval", ())),
        _layers(manifest.layers, source),
        _bits(manifest.layers, m),
        _rope(manifest.layers),
        _spectra(manifest.layers),
        _speed(found.get("bench", ())),
        _samples(found.get("sample", ())),
        limits(manifest),
        origin(manifest),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Even if something slipped through, nothing may be loaded or run.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _base(model: str) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def _head(manifest: Manifest) -> str:
    m, source = manifest.measurements, manifest.source
    short, long = verdict(m["excess_loss"])
    kept, before = m["cache_values_per_token_layer"], m["source_cache_values_per_token_layer"]
    attention = "latent attention" if m["to"] == "mla" else f"{m['num_key_value_heads']} kv head(s)"
    if m.get("bytes") is None:
        saved, size = 1 - kept / before, {"cached values a token and layer": f"{kept:g} of {before}"}
    else:
        row = m["row_bytes_per_token_layer"]
        saved, size = 1 - m["bytes"], {"bytes of a cached token and layer": f"{row:.1f} of {2 * before}"}
    facts = {
        "of the KV cache saved": f"{saved:.1%}",
        **size,
        "nats per token above the source": f"{m['excess_loss']:.4f}",
        "same most likely token": f"{m['top1_agreement']:.1%}",
    }
    boxes = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in facts.items())
    return (
        f"<p class=dim>{escape(_base(source['model']))}, converted by latentize "
        f"{escape(manifest.versions.get('latentize', ''))}</p>"
        f"<h1>{escape(attention.capitalize())}: {escape(short)}</h1>"
        f'<p class="lead">{escape(long)}</p><div class="facts">{boxes}</div>'
    )


def _other_heads(source: Mapping[str, Any]) -> dict[str, int]:
    """Cached values per token and layer of the same heads, cached as they are and as one."""
    heads = source["num_attention_heads"]
    if source["attention"] == "MLA":
        size = source["qk_nope_head_dim"] + source["qk_rope_head_dim"] + source["v_head_dim"]
        return {"MHA, a key and a value for each head": heads * size}
    d, groups, rows = source["head_dim"], source["num_key_value_heads"], {}
    if groups < heads:
        rows["MHA, a key and a value for each head"] = 2 * heads * d
    if groups > 1:
        rows["MQA, one for all heads"] = 2 * d
    return rows


def _cache(source: Mapping[str, Any], m: Mapping[str, Any]) -> str:
    layers, before = source["layers"], m["source_cache_values_per_token_layer"]
    rows = {f"{source['attention']}, the source": before, **_other_heads(source)}
    kind = "MLA" if m["to"] == "mla" else m["to"].upper()
    rows[f"{kind}, this model"] = m["cache_values_per_token_layer"]
    longest = max(1024, source["max_position_embeddings"])
    contexts = [c for c in (2**n for n in range(9, 21)) if c <= longest] or [longest]
    mib = 1 << 20
    series = {
        label: [(float(c), kv_cache_bytes(values, layers=layers, tokens=c) / mib) for c in contexts]
        for label, values in rows.items()
    }
    coded = []
    if m.get("bytes") is not None:
        values, label = m["bytes"] * before, "this model, coded"
        series[label] = [(float(c), kv_cache_bytes(values, layers=layers, tokens=c) / mib) for c in contexts]
        bits = 16 * values / rows[f"{kind}, this model"]
        size = kv_cache_bytes(values, layers=layers, tokens=longest) / mib
        coded = [(label, f"{rows[f'{kind}, this model']:g} of {bits:.2f} bits", f"{size:,.2f}", "", "")]
    chart = line_chart(series, title="MiB of cache, 16 bits a value", x_label="tokens of context", legend_below=True)
    sizes = table(
        [
            (
                label,
                f"{values:g}",
                *(f"{kv_cache_bytes(values, layers=layers, tokens=longest, bits=b) / mib:,.2f}" for b in (16, 8, 4)),
            )
            for label, values in rows.items()
        ]
        + coded,
        head=("attention", "values a token and layer", f"MiB at {longest:,} tokens", "8 bits", "4 bits"),
    )
    return f"<h2>The cache</h2>{figure(chart)}{sizes}<p class=dim>8 and 4 bits without their scales.</p>"


def _quality(m: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], *, healed: bool) -> str:
    rows: list[tuple[str, ...]] = [
        ("the source", f"{m['source_perplexity']:.3f}", "", "", "", f"{m['evaluation_tokens']:,}")
    ]
    if m.get("linear_fit_excess_loss") is not None:
        rows.append(("its linear fit, nothing compressed", "", f"{m['linear_fit_excess_loss']:.4f}", "", "", ""))
    if m.get("closed_form_excess_loss") is not None:
        rows.append(("in closed form, before training", "", f"{m['closed_form_excess_loss']:.4f}", "", "", ""))
    rows.append(_quality_row("as healed" if healed else "as converted", m, m["evaluation_tokens"]))
    rows += [_quality_row(named(e), e, e["tokens"]) for e in evaluations]
    numbers = table(rows, head=("", "perplexity", "excess, nats", "KL, nats", "same top-1", "tokens"))
    return (
        f"<h2>Quality</h2>{numbers}<p class=dim>On held-out text that nothing was learnt or chosen from: "
        f"{escape(str(m['calibration_text']))}. Excess is nats per token above the source on the same tokens.</p>"
    )


def _quality_row(label: str, found: Mapping[str, Any], tokens: int) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        return "" if found.get(key) is None else format(found[key], form)

    excess, kl, same = shown("excess_loss", ".4f"), shown("kl", ".4f"), shown("top1_agreement", ".1%")
    return (label, shown("perplexity", ".3f"), excess, kl, same, f"{tokens:,}")


def _healing(healings: Sequence[Mapping[str, Any]]) -> str:
    """What each healing learnt from and what it gained."""
    parts = []
    for done in healings:
        recipe = done["recipe"]
        looks = [(look["step"], f"{look['kl']:.4f}", f"{look['ce']:.4f}") for look in done["held_out"]]
        loss = "cross-entropy" if recipe["ce"] == 1 else "KL from the source"
        parts.append(
            f"<p>{done['steps']:,} steps on {done['tokens']:,} tokens of {escape(str(done['text']))}, {loss}, "
            f"training {escape(str(recipe['train']))} ({done['parameters']:,} parameters): "
            f"{done['excess_loss_before']:.4f} nats above the source before, {done['excess_loss']:.4f} after.</p>"
            + table(looks, head=("step", "held-out KL, nats", "held-out cross-entropy, nats"))
        )
    return f"<h2>Healing</h2>{''.join(parts)}" if parts else ""


def _layers(layers: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> str:
    parts = ["<h2>Layer by layer</h2>"]
    errors = {
        "closed form": [(i, e["error_before_refine"]) for i, e in enumerate(layers)],
        "as saved": [(i, e["error_after_refine"]) for i, e in enumerate(layers)],
    }
    series = {name: [(float(x), max(y, 1e-9)) for x, y in points] for name, points in errors.items()}
    if series["closed form"] == series["as saved"]:
        del series["closed form"]
    title = "Relative error of the residual stream after each layer"
    parts.append(figure(line_chart(series, title=title, x_label="layer", legend_below=True, even=True)))
    sizes = ("kv_lora_rank", "qk_rope_head_dim")
    if all(size in layer for layer in layers for size in sizes):
        latents = [e["kv_lora_rank"] for e in layers]
        values = {"latent": latents, "roped keys": [e["qk_rope_head_dim"] * e.get("roped_keys", 1) for e in layers]}
        if any("key_scales" in e for e in layers):
            values["norms of keys"] = [e.get("key_scales", 0) for e in layers]
        most = max(sum(parts_) for parts_ in zip(*values.values(), strict=True))
        full = max(source["cache_values_per_token_layer"], most)
        title = f"Cached values a token, of the source's {source['cache_values_per_token_layer']}"
        parts.append(figure(layer_bars(values, title=title, full=full)))
    return "".join(parts)


def _bits(layers: Sequence[Mapping[str, Any]], m: Mapping[str, Any]) -> str:
    """Where the bits of coded rows went."""
    coded = [layer for layer in layers if "latent_bits" in layer]
    if not coded:
        return ""
    segments = [(layer["latent_bits"], layer["rope_bits"]) for layer in coded]
    drawn = bit_map(segments, ("latent", "roped keys"), title="Bits of each component, the widest first")
    newest, first = coded[0]["newest_tokens"], coded[0]["exact_tokens"]
    caption = (
        f"{m['row_bytes_per_token_layer']:.1f} bytes of a token and layer on average. The first {first} tokens of a "
        f"text are exact, and so are the newest {newest} that a token sees."
    )
    return f"<h2>Where bits went</h2>{figure(drawn, caption, wide=True)}"


def _rope(layers: Sequence[Mapping[str, Any]]) -> str:
    if not all("rope_cost" in layer for layer in layers):
        return ""
    title = "What losing rotation would cost (shade); what keeps it (●)"
    drawn = rope_map([e["rope_cost"] for e in layers], {"●": [e["rope_kept"] for e in layers]}, title=title)
    caption = "Frequency 0 turns fastest. Shade is relative to the costliest frequency of the layer."
    return f"<h2>Where RoPE went</h2>{figure(drawn, caption, wide=True)}"


def _spectra(layers: Sequence[Mapping[str, Any]]) -> str:
    if not all("spectrum" in layer for layer in layers):
        return ""
    step = -(-len(layers) // 6)
    series = {
        f"layer {i}, {layers[i]['latent_energy']:.1%} kept": [
            (float(n), share) for n, share in layers[i]["spectrum"] if share > 1e-7
        ]
        for i in range(0, len(layers), step)
    }
    # Of a layer whose keys and values are zero there is nothing to show.
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    title = "Energy of keys and values by direction"
    chart = line_chart(series, title=title, x_label="direction, largest first", legend_below=True, dots=False)
    caption = "What the closed form keeps of each layer; refinement makes more of the same room."
    return f"<h2>What a latent has to hold</h2>{figure(chart, caption)}"


def speed_chart(rows: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Milliseconds a decode step against context.

    Args:
        rows: Of ``latentize bench``.
        options: As for :func:`line_chart`.
    """
    batches = {row["batch"] for row in rows}
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = row["name"] if len(batches) == 1 else f"{row['name']}, batch {row['batch']}"
        series.setdefault(label, []).append((float(row["context"]), row["milliseconds_per_token"]))
    return line_chart(series, title="Milliseconds a decode step", x_label="tokens of context", **options)


def _speed(benches: Sequence[Mapping[str, Any]]) -> str:
    if not benches:
        return ""
    latest = benches[-1]
    caption = (
        f"latentize bench, {latest['at'][:10]}, {latest['dtype']}, {latest['threads']} threads on {latest['device']}"
    )
    return f"<h2>Speed</h2>{figure(speed_chart(latest['rows'], legend_below=True), caption)}"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    latest = samples[-1]
    texts = "".join(
        f"<div><b>{escape(label)}</b><pre>{escape(latest['prompt'] + latest[key])}</pre></div>"
        for label, key in (("the source", "source"), ("this model", "converted"))
    )
    return f'<h2>A sample</h2><p class=dim>Greedy, the same prompt.</p><div class="pair">{texts}</div>'
