"""The linear probe (paper, appendix A.3): logistic regression on frozen features, its penalty chosen on validation.

Penalty: λ of ½ λ |weight|² + the sum of the rows' cross entropies, 1 / C of scikit-learn; the bias is free. The paper's
features are those before the projection; OpenAI's README takes projected ones with C = 0.316 (`README_PENALTY`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from clipfast.evaluate import metrics
from clipfast.evaluate.lbfgs import Fit, Moments, Rows, logistic, moments
from clipfast.evaluate.metrics import Array, array, needed, paired
from clipfast.files import output_folder, read_parsed, replacing

PENALTIES = 10.0 ** (np.arange(97) / 8 - 6)  # 1e-6 to 1e6, 8 steps a decade
README_PENALTY = 1 / 0.316
SMALL = 10**8  # rows × features × classes up to which scikit-learn, in float64, answers at once
Score = Callable[[np.ndarray, np.ndarray], float]


class Head(NamedTuple):
    """A linear classifier of features: weight [C, D], bias [C], the label of each class, and what it was made from."""

    weight: Tensor
    bias: Tensor
    classes: list[Any]
    about: dict[str, Any]

    def logits(self, features: np.ndarray | Tensor) -> Tensor:
        """[N, C] float32 on the CPU, in blocks of rows."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"expected features [N, {self.weight.shape[1]}], as the head was fitted on, got {tuple(features.shape)}"
            )
        rows = Rows([(features, None, np.zeros(len(features), int))], self.weight.device, self.weight.dtype)
        return judged(self, rows)[0].float() if len(features) else torch.zeros(0, len(self.classes))

    def probabilities(self, features: np.ndarray | Tensor) -> Tensor:
        return self.logits(features).softmax(1)

    def predict(self, features: np.ndarray | Tensor) -> np.ndarray:
        """The label of each row [N]."""
        return np.asarray(self.classes)[self.logits(features).argmax(1).numpy()]

    def save(self, out: str | Path) -> None:
        """out/head.safetensors and, last, out/head.json."""
        with output_folder(out) as folder:
            with replacing(folder / "head.safetensors") as file:
                file.write(save({"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}))
            with replacing(folder / "head.json") as file:
                file.write(json.dumps({"classes": self.classes, "about": self.about}, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Head:
        try:
            about = read_parsed(Path(folder) / "head.json")
            tensors = load_file(Path(folder) / "head.safetensors")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"expected head.json and head.safetensors in {folder}, got no {Path(error.filename).name}; fit a probe first"
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{folder}: expected head.safetensors as it was written, got {error}; fit the probe again"
            ) from error
        classes, told, absent = about.get("classes"), about.get("about"), torch.zeros(())
        head = cls(tensors.get("weight", absent), tensors.get("bias", absent), classes, told)  # type: ignore[arg-type]
        if not isinstance(classes, list) or not isinstance(told, dict) or (head.weight.ndim, head.bias.ndim) != (2, 1):
            raise ValueError(f"{folder}: expected weight, bias, classes and about of a head, got others; fit the probe again")
        if not len(head.weight) == len(head.bias) == len(head.classes):
            raise ValueError(
                f"{folder}: expected a row of weights for each of {len(head.classes)} classes, got {len(head.weight)}"
            )
        return head


class Trial(NamedTuple):
    """One penalty that was tried: its score on validation, and how the fit on train went."""

    penalty: float
    score: float
    loss: float
    iterations: int
    converged: bool
    seconds: float


class Probe(NamedTuple):
    head: Head
    trials: list[Trial]
    score: float | None  # on test

    def summary(self) -> dict[str, Any]:
        return {**self.head.about, "test": self.score, "trials": [trial._asdict() for trial in self.trials]}

    def table(self) -> str:
        lines = [f"{'penalty':>10} {'C':>10} {'validation':>10} {'loss':>9} {'steps':>6} {'seconds':>8}"]
        for trial in sorted(self.trials):
            mark = " <" if trial.penalty == self.head.about["penalty"] else "" if trial.converged else " not converged"
            lines.append(
                f"{trial.penalty:10.3g} {1 / trial.penalty:10.3g} {trial.score:10.4f} {trial.loss:9.4f} {trial.iterations:6}"
                f" {trial.seconds:8.2f}{mark}"
            )
        return "\n".join([*lines, *([] if self.score is None else [f"test: {self.score:.4f}"])])


def linear_probe(
    train: tuple[np.ndarray | Tensor, Array],
    validation: tuple[np.ndarray | Tensor, Array] | None = None,
    test: tuple[np.ndarray | Tensor, Array] | None = None,
    *,
    penalty: float | None = None,
    score: Score = metrics.top_k,
    names: Sequence[str] | None = None,
    solver: str = "auto",
    max_iterations: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    about: dict[str, Any] | None = None,
) -> Probe:
    """Fits a head on (features [N, D], labels [N]), choosing the penalty on validation; then on train + validation together.

    `validation`: None takes a fifth of train, class by class. `penalty`: fixed, nothing is searched or held out for it.
    `score(logits, class indices)`: what validation and test are judged by. `names`: of classes 0, 1, ...; each needs examples.
    `solver`: "sklearn", "torch", or "auto" (scikit-learn for small sets). `about`: kept with the head.
    """
    labels = array(train[1], "labels of train", 1)
    classes = np.unique(labels)
    given(classes, names)
    sets = {"train": (train[0], indices(train[0], labels, classes, "train"))}
    for what, pair in (("validation", validation), ("test", test)):
        if pair is not None:
            features, own = pair[0], array(pair[1], f"labels of {what}", 1)
            if features.ndim != 2 or features.shape[1] != train[0].shape[1]:
                raise ValueError(
                    f"expected {what} features of width {train[0].shape[1]} as train's, got {tuple(features.shape)}"
                )
            sets[what] = (features, indices(features, own, classes, what))
    device, dtype = torch.device(device), torch.float64 if "float64" in str(train[0].dtype) else torch.float32

    def rows(*parts: tuple[np.ndarray | Tensor, np.ndarray | None, np.ndarray]) -> Rows:
        return Rows(list(parts), device, dtype)

    features, targets = sets["train"]
    trials: list[Trial] = []
    if validation is not None:
        fitted, held = rows((features, None, targets)), rows((sets["validation"][0], None, sets["validation"][1]))
    elif penalty is None:
        kept, out = held_out(targets, np.random.default_rng(seed))
        fitted, held = rows((features, kept, targets[kept])), rows((features, out, targets[out]))
    if penalty is None:
        trials = search(Fitter(fitted, classes.tolist(), solver, max_iterations), held, score)
        penalty = max(trials, key=lambda trial: (trial.score, trial.penalty)).penalty  # equal scores: the simpler head
    whole = [(own, None, index) for what, (own, index) in sets.items() if what != "test"]
    final = Fitter(rows(*whole), classes.tolist(), solver, max_iterations)
    head, fit = final(penalty)
    facts = {
        "penalty": float(penalty), "rows": len(final.rows), "solver": final.solver, "loss": fit.loss,
        "iterations": fit.iterations, "converged": fit.converged, "names": None if names is None else list(names),
    }  # fmt: skip
    head = head._replace(about=facts | (about or {}))
    return Probe(head, trials, None if test is None else score(head.logits(sets["test"][0]).numpy(), sets["test"][1]))


def given(classes: np.ndarray, names: Sequence[str] | None) -> None:
    if len(classes) < 2:
        raise ValueError(f"expected examples of two classes or more in train, got only {classes.tolist()}")
    if names is None:
        return
    if outside := sorted(set(classes.tolist()) - set(range(len(names)))):
        raise ValueError(f"expected labels from 0 to {len(names) - 1}, as many as names, got {outside[:5]}")
    if absent := [name for number, name in enumerate(names) if number not in classes]:
        raise ValueError(f"expected training examples of every class, got none of {absent[:5]}; leave such classes out")


def indices(features: np.ndarray | Tensor, labels: np.ndarray, classes: np.ndarray, what: str) -> np.ndarray:
    """The place of each label among the classes of train."""
    if features.ndim != 2:
        raise ValueError(f"expected features of {what} as [N, D], got shape {tuple(features.shape)}")
    paired(features, labels, f"features of {what} as labels")  # type: ignore[arg-type]
    if unknown := sorted(set(np.unique(labels).tolist()) - set(classes.tolist())):
        raise ValueError(f"expected labels of {what} among the {len(classes)} of train, got {unknown[:5]}")
    return np.searchsorted(classes, labels)


def held_out(targets: np.ndarray, rng: np.random.Generator, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows to keep and to hold out, `share` of each class of two examples or more, at least one of each side."""
    out = []
    for own in np.split(np.argsort(targets, kind="stable"), np.bincount(targets).cumsum()[:-1]):
        if len(own) > 1:
            out.append(rng.permutation(own)[: max(1, round(share * len(own)))])
    if not out:
        raise ValueError("expected two examples or more of some class to choose the penalty on, got one of each; give penalty")
    held = np.sort(np.concatenate(out))
    return np.setdiff1d(np.arange(len(targets)), held), held


class Fitter:
    """Fits heads with different penalties on the same rows, each from the one before."""

    def __init__(self, rows: Rows, classes: list[Any], solver: str, max_iterations: int) -> None:
        if solver not in ("auto", "sklearn", "torch"):
            raise ValueError(f"expected solver auto, sklearn or torch, got {solver!r}")
        small = len(rows) * rows.width * len(classes) <= SMALL
        self.rows, self.classes, self.max_iterations = rows, classes, max_iterations
        self.solver = ("sklearn" if small else "torch") if solver == "auto" else solver
        self.moments: Moments | None = None
        self.last: Fit | None = None

    def __call__(self, penalty: float) -> tuple[Head, Fit]:
        if not 0 < penalty < np.inf:
            raise ValueError(f"expected a penalty above 0, got {penalty}")
        if self.solver == "sklearn":
            fit = by_scikit_learn(self.rows, penalty, self.max_iterations)
        else:
            self.moments = self.moments or moments(self.rows)
            fit = logistic(self.rows, len(self.classes), penalty, self.moments, self.last, self.max_iterations)
            self.last = fit
        weight, bias = fit.weight, fit.bias
        if len(weight) == 1:  # two classes: the first one's logit is 0
            weight, bias = (torch.cat([torch.zeros_like(own), own]) for own in (weight, bias))
        return Head(weight, bias, self.classes, {}), fit


def by_scikit_learn(rows: Rows, penalty: float, max_iterations: int) -> Fit:
    """As the paper's. Its tolerance was of the sum of the losses; scikit-learn since 1.2 takes it of their mean."""
    features, targets = rows.all()
    array(features, "features", 2)
    model = needed("sklearn.linear_model").LogisticRegression(
        C=1 / penalty, max_iter=max_iterations, tol=1e-4 / len(targets), random_state=0
    )
    with warnings.catch_warnings():  # what it warns of stands in the record
        warnings.simplefilter("ignore", needed("sklearn.exceptions").ConvergenceWarning)
        model.fit(features, targets)
    logits = model.decision_function(features)
    logits = np.stack([np.zeros(len(logits)), logits], 1) if logits.ndim == 1 else logits
    own = torch.from_numpy(logits).log_softmax(1)[torch.arange(len(targets)), torch.from_numpy(targets)]
    loss = float(-own.mean()) + penalty / (2 * len(targets)) * float((model.coef_**2).sum())
    weight, bias = (
        torch.from_numpy(np.ascontiguousarray(value)).to(rows.device, rows.dtype) for value in (model.coef_, model.intercept_)
    )
    steps = int(model.n_iter_.max())
    return Fit(weight, bias, loss, steps, steps < max_iterations)


def search(fitter: Callable[[float], tuple[Head, Fit]], held: Rows, score: Score) -> list[Trial]:
    """1e-6, 1e-4, ... 1e6, then ever nearer around the best, down to 8 steps a decade; every penalty tried."""
    trials: dict[int, Trial] = {}

    def attempt(place: int) -> None:
        if place in trials or not 0 <= place < len(PENALTIES):
            return
        start, penalty = perf_counter(), float(PENALTIES[place])
        head, fit = fitter(penalty)
        logits, targets = judged(head, held)
        trials[place] = Trial(
            penalty,
            float(score(logits.numpy(), targets.numpy())),
            fit.loss,
            fit.iterations,
            fit.converged,
            perf_counter() - start,
        )

    for place in range(96, -1, -16):  # the strongest first: it is quick, and each starts from the one before
        attempt(place)
    for step in (8, 4, 2, 1):
        best = max(trials, key=lambda place: (trials[place].score, place))
        attempt(best + step)
        attempt(best - step)
    return list(trials.values())


def judged(head: Head, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and class indices [N] of the rows, on the CPU."""
    blocks = [(torch.addmm(head.bias, block, head.weight.T).cpu(), own.cpu()) for block, own in rows.blocks(len(head.classes))]
    logits, targets = zip(*blocks, strict=True)
    return torch.cat(logits), torch.cat(targets)
