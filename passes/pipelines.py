"""The named pipelines. The order is the code below, and each line says why it stands there."""

from __future__ import annotations

from mlec.errors import UsageError
from mlec.passes.canonicalize import Canonicalize
from mlec.passes.cse import EliminateCommonSubexpressions
from mlec.passes.dce import EliminateDeadCode
from mlec.passes.fold_batch_norm import FoldBatchNorm
from mlec.passes.fold_constants import FoldConstants
from mlec.passes.fold_lookups import FoldLookups
from mlec.passes.fold_products import FoldProducts
from mlec.passes.fold_scales import FoldScales
from mlec.passes.fusion import FuseOperators
from mlec.passes.hoist_slices import HoistSlices
from mlec.passes.infer_shapes import InferShapes
from mlec.passes.layout import ChooseLayout
from mlec.passes.lift_sequences import LiftSequences
from mlec.passes.merge_products import MergeProducts
from mlec.passes.recognize import Recognize
from mlec.passes.sink_transposes import SinkTransposes
from mlec.passes.split_products import SplitProducts
from mlec.passes.stability import CheckNumerics
from mlec.passes.trees import FoldIntoThresholds, MergeTrees, PruneTrees
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import Pass, PassPipeline


def pipeline_for_level(level: int) -> PassPipeline:
    """O0: only checks; O1: removes work; O2 (the default): also fuses and lays out memory; O3: also repeats the clean-up after folding."""
    steps: list[Pass] = [InferShapes()]  # first: every later pass relies on the types
    if level >= 1:
        steps.append(Canonicalize())  # one spelling, so that the rules below need to know only that
        steps.append(FoldConstants())  # what the clean-up made constant
        steps.append(
            EliminateCommonSubexpressions()
        )  # before fusion, which would hide equal parts in different kernels
        steps.append(CheckNumerics())  # while formulas are spelled one way, and before they are merged with others
    if level >= 2:
        steps.append(
            FoldIntoThresholds()
        )  # first: rows are as the source computes them only while nothing before the trees is approximated
        steps.append(PruneTrees())  # what comes to a split is known once it compares numbers of the input
        steps.append(MergeTrees())  # what pruning leaves equal
        steps.append(Vectorize())  # equal parts are one by now, and what it stacks is transposed where it has to be
        steps.append(Recognize())  # `stability` has seen the spelled-out forms; what follows knows the ops only
        steps.append(Canonicalize())  # the transposes that it leaves
        steps.append(SinkTransposes())  # once weights are plain constants; what cancels is work that no later pass sees
        steps.append(Canonicalize())  # the views that it leaves
        steps.append(SplitProducts())  # what attention reads is slices by now, without transposes in between
        steps.append(HoistSlices())  # q, k and v have products of their own by now, and transposes are out of the way
        steps.append(FoldBatchNorm())  # while convolutions are still plain and their weights still constants
        steps.append(FoldLookups())  # norms are ops by now
        steps.append(FoldScales())  # those of scalers and of normalisations that found no product before them
        steps.append(FoldProducts(specials=True))  # once scales are in the weights; it only says what could be done
        steps.append(
            MergeProducts()
        )  # what is narrow, once it is known which products attention reads; weights have their last columns
        steps.append(
            LiftSequences()
        )  # once no rule looks for convolutions any more; before precisions and layouts, which know images
        steps.append(FoldConstants())  # the folded weights
    if level >= 3:
        steps += [
            Canonicalize(),
            EliminateCommonSubexpressions(),
        ]  # folding can leave neutral elements and twins behind
    if level >= 1:
        steps.append(EliminateDeadCode())  # so that nothing below counts users that are gone
    if level >= 2:
        steps.append(ChooseLayout())  # before fusion: the epilogues must be on the layout that the kernels write
        steps.append(FoldConstants())  # the packed weights
        steps.append(FuseOperators())  # last: kernels are final after it
    return PassPipeline(steps)


def named_pipeline(name: str) -> PassPipeline:
    """``O0`` .. ``O3``, or ``default`` (O2).

    Raises:
        UsageError: for another name.
    """
    levels = {"O0": 0, "O1": 1, "O2": 2, "O3": 3, "default": 2}
    if name not in levels:
        raise UsageError(f"there is no pipeline {name!r}", hint=f"there are: {', '.join(levels)}")
    return pipeline_for_level(levels[name])
