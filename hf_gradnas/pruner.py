"""The facade: one object that holds a model and calls the verbs on it in order.

Knows the order of the steps and who needs what. Holds no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .checkpoint.apply import apply_plan, check_uncut
from .checkpoint.reporting import Findings, save_with_report
from .costs.closed_form import unsplit_table_params
from .errors import OrderError
from .examined import ExaminedModel, check_choice, need
from .hub import push
from .masks import masked
from .scores import METHODS, check_scores, collect_scores
from .scores.prediction import with_prediction
from .scores.sample import Batch
from .scores.shards import gathered, is_sharded, shape_of
from .scores.wrappers import check_parameters, uncompiled
from .search.solver import STRATEGIES, find_plan
from .surgery import check_plan
from .types import Plan, Scores

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from .repair import Recovery

Progress = Callable[[int, int | None], None]


class GradNASPruner(ExaminedModel):
    """Prune a Transformers model: score once with gradients, then plan and cut to any budget.

    Args:
        model: Any ``PreTrainedModel``, also inside DDP or ``torch.compile``, or a model of
            sentence-transformers with one; `model` is the inner one, unchanged until `apply`.
        score: ``fisher`` (default), ``gradnas``, ``taylor``, ``magnitude`` or ``random``.
        search: ``lagrangian`` (default) or ``binary``.
        layout: ``stock`` (one width for all layers, plain Transformers loads it), ``per_layer``
            (each layer its own width), or ``auto``: per_layer as soon as a kind of axis cannot be
            expressed by the stock class.
        rules: Ordered mapping from a glob over module paths to None (keep) or ``{"min": …,
            "multiple": …}``; later entries win.
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
        score: str = "fisher",
        search: str = "lagrangian",
        layout: str = "auto",
        rules: Mapping[str, Any] | None = None,
        accelerator: Accelerator | PartialState | None = None,
    ) -> None:
        check_choice("score", score, METHODS)
        check_choice("search", search, STRATEGIES)
        super().__init__(model, layout=layout, rules=rules, accelerator=accelerator)
        self.score_method = score
        self.search = search
        self._scores: Scores | None = None
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
    ) -> Scores:
        """Measure what every unit is worth, in one pass of forwards and backwards.

        Args:
            dataloader: Yields dicts for ``model(**batch)``; read no further than `num_examples`.
            labels: ``"data"`` (the batch's) or ``"model"`` (sampled from its own predictions).
            num_examples: Use the first so many examples; None: all.
            file: Where scores are kept while running; a broken-off run resumes from it.
            progress: Called with examples done and the total (None: not known).
            seed: For sampled labels and the ``random`` score.

        Raises:
            DataError: Batches that the model cannot be scored with.
            StructureError: Nothing in the model can be pruned.
        """
        check_uncut("score", is_cut=self._applied)
        dataloader = self._discovered(dataloader, num_examples)
        self._scores = collect_scores(
            self.model,
            self.structure.axes,
            dataloader,
            method=self.score_method,
            labels=labels,
            num_examples=num_examples,
            seed=seed,
            file=file,
            progress=progress,
            accelerator=self._processes.accelerator,
        )
        return self._scores

    def use_scores(self, scores: Scores) -> None:
        """Take scores from an earlier run instead of scoring.

        Raises:
            ScoresError: They belong to another model.
        """
        check_scores(scores, self.model, self.structure.axes)
        self._scores = scores

    def plan(self, budget: Mapping[str, Any]) -> Plan:
        """Find the best units to keep under a budget such as ``{"flops": "60%"}``.

        Raises:
            BudgetError: The budget cannot be read or reached.
            OrderError: There are no scores yet.
        """
        budgets = self.check(budget)
        make = partial(find_plan, self.structure.axes, self.scores, self.costs, budgets)
        options = {"search": self.search, "layout": self.layout, "rules": self.rules}
        make = partial(make, **options, stock=self._space)
        return self._settle(self._processes.from_main(make))

    def masked(self, plan: Plan) -> AbstractContextManager[None]:
        """Try a plan without cutting: inside the ``with``, pruned units are multiplied by 0.

        Raises:
            PlanError: The plan does not fit this model.
        """
        check_uncut("masked", is_cut=self._applied)
        check_plan(self.structure.axes, plan)
        return uncompiled(masked(self.model, self.structure.axes, plan.kept))

    def apply(self, plan: Plan) -> PreTrainedModel:
        """Cut the model in place and rewrite its config; a plan that does not fit changes nothing.

        Of shards (FSDP2), a plain copy of the whole is cut and becomes `model`, on all processes.

        Raises:
            CutError: On the sample the cut model differs from the masked one; it is not usable.
            PlanError: The plan does not fit this model or its class, or it was cut already.
        """
        check_uncut("apply", is_cut=self._applied)
        check_plan(self.structure.axes, plan)
        check_parameters(self.model, "apply", shards=True)
        space = need(self._space, "config", "discover(batch) or score(dataloader)")
        if is_sharded(self.model):
            self.model = gathered(self.model)
        with self._processes.joint():
            before = [id(parameter) for parameter in self.model.parameters()]
            try:
                apply_plan(self.model, plan, self.structure, space, sample=self._sample)
            finally:  # what fails after the cut has begun leaves no whole model
                self._applied = before != [id(p) for p in self.model.parameters()]
        self._applied = True
        self._plan = plan
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
    ) -> Path:
        """Write the cut model, its tokenizer or processor, ``gradnas.json`` and model card.

        Args:
            directory: Target; must not exist unless `overwrite`.
            processing_class: Tokenizer or processor to save beside the model.
            overwrite: Replace what hf_gradnas wrote there; anything else there is an error.
            document: More to keep in ``gradnas.json`` (metrics, data).
            files: Further files beside the model, by path; not of names that the model's have.
            report: Write the pictures and tables of the folder ``report`` too.

        Raises:
            OrderError: `apply` was not called.
            CheckpointError: The target cannot be written, or does not load back as it was.
        """
        plan = self._cut_plan("save_pretrained")
        found = Findings(plan, self.structure, self._costs, self._totals, self._scores)
        options = {"processing_class": processing_class, "overwrite": overwrite, "report": report}
        more: dict[str, Any] = {"document": document, "files": files, "sample": self._sample}
        more["owner"] = self._owner
        write = partial(save_with_report, self.model, directory, found, **more, **options)
        self._saved = self._processes.from_main(write)
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

    def prune(self, dataloader: Iterable[Batch], budget: Mapping[str, Any], **score: Any) -> Plan:
        """Discover, check the budget, score, plan and cut in one call.

        Args:
            dataloader: Yields dicts for ``model(**batch)``.
            budget: Such as ``{"flops": "60%"}`` or ``{"params": 66e6}``.
            **score: Further arguments of `score`.

        Raises:
            BudgetError: The budget cannot be read or reached (raised before scoring).
        """
        check_uncut("prune", is_cut=self._applied)
        dataloader = self._discovered(dataloader, score.get("num_examples"))
        self.check(budget)
        self.score(dataloader, **score)
        plan = self.plan(budget)
        self.apply(plan)
        return plan

    def _cut_plan(self, step: str) -> Plan:
        """The plan that the model was cut to."""
        if self._plan is None:
            found = "failed when it was cut" if self._applied else "is not cut yet"
            advice = "load it again and make a new pruner" if self._applied else "call apply(plan)"
            raise OrderError(f"{step}: the model {found}; {advice} first.")
        return self._plan

    def _settle(self, plan: Plan) -> Plan:
        """The plan with its loss in nats where it is one, and with the costs after the cut."""
        shapes = {name: shape_of(p) for name, p in self.model.named_parameters()}
        costs = dict(plan.costs)
        if plan.layout == "per_layer":
            costs["params"] -= unsplit_table_params(self.structure.axes, shapes, plan.counts())
        return with_prediction(replace(plan, costs=costs), self.scores)
