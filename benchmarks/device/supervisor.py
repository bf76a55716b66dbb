"""Runs the steps, each in a child process with limits, and keeps the report. No torch in here."""

from __future__ import annotations

import contextlib
import json
import os
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import place
from .journal import LOST, NO_TIME, Item, flaw, items_of, lines_of
from .orders import Orders, end, start
from .steps import STEPS
from .table import headline, table

RESTARTS = 10
STEP_LIMIT = "the step's limit"
LEAST = 8  # seconds below which nothing is begun


class Supervisor:
    """Of one visit."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.begun = args, time.monotonic()
        self.root, self.out, self.state = place.checkout(), args.out, args.state
        for folder in (self.out, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("a")
        self.running: list[Run] = []
        gpu = place.smi("name").splitlines()[0] if args.device == "cuda" else "none"
        key = {"source": place.source_hash(self.root), "device": args.device, "gpu": gpu}
        self.report: dict[str, Any] = {"key": key, "steps": {}}
        self.same_state = False  # whether the journals in the state are of this source and GPU
        if args.resume is not None:
            self._resume()
        self.environment = place.environment(self.root, self.state, args.device)

    def _resume(self) -> None:
        """Keep the steps that an earlier report, of the same source and GPU, has in full."""
        places = [Path(self.args.resume)] if self.args.resume else []
        for file in [*places, self.state / "report.json", self.out / "report.json"]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                old = json.loads(file.read_text())
                if old["key"] != self.report["key"]:
                    say(f"{file} is of another source or GPU: not resumed")
                    continue
                self.same_state = file == self.state / "report.json"
                done = {name: s for name, s in old["steps"].items() if s["status"] == "ok"}
                cached = any((self.state / "triton").glob("*"))
                if self.args.device == "cuda" and not cached:
                    done.pop("compile", None)  # its cache is what it is for
                self.report["steps"] = done
                say(f"resumed from {file}: {', '.join(done) or 'nothing'}")
                return

    def left(self) -> float:
        """Seconds, less what the report takes."""
        return float(self.args.budget) - (time.monotonic() - self.begun) - 3

    def go(self) -> int:
        """Everything; the exit code is 1 if anything failed or was left out."""
        wanted = [name for name in self.args.steps if name not in self.report["steps"]]
        for group in sorted({STEPS[name].group for name in wanted}):
            names = [name for name in wanted if STEPS[name].group == group]
            if self.left() < LEAST:
                self._leave_out(names, NO_TIME)
            elif self._nothing_runs():
                self._leave_out(names, "nothing runs")
            else:
                self._group(names)
        self.save()
        lines = table(self.report)
        (self.out / "table.txt").write_text("\n".join(lines) + "\n")
        say(*lines)
        return 1 if any(failed(step) for step in self.report["steps"].values()) else 0

    def _nothing_runs(self) -> bool:
        """No GPU, or no backend on it: "facts" says why."""
        items = self.report["steps"].get("facts", {}).get("items", [])
        package = [item for item in items if item["name"] in ("package", "the step itself")]
        return any(flaw(item) for item in package)

    def _leave_out(self, names: list[str], why: str) -> None:
        for name in names:
            step = {"status": why, "seconds": 0, "starts": 0, "items": []}
            self.report["steps"][name] = step
            say(*headline(name, step))

    def _group(self, names: list[str]) -> None:
        self.running = [Run(self, name) for name in names]
        while self.running:
            time.sleep(0.1)
            for run in [run for run in self.running if run.poll()]:
                self.running.remove(run)
                say(*headline(run.name, self.report["steps"][run.name]))

    def save(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.begun, 1)
        text = json.dumps(self.report, indent=1)
        for folder in (self.out, self.state):
            fresh = folder / ".report.tmp"
            fresh.write_text(text)
            os.replace(fresh, folder / "report.json")

    def stop(self, number: int, _frame: Any) -> None:
        """Somebody ends us: save and show what there is."""
        for run in self.running:
            run.end()
            run.finish(f"stopped by signal {number}")
        self.save()
        say(*table(self.report))
        os._exit(128 + number)


class Run:
    """One step under way, in one child after another."""

    def __init__(self, visit: Supervisor, name: str) -> None:
        self.visit, self.name, self.step = visit, name, STEPS[name]
        args = visit.args
        root = str(visit.root) if visit.root else ""
        self.orders = Orders(
            name, args.device, root, str(visit.state), 0.0, faults=tuple(args.fault)
        )
        self.path = self.orders.journal
        keep = items_of(self.path) if visit.same_state and name != "compile" else []
        late = (NO_TIME, STEP_LIMIT)  # what only lacked time is done again
        kept = [x for x in keep if x.get("skipped") not in late and x.get("error") not in late]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.begun, self.starts, self.size = time.monotonic(), 0, -1
        self.limit = min(self.step.limit * args.limit_scale, visit.left())
        self.item_limit = self.step.item * args.limit_scale
        self.start()

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begun)

    def start(self) -> None:
        self.starts += 1
        self.at, self.since = "", time.monotonic()  # the item that is under way, since when
        deadline = time.time() + self.left() - 3
        orders = replace(self.orders, deadline=deadline)
        log, environment = self.visit.log, self.visit.environment
        self.process = start(orders.command, log, session=True, **environment)

    def poll(self) -> bool:
        """Whether it is over."""
        self.merge("running")
        code = self.process.poll()
        if code is None:
            if self.left() < 0:
                self.end()
                self.blame(STEP_LIMIT)
                return self.finish(f"over its limit of {self.limit:.0f} s")
            if time.monotonic() - self.since > self.item_limit:
                self.end()
                return self.again(f"took over {self.item_limit:.0f} s")
            return False
        end(self.process.pid)  # what it may have left behind
        if code == 0:
            late = any(item.get("skipped") == NO_TIME for item in items_of(self.path))
            return self.finish("out of time" if late else "ok")
        return self.again(f"the process ended with {code}", blame=code != LOST)

    def again(self, why: str, blame: bool = True) -> bool:
        """Start behind the item that did it."""
        before = len(items_of(self.path))
        if blame:
            self.blame(why)
        stuck = blame and len(items_of(self.path)) == before
        if stuck or self.starts > RESTARTS or self.left() < LEAST:
            return self.finish(why)
        self.start()
        return False

    def blame(self, why: str) -> None:
        self.merge("running")
        if self.at:
            with self.path.open("a") as file:
                file.write("\n" + json.dumps({"name": self.at, "error": why}) + "\n")
            self.at = ""

    def end(self) -> None:
        end(self.process.pid)
        self.process.wait(5)

    def merge(self, status: str) -> None:
        """What the journal has into the report."""
        size = self.path.stat().st_size
        if size == self.size and status == "running":
            return
        self.size, lines = size, lines_of(self.path)
        under_way = lines[-1].get("begin", "") if lines else ""
        if under_way != self.at or not under_way:
            self.at, self.since = under_way, time.monotonic()
        items: list[Item] = [line for line in lines if "name" in line]
        seconds = round(time.monotonic() - self.begun, 1)
        step = {"status": status, "seconds": seconds, "starts": self.starts, "items": items}
        self.visit.report["steps"][self.name] = step
        self.visit.save()

    def finish(self, status: str) -> bool:
        self.merge(status)
        return True


def failed(step: dict[str, Any]) -> bool:
    return step["status"] != "ok" or any(flaw(item) for item in step["items"])


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
