"""The steps of the score command: those of a prune up to the scores."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from ..checkpoint.fingerprints import checkpoint_of
from ..config.recipe_files import shareable
from ..flow import Run
from ..jobs.preparation import open_model


class ScoreRun(Run):
    """One run that ends with a file from which plans are made without the model."""

    NOTHING = "no scores were written"
    UNREAD = frozenset(
        f"--{name}"
        for name in ("target", "search", "layout", "repair", "exclude", "min-units", "save-scores")
    ) | {"--output", "--report", "--eval-dataset"}

    def execute(self) -> Path:
        """All steps in order; the file that was written.

        Raises:
            GradNASError: One of the steps failed.
        """
        began = time.monotonic()
        job = self._prepare(self._folder())
        load = partial(open_model, self.recipe, job, self.report)
        model, loader, _ = self.processes.main_first(load)
        name, revision = shareable(self.recipe).model, self.recipe.revision
        origin = partial(checkpoint_of, name, revision, folder=job.folder)
        checkpoint = self.processes.from_main(origin)
        # Structure in every layout, since the plan decides for one of them.
        pruner = self._discover(model, loader, job, every_layout=True, checkpoint=checkpoint)
        self.report.structure(pruner.structure, pruner.layout, pruner.layout_reason)
        self._score(pruner, loader, job)
        self.report.line(f"Done in {time.monotonic() - began:.1f} s.")
        return Path(str(self.recipe.save_scores))
