"""What an evaluation measures beside the loss, for a reader: tables of key tokens, recall by depth and attention, and
the effective context in words."""

from nanope.evaluation.attention_by_distance import head_means
from nanope.evaluation.key_tokens import key_rows


def label_of(row: dict) -> str:
    """The length of a row, with its scaling."""
    return f"{row['length']}" + (f" {row['scaling']} ×{row['factor']:g}" if row["scaling"] != "none" else "")


def interval_of(row: dict, alone: str) -> str:
    return f"{row['interval'][0]:.4f} … {row['interval'][1]:.4f}" if row["interval"] else alone


def tables_of(report: dict, reasons: list[str]) -> list[str]:
    """Markdown tables of what a report has; the reasons for what is missing are added to `reasons`."""
    found = [key_table(report, reasons)] if report.get("key_tokens") else []
    if report.get("attention"):
        found.append(attention_table(report["attention"], reasons))
    if any(row.get("by_depth") for row in report.get("probe", ())):
        found += [depth_table(report["probe"], figure) for figure in ("recall", "perplexity")]
    return found


def key_table(report: dict, reasons: list[str]) -> str:
    lines, missing = ["| key tokens, length | nats/token | 95 % interval | tokens |", "|--:|--:|:-:|--:|"], []
    for row in key_rows(report["results"]):
        if row["nats_per_token"] is None:
            lines.append(f"| {label_of(row)} | n/a | | {row['tokens'] or ''} |")
            missing.append(f"key tokens n/a: {row['reason']}")
        else:
            interval = interval_of(row, "one document")
            lines.append(f"| {label_of(row)} | {row['nats_per_token']:.4f} | {interval} | {row['tokens']:,} |")
    reasons += dict.fromkeys(missing)
    return "\n".join(lines)


def depth_table(rows: list[dict], figure: str) -> str:
    rows = [row for row in rows if row.get("by_depth")]
    depths = [depth_of(b) for b in rows[0]["by_depth"]]
    lines = [f"| {figure} by depth, length | {' | '.join(depths)} |", "|--:" * (len(depths) + 1) + "|"]
    for row in rows:
        cells = (f"{b[figure]:.4f} ({b['trials']})" if b["trials"] else "no trial" for b in row["by_depth"])
        lines.append(f"| {label_of(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def depth_of(b: dict) -> str:
    """A bin of depths, in per cent of the context."""
    return f"{100 * b['low']:.0f}–{100 * b['high']:.0f} %"


def attention_table(rows: list[dict], reasons: list[str]) -> str:
    """Means over heads, of each layer, beside those of a head that gives all tokens the same weight."""
    lines = [
        "| attention, length | layer | entropy, nats | of uniform | mean distance | of uniform |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if not row["layers"]:
            lines.append(f"| {label_of(row)} | n/a | | | | |")
            reasons.append(f"attention n/a at {label_of(row)}: {row['reason']}")
            continue
        even = row["uniform"]
        each = zip(head_means(row, "entropy"), head_means(row, "mean_distance"))
        for layer, (entropy, distance) in enumerate(each, 1):
            cells = f"{entropy:.3f} | {even['entropy']:.3f} | {distance:.1f} | {even['mean_distance']:.1f}"
            lines.append(f"| {label_of(row)} | {layer} | {cells} |")
    return "\n".join(lines)


def probe_notes(report: dict) -> list[str]:
    """Effective contexts, and how key tokens were chosen, a line each."""
    found = [in_words(each) for each in report.get("effective_context", ())]
    return found + key_notes([report])


def key_notes(reports: list[dict]) -> list[str]:
    """How the key tokens of reports were chosen, and where they say less than they seem to, a line each."""
    found = {}
    for report in reports:
        if keys := report.get("key_tokens"):
            found[keys_in_words(keys)] = None
            own = report.get("checkpoint_sha256") or report.get("weights_sha256")
            if keys["tokens"] and keys["weights_sha256"] == own:
                found[
                    f"{keys['evaluator']} is judged by itself: its own losses chose the tokens, which makes those at "
                    f"{keys['lengths'][0]} too high and those at {keys['lengths'][1]} too low."
                ] = None
    return list(found)


def keys_in_words(keys: dict) -> str:
    short, long = keys["lengths"]
    text = (
        f"Key tokens: {keys['tokens']:,} of {keys['of']:,}, whose loss under {keys['evaluator']} falls by more than "
        f"{keys['falls_by']:g} nats from a context of {short} to {long} and ends below {keys['ends_below']:g}."
    )
    before, after = keys["evaluator_nats"]
    if after > before + 0.01:
        text += f" Its own mean loss rises from {before:.4f} to {after:.4f}: a poor judge of what a long context helps."
    return text


def in_words(e: dict) -> str:
    """An effective context as a sentence or two."""
    scaled = f", {e['scaling']} ×{e['factor']:g}" if e["scaling"] != "none" else ""
    ends = f" (95 %: {e['interval'][0]} … {e['interval'][1]})" if e["interval"] else ""
    text = f"Effective context{scaled}: {e['length']}{ends}, the least length within {e['epsilon']:g} nats of the loss "
    text += f"at {e['longest']}."
    at_shortest, gain = e["length"] == e["shortest"], e["gain_interval"] or [e["gain"]]
    if at_shortest and e["rises"]:
        text += (
            f" There it is {-e['gain']:.4f} nats above that at {e['shortest']}; it is lowest at {e['lowest']}. A loss "
            "that rises with length makes it the shortest: no use of context, rather than a short one."
        )
    elif at_shortest and gain[0] <= 0:
        text += f" {e['longest']} gains nothing over the shortest beyond noise: no use of context is seen."
    elif e["rises"]:
        text += f" The loss is lowest at {e['lowest']}, and rises from there."
    return text


def probe_figures(report: dict) -> dict[str, float]:
    """Figures by name, for wandb: eval/WHAT/LENGTH[/SCALING]/FIGURE, the effective context without a length."""
    found = {}
    for row in key_rows(report["results"]):
        if row["nats_per_token"] is not None:
            found[f"eval/key-tokens/{path_of(row)}/nats_per_token"] = row["nats_per_token"]
    for row in report.get("attention", ()):
        for name in ("entropy", "mean_distance") if row["layers"] else ():
            means = head_means(row, name)
            found |= {f"eval/attention/{path_of(row)}/layer-{i}/{name}": mean for i, mean in enumerate(means, 1)}
    for row in report.get("probe", ()):
        for b in row.get("by_depth") or ():
            if b["trials"]:
                found[f"eval/probe/{path_of(row)}/depth-{b['low']:g}/recall"] = b["recall"]
    for e in report.get("effective_context", ()):
        found["eval/effective-context" + (f"/{e['scaling']}" if e["scaling"] != "none" else "")] = e["length"]
    return found


def path_of(row: dict) -> str:
    return f"{row['length']}" + (f"/{row['scaling']}" if row["scaling"] != "none" else "")
