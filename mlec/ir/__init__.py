"""The typed intermediate representation: dims, types, graphs, their text form, their checker and their interpreter."""

from mlec.ir.builder import GraphBuilder, extract
from mlec.ir.dim import Dim, Proof, SymDim, parse_dim, proves_equal
from mlec.ir.dtype import DType, promote
from mlec.ir.graph import Graph, Node, Value, constant_array
from mlec.ir.interp import bind_symbols, run_graph, trace_graph
from mlec.ir.op import OPS, Attr, AttrKind, Case, ConstantRef, Cost, OpDef, Operand, Trait, lookup, register
from mlec.ir.parser import parse_graph
from mlec.ir.pattern import AnyOf, Const, Match, P
from mlec.ir.printer import print_graph, print_node
from mlec.ir.rewrite import Edit, Miss, Rule, apply_rules
from mlec.ir.types import UNKNOWN, Location, TensorType, tensor
from mlec.ir.verify import verify, violations

__all__ = [
    "OPS", "UNKNOWN", "AnyOf", "Attr", "AttrKind", "Case", "Const", "ConstantRef", "Cost", "DType", "Dim", "Edit", "Graph",
    "GraphBuilder", "Location", "Match", "Miss", "Node", "OpDef", "Operand", "P", "Proof", "Rule", "SymDim", "TensorType", "Trait", "Value",
    "apply_rules", "bind_symbols", "constant_array", "extract", "lookup", "parse_dim", "parse_graph", "print_graph", "print_node",
    "promote", "proves_equal", "register", "run_graph", "tensor", "trace_graph", "verify", "violations",
]  # fmt: skip
