"""What an ONNX pass is: a rewrite rule with a name, applied to the main graph and to every layer function.

A rule refuses a place that looks right and is not with `refuse`, which keeps the reason for ``--verbose``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, pattern


@dataclass(frozen=True)
class PassReport:
    """What a pass did: places rewritten, and for each place left alone the reason."""

    name: str
    rewritten: int
    refusals: list[str] = field(default_factory=list)


class OnnxPass(Protocol):
    """A pass over an ONNX graph, made anew for each run."""

    pass_name: str

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place."""


class GraphPass(pattern.RewriteRuleClassBase):
    """Base of the ONNX passes: subclasses give `pass_name`, `pattern`, `check` and `rewrite`.

    A pass with several forms of one pattern overrides `rules` instead.
    """

    pass_name: str

    def __init__(self) -> None:
        super().__init__(name=self.pass_name)
        self.refusals: list[str] = []

    def refuse(self, node: ir.Node | None, expected: str, found: Any) -> Any:
        """A failed match that is worth telling: the place, what was expected, what was found."""
        result = MatchResult()
        where = node.name if node is not None else "a graph input"
        self.refusals.append(f"{where}: expected {expected}, found {found}")
        return result.fail(self.refusals[-1])

    def rules(self) -> list[pattern.RewriteRule]:
        """The rewrite rules, tried in order at every node."""
        return [pattern.RewriteRule(self.pattern, self.rewrite, self.check, name=self.pass_name)]

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place, main graph and functions, wherever a rule matches."""
        count = pattern.RewriteRuleSet(self.rules()).apply_to_model(model)
        return PassReport(self.pass_name, count, self.refusals)


def constant(value: ir.Value | None) -> Any:
    """The array of an initializer or Constant node, None for anything else."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].value.numpy()
    return value.const_value.numpy() if value.const_value is not None else None


def scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds, None for anything else."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None
