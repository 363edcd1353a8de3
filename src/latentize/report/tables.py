"""What commands print for people, where it is more than a list of facts."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from latentize.formats.portable import PORTABLE
from latentize.progress import said_time
from latentize.report.evaluation import score_cells, tasks_said, with_error
from latentize.report.measurements import cached_rows

__all__ = [
    "capacity_tables",
    "compare_table",
    "conversion_facts",
    "conversions_table",
    "healing_facts",
    "plan_table",
    "positions_table",
    "probes_table",
    "tasks_table",
]

GB = 10**9


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def plan_table(model: str, result: dict[str, Any]) -> tuple[Table, list[str]]:
    """Bytes of the cache, and the notes that its rows refer to by number."""
    title = f"{model}: {result['context']:,} tokens, batch {result['batch']}, 16 bits"
    ranks = result.get("tensor_parallel", 1)
    table = _table(title, "attention", "values", "bits", "GiB", "smaller", *([f"on each of {ranks}"] * (ranks > 1)))
    notes: list[str] = []
    for row in result["rows"]:
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        mark = Text(f" ({notes.index(row['note']) + 1})" if row["note"] else "", style="dim")
        size, share = (_gib(held) for held in (row["cache_bytes"], row.get("rank_bytes", 0)))
        values = f"{row['values_per_token_layer']:,}"
        cells = [values, f"{row['bits']:.3g}", size, f"{row['ratio']:.2f} ×", *([share] * (ranks > 1))]
        table.add_row(Text(row["name"]) + mark, *cells)
    return table, notes


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:.2f}" if gib >= 0.01 else f"{gib:.4f}"


def capacity_tables(result: dict[str, Any]) -> tuple[list[Table], list[str]]:
    """What fits on a machine and how fast it could be, and what to know of that."""
    machine, tables = result["machine"], []
    if machine["memory_bytes"] is not None:
        fits = _table(f"What {machine['name']} holds", "attention", "weights, GB", "longest context", "most sequences")
        for row in result["rows"]:
            longest = "any" if row["max_context"] is None else f"{row['max_context']:,}"
            fits.add_row(row["name"], f"{row['weight_bytes'] / GB:.2f}", longest, f"{row['max_batch']:,}")
        tables.append(fits)
    fast = _table(f"How fast {machine['name']} decodes at best", "attention")
    speeds = [("", "tok/s"), ("max_batch_", "tok/s, full")] if machine["bytes_per_second"] else []
    for _, label in speeds:
        for column in (label, "faster"):
            fast.add_column(column, justify="right")
    fast.add_column("even at", justify="right")
    for row in result["rows"]:
        cells = []
        for prefix, _ in speeds:
            star = "*" if row[f"{prefix}bound"] == "arithmetic" else ""
            cells += [_rate(row[f"{prefix}tokens_per_second"]) + star, _number(row[f"{prefix}speedup"], ".2f", " ×")]
        fast.add_row(row["name"], *cells, _number(row["break_even_context"], ",d"))
    return [*tables, fast], _capacity_notes(result)


def conversions_table(result: dict[str, Any]) -> Table:
    """How long a conversion takes, how much memory, and what takes most of the time."""
    several = result["conversion"][0].get("processes", 1)
    where = result["machine"]["name"] if several == 1 else f"{several} × {result['machine']['name']}"
    table = _table(f"Converting on {where}", "effort", "time", "memory, GB", "TFLOP", "longest")
    for row in result["conversion"]:
        longest = max(row["stages"], key=row["stages"].__getitem__)
        share = row["stages"][longest] / row["seconds"]
        cells = (said_time(row["seconds"]), f"{row['peak_bytes'] / GB:.1f}", f"{row['flop'] / 10**12:,.1f}")
        table.add_row("--fast" if row["fast"] else "default", *cells, f"{longest} ({share:.0%})")
    return table


def _rate(value: float | None) -> str:
    return _number(value, ",.0f" if value and value >= 100 else ".3g")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _capacity_notes(result: dict[str, Any]) -> list[str]:
    machine, context, batch = result["machine"], result["context"], result["batch"]
    sizes = {
        "memory": (machine["memory_bytes"], GB, "GB"),
        "bandwidth": (machine["bytes_per_second"], GB, "GB/s"),
        "arithmetic": (machine["flops_per_second"], 10**12, "TFLOPS"),
    }
    said = ", ".join(f"{name} {value / unit:,.4g} {word}" for name, (value, unit, word) in sizes.items() if value)
    notes = [f"{said} ({machine['origin']}); weights of {machine['weight_bits']:g} bits"]
    if machine["memory_bytes"] is not None:
        notes.append(
            f"longest context: at batch {batch}; most sequences: of {context:,} tokens; {machine['reserve']:.0%} of "
            f"the memory is left for something else"
        )
    if machine["bytes_per_second"] is not None:
        notes.append(
            f"tok/s: of all sequences together, {context:,} tokens of context, batch {batch}; full: as many as fit. A "
            f"bound: weights and cache are read once a step, nothing else takes time (*: but arithmetic, which takes "
            f"longer); faster: than the model as it is"
        )
    notes.append("even at: tokens of context from which a step reads fewer bytes than one of the model as it is")
    kernels: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["kernels"]:
            kernels.setdefault(row["kernels"], []).append(row["name"])
    return notes + [f"{'; '.join(names)}: {text}" for text, names in kernels.items()]


def positions_table(bins: list[dict[str, Any]]) -> Table:
    """Losses against the tokens of context that predictions were made from."""
    table = _table("By position", "tokens of context", "loss, nats", "the source's", "KL")
    for b in bins:
        span = f"{b['from']:,}" if b["from"] == b["to"] else f"{b['from']:,} to {b['to']:,}"
        table.add_row(span, *(_number(b[key], ".4f") for key in ("loss", "reference_loss", "kl")))
    return table


def probes_table(found: dict[str, Any]) -> tuple[Table, str]:
    """What long contexts were asked for and what came of it, and how to read that."""
    compared = any(row["reference_gain"] is not None for row in found["rows"])
    columns = ("score", "the source's", "gain, nats", "the source's", "lost") if compared else ("score", "gain, nats")
    table = _table("Asked for what lies far back", "probe", "tokens", *columns)
    for row in found["rows"]:
        keys = ("score", "reference_score", "gain", "reference_gain", "gain_lost") if compared else ("score", "gain")
        table.add_row(row["probe"], f"{row['length']:,}", *(with_error(row, key) for key in keys))
    depths = ", ".join(f"{depth:g}" for depth in found["depths"])
    note = (
        f"{found['rows'][0]['examples']} examples a row, as many at each depth of {depths}; "
        f"score: share of the answer's tokens that are the most likely; gain: how much likelier the answer is, nats "
        f"per token, than where the text lacks it"
    )
    return table, note


def tasks_table(found: dict[str, Any]) -> tuple[Table, str]:
    """Scores of lm-eval's tasks, and how to read them."""
    head, rows = score_cells(found)
    table = _table("Tasks", head[0], *head[1:])
    for row in rows:
        table.add_row(*row)
    return table, tasks_said(found)


