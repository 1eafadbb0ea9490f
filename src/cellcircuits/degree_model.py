"""What drives degree: activation frequency, live targets and ablated norm, one by one and in one model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.degree_table import DegreeTable
from cellcircuits.spline_models import (
    Additive,
    FitError,
    count_model,
    dispersion_of,
    f_test,
    partial_rank_correlation,
)

MIN_FEATURES = 50
N_CURVE_POINTS = 40

Floats = NDArray[np.float64]


def drivers(table: DegreeTable) -> dict[str, Any]:
    """Rank correlations of degree with each predictor, and a model of degree on all of them.

    The model is a negative binomial with a log link on natural splines (3 degrees of freedom each) of the
    logarithms of the predictors; its dispersion is estimated once, with all predictors, and kept, so that
    the deviances of all models can be compared.
    """
    known = {"activation_freq": table.frequency, **table.predictors}
    known = {name: values for name, values in known.items() if not np.isnan(values).all()}
    if not known:
        return {"n": 0, "result": None, "reason": "no frequency, live targets or ablated norm is known"}
    complete = ~np.isnan(np.column_stack(list(known.values()))).any(axis=1)
    degrees = table.degrees[complete].astype(np.float64)
    predictors = {name: values[complete] for name, values in known.items()}
    counted = {"n": len(degrees), "n_left_out": int((~complete).sum()), "predictors": list(predictors)}
    if len(degrees) < MIN_FEATURES:
        return {**counted, "result": None, "reason": f"fewer than {MIN_FEATURES} features with all predictors"}
    if np.ptp(degrees) == 0:
        return {**counted, "result": None, "reason": "all degrees are equal"}
    result: dict[str, Any] = {
        "rank_correlations": {name: _rank_correlations(degrees, predictors, name) for name in predictors}
    }
    try:
        result["model"] = _model(degrees, predictors)
    except FitError as error:
        result["model"] = {"result": None, "reason": str(error)}
    return {**counted, "result": result}


def _rank_correlations(degrees: Floats, predictors: Mapping[str, Floats], name: str) -> dict[str, Any]:
    others = [values for other, values in predictors.items() if other != name]
    alone = partial_rank_correlation(predictors[name], degrees)
    return {"spearman": alone, "given_the_others": partial_rank_correlation(predictors[name], degrees, others)}


def _model(degrees: Floats, predictors: Mapping[str, Floats]) -> dict[str, Any]:
    logs = {name: np.log10(values) for name, values in predictors.items()}
    full = count_model(degrees, logs)
    dispersion = dispersion_of(full)
    null = count_model(degrees, {}, dispersion)
    whole = float(null.fitted.deviance)

    def explained(model: Additive) -> float:
        return 1.0 - float(model.fitted.deviance) / whole

    terms = {}
    for name, values in logs.items():
        alone = count_model(degrees, {name: values}, dispersion)
        without = count_model(degrees, {other: x for other, x in logs.items() if other != name}, dispersion)
        terms[name] = {
            "deviance_explained_alone": explained(alone),
            "deviance_explained_added_last": explained(full) - explained(without),
            "alone": f_test(alone, null),
            "added_last": f_test(full, without),
        }
    described = {
        "family": "negative binomial, log link",
        "dispersion": dispersion,
        "pearson_scale": float(full.fitted.pearson_chi2 / full.fitted.df_resid),
        "deviance_explained": explained(full),
        "terms": terms,
    }
    if "activation_freq" in logs:
        described["frequency_curve"] = _curve(degrees, logs["activation_freq"], dispersion)
    return described


def _curve(degrees: Floats, log_frequency: Floats, dispersion: float) -> dict[str, list[float]]:
    """Degree by frequency alone, with its 95% confidence band, for the figure."""
    alone = count_model(degrees, {"activation_freq": log_frequency}, dispersion)
    at = np.linspace(log_frequency.min(), log_frequency.max(), N_CURVE_POINTS)
    mean, low, high = alone.mean_at({"activation_freq": at})
    return {"activation_freq": (10**at).tolist(), "mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
