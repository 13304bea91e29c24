"""The callback: what is done at which event of a ``Trainer``.

Knows the order of a trainer's events. Scoring, masks, schedule and files have modules of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..batches.longest import reiterable
from ..checkpoint.folders import check_target, target_of
from ..checkpoint.savable import check_processor
from ..config.defaults import DEFAULT_SCORE
from ..config.recipe_files import build_recipe
from ..errors import OrderError, PlanError
from ..running.wrappers import body_of
from ..types import Plan, Scores
from .handover import (
    check_publishing,
    come_first,
    complete_output,
    log_last,
    names_of,
    publish,
    put_first,
    renew_optimizer,
    renew_trainer,
    swap_parameters,
    tokenizer_of,
    warn_of_scheduler,
)
from .latency import check_table
from .resuming import (
    check_not_cut,
    check_restored,
    check_same_cut,
    checkpoint_folder,
    run_folder,
    saved_progress,
)
from .run import Run
from .scoring import trainer_batches
from .settings import Settings, arguments_of, check_only_one, check_unwrapped, check_whole
from .told import check_dataloader, path_of

FOLDER = "pruned"
TRAINING_LOGS = {"loss", "train_loss"}  # keys of what is logged while training, and at its end


class GradNASCallback(TrainerCallback, ExportableState):
    """Prune the model that a ``transformers.Trainer`` trains: it is smaller when training ends.

    The model is cut in place and saved at the end of training, whatever `when` is; ``evaluate``,
    ``predict``, ``save_model`` and ``push_to_hub`` then work on the cut model, and so does a second
    ``train()``, which prunes no further. `plan`, `scores` and `directory` say what was done.

    Args:
        budget: Such as ``{"flops": "50%"}``: what is kept of the model as it comes.
        when: ``"end"``: scored and cut when training ends. ``"begin"``: cut before training, where
            `dataloader` is given or `attach` is called; otherwise trained under the masks of the
            plan, which is the same function, and cut at the end. ``"gradual"``: masked in
            `stages` while training, and cut at the end.
        score: As of `GradNASPruner`, and so are `search`, `layout`, `rules` and `layers`.
        search: Strategy of the search.
        layout: How the result is written.
        rules: What must stay.
        layers: Whether whole layers may go.
        dataloader: Batches to score with, in private passes; None: a sample of the trainer's data.
        num_examples: How many examples to score with; None: all of the data, which must end.
        labels: ``"data"`` or ``"model"`` (drawn from the model's predictions), in private passes.
            ``"auto"``: the data's where it has any, as preference trainers (DPO) have none.
        schedule: Of ``"gradual"``: ``"cubic"`` (Zhu & Gupta 2017) or ``"linear"``.
        start_ratio: Share of the run's steps after which pruning begins.
        end_ratio: Share of the run's steps after which the budget is met.
        stages: Rises of the sparsity between them; each is scored anew.
        mask: ``"soft"``: units fade during a stage. ``"hard"``: they are gone at its end at once.
        scores_from: ``"private"``: passes in eval mode over `dataloader` or a sample.
            ``"training"``: the training's own backward passes, at no pass more.
        repair: As of `GradNASPruner.prune`; ``"gradual"`` repairs nothing.
        output_dir: Where the cut model is saved; None: ``pruned`` in the trainer's ``output_dir``.
        latency_table: File that a budget of ``latency_ms`` is read from; None: measured before the
            training, and saved beside the cut model.
        latency_batch_size: Examples at once for which it is measured.
        latency_phase: ``"prefill"`` or ``"decode"``, as of `GradNASPruner.measure_latency`.

    Raises:
        PlanError: An argument is unknown, or two contradict each other.

    Example:
        >>> callback = GradNASCallback({"flops": "50%"}, when="gradual")
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - what a pruner, a search and a schedule take, all with defaults
        self,
        budget: Mapping[str, Any],
        *,
        when: str = "end",
        score: str = DEFAULT_SCORE,
        search: str = "lagrangian",
        layout: str = "auto",
        rules: Mapping[str, Any] | None = None,
        layers: bool = False,
        dataloader: Iterable[Mapping[str, Any]] | None = None,
        num_examples: int | None = 512,
        labels: str = "auto",
        schedule: str = "cubic",
        start_ratio: float = 0.1,
        end_ratio: float = 0.7,
        stages: int = 10,
        mask: str = "soft",
        scores_from: str = "private",
        repair: str = "auto",
        output_dir: str | Path | None = None,
        latency_table: str | Path | None = None,
        latency_batch_size: int = 1,
        latency_phase: str = "prefill",
    ) -> None:
        self.settings = Settings(
            budget=budget,
            when=when,
            score=score,
            search=search,
            layout=layout,
            rules=rules,
            layers=layers,
            num_examples=num_examples,
            labels=labels,
            schedule=schedule,
            start_ratio=start_ratio,
            end_ratio=end_ratio,
            stages=stages,
            mask=mask,
            scores_from=scores_from,
            repair=repair,
            output_dir=path_of("output_dir", output_dir),
            latency_table=path_of("latency_table", latency_table),
            latency_batch_size=latency_batch_size,
            latency_phase=latency_phase,
        )
        check_dataloader(dataloader, scores_from)
        self.dataloader, self.has_dataloader = dataloader, dataloader is not None
        self.progress: dict[str, Any] = {}
        self.directory: Path | None = None
        self._run: Run | None = None
        self._logged: dict[str, float] = {}  # of the training, latest; at its end its metrics
        self._cut: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self._trainer: weakref.ReferenceType[Trainer] | None = None
        self._makes_optimizer, self._makes_scheduler = False, True
        self._holds_whole = False  # a trainer that is not known still refers to the whole model

    @classmethod
    def from_recipe(cls, recipe: str | Path, **changes: Any) -> GradNASCallback:
        """Callback with the options of a recipe: a YAML file, or the name of a shipped one.

        Args:
            recipe: Its budget, scores, search, layout, repair, limits and ``training`` are taken;
                model, data and everything else are the trainer's.
            **changes: Arguments of the constructor, which beat the recipe's.

        Raises:
            RecipeError: The recipe cannot be read.
        """
        return cls(**{**arguments_of(build_recipe({}, file=recipe)), **changes})

    # -- what was done -----------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """What is pruned, or masked by now; None: nothing yet."""
        return None if self._run is None else self._run.progress.plan

    @property
    def scores(self) -> Scores | None:
        """Scores that the latest plan was made from; None: nothing was scored in this process."""
        return None if self._run is None else self._run.scores

    def attach(self, trainer: Trainer) -> None:
        """Tell the callback which trainer it belongs to, which a trainer's events do not say.

        It is added to the trainer if it is not there yet, before all that report, so that what it
        logs reaches them. With ``when="begin"`` the model is cut at once, scored with the
        trainer's own data. A trainer on several processes needs this to train a second time.

        Raises:
            BudgetError: The budget cannot be reached.
            OrderError: The trainer is training, or the callback belongs to another one.
            PlanError: It is no Trainer.
        """
        if not isinstance(trainer, Trainer):
            raise PlanError(f"attach: found a {type(trainer).__name__}, needed a Trainer.")
        if trainer.is_in_train:
            raise OrderError("attach: the trainer is training already; attach before train().")
        if self._trainer is not None and self._trainer() not in (None, trainer):
            raise OrderError(
                "attach: the callback belongs to another trainer already; give each trainer a "
                "GradNASCallback of its own."
            )
        put_first(trainer, self)
        self._trainer, self._makes_optimizer = weakref.ref(trainer), trainer.optimizer is None
        self._makes_scheduler = trainer.lr_scheduler is None
        if self.settings.when == "begin" and trainer.model_init is None and self._run is None:
            loader = trainer.get_train_dataloader()
            self._cut_before(trainer.args, trainer.state, trainer.model, loader, trainer.optimizer)

    def release(self) -> None:
        """Take every hook off the model; needed only after a training that was interrupted."""
        if self._run is not None:
            self._run.release()

    def state(self) -> dict[str, Any]:
        """Arguments and progress for ``trainer_state.json``."""
        if self._run is not None:
            self.progress = self._run.progress.to_dict()
        attributes = {"progress": self.progress, "has_dataloader": self.has_dataloader}
        return {"args": self.settings.to_dict(), "attributes": attributes}

    # -- events ------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut before training, where that was asked for and data is there."""
        come_first(self)
        model = kwargs["model"]
        self._makes_scheduler = kwargs["lr_scheduler"] is None
        is_new = self._run is None or self._run.trained is not model
        if self.settings.when == "begin" and self.dataloader is not None and is_new:
            self._cut_before(args, state, model, self.dataloader, kwargs["optimizer"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a run: check everything that can be checked before training; mask for `begin`."""
        self.release()
        come_first(self)
        model = kwargs["model"]
        check_only_one(self, model, state)
        check_restored(self)
        saved = saved_progress(state, self)
        if model in self._cut:
            self._train_again(args, state, model, saved)
        else:
            check_not_cut(state, saved)
            check_processor(tokenizer_of(kwargs))
            self._holds_whole = False
            run = self._begin_run(args, state, model, kwargs["train_dataloader"])
            with run.clock:
                run.begin(state, saved, checkpoint_folder(args, state))
        # A trainer that goes on from a checkpoint without the callback knows nothing of it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the next forward."""
        if run := self._running:
            run.before_pass()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the micro-batch, and measure the next."""
        if run := self._running:
            run.after_pass()
            run.before_pass()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the last micro-batch of the step."""
        if run := self._running:
            run.after_pass()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep masked units at zero."""
        if run := self._running:
            run.mask_again()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the schedule."""
        if run := self._running:
            with run.clock:
                run.after_step(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a best model that is not at final sparsity."""
        if run := self._running:
            run.forget_best(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save sums of scores beside the checkpoint."""
        if run := self._running:
            run.forget_best(state)
            run.save(checkpoint_folder(args, state), writes=args.should_save)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what is kept beside the training's loss, and leave metrics of evaluations alone."""
        if self._run is None:
            return
        self._run.forget_best(state)
        if not TRAINING_LOGS & kwargs["logs"].keys():
            return
        values = self._run.logs()
        self._logged = kwargs["logs"]
        self._logged.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the model, save it, and let go of what belonged to the whole one."""
        run, model = self._run, kwargs["model"]
        if run is None or run.trained is not model:
            return
        with run.clock:
            before = run.logs()
            if not run.is_cut:
                names = names_of(model)
                run.finish(state)
                self._hand_over(model, names, kwargs["optimizer"])
            self.directory = run.write(self._target(args, state), tokenizer_of(kwargs))
        self._logged.update(run.logs())
        log_last(run.logs(), before)
        run.tell(self.directory)
        publish(self.directory, args)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a push by the trainer end with the same repository."""
        if state.is_world_process_zero:
            folder = self._target(args, state)
            complete_output(folder, args, is_cut=self.directory == target_of(folder))

    # -- parts -------------------------------------------------------------------------------

    @property
    def _running(self) -> Run | None:
        return None if self._run is None or self._run.is_cut else self._run

    def _begin_run(self, args: Any, state: Any, model: PreTrainedModel, loader: Any) -> Run:
        check_whole(args)
        source = body_of(model)[0].name_or_path
        target = self._target(args, state)
        check_target(target, overwrite=True, source=source)
        check_table(self.settings, target)
        check_publishing(args)
        if self.dataloader is None:
            batches = trainer_batches(loader, model, self.settings, args)
        else:
            limit, body = self.settings.num_examples, body_of(model)[0]
            batches = self.dataloader = reiterable(self.dataloader, body, limit)
        self._run = Run(self.settings, model, batches, args, target)
        return self._run

    def _cut_before(
        self, args: Any, state: Any, model: PreTrainedModel, loader: Any, optimizer: Any
    ) -> None:
        """Cut a model whose training has not begun."""
        names = names_of(model)
        run = self._begin_run(args, state, model, loader)
        with run.clock:
            run.cut_at_once()
        self._cut.add(model)
        if optimizer is not None:
            swap_parameters(optimizer, names, model)

    def _hand_over(self, model: PreTrainedModel, names: dict[int, str], optimizer: Any) -> None:
        """Let optimizer and trainer, which have trained, follow a cut."""
        self._cut.add(model)
        if optimizer is not None:
            renew_optimizer(optimizer, names, model, rewinds=self._makes_scheduler)
        trainer = None if self._trainer is None else self._trainer()
        is_known = trainer is not None and trainer.model is model
        self._holds_whole = not is_known
        if is_known:
            renew_trainer(
                trainer,
                makes_optimizer=self._makes_optimizer,
                makes_scheduler=self._makes_scheduler,
            )

    def _train_again(
        self, args: Any, state: Any, model: PreTrainedModel, saved: dict[str, Any] | None
    ) -> None:
        """Check that a model that is cut already can be trained, and saved at the end.

        Raises:
            OrderError: Another model was pruned since, or the trainer wraps the whole one.
            PlanError: It goes on from a checkpoint of other units.
        """
        run = self._run
        if run is None or run.trained is not model or run.progress.plan is None:
            raise OrderError(
                "train: the callback cut this model, and began to prune another one since; give "
                "each trainer a GradNASCallback of its own."
            )
        if self._holds_whole:
            check_unwrapped(args)
        check_same_cut(state, saved, run.progress.plan, run.axes)
        if self.directory is not None and not self._makes_scheduler:
            warn_of_scheduler()

    def _target(self, args: Any, state: Any) -> Path:
        return Path(self.settings.output_dir or run_folder(args, state) / FOLDER)