def compare_table(result: dict[str, Any]) -> Table:
    """What each model loses, for how many bytes a token, and the number of the first that dominates it."""
    table = Table(title=f"Beside {result['source']}, {result['tokens']:,} tokens", title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for column in ("bytes", "share", "excess", "KL", "top-1", "worse than"):
        table.add_column(column, justify="right", no_wrap=column != "worse than")
    numbers = {row["name"]: str(number) for number, row in enumerate(result["rows"], 1)}
    for row in result["rows"]:
        table.add_row(
            numbers[row["name"]],
            row["name"],
            f"{row['cache_bytes_per_token']:,.5g}",
            f"{row['cache_share']:.1%}",
            f"{row['excess_loss']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
            numbers.get(row["dominated_by"], ""),
            style=None if row["dominated_by"] is None else "dim",
        )
    return table


def serving_table(model: str, facts: dict[str, Any]) -> tuple[Table, Table]:
    """What ``inspect --for`` says."""
    sizes = facts["sizes"]
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "heads")
    head = Table(title=f"{model} in {facts['engine']} {facts['version']}", title_justify="left", show_header=False)
    head.add_row("machine", f"{facts['machine']} ({facts['hardware']})")
    head.add_row("sizes", ", ".join(f"{name} {sizes[name]}" for name in names))
    head.add_row("cache", facts["cache"])
    head.add_row("latents", facts["latent_on_ranks"])
    if facts["rope"]:
        head.add_row("scaled RoPE", facts["rope"])
    head.add_row("read", f"{facts['read']}, in the engine's source")
    table = Table(title="Backends", title_justify="left")
    for column in ("phase", "backend", "what to know", "source"):
        table.add_column(column, overflow="fold")
    for phase in facts["phases"]:
        if phase["refused"]:
            instead = f"; {facts['instead']}" if facts["instead"] else ""
            table.add_row(phase["phase"], "refused", phase["refused"] + instead, "")
        else:
            speed = "made for these sizes" if phase["fast"] else "made for any sizes, slower"
            known = "; ".join(filter(None, (speed, phase["note"])))
            table.add_row(phase["phase"], phase["backend"], known, phase["source"])
        for declined in phase["declined"]:
            table.add_row("", f"not {declined['backend']}", declined["why"], "", style="dim")
        if phase["made_for"]:
            table.add_row("", "", "fast kernels are for " + " / ".join(phase["made_for"]), "", style="dim")
        if phase["fast_if_padded"]:
            zeros = ", ".join(f"{name} {size}" for name, size in phase["fast_if_padded"].items())
            table.add_row("", phase["padded_backend"], f"would take it, padded with zeros to {zeros}", "", style="dim")
    return head, table


