"""Rank correlations and generalized linear models on natural splines, with tests of what one predictor adds."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atanh, sqrt, tanh
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
SPLINE_DF = 3
LOG_DISPERSION = (-8.0, 4.0)  # between nearly Poisson and a variance of 55 mean^2
Z95 = 1.959963984540054
LEAST_P = 1e-300  # a p-value is never 0


@dataclass(frozen=True)
class Spline:
    """A natural cubic spline of one predictor: linear beyond the outer knots.

    Attributes:
        knots: (n_knots,) ascending and distinct, on the predictor's own scale.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 5.2.1.
    """

    knots: Floats

    @classmethod
    def through(cls, values: Floats, df: int = SPLINE_DF) -> "Spline":
        """Knots at `df` + 1 evenly spaced quantiles, fewer where many values are equal."""
        return cls(np.unique(np.quantile(values, np.linspace(0, 1, df + 1))))

    def basis(self, values: Floats) -> Floats:
        """(n,) -> (n, n_knots - 1) columns without an intercept; a predictor that is all equal has none."""
        if len(self.knots) < 2:
            return np.empty((len(values), 0))
        scaled = (values - self.knots[0]) / (self.knots[-1] - self.knots[0])
        knots = (self.knots - self.knots[0]) / (self.knots[-1] - self.knots[0])
        cubes = np.maximum(scaled[:, None] - knots[:-1], 0) ** 3 - np.maximum(scaled[:, None] - 1.0, 0) ** 3
        slopes = cubes / (1.0 - knots[:-1])
        return np.column_stack([scaled, slopes[:, :-1] - slopes[:, -1:]])


@dataclass(frozen=True)
class Additive:
    """A fitted model: a link of the mean of `response` is a sum of splines of the predictors.

    Attributes:
        fitted: what statsmodels returned.
        splines: by predictor.
        columns: (n, n_columns) design, an intercept and the splines in their order.
    """

    fitted: Any
    splines: Mapping[str, Spline]
    columns: Floats

    def mean_at(self, predictors: Mapping[str, Floats]) -> tuple[Floats, Floats, Floats]:
        """Fitted mean with its 95% confidence band at new values, each (n,)."""
        frame = self.fitted.get_prediction(_design(self.splines, predictors)).conf_int()
        mean = self.fitted.predict(_design(self.splines, predictors))
        return np.asarray(mean), frame[:, 0], frame[:, 1]


def partial_rank_correlation(x: Floats, y: Floats, others: Sequence[Floats] = ()) -> dict[str, Any]:
    """Spearman correlation of x and y given the others; without others, the plain one.

    The Pearson correlation of what is left of the ranks after a linear fit on the ranks of the others,
    tested with n - 2 - k degrees of freedom for k others; the interval is Fisher's.
    """
    n, k = len(x), len(others)
    if n - k < 5:
        return {"n": n, "rho": None, "reason": "fewer than 5 features"}
    design = np.column_stack([np.ones(n), *(stats.rankdata(other) for other in others)])
    left = [ranks - design @ np.linalg.lstsq(design, ranks)[0] for ranks in (stats.rankdata(x), stats.rankdata(y))]
    norms = [float(np.linalg.norm(residuals)) for residuals in left]
    if min(norms) < 1e-9 * n**1.5:
        return {"n": n, "rho": None, "reason": "a quantity does not vary, or the others determine it"}
    rho = float(np.clip(left[0] @ left[1] / (norms[0] * norms[1]), -1.0, 1.0))
    df = n - 2 - k
    if abs(rho) > 1 - 1e-12:
        return {"n": n, "rho": rho, "df": df, "p": LEAST_P, "interval": None, "reason": "the ranks agree exactly"}
    p = max(LEAST_P, 2.0 * float(stats.t.sf(abs(rho) * sqrt(df / (1.0 - rho**2)), df)))
    half = Z95 / sqrt(n - k - 3)
    return {"n": n, "rho": rho, "df": df, "p": p, "interval": [tanh(atanh(rho) - half), tanh(atanh(rho) + half)]}


def count_model(counts: Floats, predictors: Mapping[str, Floats], dispersion: float | None = None) -> Additive:
    """Negative binomial model of counts with a log link.

    Args:
        counts: (n,).
        predictors: (n,) each.
        dispersion: variance = mean + dispersion mean^2; None estimates it by maximum likelihood.

    Raises:
        FitError: the fit did not converge.
    """
    from statsmodels.genmod.families import NegativeBinomial

    def model(value: float) -> Additive:
        return _fit(counts, predictors, NegativeBinomial(alpha=value))

    if dispersion is None:
        found = optimize.minimize_scalar(
            lambda log_value: -float(model(float(np.exp(log_value))).fitted.llf),
            bounds=LOG_DISPERSION,
            method="bounded",
            options={"xatol": 1e-4},
        )
        dispersion = float(np.exp(found.x))
    return model(dispersion)


def dispersion_of(model: Additive) -> float:
    """Of a model of `count_model`."""
    return float(model.fitted.family.alpha)


def yes_no_model(answers: Floats, predictors: Mapping[str, Floats]) -> Additive:
    """Logistic model of answers of 0 and 1.

    Raises:
        FitError: the fit did not converge, or the predictors separate the answers.
    """
    from statsmodels.genmod.families import Binomial

    return _fit(answers, predictors, Binomial())


def f_test(full: Additive, reduced: Additive) -> dict[str, Any]:
    """Whether the full count model has less deviance than the reduced one of the same dispersion.

    An F test with the full model's Pearson chi-squared over its degrees of freedom as the scale, so that
    counts that vary more than a negative binomial do not pass for an effect.
    """
    df = _rank(full) - _rank(reduced)
    if df < 1:
        return {"p": None, "reason": "the predictor does not vary"}
    df_rest = len(full.columns) - _rank(full)
    scale = float(full.fitted.pearson_chi2) / df_rest
    f = max(0.0, (float(reduced.fitted.deviance) - float(full.fitted.deviance)) / df / scale)
    return {"f": f, "df": [df, df_rest], "p": max(LEAST_P, float(stats.f.sf(f, df, df_rest)))}


def likelihood_ratio_test(full: Additive, reduced: Additive) -> dict[str, Any]:
    """Whether the full yes-or-no model is more likely than the reduced one."""
    df = _rank(full) - _rank(reduced)
    if df < 1:
        return {"p": None, "reason": "the predictor does not vary"}
    chi2 = max(0.0, 2.0 * (float(full.fitted.llf) - float(reduced.fitted.llf)))
    return {"chi2": chi2, "df": df, "p": max(LEAST_P, float(stats.chi2.sf(chi2, df)))}


class FitError(Exception):
    """These data determine no such model; the text says why."""


def _fit(response: Floats, predictors: Mapping[str, Floats], family: Any) -> Additive:
    from statsmodels.genmod.generalized_linear_model import GLM
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationWarning

    splines = {name: Spline.through(values) for name, values in predictors.items()}
    columns = _design(splines, {**predictors, "": response})
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, PerfectSeparationWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        try:
            fitted = GLM(response, columns, family=family).fit(maxiter=200)
        except (Warning, np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
            raise FitError(f"the model could not be fitted ({type(error).__name__})") from None
    if not fitted.converged:
        raise FitError("the fit did not converge")
    return Additive(fitted, splines, columns)


def _design(splines: Mapping[str, Spline], predictors: Mapping[str, Floats]) -> Floats:
    n = len(next(iter(predictors.values())))
    return np.column_stack([np.ones(n), *(spline.basis(predictors[name]) for name, spline in splines.items())])


def _rank(model: Additive) -> int:
    return int(np.linalg.matrix_rank(model.columns))
