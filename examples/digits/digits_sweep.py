"""A hyper-parameter sweep over handwritten digits: one call for each fold of each trial.

``Sweep.run`` is itself a call on a worker. It sends the images to the object store once, and then
a few hundred small calls to whatever workers there are.
"""

from __future__ import annotations

import importlib
import itertools
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from digits_plot import draw
from rich.console import Console
from rich.table import Table

import flame
from flame.runnable import Runnable


class Grid:
    """A classifier of scikit-learn and the values to try.

    Args:
        classifier: ``module.Class``.
        parameters: A list of values for each argument of the class.
    """

    def __init__(self, classifier: str, parameters: Mapping[str, Sequence[Any]]) -> None:
        self.classifier = classifier
        self.parameters = parameters

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every combination."""
        for values in itertools.product(*self.parameters.values()):
            yield dict(zip(self.parameters, values, strict=True))

    @property
    def varied(self) -> list[str]:
        """The parameters with more than one value."""
        return [name for name, values in self.parameters.items() if len(values) > 1]


@dataclass
class Trial:
    """One combination of parameters and how well it did in each fold."""

    model: str
    classifier: str
    parameters: dict[str, Any]
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The mean over the folds."""
        return mean(self.accuracies)

    @property
    def fit_s(self) -> float:
        """Mean seconds of fitting."""
        return mean(self.seconds)


class Sweep(Runnable):
    """Tries every combination of every grid with cross-validation.

    Args:
        grids: By the name that the table shows.
        folds: Parts to split the images into; each is left out once.
        plot: Where to draw the outcome, a PNG file of the machine that runs ``run``.
    """

    def __init__(self, grids: Mapping[str, Grid], folds: int = 3, plot: str = "digits.png") -> None:
        super().__init__()
        self.grids = grids
        self.folds = folds
        self.plot = plot

    def run(self, **kwargs: Any) -> None:
        """Sweep, print the best of each model, draw the plot."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        with flame.Runner("digits", echo=False) as runner:
            images = runner.put_object((digits.data, digits.target))
            trials = self._sweep(runner, images)
            best = max(trials, key=lambda trial: trial.accuracy)
            _tell(1.0, "looking at what the best one misreads")
            found = runner.service(find_mistakes)(
                best.classifier, best.parameters, images, self.folds
            )
            mistakes = found.get()
        _show(trials)
        path = Path(self.plot).absolute()
        draw(path, trials, self.grids[best.model], best, mistakes)
        print(f"The best of {len(trials)} trials misread {len(mistakes)} of {len(digits.data)}.")
        print(f"Plot: {path} on {platform.node()}")

    def _sweep(self, runner: flame.Runner, images: flame.ObjectRef) -> list[Trial]:
        trials = [
            Trial(model, grid.classifier, parameters)
            for model, grid in self.grids.items()
            for parameters in grid
        ]
        evaluate = runner.service(evaluate_fold)
        trial_of = {
            evaluate(trial.classifier, trial.parameters, images, fold, self.folds): trial
            for trial in trials
            for fold in range(self.folds)
        }
        best = 0.0
        for done, future in enumerate(as_completed(trial_of), start=1):
            accuracy, seconds = future.result()
            trial = trial_of[future]
            trial.accuracies.append(accuracy)
            trial.seconds.append(seconds)
            if len(trial.accuracies) == self.folds:
                best = max(best, trial.accuracy)
            _tell(done / len(trial_of), f"{done}/{len(trial_of)} fits, best {best:.2%}")
        return trials


def evaluate_fold(
    classifier: str,
    parameters: dict[str, Any],
    images: tuple[Any, Any],
    fold: int,
    folds: int,
) -> tuple[float, float]:
    """Fit on all folds but one. Returns the accuracy on that one, and the seconds of the fit."""
    pixels, labels = images
    train, test = _split(labels, folds)[fold]
    model = _make(classifier, parameters)
    started = time.perf_counter()
    model.fit(pixels[train], labels[train])
    seconds = time.perf_counter() - started
    return float(model.score(pixels[test], labels[test])), seconds


def find_mistakes(
    classifier: str, parameters: dict[str, Any], images: tuple[Any, Any], folds: int
) -> list[tuple[Any, int, int]]:
    """The images that a model misreads: pixels, what it is, what the model says."""
    pixels, labels = images
    wrong = []
    for train, test in _split(labels, folds):
        model = _make(classifier, parameters).fit(pixels[train], labels[train])
        said = model.predict(pixels[test])
        wrong += [
            (pixels[index], int(labels[index]), int(guess))
            for index, guess in zip(test, said, strict=True)
            if labels[index] != guess
        ]
    return wrong


def _split(labels: Any, folds: int) -> list[tuple[Any, Any]]:
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    return list(splitter.split(labels, labels))


def _make(classifier: str, parameters: dict[str, Any]) -> Any:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # a call reserves one cpu
    module, _, name = classifier.rpartition(".")
    return getattr(importlib.import_module(module), name)(**parameters)


def _tell(fraction: float, text: str) -> None:
    call = flame.current_call()
    if call is not None:
        call.progress(fraction, text)


def _show(trials: list[Trial]) -> None:
    table = Table(title="Handwritten digits: the best of each model", title_justify="left")
    for header, justify in (
        ("model", "left"),
        ("best parameters", "left"),
        ("accuracy", "right"),
        ("fit", "right"),
        ("trials", "right"),
    ):
        table.add_column(header, justify=justify)
    for best, count in _best_of_each(trials):
        shown = ", ".join(f"{k}={v}" for k, v in best.parameters.items() if k not in _FIXED)
        accuracy = f"{best.accuracy:.2%} ± {pstdev(best.accuracies):.2%}"
        table.add_row(best.model, shown, accuracy, f"{best.fit_s * 1000:.0f} ms", str(count))
    Console().print(table)


_FIXED = ("random_state", "max_iter")


def _best_of_each(trials: list[Trial]) -> list[tuple[Trial, int]]:
    found = []
    for model in dict.fromkeys(trial.model for trial in trials):
        tried = [trial for trial in trials if trial.model == model]
        found.append((max(tried, key=lambda trial: trial.accuracy), len(tried)))
    return sorted(found, key=lambda pair: -pair[0].accuracy)
