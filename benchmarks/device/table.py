"""What is printed: a few lines when a step ends, and one table of at most 60 lines at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .journal import Item, flaw

Items = dict[str, Item]  # of one step, by name
MOST = 60  # lines
WIDTH = 170


def headline(name: str, step: dict[str, Any]) -> list[str]:
    items = step["items"]
    flawed = [item for item in items if flaw(item)]
    skipped = sum("skipped" in item for item in items)
    starts = f", {step['starts']} starts" if step["starts"] > 1 else ""
    lines = [
        f"{name}: {step['status']}, {step['seconds']:.0f} s, {len(items)} items, {len(flawed)} "
        f"failed, {skipped} skipped{starts}"
    ]
    lines += [f"  ! {item['name'][:60]}: {str(flaw(item))[:90]}" for item in flawed[:4]]
    return lines + ([f"  ! and {len(flawed) - 4} more"] if len(flawed) > 4 else [])


def table(report: dict[str, Any]) -> list[str]:
    key, steps = report["key"], report["steps"]
    lines = [f"=== {key['gpu']}, source {key['source']}, {report.get('seconds', 0)} s ==="]
    for name, step in steps.items():
        if not step["items"]:
            lines.append(f"{name}: nothing ({step['status']})")
            continue
        items = {item["name"]: item for item in step["items"]}
        status = "" if step["status"] == "ok" else f" [{step['status']}]"
        try:
            first, *more = SHOWN[name](items)
        except Exception as error:  # a report of a broken step must not hide the others
            first, more = f"cannot be shown: {type(error).__name__}: {error}", []
        wrong = [f"! {n[:60]}: {flaw(item)}" for n, item in items.items() if flaw(item)]
        lines += [f"{name}{status}: {first}", *(f"  {line}" for line in [*more, *wrong[:3]])]
    left_out = [f"... {len(lines) - MOST + 1} more lines: --show report.json"] * (len(lines) > MOST)
    return [line[:WIDTH].rstrip() for line in (lines[: MOST - len(left_out)] + left_out)]


def _columns(cells: Sequence[str], count: int = 3) -> list[str]:
    rows, width = -(-len(cells) // count), max(map(len, cells), default=0)
    return [" | ".join(cell.ljust(width) for cell in cells[i::rows]) for i in range(rows)]


def _short(label: str) -> str:
    """A call's label without what most calls share."""
    label = re.sub(r"chunk_bytes=(\d+)", lambda m: f"{int(m[1]) / 2**30:.3g} GiB", label)
    return re.sub(r" (dense|head|bf16|T=2|8192x151936)\b|x151936\b", "", label).replace(
        "forward_kl", "fkl"
    )


def _gib(item: Item) -> str:
    return f"{item['bytes'] / 2**30:.2f}" if item.get("bytes") is not None else "-"


def _facts(items: Items) -> list[str]:
    machine, card = items.get("machine", {}), items.get("card", {})
    versions = machine.get("versions", {})
    return [
        f"torch {versions.get('torch')}, triton {versions.get('triton')}, python "
        f"{machine.get('python')}, L2 {(card.get('L2_cache_size') or 0) / 1e6:.0f} MB, "
        f"{card.get('multi_processor_count')} SMs, {card.get('smi', 'no GPU')}"
    ]


def _ceilings(items: Items) -> list[str]:
    def series(start: str, key: str, end: str = "") -> str:
        cells = []
        for name, item in items.items():
            match = re.fullmatch(rf"{start} ([\d.]+)(?: MB| GB)?{end}", name)
            if match and key in item:
                value = f"{item[key] / 1000:.2f}" if key == "gb_s" else f"{item[key]:.0f}"
                cells.append(f"{match[1]} {value}")
        return ", ".join(cells)

    one = {
        name: f"{items[name]['gb_s'] / 1000:.2f}"
        for name in ("triad", "read")
        if "gb_s" in items.get(name, {})
    }
    lines = [
        f"TB/s: copy by GB {series('copy', 'gb_s')}; triad {one.get('triad')}; read "
        f"{one.get('read')}; square product {items.get('square', {}).get('tflops')} TFLOP/s",
        f"read again, TB/s by MB: {series('again', 'gb_s')}",
        f"... back and forth: {series('again', 'gb_s', ' turning')}",
    ]
    rates = {kind: series(kind, "tflops") for kind in ("logits", "hidden", "weight")}
    wide = {kind: series(kind, "tflops") for kind in ("logits fp32", "weight fp32 add")}
    words = ["; ".join(f"{kind} {rate}" for kind, rate in some.items()) for some in (rates, wide)]
    return [*lines, f"TFLOP/s by rows: {words[0]}", f"... fp32 out: {words[1]}"]


