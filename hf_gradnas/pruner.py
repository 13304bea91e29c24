"""The facade: one object that holds a model and calls the verbs on it in order.

Knows the order of the steps and who needs what. Holds no algorithm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from .batches.longest import Batch, reiterable
from .batches.steps import HeldOut
from .checkpoint.apply import apply_plan, check_uncut
from .checkpoint.save import save_with_report
from .config.defaults import AUTO, CANDIDATES, DEFAULT_SCORE, MAX_SHARD_SIZE
from .errors import check_choice
from .examined import ExaminedModel, Progress, need
from .frontier import Limits, measure_frontier
from .hub import push
from .planning import plans_of
from .repair.closeness import closest
from .repair.repairs import CHOICES as REPAIRS
from .repair.repairs import Repair, attempted, check_repair, mended, swaps
from .repair.swaps import swap_neurons
from .report import say_repair
from .running.wrappers import check_parameters, gathered, is_sharded
from .scores import METHODS, check_scores, collect_scores
from .search.solver import STRATEGIES
from .surgery.cut import check_plan
from .types import Budget, Frontier, Plan, Scores

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from .repair import Recovery

logger = logging.getLogger(__name__)


class GradNASPruner(ExaminedModel):
    """Prune a Transformers model: score once with gradients, then plan and cut to any budget.

    Args:
        model: Any ``PreTrainedModel``, also inside DDP or ``torch.compile``, or a model of
            sentence-transformers with one; `model` is the inner one, unchanged until `apply`.
        score: ``tempered`` (default), another of `scores.methods.METHODS`, or ``auto``: of
            ``tempered`` and ``fisher`` the one whose plan is closer to the original, by KL on every
            fifth batch, which is then not scored.
        search: ``lagrangian`` (default) or ``binary``.
        layout: ``stock`` (one width for all layers, plain Transformers loads it), ``per_layer``
            (each layer its own width), or ``auto``: per_layer as soon as a kind of axis cannot be
            expressed by the stock class.
        rules: Ordered mapping from a glob over module paths to None (keep) or ``{"min": …,
            "multiple": …}``; later entries win.
        layers: Whether whole layers may go, too. Then they compete with heads and neurons on one
            scale, and one layer of every stack stays.
        accelerator: An ``accelerate.Accelerator`` or ``PartialState``: all processes score their
            share, get the same plan and cut; the main one writes. Each calls the same methods.

    Raises:
        PlanError: An unknown score, search, layout or rule.
        StructureError: It is no Transformers model, or adapters are in or around it.

    Example:
        >>> pruner = GradNASPruner(model)                      # doctest: +SKIP
        >>> plan = pruner.prune(dataloader, {"flops": "60%"})  # doctest: +SKIP
        >>> pruner.save_pretrained("smaller", tokenizer)       # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        score: str = DEFAULT_SCORE,
        search: str = "lagrangian",
        layout: str = "auto",
        rules: Mapping[str, Any] | None = None,
        layers: bool = False,
        accelerator: Accelerator | PartialState | None = None,
    ) -> None:
        check_choice("score", score, (AUTO, *METHODS))
        check_choice("search", search, STRATEGIES)
        super().__init__(model, layout=layout, rules=rules, layers=layers, accelerator=accelerator)
        self.score_method, self.search = score, search
        self._scores: Scores | None = None
        self._held_out = HeldOut()
        self._repair: Repair | None = None
        self._saved: Path | None = None

    @property
    def scores(self) -> Scores:
        """Scores of this model.

        Raises:
            OrderError: Neither `score` nor `use_scores` was called.
        """
        return need(self._scores, "scores", "score(dataloader) or use_scores(scores)")

    def score(
        self,
        dataloader: Iterable[Batch],
        *,
        labels: str = "data",
        num_examples: int | None = None,
        file: str | Path | None = None,
        progress: Progress | None = None,
        seed: int = 0,
        checkpointing: bool | None = None,
    ) -> Scores:
        """Measure what every unit is worth, in one pass of forwards and backwards.

        Args:
            dataloader: Yields dicts for ``model(**batch)``; read no further than `num_examples`.
            labels: ``"data"`` (the batch's) or ``"model"`` (sampled from its own predictions).
            num_examples: Use the first so many examples; None: all.
            file: Where scores are kept while running; a broken-off run resumes from it.
            progress: Called with examples done and the total (None: not known).
            seed: For sampled labels and the ``random`` score.
            checkpointing: As of `scores.collect_scores`: less memory, the same scores.

        Raises:
            DataError: Batches that the model cannot be scored with.
            StructureError: Nothing in the model can be pruned.
        """
        check_uncut("score", is_cut=self._applied)
        dataloader = self._discovered(dataloader, num_examples)
        is_auto = self.score_method == AUTO
        method, *also = CANDIDATES if is_auto else (self.score_method,)
        self._held_out = HeldOut()
        self._scores = collect_scores(
            self.model,
            self.structure.axes,
            dataloader,
            method=method,
            also=also,
            held_out=self._held_out if is_auto else None,
            labels=labels,
            num_examples=num_examples,
            seed=seed,
            file=file,
            progress=progress,
            accelerator=self._processes.accelerator,
            checkpointing=checkpointing,
            basis=self.basis,
        )
        return self._scores

    def use_scores(self, scores: Scores) -> None:
        """Take scores from an earlier run instead of scoring.

        Of several methods, that of `score_method` is taken if it is there, else the first; all of
        them for ``auto``, which can choose after `score` only.

        Raises:
            ScoresError: They belong to another model.
        """
        scores = check_scores(scores, self.model, self.structure.axes)
        is_one = scores.also and self.score_method in scores.methods
        self._scores = scores.of(self.score_method) if is_one else scores

    def plan(self, budget: Mapping[str, Any]) -> Plan:
        """Find the best units to keep under a budget such as ``{"flops": "60%"}``.

        Raises:
            BudgetError: The budget cannot be read or reached.
            OrderError: There are no scores yet.
        """
        budgets, scores = self.check(budget), self.scores
        if self.score_method != AUTO:
            return self._planned(scores, budgets)
        plans = [self._planned(scores.of(method), budgets) for method in scores.methods]
        return closest(self.model, self._held_out, plans, self.masked, processes=self._processes)

    def _planned(self, scores: Scores, budgets: tuple[Budget, ...]) -> Plan:
        """The plan of one method."""
        found, search, rules = self.prunable, self.search, self.rules
        return self._processes.from_main(
            lambda: plans_of(found, scores, [budgets], search=search, rules=rules)[0]
        )

    def swap(
        self,
        plan: Plan,
        dataloader: Iterable[Batch],
        *,
        num_examples: int | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """Choose half of the neurons that stay by what least squares mends; widths do not change.

        To be repaired after it: what stays is chosen for new weights, not for the present ones. One
        forward of the whole model for every second batch that a repair does not hold out, and one
        inverse per layer. See `repair.swaps` for the source.

        Args:
            plan: Made from the present scores.
            dataloader: As for `repair`.
            num_examples: Use the first so many examples; None: all.
            progress: Called with steps done and their number.

        Raises:
            DataError: Batches that the model cannot run.
            OrderError: There are no scores yet, or the model is cut already.
            PlanError: The plan does not fit this model.
            RepairError: Activations are not finite, or there is one example only.
            StructureError: The weights are sharded.
        """
        self._check_whole("swap")
        scores, axes = self.scores, self.structure.axes
        plan = check_plan(axes, plan)
        if plan.score in scores.also:
            scores = scores.of(plan.score)
        more: dict[str, Any] = {"num_examples": num_examples, "progress": progress}
        more["processes"] = self._processes
        return swap_neurons(self.model, axes, plan, scores, dataloader, **more)

    def apply(self, plan: Plan, repair: Repair | None = None) -> PreTrainedModel:
        """Cut the model in place and rewrite its config; a plan that does not fit changes nothing.

        Of shards (FSDP2), a plain copy of the whole is cut and becomes `model`, on all processes.

        Args:
            plan: What is kept.
            repair: New weights for this plan, of `repair`; one that was not accepted changes none.

        Raises:
            CutError: On the sample the cut model differs from the masked one; it is not usable.
            PlanError: The plan does not fit this model or its class, or it was cut already.
            RepairError: The repair is that of another plan or model.
        """
        check_uncut("apply", is_cut=self._applied)
        given, plan = plan, check_plan(self.structure.axes, plan)
        if repair is not None:
            check_repair(repair, self.model, plan, given)
        check_parameters(self.model, "apply", shards=True)
        found = self.prunable
        if is_sharded(self.model):
            self.model = gathered(self.model)
        # Weights that are made in inference mode could not be trained.
        with torch.inference_mode(False), self._processes.joint():
            before = [id(parameter) for parameter in self.model.parameters()]
            try:
                more: dict[str, Any] = {"sample": found.sample, "repair": repair}
                apply_plan(self.model, plan, found.structure, found.space, **more)
            finally:  # what fails after the cut has begun leaves no whole model
                self._applied = before != [id(p) for p in self.model.parameters()]
        self._applied, self._plan, self._repair = True, plan, repair
        return self.model

    def recover(self, teacher: PreTrainedModel, train_dataset: Any, **options: Any) -> Recovery:
        """Train the cut model for a short time with `teacher`, the uncut one, as its example.

        Args:
            teacher: The original, loaded again or a deep copy from before `apply`.
            train_dataset: Examples as for ``Trainer``, with labels or without.
            **options: Further arguments of `repair.recover`.

        Raises:
            OrderError: `apply` was not called.
            RecipeError: An option that cannot be used.
            StructureError: The teacher does not fit the model.
        """
        self._cut_plan("recover")
        from .repair import recover  # noqa: PLC0415 - the Trainer takes seconds to import

        return recover(self.model, teacher, train_dataset, **options)

    def save_pretrained(
        self,
        directory: str | Path,
        processing_class: Any = None,
        *,
        overwrite: bool = False,
        document: Mapping[str, Any] | None = None,
        files: Mapping[str, str | bytes] | None = None,
        report: bool = True,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> Path:
        """Write the cut model, its tokenizer or processor, ``gradnas.json`` and model card.

        Args:
            directory: Target; must not exist unless `overwrite`.
            processing_class: Tokenizer or processor to save beside the model.
            overwrite: Replace what hf_gradnas wrote there; anything else there is an error.
            document: More to keep in ``gradnas.json`` (metrics, data).
            files: Further files beside the model, by path; not of names that the model's have.
            report: Write the pictures and tables of the folder ``report`` too.
            max_shard_size: Largest file of weights, in bytes or as ``"5GB"``.

        Raises:
            OrderError: `apply` was not called.
            CheckpointError: The target cannot be written, or does not load back as it was.
        """
        plan, found, scores = self._cut_plan("save_pretrained"), self.prunable, self._scores
        if scores is not None and plan.score in scores.also:
            scores = scores.of(plan.score)
        options = {"processing_class": processing_class, "overwrite": overwrite, "report": report}
        options |= {"document": document, "files": files, "sample": found.sample}
        options |= {"scores": scores, "repair": self._repair, "owner": self._owner}
        options["max_shard_size"] = max_shard_size
        save = partial(save_with_report, self.model, directory, found, plan, **options)
        self._saved = self._processes.from_main(save)
        return self._saved

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push what `save_pretrained` wrote to the Hub, and return the repository's address.

        Args:
            repo_id: ``user/name``; made if it is not there, else it gets a commit more.
            **options: ``private``, ``token``, ``commit_message`` and ``revision`` of `hub.push`.

        Raises:
            HubError: The push failed; what was saved is as it was.
            OrderError: `save_pretrained` was not called.
        """
        folder = need(self._saved, "folder to push", "save_pretrained(directory)")
        return self._processes.from_main(partial(push, folder, repo_id, **options)).url

    def prune(
        self,
        dataloader: Iterable[Batch],
        budget: Mapping[str, Any],
        *,
        repair: str = "auto",
        **score: Any,
    ) -> Plan:
        """Discover, check the budget, score, plan, repair and cut in one call.

        Args:
            dataloader: Yields dicts for ``model(**batch)``.
            budget: Such as ``{"flops": "60%"}`` or ``{"params": 66e6}``.
            repair: ``"weights"``: with new weights by `repair` where they bring its predictions
                closer to the original's; a warning says where none can be found. ``"swap"``: with
                neurons by `swap`, too, where that is closer still; it takes twice the time.
                ``"auto"``: ``"swap"`` where the loss is one of tokens, else ``"weights"``.
                ``"none"``.
            **score: Further arguments of `score`.

        Raises:
            BudgetError: The budget cannot be read or reached (raised before scoring).
            PlanError: An unknown `repair`.
        """
        check_uncut("prune", is_cut=self._applied)
        check_choice("repair", repair, REPAIRS)
        check_parameters(self.model, "prune", shards=True)
        limit = score.get("num_examples")
        dataloader = self._discovered(reiterable(dataloader, self.model, limit), limit)
        self.check(budget)
        self.score(dataloader, **score)
        plan, found = self.plan(budget), None
        if repair != "none":
            swap = self.swap if swaps(repair, self.scores) else None
            more = {"num_examples": limit}
            plan, found = mended(plan, dataloader, swap, self.repair, self._processes, **more)
        if found is not None:
            logger.info("gradnas: %s", say_repair(found.record()))
        self.apply(plan, found)
        return plan

    def sweep(
        self,
        dataloader: Iterable[Batch] | Mapping[int, Iterable[Batch]],
        budgets: Mapping[str, Limits],
        *,
        repair: str = "auto",
        **options: Any,
    ) -> Frontier:
        """Measure plans for several budgets, scores and calibration subsets; nothing is cut.

        Args:
            dataloader: As of `score`; or a mapping from a seed to such batches, for several.
            budgets: Limits per cost, ``{"flops": ["80%", "60%"]}``; each is a budget of its own.
            repair: ``"auto"``: each plan is measured with the new weights of `repair` too.
            **options: ``batches`` to measure on, and further arguments of
                `frontier.measure_frontier`.

        Raises:
            BudgetError: A budget cannot be read or reached; before any scoring.
            DataError: There is nothing to measure on.
            PlanError: An unknown score or `repair`, or no seed.
        """
        check_uncut("sweep", is_cut=self._applied)
        check_choice("repair", repair, ("auto", "weights", "none"))
        loaders = dict(dataloader) if isinstance(dataloader, Mapping) else {0: dataloader}
        for seed in list(loaders)[:1]:
            loaders[seed] = self._discovered(loaders[seed], options.get("num_examples"))
        names = CANDIDATES if self.score_method == AUTO else self.score_method
        given = {"score": names, "processes": self._processes, **options}
        given["repair"] = self._attempt if repair != "none" else None
        return measure_frontier(self, loaders, budgets=budgets, **given)

    def _attempt(self, plan: Plan, dataloader: Iterable[Batch], **options: Any) -> Repair | None:
        """The repair of a plan, or None with a warning that says why there is none."""
        return attempted(partial(self.repair, plan, dataloader, **options), self._processes)
