from collections.abc import Callable
from typing import Any

from torch import Tensor

class Plan:
    may_sum: bool
    def climb(
        self,
        groups: list[dict[str, Any]],
        phase: Any,
        variant: str,
        reduce: Callable[[Tensor, list[int]], None] | None,
        backups: list[tuple[Tensor, Tensor]],
        state: dict[Tensor, Any] | None,
        moment: str,
        /,
    ) -> bool: ...
    def descend(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        phase: Any,
        method: str,
        create: Callable[[Tensor, tuple[str, ...]], dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
        share: Callable[[Tensor], None] | None,
        /,
    ) -> bool: ...
    def restore(self, backups: list[tuple[Tensor, Tensor]], /) -> None: ...
    def finite(self) -> bool: ...
    def skipped(self) -> int: ...
    def memory(self) -> list[Tensor]: ...
    def norms(self) -> tuple[float, list[float]]: ...

def is_dense(tensor: Tensor, /) -> bool: ...
def walk(sizes: list[int], chunks: list[int], /) -> list[tuple[int, int, int]]: ...

chunk: int
tensors_per_launch: dict[str, int]
instruction_set: str
cuda: bool
