"""The best learning rate and radius on a grid, by a search that goes on until all neighbours of a point are worse."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)  # what is searched for: all keys move at once


class Point(NamedTuple):
    """Where lr and rho lie on the grid, in its steps."""

    lr: int
    rho: int

    def moved(self, by: tuple[int, int]) -> "Point":
        return Point(self.lr + by[0], self.rho + by[1])


def climb(
    point: Point, moves: list[tuple[int, int]], known: Callable[[Point], float | None]
) -> tuple[Point, list[Point]]:
    """The best point that is known, from this one on, and the points that must be known to go on.

    known: a point's mean accuracy, None if a run is missing. No point is missing if all neighbours are worse.
    """
    while True:
        found = {p: known(p) for p in (point, *map(point.moved, moves))}
        if missing := [p for p, mean in found.items() if mean is None]:
            return point, missing
        best = max(found, key=lambda p: found[p])
        if best == point:
            return point, []
        point = best


def best_points(
    starts: dict[Key, Point],
    moves: Callable[[Key], list[tuple[int, int]]],
    known: Callable[[Key, Point], float | None],
    train: Callable[[Iterable[tuple[Key, Point]]], None],
) -> dict[Key, Point]:
    """The keys' best points. All of them move at once, so that all are equally far after an interruption."""
    points = dict(starts)
    while True:
        climbs = {key: climb(point, moves(key), lambda p, key=key: known(key, p)) for key, point in points.items()}
        points = {key: point for key, (point, _) in climbs.items()}
        missing = [(key, p) for key, (_, some) in climbs.items() for p in some]
        if not missing:
            return points
        train(missing)
