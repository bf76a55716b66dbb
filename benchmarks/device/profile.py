"""Step: torch's profiler over a few calls: kernels, times, gaps."""

from __future__ import annotations

from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from .calls import Call, problem_of, step_of
from .card import Card
from .journal import Item, Journal
from .plans import Sizes


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    rows, *hidden = sizes.heads[0]
    dense = Call(rows=sizes.rows, vocab=sizes.vocab, divergence="jsd")
    head = Call("head", rows=rows, vocab=sizes.vocab, hidden=(hidden[0], hidden[1]))
    for call in (head, dense, dense.but(form="bucket")):
        journal.item(call.label, _watch, call, card)
        card.free()


def _watch(call: Call, card: Card) -> Item:
    step = step_of(call, problem_of(call, card))
    step()
    card.wait()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.cuda else [])]
    with record(activities=kinds) as seen:
        step()
        card.wait()
    spans, kernels = [], dict[str, tuple[int, float]]()
    for event in seen.events() or ():
        if card.device.type in str(event.device_type).lower():
            spans.append((event.time_range.start, event.time_range.end))
            count, us = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (count + 1, us + event.time_range.elapsed_us())
    busy, upto = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, upto))
        upto = max(upto, stop)
    span = max(stop for _, stop in spans) - min(start for start, _ in spans) if spans else 0
    longest = sorted(kernels.items(), key=lambda pair: -pair[1][1])[:14]
    top = [{"kernel": k[:90], "count": c, "us": round(us, 1)} for k, (c, us) in longest]
    return {"span_us": span, "busy_us": busy, "kernels": len(spans), "top": top}
