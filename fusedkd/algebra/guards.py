"""What keeps a formula finite where its value is not looked at."""

from __future__ import annotations

from fusedkd.tape import OPERATIONS, Builder, Node, Tape

PASSING = ("add", "sub", "mul", "neg", "detach")  # what takes a NaN or an infinity to its result


def unguarded(tape: Tape) -> Tape | None:
    """The same where all that is guarded is positive, and else the same or not finite: without
    ``where(p > 0, p * x, 0)`` and ``log(where(m > 0, m, 1))``, whose result is not looked at again.
    """
    builder = Builder()
    places: dict[int, int] = {}
    replaced = _guards(tape)
    for position, node in enumerate(tape.nodes[: tape.value + 1]):
        if position in replaced:
            places[position] = places[replaced[position]]
        elif node.op in OPERATIONS:
            places[position] = builder(node.op, *(places[i] for i in node.inputs))
        else:
            places[position] = builder.node(node.op, *node.inputs, number=node.number)
    return builder.tape(places[tape.value])


def _guards(tape: Tape) -> dict[int, int]:
    """Guards that may go, and what they guard."""
    users: dict[int, list[int]] = {}
    found: dict[int, int] = {}
    seen = {tape.value}
    passing: dict[int, bool] = {}
    for position in range(tape.value, -1, -1):
        if position not in seen:
            continue
        node, of = tape.nodes[position], users.get(position, [])
        passing[position] = all(_passes(tape, user, position, passing, found) for user in of)
        if node.op == "where":
            guarded, live = _guarded(tape, node)
            other = tape.nodes[node.inputs[3 - live]]
            inside = node.inputs[live]
            if passing[position] and other == ZERO_NODE and _has_factors(tape, inside, guarded):
                found[position] = inside
            logs = [user for user in of if tape.nodes[user].op == "log" and passing[user]]
            if of and len(logs) == len(of) and guarded == [inside]:
                found[position] = inside
        for i in node.inputs:
            if position not in found or i == found[position]:
                users.setdefault(i, []).append(position)
                seen.add(i)
    return found


ZERO_NODE = Node("constant", (), 0.0)


def _passes(
    tape: Tape, user: int, position: int, passing: dict[int, bool], found: dict[int, int]
) -> bool:
    node = tape.nodes[user]
    if not passing[user]:
        return False
    if node.op == "div":
        return node.inputs[1] != position
    return node.op in PASSING or user in found


def _guarded(tape: Tape, node: Node) -> tuple[list[int], int]:
    """What is positive where a branch of a ``where`` counts, and which."""
    found, live = _positive(tape, node.inputs[0]), 1
    if not found:
        found, live = _positive(tape, node.inputs[0], False), 2
    return found, live


def _positive(tape: Tape, mask: int, holds: bool = True) -> list[int]:
    """What is positive, or more than minus infinity, if and only if a mask holds; or does not."""
    node = tape.nodes[mask]
    if node.op == "not":
        return _positive(tape, node.inputs[0], not holds)
    if node.op == ("and" if holds else "or"):
        parts = [_positive(tape, i, holds) for i in node.inputs]
        return [x for part in parts for x in part] if all(parts) else []
    if node.op not in ("lt", "le", "eq"):
        return []
    numbers = [
        tape.nodes[i].number if tape.nodes[i].op == "constant" else None for i in node.inputs
    ]
    ends = (0.0, -float("inf"))
    if holds and node.op == "lt" and numbers[0] in ends:
        return [node.inputs[1]]
    if not holds and node.op in ("le", "eq") and numbers[1] in ends:
        return [node.inputs[0]]
    if not holds and node.op == "eq" and numbers[0] in ends:
        return [node.inputs[1]]
    return []


def _has_factors(tape: Tape, position: int, wanted: list[int]) -> bool:
    """Whether a product has them all, or their exponentials."""
    factors, open_ones = set(), [position]
    while open_ones:
        node = tape.nodes[at := open_ones.pop()]
        factors.add(at)
        if node.op == "exp":
            factors.add(node.inputs[0])
        if node.op in ("mul", "neg", "detach"):
            open_ones += node.inputs
        elif node.op == "div":
            open_ones.append(node.inputs[0])
    return bool(wanted) and factors.issuperset(wanted)
