"""The training loop: deterministic in the seed, resumed exactly from its checkpoint."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..data import LabelledStructure, fingerprint, groups_of
from ..errors import LabelError, MMACEError
from ..files import whole_file
from ..graph import Graph
from ..io import save_model, weights_hash
from ..locks import sole_use
from ..model import MagneticMACE, ModelConfig, is_spin_orbit
from .batches import DirectionBatch, LabelBatch, ground_energies
from .checkpoint import read_checkpoint, write_checkpoint
from .distributed import Processes, current_processes, part_of_probe
from .evaluate import Prediction, errors_of, predict
from .loss import LossTerms, direction_loss, label_loss
from .recipe import Recipe, RecipeError
from .restraint import (
    LONGEST_WALK,
    Crystal,
    Probe,
    ShakenCell,
    crystals_to_shake,
    floor_loss,
    make_probe,
    restraint_loss,
    shake,
    spin_orbit_loss,
    walk_downhill,
)
from .setup import initial_model, restart_spin_orbit

CHECKPOINT_SECONDS = 60.0
TERMS = ("energy", "forces", "stress", "magnetic_forces", "anisotropy")
ORDER_STREAM, LABEL_STREAM, GROUP_STREAM, RESTRAINT_STREAM, REPLAY_STREAM = range(5)


T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Start:
    """Where fine-tuning begins and what it must not forget.

    Attributes
    ----------
    model : MagneticMACE
        Weights and settings to start from.
    replay : sequence of LabelledStructure
        Labels the model was trained on; new ones are drawn from them in every epoch.
    fraction : float
        Share of them among the labels of an epoch, at least 0 and below 1.
    """

    model: MagneticMACE
    replay: Sequence[LabelledStructure] = ()
    fraction: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a training run came to.

    Attributes
    ----------
    model : MagneticMACE
        Averaged weights with the best validation so far.
    finished : bool
        All epochs are done or validation stopped improving; otherwise the run can be resumed.
    epoch : int
        Epochs done.
    best_epoch : int
        Epoch of the weights in `model`; 0 where none is better than the weights that the run started from.
    best_score : float
        Their validation score, the mean over structures of log(1 + loss).
    """

    model: MagneticMACE
    finished: bool
    epoch: int
    best_epoch: int
    best_score: float


