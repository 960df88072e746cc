"""Which cells have lost the Y chromosome: log posterior odds from the counts of Y-linked genes, aware of depth.

A cell without a count of a Y gene may have lost its Y, or may have been sequenced too shallowly. With L the cell's
counts outside the Y, y the sum of its counts of Y genes, and f the share of Y counts of XY cells of its type,

    XY:   y ~ NB(mean L f, inverse dispersion r)         LOY:  y ~ Poisson(ambient L f)

and the score is log P(y | LOY) - log P(y | XY) + log prior odds. f and r come from XY control cells of the cell type
where they are given; otherwise from all cells of male donors, as one component of the mixture (EM). The sum y is
sufficient for the Poisson case, since LOY lowers all Y genes by the same factor.

A call is made for cells that are deep enough to be called either way: those in which no Y count at all would be a call
of LOY. Cells that are not deep enough are undecided even where they show a Y count; were they called XY, XY cells would
be the shallow ones, and every comparison with LOY cells would see depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse, stats

from pf_core.errors import DataError, nearest
from pf_core.outputs import Csr
from pf_core.y_genes import AMBIGUOUS_GENES, PAR_GENES, XIST, Y_GENES

__all__ = ["LOY", "NO_Y", "UNDECIDED", "XY", "LoyScores", "loy_score"]

XY, LOY, UNDECIDED, NO_Y = "XY", "LOY", "undecided", "no Y"
AMBIENT = 0.03  # Y counts of a cell without Y relative to an XY cell, where no female cells measure it
LEVEL = 0.95  # posterior probability that a call needs
MIN_CELLS = 50  # XY cells of a type, to know the type's share of Y counts
MIN_DETECTED = 0.01  # share of XY cells in which a Y gene must be seen to be used
FEMALE_SHARE = 0.3  # a gene that females express at more than this share of males is not specific
DONOR_SHARE = 0.1  # a donor below this share of the XY rate has no Y
MIN_RATE = 5e-5  # Y counts per count, below which no donor of a data set has a Y
FEMALE_XIST = 3.0  # XIST counts per Y count, above which the Y counts are ambient
MIXED_SHARE = 0.25  # XIST counts per Y count, above which a donor's cells are of both sexes
PRIOR_LOY, PRIOR_CELLS = 0.05, 10.0  # a donor's LOY share starts at 5%, with the weight of 10 cells
PRIOR_LEAST = 0.02  # of a donor without LOY, or only its deepest cells could be called
CONTROL_PER_GENE = 5  # control genes matched to every Y gene by expression
CONTROL_LOW = 0.2  # a cell with less than this share of its control genes' counts is not judged,
CONTROL_LEVEL = 0.01  # where counting noise explains it with less than this probability
EM_STEPS = 200
R_CAP = 1e6


@dataclass(frozen=True)
class LoyScores:
    """Per cell and per donor; what `label_loy` and `report` write out. (n_cells,) where nothing else is said."""

    call: np.ndarray  # "XY", "LOY", "undecided", "no Y"
    reason: np.ndarray  # why not called; "" where it was
    score: np.ndarray  # log posterior odds of LOY against XY, nats; NaN where there is no Y or no model of the type
    evidence: np.ndarray  # log P(y | LOY) - log P(y | XY)
    observed: np.ndarray  # counts of the Y genes used
    expected: np.ndarray  # counts of them that an XY cell of this type and depth has
    control_ratio: np.ndarray  # matched control genes: observed / expected counts
    genes: tuple[str, ...]  # Y genes used
    dropped: Mapping[str, str]  # Y genes not used, and why
    control_genes: tuple[str, ...]
    ambient: float
    ambient_source: str
    donors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    types: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def posterior(self) -> np.ndarray:
        """Probability of LOY; NaN where the score is."""
        return 1.0 / (1.0 + np.exp(-np.clip(self.score, -500, 500)))

    def counts(self, rows: np.ndarray | None = None) -> dict[str, int]:
        """Number of cells per call."""
        calls = self.call if rows is None else self.call[rows]
        return {name: int((calls == name).sum()) for name in (XY, LOY, UNDECIDED, NO_Y)}


def loy_score(
    counts: Any,
    genes: Sequence[str],
    *,
    cell_type: np.ndarray | None = None,
    donor: np.ndarray | None = None,
    control: np.ndarray | None = None,
    y_genes: Sequence[str] = Y_GENES,
    ambient: float | None = None,
    level: float = LEVEL,
) -> LoyScores:
    """Log posterior odds that each cell has lost its Y, and the calls.

    Args:
        counts: (n_cells, n_genes) raw counts, sparse or dense.
        genes: (n_genes,) gene symbols.
        cell_type: (n_cells,) labels; the share of Y counts is one per type. None for one type.
        donor: (n_cells,) labels; a donor's sex and its share of LOY cells are one per donor. None for one donor.
        control: (n_cells,) True for cells known to be XY, such as those of young men; None to estimate from the
            mixture of all cells of male donors.
        y_genes: which genes to use; those not detected in XY cells, or expressed by females, are dropped.
        ambient: Y counts of a cell without Y relative to an XY cell (ambient RNA). None measures it in female donors,
            and takes AMBIENT where there is none.
        level: posterior probability that a call needs.

    Returns:
        LoyScores.

    Raises:
        DataError: no raw counts, a pseudoautosomal or ambiguous gene among y_genes, no Y gene in the data, no donor
            with a Y, or too few XY cells.
    """
    counts = _raw(counts)
    n_cells, n_genes = counts.shape
    names = [str(gene) for gene in genes]
    if len(names) != n_genes:
        raise DataError(f"genes has {len(names)} names but counts has {n_genes} columns; give one name per column")
    if not 0.5 < level < 1:
        raise DataError(f"level is {level}; a probability between 0.5 and 1 was wanted")
    if ambient is not None and not 0 < ambient < 0.5:
        raise DataError(f"ambient is {ambient}; a share between 0 and 0.5 was wanted")
    cell_type, donor = _labels("cell_type", cell_type, n_cells), _labels("donor", donor, n_cells)
    if control is not None:
        control = np.asarray(control, bool)
        if control.shape != (n_cells,) or not control.any():
            raise DataError(
                f"control marks {int(control.sum())} of {n_cells} cells as known XY; mark some, or leave it"
            )
    columns = _y_columns(names, y_genes)
    y_matrix = np.asarray(counts[:, list(columns.values())].todense(), np.float64)
    library = np.asarray(counts.sum(1), np.float64).ravel() - y_matrix.sum(1)
    xist = np.asarray(counts[:, names.index(XIST)].todense(), np.float64).ravel() if XIST in names else None
    donors = _donors(y_matrix.sum(1), library, xist, donor, control)
    male = np.isin(donor, [name for name, found in donors.items() if found["status"] == "male"])
    female = np.isin(donor, [name for name, found in donors.items() if found["status"].startswith("no Y: XIST")])
    if control is not None and np.any(control & ~male):
        wrong = donors[str(donor[np.flatnonzero(control & ~male)[0]])]["status"]
        raise DataError(f"cells given as XY controls are of a donor with {wrong!r}; choose controls among male donors")
    used, dropped = _usable(columns, y_matrix, library, male if control is None else control, female)
    y = y_matrix[:, [list(columns).index(gene) for gene in used]].sum(1)

    matched = _matched(counts, names, used, library, male)
    background = np.asarray(counts[:, matched].sum(1), np.float64).ravel()
    score, evidence, reason = np.full(n_cells, np.nan), np.full(n_cells, np.nan), np.full(n_cells, "", object)
    expected, ratio, types = np.full(n_cells, np.nan), np.full(n_cells, np.nan), {}
    deep = np.zeros(n_cells, bool)
    # The ambient share is measured against the pooled share of XY cells, before types are fitted.
    ambient, source = _ambient(ambient, y, library, male if control is None else control, female)
    reason[~male] = [donors[str(name)]["status"] for name in donor[~male]]
    for name in sorted(set(cell_type[male])):
        rows = np.flatnonzero(male & (cell_type == name))
        known = None if control is None else control[rows]
        n_known = len(rows) if known is None else int(known.sum())
        if n_known < MIN_CELLS:
            reason[rows] = f"cell type has {n_known} XY cells, fewer than {MIN_CELLS}"
            continue
        fit = _fit(y[rows], library[rows], donor[rows], ambient, known)
        if fit.share <= 0:
            reason[rows] = "no Y count in the XY cells of this type"
            continue
        mu = library[rows] * fit.share
        evidence[rows] = _evidence(y[rows], mu, fit.r, ambient)
        # A prior above one half would call cells without evidence of their own.
        share = np.clip(fit.prior, PRIOR_LEAST, 0.5)
        prior = np.log(share) - np.log1p(-share)
        score[rows] = evidence[rows] + prior
        deep[rows] = _evidence(np.zeros(len(rows)), mu, fit.r, ambient) + prior >= _logit(level)
        expected[rows] = mu
        xy = 1.0 - fit.loy if known is None else known.astype(float)
        rate = float((xy * background[rows]).sum() / (xy * library[rows]).sum())
        usual = np.maximum(library[rows] * rate, 1e-12)
        ratio[rows] = background[rows] / usual
        low = (ratio[rows] < CONTROL_LOW) & (stats.poisson.cdf(background[rows], usual) < CONTROL_LEVEL)
        reason[rows[low]] = "control genes of similar expression are missing too"
        reason[rows[~deep[rows]]] = "too few counts to tell"
        types[str(name)] = {"share": fit.share, "r": fit.r, "xy_cells": float(xy.sum()), "cells": float(len(rows))}
    call = np.where(male, UNDECIDED, NO_Y).astype(object)
    sure = male & (reason == "")
    call[sure & (score >= _logit(level))] = LOY
    call[sure & (score <= -_logit(level))] = XY
    reason[sure & (call == UNDECIDED)] = "between XY and LOY"
    scores = LoyScores(
        call=call,
        reason=reason,
        score=score,
        evidence=evidence,
        observed=y,
        expected=expected,
        control_ratio=ratio,
        genes=used,
        dropped=dropped,
        control_genes=tuple(names[column] for column in matched),
        ambient=ambient,
        ambient_source=source,
        donors={name: {**found, **_loss(call[donor == name])} for name, found in donors.items()},
        types=types,
    )
    return scores


def _logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def _loss(call: np.ndarray) -> dict[str, Any]:
    n_loy, n_xy = int((call == LOY).sum()), int((call == XY).sum())
    share = n_loy / (n_loy + n_xy) if n_loy + n_xy else float("nan")
    return {"loy": n_loy, "xy": n_xy, "undecided": int((call == UNDECIDED).sum()), "loy_share": share}


def _raw(counts: Any) -> Csr:
    counts = sparse.csr_matrix(counts)
    data = counts.data
    if not (np.all(np.isfinite(data)) and np.all(data >= 0) and np.all(data == np.rint(data))):
        raise DataError("counts holds values that are not non-negative integers; give raw counts, not normalised ones")
    return counts


def _labels(name: str, labels: Any, n: int) -> np.ndarray:
    if labels is None:
        return np.full(n, "all", object)
    table = np.asarray(labels).astype(str).astype(object)
    if table.shape != (n,):
        raise DataError(f"{name} has shape {table.shape}; ({n},), one label per cell, was wanted")
    return table


def _y_columns(names: Sequence[str], y_genes: Sequence[str]) -> dict[str, int]:
    wrong = [gene for gene in y_genes if gene in (*PAR_GENES, *AMBIGUOUS_GENES)]
    if wrong:
        raise DataError(
            f"{wrong[0]} is pseudoautosomal, or as good as equal to its X copy: a cell without Y has its counts too;"
            " leave it out of the Y genes"
        )
    place = {name: column for column, name in enumerate(names)}
    found = {gene: place[gene] for gene in y_genes if gene in place}
    if not found:
        raise DataError(
            f"none of the {len(y_genes)} Y genes is in the data ({nearest(y_genes[0], names)}); give the symbols"
            " of all genes, before any selection of genes"
        )
    return found


def _donors(
    y: np.ndarray, library: np.ndarray, xist: np.ndarray | None, donor: np.ndarray, control: np.ndarray | None
) -> dict[str, dict[str, Any]]:
    """Sex of every donor by Y genes and XIST: the XY rate is that of the controls, else that of the highest donor."""
    rows = {str(name): np.flatnonzero(donor == name) for name in sorted(set(donor))}
    rates = {name: float(y[found].sum() / max(library[found].sum(), 1.0)) for name, found in rows.items()}
    reference = max(rates.values()) if control is None else float(y[control].sum() / max(library[control].sum(), 1.0))
    out: dict[str, dict[str, Any]] = {}
    for name, found in rows.items():
        total = None if xist is None else float(xist[found].sum())
        n_y = float(y[found].sum())
        female = total is not None and total > FEMALE_XIST * n_y and total > MIN_RATE * library[found].sum()
        if reference < MIN_RATE or rates[name] < DONOR_SHARE * reference or female:
            if total is None:
                status = "no Y, and XIST is not among the genes: female, or complete loss"
            elif female:
                status = "no Y: XIST is expressed, a female donor"
            else:
                status = "no Y and no XIST: complete loss, or another species"
        elif total is not None and total > MIXED_SHARE * n_y:
            status = "Y and XIST both: cells of both sexes under one donor"
        else:
            status = "male"
        out[name] = {"status": status, "cells": len(found), "y_per_10k": 1e4 * rates[name]}
        if total is not None:
            out[name]["xist_per_10k"] = 1e4 * total / max(float(library[found].sum()), 1.0)
    if not any(found["status"] == "male" for found in out.values()):
        first = next(iter(out))
        raise DataError(
            f"no donor has a Y chromosome to lose ({first}: {out[first]['status']};"
            f" {out[first]['y_per_10k']:.2g} Y counts in 10,000); LOY can be called in male donors only"
        )
    return out


def _usable(
    columns: Mapping[str, int], y: np.ndarray, library: np.ndarray, xy: np.ndarray, female: np.ndarray
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Y genes that XY cells show and females do not."""
    dropped: dict[str, str] = {}
    for place, gene in enumerate(columns):
        seen = float((y[xy, place] > 0).mean())
        rate = y[xy, place].sum() / library[xy].sum()
        if seen < MIN_DETECTED:
            dropped[gene] = f"seen in {seen:.1%} of XY cells"
        elif female.any() and y[female, place].sum() / library[female].sum() > FEMALE_SHARE * rate:
            dropped[gene] = "female cells have it too"
    used = tuple(gene for gene in columns if gene not in dropped)
    if not used:
        raise DataError(
            f"no Y gene can be used: {'; '.join(f'{gene} {why}' for gene, why in dropped.items())}; the cells are too"
            " shallow to call LOY"
        )
    return used, dropped