def conversion_facts(r: dict[str, Any]) -> dict[str, Any]:
    """What ``convert`` says, by name."""
    kept, before = r["cache_values_per_token_layer"], r["source_cache_values_per_token_layer"]
    sizes = f" = {r['kv_lora_rank']} + {r['qk_rope_head_dim']}" if r["format"] in PORTABLE else ""
    rows = {
        "format, method": f"{r['format']}, {r['method']}",
        "cached values per token and layer": f"{kept}{sizes}, the source has {before} ({1 - kept / before:.1%} fewer)",
        **cached_rows(r),
        "perplexity": f"{r['perplexity']:.3f}, the source has {r['source_perplexity']:.3f}",
        "KL from the source": f"{r['kl']:.4f} nats per token",
        "same most likely token": f"{r['top1_agreement']:.1%}",
        "measured on": f"{r['evaluation_tokens']:,} held-out tokens of {r['calibration_text']}",
        "time, peak memory": f"{r['seconds']:.1f} s, {r['peak_rss_bytes'] / 2**30:.2f} GiB",
    }
    if r["notes"]:
        rows["notes"] = "; ".join(r["notes"])
    return rows


def healing_facts(r: dict[str, Any]) -> dict[str, Any]:
    """What ``heal`` says, by name."""
    rows = {
        "above the source": f"{r['excess_loss']:.4f} nats per token, before {r['excess_loss_before']:.4f} "
        f"({r['excess_removed']:.0%} removed)",
        "perplexity": f"{r['perplexity']:.3f}, the source has {r['reference_perplexity']:.3f}",
        "KL from the source": f"{r['kl']:.4f} nats per token",
        "same most likely token": f"{r['top1_agreement']:.1%}",
        "measured on": f"{r['evaluation_tokens']:,} held-out tokens",
        "learnt from": f"{r['tokens']:,} tokens of {r['text']}, {r['steps']:,} steps, {r['parameters']:,} parameters",
        "time, speed, peak memory": f"{r['seconds']:.1f} s, {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['peak_rss_bytes'] / 2**30:.2f} GiB",
    }
    return rows
