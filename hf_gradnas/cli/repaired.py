"""The steps of the repair command: from a plan and a checkpoint to new weights."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batches.steps import by_length
from ..checkpoint.fingerprints import check_same, checkpoint_of
from ..config.recipe_files import shareable
from ..flow import Run
from ..jobs.preparation import Job, open_model
from ..repair.least_squares import find_repair
from ..report import say_repair
from ..running.wrappers import check_parameters
from ..shards.apply import check_axes
from ..surgery.cut import check_plan

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from ..types import Axis, Plan


class RepairRun(Run):
    """One run that ends with a file of new weights for a plan.

    Args:
        plan: The plan.
        *args: As of `Run`.
        **options: As of `Run`.
    """

    UNREAD = frozenset(
        f"--{name}"
        for name in "target score search layout repair axes exclude min-units save-scores".split()
    ) | {"--output", "--report", "--eval-dataset", "--flops-length"}

    def __init__(self, plan: Plan, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plan = plan

    def execute(self) -> Path:
        """All steps in order; the file that was written.

        Raises:
            GradNASError: One of the steps failed.
        """
        began = time.monotonic()
        job = self._prepare(self._folder())
        self._check_checkpoint(job)
        load = partial(open_model, self.recipe, job, self.report)
        model, loader, _ = self.processes.main_first(load)
        check_parameters(model, "repair", offloaded=True)
        axes = self._axes(model, loader, job)
        plan = check_plan(axes, self.plan)
        with self.report.progress("Repairing") as progress:
            found = find_repair(
                model,
                axes,
                plan,
                by_length(loader),
                processes=self.processes,
                progress=progress,
                spill=self._spill(),
            )
        file = Path(str(self.recipe.output))
        self.processes.from_main(partial(found.save, file))
        took = f"{time.monotonic() - began:.1f} s"
        self.report.line(f"{say_repair(found.record())} It took {took}.")
        self.report.line(f"Repair: {file}")
        return file

    def interruption(self) -> str:
        """What an interrupted run leaves behind."""
        return "interrupted; no repair was written."

    def _check_checkpoint(self, job: Job) -> None:
        """Check that the checkpoint is the one that the plan was made for, as far as it says.

        Raises:
            CheckpointError: It is another one.
        """
        basis = self.plan.basis
        if basis is not None and basis.checkpoint:
            name, revision = shareable(self.recipe).model, self.recipe.revision
            origin = partial(checkpoint_of, name, revision, folder=job.folder)
            check_same(name, self.processes.from_main(origin), basis.checkpoint, "the plan")

    def _axes(self, model: PreTrainedModel, loader: DataLoader[Any], job: Job) -> tuple[Axis, ...]:
        """The axes that the plan was made for, of the plan itself; else they are found."""
        basis = self.plan.basis
        prunable = None if basis is None else basis.prunables.get(self.plan.layout)
        if prunable is None:
            return self._discover(model, loader, job).structure.axes
        check_axes(model, prunable)
        return tuple(prunable.axes)

    def _spill(self) -> Path | None:
        """Where states go that do not fit into memory: beside the weights that do not."""
        folder = self.recipe.offload_folder
        if folder is None:
            return None
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        return place