def _matched(
    counts: Csr, names: Sequence[str], used: Sequence[str], library: np.ndarray, male: np.ndarray
) -> list[int]:
    """Columns of autosomal and X genes whose expression is nearest to that of each Y gene used."""
    total = np.asarray(counts[np.flatnonzero(male)].sum(0), np.float64).ravel()
    barred = {*Y_GENES, *PAR_GENES, *AMBIGUOUS_GENES, XIST, *used}
    free = np.array([name not in barred for name in names]) & (total > 0)
    chosen: list[int] = []
    for gene in used:
        gap = np.abs(np.log(np.maximum(total, 0.5)) - np.log(max(total[list(names).index(gene)], 0.5)))
        order = [int(column) for column in np.argsort(np.where(free, gap, np.inf), kind="stable") if free[column]]
        chosen += order[:CONTROL_PER_GENE]
        free[chosen] = False
    if not chosen:
        raise DataError(
            "the data hold no gene outside the Y; give all genes, so that missing depth can be told from LOY"
        )
    return sorted(chosen)


def _ambient(
    ambient: float | None, y: np.ndarray, library: np.ndarray, xy: np.ndarray, female: np.ndarray
) -> tuple[float, str]:
    if ambient is not None:
        return ambient, "given"
    if female.sum() >= MIN_CELLS:
        share = (y[female].sum() / library[female].sum()) / (y[xy].sum() / library[xy].sum())
        return float(np.clip(share, 1e-3, 0.3)), f"measured in {int(female.sum())} cells of female donors"
    return AMBIENT, "assumed: there are no female donors to measure it in"