def train(
    train_labels: Sequence[LabelledStructure],
    valid_labels: Sequence[LabelledStructure],
    recipe: Recipe,
    out: str | os.PathLike[str],
    seed: int = 0,
    bootstrap: bool = False,
    max_minutes: float | None = None,
    stop_after: int | None = None,
    device: torch.device | str = "cpu",
    metadata: dict[str, str] | None = None,
    report: Report | None = None,
    start: Start | None = None,
) -> Outcome:
    """Train a model, or go on with a run that was stopped; in every process of a group, if there is one.

    Parameters
    ----------
    train_labels, valid_labels : sequence of LabelledStructure
        Labels to fit, and labels that only select the best weights.
    recipe : Recipe
        Settings.
    out : path
        Folder for `model.safetensors` (best weights), `checkpoint.safetensors`, `log.jsonl` and `recipe.json`. If it
        holds a checkpoint of the same run, training goes on from there, to the same numbers as in one piece.
    seed : int
        Seed of weights, order and bootstrap.
    bootstrap : bool
        Draw the training parents with replacement, so that members of a committee see different data.
    max_minutes : float, optional
        Stop after the step that ends after this time; running again goes on.
    stop_after : int, optional
        Stop after this epoch; running again goes on.
    device : torch.device or str
        Where to train.
    metadata : dict, optional
        Notes stored with the model.
    report : callable, optional
        Called with every record of the log.
    start : Start, optional
        Weights to start from instead of random ones.

    Returns
    -------
    Outcome

    Raises
    ------
    LabelError
        No labels to train or to validate on.
    MMACEError
        `out` holds a run with other labels or settings, or another process trains there, or the loss is not finite.
    """
    if not train_labels or not valid_labels:
        raise LabelError("training needs labels to train on and others to validate on: give both.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_use(folder / "lock") if current_processes().first else nullcontext(True) as mine:
        if not mine:
            raise MMACEError(
                f"another training run is at work in {folder}: wait for its end, or choose another folder for this one."
            )
        run = _Run(
            train_labels, valid_labels, recipe, folder, seed, bootstrap, torch.device(device), metadata or {}, start
        )
        return run.go(max_minutes, stop_after, report or (lambda record: None))


class _Run:
    """Model, averaged model, optimiser and counters of one run."""

    def __init__(
        self,
        train_labels: Sequence[LabelledStructure],
        valid_labels: Sequence[LabelledStructure],
        recipe: Recipe,
        folder: Path,
        seed: int,
        bootstrap: bool,
        device: torch.device,
        metadata: dict[str, str],
        start: Start | None,
    ) -> None:
        self.processes = current_processes()
        self.start = start
        self.recipe, self.folder, self.seed, self.metadata = recipe, folder, seed, metadata
        self.valid_labels = valid_labels
        self.identity = {
            "recipe": recipe.to_dict(),
            "seed": seed,
            "bootstrap": bootstrap,
            "train": fingerprint(train_labels),
            "valid": fingerprint(valid_labels),
        }
        if start is not None:
            self.identity["start"] = weights_hash(start.model)
            self.identity["replay"] = [fingerprint(start.replay), start.fraction]
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.steps_of_epoch = 0
        self.best_epoch, self.best_score = 0, math.inf
        self.lowest_epoch, self.lowest_score = 0, math.inf
        self.terms, self.terms_steps = np.zeros(len(TERMS)), 0
        checkpoint = folder / "checkpoint.safetensors"
        saved = read_checkpoint(checkpoint) if checkpoint.exists() else None
        dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
        if saved is None and start is not None:
            self.model = copy.deepcopy(start.model).to(dtype).requires_grad_(True).train()
        elif saved is None:
            self.model = initial_model(train_labels, recipe, seed)
        else:
            if saved[1]["identity"] != self.identity:
                raise MMACEError(
                    f"{folder} holds a run with other labels, recipe or seed: choose another folder for this run."
                )
            self.model = MagneticMACE(ModelConfig.from_dict(saved[1]["config"])).to(dtype)
        if recipe.part == "spin_orbit":
            self._check_spin_orbit_part(train_labels)
            if recipe.restart and saved is None:
                restart_spin_orbit(self.model, seed)
            for name, weights in self.model.named_parameters():
                weights.requires_grad_(is_spin_orbit(name))
        self.model.to(device)
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.best = {name: value.clone() for name, value in self.average.items()}
        named = dict(self.model.named_parameters())
        spin_orbit = [p for name, p in named.items() if is_spin_orbit(name)]
        others = [p for name, p in named.items() if not is_spin_orbit(name) and not name.startswith("one_body.")]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": list(self.model.one_body.parameters()), "weight_decay": 0.0},
                {"params": others, "weight_decay": recipe.weight_decay},
                {"params": spin_orbit, "weight_decay": recipe.spin_orbit_decay},
            ],
            lr=recipe.learning_rate,
        )
        if saved is not None:
            self._restore(*saved)
        train_labels, valid_labels, replay = (
            [label.carried_by(self.model.config.carriers) for label in labels]
            for labels in (train_labels, valid_labels, () if start is None else start.replay)
        )
        self.ground = ground_energies([*train_labels, *replay])
        self.labels, self.groups = self._batches(train_labels)
        self.replay, self.replay_groups = self._batches(replay)
        known = [*self.groups, *self.replay_groups]
        self.spin_orbit_bound = max((_largest_anisotropy(group) for group in known), default=0.0)
        valid_single, valid_groups = self._batches(valid_labels)
        self.valid: list[LabelBatch | DirectionBatch] = [*valid_single, *valid_groups]
        if bootstrap:
            single = [label.parent for label in train_labels if label.anisotropy_group is None]
            grouped = [group[0].parent for group in groups_of(train_labels)]
            self.labels = _redrawn(self.labels, single, self._rng(LABEL_STREAM))
            self.groups = _redrawn(self.groups, grouped, self._rng(GROUP_STREAM))
        self.labels = self.labels + [label for label in self.labels if label.canted] * (recipe.canted_repeats - 1)
        self.replayed, self.replayed_groups = self._replay_counts()
        self.steps_per_epoch = max(
            math.ceil((len(self.labels) + self.replayed) / recipe.batch_size),
            math.ceil((len(self.groups) + self.replayed_groups) / recipe.groups_per_step),
        )
        known_labels = [*train_labels, *replay] if recipe.restrain_every else []
        crystals = crystals_to_shake(known_labels, recipe.stiffness_of, recipe.shake_weight_of)
        self.loss: torch.nn.Module = _StepLoss(self.model, recipe, crystals, self.spin_orbit_bound, self.processes)
        if self.processes.count > 1:
            self.loss = torch.nn.parallel.DistributedDataParallel(self.loss, find_unused_parameters=True)

    def _check_spin_orbit_part(self, train_labels: Sequence[LabelledStructure]) -> None:
        """Raise unless there is a spin-orbit part to train and something to learn for it."""
        if self.start is None:
            raise RecipeError(
                "the recipe trains the spin-orbit part alone, which needs a trained model around it: give one with "
                "`mmace finetune --from`."
            )
        if not self.model.config.has_spin_orbit:
            raise RecipeError(
                "the recipe trains the spin-orbit part alone, but the model is without spin-orbit coupling: train one "
                "with `mmace train` on labels that have it."
            )
        if not any(label.soc for label in train_labels):
            raise LabelError(
                "the recipe trains the spin-orbit part alone, but no training label has spin-orbit coupling: add such "
                "labels, or leave `part` out of the recipe."
            )

    def go(self, max_minutes: float | None, stop_after: int | None, report: Report) -> Outcome:
        start = saved_at = time.monotonic()
        before = self.seconds
        if self.processes.first:
            (self.folder / "recipe.json").write_text(json.dumps(self.identity, indent=1) + "\n")
        if self.start is not None and self.step == 0 and self.recipe.keep == "best":
            self.best_score = self.lowest_score = self._score(self._model_with(self.best))[1]
        records = self._records_until_checkpoint()
        limit = math.inf if max_minutes is None else 60.0 * max_minutes
        while not self._finished() and (stop_after is None or self.epoch < stop_after):
            for labels, groups in self._epoch_batches()[self.steps_of_epoch :]:
                if self.processes.agreed(time.monotonic() - start > limit):
                    break
                self.terms += self._train_step(labels, groups)
                self.terms_steps += 1
                self.steps_of_epoch += 1
                if self.processes.agreed(time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                    self.seconds = before + time.monotonic() - start
                    self._save(records)
                    saved_at = time.monotonic()
            self.seconds = before + time.monotonic() - start
            if self.steps_of_epoch < self.steps_per_epoch:
                break
            self.epoch, self.steps_of_epoch = self.epoch + 1, 0
            if self.epoch % self.recipe.validate_every == 0 or self.epoch == self.recipe.epochs:
                records.append(self._validate())
                if self.processes.first:
                    report(records[-1])
        self.seconds = before + time.monotonic() - start
        self._save(records)
        return Outcome(self._model_with(self.best), self._finished(), self.epoch, self.best_epoch, self.best_score)

    def _finished(self) -> bool:
        validated = self.epoch % self.recipe.validate_every == 0
        stale = validated and self.epoch - self.lowest_epoch > self.recipe.patience
        return self.epoch >= self.recipe.epochs or stale

    def _batches(self, labels: Sequence[LabelledStructure]) -> tuple[list[LabelBatch], list[DirectionBatch]]:
        device, tolerances = self.model.device, self.recipe.tolerances
        single = [
            LabelBatch.of(label, self.model, tolerances, self.ground).to(device)
            for label in labels
            if label.anisotropy_group is None
        ]
        grouped = [DirectionBatch.of(group, self.model, tolerances).to(device) for group in groups_of(labels)]
        return single, grouped

    def _replay_counts(self) -> tuple[int, int]:
        """Replayed labels and groups in an epoch; groups come along in the proportion they had."""
        if self.start is None or not 0.0 < self.start.fraction < 1.0:
            return 0, 0
        wanted = self.start.fraction / (1.0 - self.start.fraction) * (len(self.labels) + len(self.groups))
        known = len(self.replay) + len(self.replay_groups)
        if not known:
            return 0, 0
        replayed = round(wanted * len(self.replay) / known)
        return replayed, round(wanted) - replayed

    def _epoch_batches(self) -> list[tuple[list[LabelBatch], list[DirectionBatch]]]:
        """Batches of this epoch; the order depends on seed and epoch alone, so a resumed run repeats it."""
        labels, groups = self.labels, self.groups
        if self.replayed or self.replayed_groups:
            draw = self._rng(REPLAY_STREAM, self.epoch)
            labels = labels + _drawn(self.replay, self.replayed, draw)
            groups = groups + _drawn(self.replay_groups, self.replayed_groups, draw)
        rng = self._rng(ORDER_STREAM, self.epoch)
        label_parts = np.array_split(rng.permutation(len(labels)), self.steps_per_epoch)
        group_parts = np.array_split(rng.permutation(len(groups)), self.steps_per_epoch)
        return [
            ([labels[k] for k in label_part], [groups[k] for k in group_part])
            for label_part, group_part in zip(label_parts, group_parts, strict=True)
        ]

    def _train_step(self, labels: list[LabelBatch], groups: list[DirectionBatch]) -> np.ndarray:
        recipe = self.recipe
        self.step += 1
        rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        seed = None
        if labels and recipe.restrain_every and self.step % recipe.restrain_every == 0:
            seed = int(self._rng(RESTRAINT_STREAM, self.step).integers(2**62))
        total, terms = self.loss(labels, groups, seed)
        if not math.isfinite(float(total.detach())):
            raise MMACEError(
                f"the loss of step {self.step} (epoch {self.epoch + 1}) is not finite: training has diverged or a "
                "label holds absurd numbers; look at the labels, or lower learning_rate or clip in the recipe."
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimiser.step()
        memory = min(recipe.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.average[name].lerp_(value, 1.0 - memory)
        return terms

    def _rng(self, *key: int) -> np.random.Generator:
        """Numbers that depend on the seed and `key` alone, so that a resumed run draws the same."""
        return np.random.default_rng([self.seed, *key])

    def _learning_rate(self) -> float:
        recipe = self.recipe
        progress = self.step / (recipe.epochs * self.steps_per_epoch)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        rate = recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine
        return rate * min(1.0, self.step / max(recipe.warmup_steps, 1))

    def _validate(self) -> dict[str, Any]:
        """Errors of the averaged weights on the validation labels, remembered if they are the best so far."""
        model = self._model_with(self.average)
        terms, score = self._score(model)
        trained = sum(self.processes.gathered(self.terms)) / self.terms_steps
        train_terms = dict(zip(TERMS, trained.tolist(), strict=True))
        self.terms, self.terms_steps = np.zeros(len(TERMS)), 0
        if score < self.lowest_score:
            self.lowest_epoch, self.lowest_score = self.epoch, score
        if self.lowest_epoch == self.epoch or self.recipe.keep == "last":
            self.best_epoch, self.best_score = self.epoch, score
            self.best = {name: value.clone() for name, value in self.average.items()}
        errors = errors_of(self.valid_labels, self._predictions(model)).to_dict()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "minutes": round(self.seconds / 60.0, 3),
            "learning_rate": self._learning_rate(),
            "train_loss": train_terms,
            "valid_loss": dict(zip(TERMS, terms.tolist(), strict=True)),
            "valid_score": score,
            "best_epoch": self.best_epoch,
            "valid": errors,
        }

    def _score(self, model: MagneticMACE) -> tuple[np.ndarray, float]:
        """Loss terms on the validation labels, and the mean logarithm of each structure's loss.

        By the logarithm one strange structure does not choose the weights.
        """
        losses = [_mean_loss(model, part, self.recipe, create_graph=False) for part in self.processes.share(self.valid)]
        parts = self.processes.gathered([[float(getattr(loss, name)) for name in TERMS] for loss in losses])
        values = np.array([parts[k % len(parts)][k // len(parts)] for k in range(len(self.valid))])
        return values.mean(0), float(np.log1p(values.sum(1)).mean())

    def _predictions(self, model: MagneticMACE) -> list[Prediction]:
        """Predictions for the validation labels, each label or group by one process."""
        labels = self.valid_labels
        index = {id(label): k for k, label in enumerate(labels)}
        units = [[k] for k, label in enumerate(labels) if label.anisotropy_group is None]
        units += [[index[id(label)] for label in group] for group in groups_of(labels)]
        mine = [k for unit in self.processes.share(units) for k in unit]
        parts = self.processes.gathered(dict(zip(mine, predict(model, [labels[k] for k in mine]), strict=True)))
        found = {k: prediction for part in parts for k, prediction in part.items()}
        return [found[k] for k in range(len(labels))]

    def _model_with(self, weights: dict[str, torch.Tensor]) -> MagneticMACE:
        model = copy.deepcopy(self.model)
        model.load_state_dict({**model.state_dict(), **weights})
        return model.requires_grad_(False).eval()

    def _save(self, records: Sequence[dict[str, Any]]) -> None:
        terms = sum(self.processes.gathered(self.terms))
        if not self.processes.first:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in values.items()}
        state = {
            "identity": self.identity,
            "config": self.model.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_of_epoch": self.steps_of_epoch,
            "seconds": self.seconds,
            "terms": terms.tolist(),
            "terms_steps": self.terms_steps,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "lowest_epoch": self.lowest_epoch,
            "lowest_score": self.lowest_score if math.isfinite(self.lowest_score) else None,
        }
        # before the checkpoint: what is later than that is run again, what is missing would be lost
        with whole_file(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        write_checkpoint(self.folder / "checkpoint.safetensors", tensors, state)
        notes = {
            **self.metadata,
            "seed": str(self.seed),
            "bootstrap": json.dumps(self.identity["bootstrap"]),
            "best_epoch": str(self.best_epoch),
        }
        save_model(self._model_with(self.best), self.folder / "model.safetensors", notes)

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        device = self.model.device
        self.model.load_state_dict(_named(tensors, "model."))
        self.average = {name: value.to(device) for name, value in _named(tensors, "average.").items()}
        self.best = {name: value.to(device) for name, value in _named(tensors, "best.").items()}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _named(tensors, "optimiser.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        settings = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": settings})
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.steps_of_epoch = state["steps_of_epoch"]
        self.terms = np.array(state["terms"]) if self.processes.first else np.zeros(len(TERMS))
        self.terms_steps = state["terms_steps"]
        self.best_epoch, self.lowest_epoch = state["best_epoch"], state["lowest_epoch"]
        self.best_score, self.lowest_score = (
            math.inf if state[name] is None else state[name] for name in ("best_score", "lowest_score")
        )

    def _records_until_checkpoint(self) -> list[dict[str, Any]]:
        """Log of the epochs that the checkpoint holds; later ones will be run again."""
        log = self.folder / "log.jsonl"
        if self.epoch == 0 or not log.exists():
            return []
        try:
            records = [json.loads(line) for line in log.read_text().splitlines()]
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise MMACEError(f"{log} is damaged: mend it, or delete it to go on without the earlier epochs.") from None
        return [record for record in records if record["epoch"] <= self.epoch]


class _StepLoss(torch.nn.Module):
    """Loss of one step: this process's structures, weighed so that the mean over processes is that of the batch."""

    def __init__(
        self,
        model: MagneticMACE,
        recipe: Recipe,
        crystals: Sequence[Crystal],
        spin_orbit_bound: float,
        processes: Processes,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.crystals = model, recipe, crystals
        self.spin_orbit_bound, self.processes = spin_orbit_bound, processes

    def forward(
        self, labels: list[LabelBatch], groups: list[DirectionBatch], seed: int | None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Loss to differentiate, and the terms of this process's labels.

        `seed` draws the restraint of a step that has one.
        """
        total = 0.0 * next(weights for weights in self.model.parameters() if weights.requires_grad).sum().double()
        terms = np.zeros(len(TERMS))
        parts: list[tuple[LabelBatch | DirectionBatch, float]] = []
        mine = self.processes.share(labels)
        fitted = [label for label in mine if self._learns_from(label)]
        if fitted:
            parts.append((LabelBatch.collate(fitted), len(fitted) / len(labels)))
        my_groups = self.processes.share(groups)
        if my_groups:
            parts.append((DirectionBatch.collate(my_groups), len(my_groups) / len(groups)))
        for part, share in parts:
            loss = _mean_loss(self.model, part, self.recipe)
            total = total + self.processes.count * share * loss.total()
            terms += [share * float(getattr(loss, name).detach()) for name in TERMS]
        if mine and seed is not None:
            total = total + self.processes.count * len(mine) / len(labels) * self._restraint(labels, mine, seed)
        return total, terms

    def _learns_from(self, label: LabelBatch) -> bool:
        """Whether a label says anything about the weights that change."""
        return self.recipe.part == "all" or bool(label.graph.soc.any())

    def _restraint(self, labels: list[LabelBatch], mine: list[LabelBatch], seed: int) -> torch.Tensor:
        """Restraint per structure of this process; random numbers are those of the whole batch."""
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        cells = self._shaken_cells(len(labels), rng)
        loss = torch.zeros((), dtype=torch.float64, device=self.model.device)
        if self.recipe.part == "all":
            loss = loss + self._spin_free_restraint(labels, generator)
            if cells:
                # Many walks fall within a few steps: shorter ones at random halve the cost.
                steps = int(rng.integers(1, LONGEST_WALK, endpoint=True))
                loss = loss + floor_loss(self.model, walk_downhill(self.model, cells, steps))
        if self.spin_orbit_bound > 0:
            shaken = [cell.graph.to(self.model.device) for cell in cells]
            graph = Graph.collate([*(label.graph for label in mine), *shaken])
            loss = loss + spin_orbit_loss(self.model, graph, self.spin_orbit_bound, generator)
        return loss.double()

    def _shaken_cells(self, count: int, rng: np.random.Generator) -> list[ShakenCell]:
        """This process's share of `count` labelled crystals with other positions, volumes and moments."""
        if not self.crystals:
            return []
        weights = np.array([crystal.weight for crystal in self.crystals])
        drawn = rng.choice(len(weights), size=count, p=weights / weights.sum())
        return self.processes.share([shake(self.crystals[k], self.model, rng) for k in drawn])

    def _spin_free_restraint(self, labels: list[LabelBatch], generator: torch.Generator) -> torch.Tensor:
        """Moments beyond the labels' and expanded crystals, without spin-orbit coupling."""
        probe: Probe = make_probe(self.model, LabelBatch.collate(labels), generator)
        if self.processes.count > 1:
            probe = part_of_probe(probe, self.processes.share(range(len(labels))))
        return restraint_loss(self.model, probe)


def _mean_loss(
    model: MagneticMACE, batch: LabelBatch | DirectionBatch, recipe: Recipe, create_graph: bool = True
) -> LossTerms:
    """Loss terms per structure."""
    if isinstance(batch, LabelBatch):
        loss = label_loss(model, batch, recipe.tolerances, create_graph)
    else:
        loss = direction_loss(model, batch, recipe.tolerances)
    return LossTerms(*(getattr(loss, name) / batch.graph.n_graphs for name in TERMS))


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _largest_anisotropy(group: DirectionBatch) -> float:
    """Largest labelled energy about the mean of one group, eV/atom."""
    return float(group.energy.value.abs().max()) / len(group.graph.species)


def _drawn(items: list[T], count: int, rng: np.random.Generator) -> list[T]:
    """So many items in random order; where there are fewer, all of them over and over."""
    rounds = -(-count // len(items)) if items else 0
    return [items[k] for _ in range(rounds) for k in rng.permutation(len(items))][:count]


def _redrawn(items: list[T], parents: Sequence[str], rng: np.random.Generator) -> list[T]:
    """Items of parents drawn with replacement: labels of one parent are no independent draws."""
    names = sorted(set(parents))
    drawn = [names[k] for k in rng.integers(len(names), size=len(names))] if names else []
    return [item for name in drawn for item, parent in zip(items, parents, strict=True) if parent == name]