def _compile(items: Items) -> list[str]:
    kernels = items.get("kernels", {})
    top = (kernels.get("worst") or [{}])[-1]
    slow = sorted(items.values(), key=lambda item: -item.get("s", 0.0))
    slow = [item for item in slow if item["name"] not in ("processes", "kernels")][:2]
    return [
        f"{len(items)} items, {kernels.get('count')} kernels, {kernels.get('spilled')} of ours "
        f"spill; most registers {top.get('registers')} ({top.get('kernel')}); slowest first call "
        + ", ".join(f"{item['name'][:40]} {item.get('s', 0):.1f} s" for item in slow)
    ]


def _smoke(items: Items) -> list[str]:
    judged = [item for item in items.values() if "ok" in item]
    scored = sorted((item for item in judged if "score" in item), key=lambda item: -item["score"])
    nearest = "; ".join(f"{item['score']:.2f} {item['name'][:44]}" for item in scored[:3])
    right = sum(item["ok"] for item in judged)
    return [f"{right} of {len(items)} right; nearest to their budgets: {nearest}"]


def _verdicts(items: Items) -> list[str]:
    def word(item: Item) -> str:
        said = f" ({item['said'][:60]})" if item.get("ok") and item.get("said") else ""
        return (
            f"{item['name']} {'ok' if item.get('ok') else flaw(item) or item.get('skipped')}{said}"
        )

    return ["; ".join(map(word, items.values()))]


def _shares(items: Items) -> list[str]:
    def copied(when: str) -> str:
        return f"{items.get(f'copy {when}', {}).get('gb_s', math.nan) / 1000:.2f}"

    cells = [
        f"{_short(name)[:27]:28}{item['ms']:7.2f} {item['share']:5.1f} {item.get('modelled', '')}"
        for name, item in items.items()
        if "share" in item
    ]
    rates = f"{copied('before')} TB/s before, {copied('after')} after"
    return [f"ms a step, % of copy bandwidth, and by the model ({rates})", *_columns(cells)]


def _heads(items: Items) -> list[str]:
    cells = [
        f"{_short(name)[:30]:30}{item['ms']:6.1f} {item['ratio']:.2f} {_gib(item)}"
        for name, item in items.items()
        if "ratio" in item
    ]
    return ["ms a step, times the bare products, peak GiB beyond inputs", *_columns(cells)]


def _host(items: Items) -> list[str]:
    costs = {name: item["us"] for name, item in items.items() if "us" in item}
    others = [item for n, item in items.items() if n not in costs and n != "profile"]
    top = items.get("profile", {}).get("top", [])[:4]
    return [
        "us a call: " + ", ".join(f"{n.removeprefix('call ')} {us:.0f}" for n, us in costs.items()),
        "profile: " + "; ".join(f"{line['what'][:34]} {line['us']}" for line in top),
        f"{sum(bool(i.get('ok')) for i in others)} of {len(others)} ok (waiting, graph, stream)",
    ]


def _peers(items: Items) -> list[str]:
    raced = [item for item in items.values() if "peer" in item]
    ours = {item["case"]: item["ms"] for item in raced if item["peer"] == "fusedkd"}
    common = re.compile(r", bf16|, [\d,]+ x [\d,]+(?=,)|, T=2|, H=\S+")
    cells = [
        f"{item['peer'][:12]:12} {common.sub('', item['case'])[:22]:22}{item['ms']:8.2f} "
        f"{item['ms'] / ours.get(item['case'], math.nan):5.1f} {_gib(item)}"
        for item in raced
    ]
    reasons = {item["skipped"] for item in items.values() if "skipped" in item}
    left_out = f"; left out: {'; '.join(sorted(reasons))}" if reasons else ""
    return [f"ms, times ours, peak GiB{left_out}", *_columns(cells)]


def _profile(items: Items) -> list[str]:
    lines = []
    for name, item in items.items():
        top = ", ".join(
            f"{k['count']} {k['kernel'][:26]} {k['us']:.0f}" for k in item.get("top", [])[:4]
        )
        if top:
            lines.append(
                f"{name[:34]}: {item['span_us']:.0f} us, busy {item['busy_us']:.0f}: {top}"
            )
    return lines or ["nothing"]


def _counters(items: Items) -> list[str]:
    lines = []
    for name, item in items.items():
        cells = [
            f"{metric.split('.')[0].split('__')[-1][:30]} {value:g}"
            for metric, value in item.items()
            if "__" in metric and isinstance(value, float)
        ]
        verdict = flaw(item) or item.get("skipped") or "ran"
        lines += [
            f"{name}: {', '.join(cells[:6]) or verdict}",
            *filter(None, [", ".join(cells[6:])]),
        ]
    return lines


SHOWN: dict[str, Callable[[Items], list[str]]] = {
    "facts": _facts,
    "ceilings": _ceilings,
    "compile": _compile,
    "smoke": _smoke,
    "sanitizer": _verdicts,
    "shares": _shares,
    "heads": _heads,
    "host": _host,
    "peers": _peers,
    "profile": _profile,
    "counters": _counters,
    "badlabel": _verdicts,
    "tests": _verdicts,
}
