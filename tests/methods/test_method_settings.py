"""Settings that have no meaning are refused in one sentence, by the method's name and the value."""

import math

import pytest
import torch

import modular_experts.methods as m
from modular_experts.deltas import Dense
from modular_experts.methods.method import Context, DataStatistic

BAD = [
    (m.Average, {"weights": [0.1, 0.2, -0.3]}, "sum to zero"),
    (m.Average, {"scale": math.inf}, "scale must be a finite number, got inf"),
    (m.Breadcrumbs, {"beta": 1.0}, r"beta .* in \[0, 1\), got 1.0"),
    (m.Breadcrumbs, {"beta": 0.9, "gamma": 0.1}, "beta 0.9 and gamma 0.1 drop every entry"),
    (m.Breadcrumbs, {"beta": [0.9, 0.1], "gamma": 0.8}, "beta 0.9 and gamma 0.8 drop every entry"),
    (m.ConsensusTA, {"agreement": 0}, "agreement is a number of experts, at least 1, got 0"),
    (m.CoreSpace, {"inner": m.RegMean()}, "CoreSpace: RegMean needs gram statistics .* in the core space"),
    (m.CtM, {"rank": 0}, "CtM: rank must be at least 1, got 0"),
    (m.CtM, {"inner": m.RegMean()}, "CtM: RegMean needs gram statistics .* in the small space"),
    (m.DARE, {"keep": [0.5, 2.0]}, "keep is the probability with which an entry stays .* got 2.0"),
    (m.DARE, {"rescale": "L1"}, "rescale must be 'probability', 'l1' or 'none', got 'L1'"),
    (m.DARE, {"preset": "peft"}, "peft has no default for keep; give a value"),
    (m.DARETIES, {"zero": "majority"}, "zero must be .* got 'majority'"),
    (m.DELLA, {"keep": 0.1}, r"must lie in \(0, 1\), got keep 0.1 and epsilon 0.15"),
    (m.DELLA, {"keep": [0.9, 0.5], "epsilon": [0.3, 0.05]}, "got keep 0.9 and epsilon 0.3"),
    (m.Fisher, {"floor": 0.0}, "floor must be above 0"),
    (m.Intersection, {"agreement": 0}, "agreement is a number of experts, at least 1, got 0"),
    (m.IsoCTS, {"common": 1.1}, r"in \[0, 1\], got 1.1"),
    (m.Karcher, {"max_iterations": -1}, "max_iterations must be at least 0, got -1"),
    (m.Karcher, {"weights": [0.0, 0.0]}, r"Karcher: the weights \[0.0, 0.0\] sum to zero"),
    (m.KnOTS, {"inner": m.RegMean()}, "KnOTS: RegMean needs gram statistics of the weights, which do not exist in"),
    (m.LiNeS, {"last": -0.5}, "LiNeS: last must be at least 0, got -0.5"),
    (m.MultiSLERP, {"weights": [1.0, -0.5]}, "MultiSLERP: each weight must be at least 0, got -0.5"),
    (m.NuSLERP, {"row_wise": True, "column_wise": True}, "exclude each other"),
    (m.NuSLERP, {"preset": "mergekit", "weights": [1.0, -1.0]}, "sum to zero"),
    (m.RegMean, {"reduce": 1.1}, r"RegMean: reduce must be in \[0, 1\]"),
    (m.RegMean, {"ridge": -1.0}, "RegMean: ridge must be at least 0, got -1.0"),
    (m.SCE, {"zero": "none ", "keep": 1.0}, "zero must be 'none' or 'positive', got 'none '"),
    (m.SelfRegMean, {"ridge": 0.0}, "SelfRegMean: ridge must be above 0, got 0.0"),
    (m.SelfRegMean, {"inputs": 2}, "inputs must be 0 or 1, got 2"),
    (m.SLERP, {"t": 1.1}, r"SLERP: t .* in \[0, 1\], got 1.1"),
    (m.SparseAverage, {"count": "masks"}, "'values' or 'supports', got 'masks'"),
    (m.SVC, {"alpha": 0.0}, r"SVC: alpha must be in \(0, 1\], got 0.0"),
    (m.TALLMask, {"threshold": -0.1}, "threshold must be at least 0, got -0.1"),
    (m.TaskArithmetic, {"weights": [1, math.nan]}, "TaskArithmetic: each weight must be a finite number, got nan"),
    (m.TIES, {"keep": 0.0}, r"in \(0, 1\], got 0.0"),
    (m.TIES, {"scope": "tensor"}, "'weight' or 'global', got 'tensor'"),
    (m.TIES, {"preset": "mergkit"}, r"no preset 'mergkit'; did you mean mergekit\?"),
    (m.TIES, {"preset": "x"}, "the presets are paper, mergekit, peft, paper-code"),
    (m.TSVMerge, {"share": math.nan}, "finite number, got nan"),
    (m.WUDI, {"steps": -1}, "steps must be at least 0, got -1"),
    (m.WUDI, {"solver": "sgd"}, "'adam' or 'exact', got 'sgd'"),
]


@pytest.mark.parametrize(("kind", "settings", "sentence"), BAD, ids=str)
def test_bad_settings_get_a_sentence(kind, settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(**settings)


@pytest.mark.parametrize("kind", [m.Average, m.TaskArithmetic, m.NuSLERP, m.MultiSLERP, m.Karcher])
def test_another_number_of_weights_than_experts_is_refused(kind) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: 2 weights were given for 3 experts"):
        kind(weights=[1.0, 2.0]).merge([Dense(torch.ones(2, 2))] * 3)


@pytest.mark.parametrize("kind", [m.Intersection, m.ConsensusTA])
def test_an_agreement_of_more_experts_than_there_are_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="agreement=3 is more than the number of experts; give at most 2"):
        kind(agreement=3).merge([Dense(torch.ones(2, 2))] * 2)


@pytest.mark.parametrize("method", [m.Fisher(), m.RegMean(), m.RegMeanPlusPlus()], ids=str)
def test_each_expert_needs_its_statistics(method) -> None:
    deltas = [Dense(torch.ones(2, 2))] * 2
    name = type(method).__name__
    with pytest.raises(ValueError, match=f"{name} needs {method.needs.statistics} statistics, .* got none"):
        method.merge(deltas)
    with pytest.raises(ValueError, match=f"{name} needs .* got 1 for 2 experts"):
        method.merge(deltas, Context("w", [DataStatistic(torch.eye(2))]))