@dataclass(frozen=True)
class _Fit:
    share: float  # Y counts per count of an XY cell
    r: float
    prior: np.ndarray  # (n,) LOY share of the cell's donor
    loy: np.ndarray  # (n,) posterior of the EM


def _fit(y: np.ndarray, library: np.ndarray, donor: np.ndarray, ambient: float, known: np.ndarray | None) -> _Fit:
    """Share of Y counts, dispersion and donors' LOY shares of one cell type, by EM.

    With known XY cells, share and dispersion are theirs, and only the donors' LOY shares are iterated. The first steps
    take Poisson counts: a dispersion that is free from the start explains the zeros of LOY cells as spread.
    """
    groups = [np.flatnonzero(donor == name) for name in sorted(set(donor))]
    fixed = np.zeros(len(y), bool) if known is None else known
    base = np.ones(len(y)) if known is None else known.astype(float)
    share, r = float((base * y).sum() / (base * library).sum()), R_CAP
    if known is not None:
        r = _inverse_dispersion(y, library * share, base)
    prior, loy = np.full(len(y), PRIOR_LOY), np.zeros(len(y))
    for step in range(EM_STEPS):
        if share <= 0:
            break
        odds = _evidence(y, library * share, r, ambient) + np.log(prior) - np.log1p(-prior)
        updated = np.where(fixed, 0.0, 1.0 / (1.0 + np.exp(-np.clip(odds, -500, 500))))
        moved, loy = float(np.abs(updated - loy).max()), updated
        for rows in groups:
            free = rows[~fixed[rows]]
            prior[rows] = (loy[free].sum() + PRIOR_LOY * PRIOR_CELLS) / (len(free) + PRIOR_CELLS)
        if known is None:
            share = float(y.sum() / (library * (1.0 - loy + ambient * loy)).sum())
            if step >= 20:
                r = _inverse_dispersion(y, library * share, 1.0 - loy)
        if step > 25 and moved < 1e-6:
            break
    return _Fit(share, r, prior, loy)


def _nb(mu: np.ndarray, r: float) -> Any:
    return stats.nbinom(r, r / (r + np.maximum(mu, 1e-12)))


def _evidence(y: np.ndarray, mu: np.ndarray, r: float, ambient: float) -> np.ndarray:
    """log Poisson(y; ambient mu) - log NB(y; mu, r)."""
    return stats.poisson.logpmf(y, ambient * np.maximum(mu, 1e-12)) - _nb(mu, r).logpmf(y)


def _inverse_dispersion(y: np.ndarray, mu: np.ndarray, weight: np.ndarray) -> float:
    """r of variance mu + mu^2/r by moments, at least 0.5 (zeros of XY cells are never explained by spread alone)."""
    excess = float((weight * ((y - mu) ** 2 - mu)).sum())
    return float(np.clip((weight * mu**2).sum() / excess, 0.5, R_CAP)) if excess > 0 else R_CAP
