"""The plan that would run for a layer or a chain of layers: which kernel makes what, and why. Nothing is computed."""

from dlkernels.explanation.glu import explain_glu
from dlkernels.explanation.layer import explain
from dlkernels.explanation.mlp import explain_mlp
from dlkernels.explanation.plans import Explanation, GluPlan, LayerPlan, MlpPlan, Step

__all__ = ["Explanation", "GluPlan", "LayerPlan", "MlpPlan", "Step", "explain", "explain_glu", "explain_mlp"]

for _class in (Explanation, GluPlan, LayerPlan, MlpPlan, Step):
    _class.__module__ = __name__  # which pickles name
