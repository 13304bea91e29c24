"""A Trainer whose student learns from a teacher's outputs, with or without labels.

The loss itself is that of `objective`. Every term is the mean over what counts in it: examples for
a head with one prediction per example, tokens for one per token. That mean is taken over the whole
accumulated batch of all processes, so that gradient accumulation gives the gradient of one large
batch.

Knows losses and the Trainer; what is saved and restored around a training is in `recovery`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import find_labels

from ..batches.batch import Batch, check_batch, to_device
from ..errors import DataError, StructureError
from ..running.precision import widest
from ..running.states import evaluating, frozen
from ..scores.losses import predict
from ..scores.normaliser import IGNORED, TOKEN_COUNTS, count_labels, find_normaliser
from ..scores.normaliser import is_token_labels as is_tokens
from .closeness import DIVERGENCES, attention_divergence, relative_error, weighted_divergence
from .objective import (
    ATTENTIONS,
    HIDDEN,
    Distillation,
    Seen,
    Site,
    check_probabilities,
    find_sites,
    pair_attentions,
    watched,
)

# What a term of the loss is the mean over.
UNITS = ("labels", "label_tokens", "tokens", "decoder_tokens", "examples")


class DistillationTrainer(Trainer):
    """``transformers.Trainer`` with a teacher.

    The teacher is put onto the training device for `train`, frozen, in eval mode and without
    gradients; where it was, its flags and its device come back afterwards. Evaluation and
    prediction are the plain Trainer's: the evaluation loss is that of the labels.

    Args:
        teacher: Model whose outputs are learnt, of the same task and vocabulary.
        distillation: Weights of the loss.
        **trainer: Arguments of ``Trainer``: model, args, train_dataset, …
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        distillation: Distillation | None = None,
        **trainer: Any,
    ) -> None:
        super().__init__(**trainer)
        self.teacher = teacher
        self.distillation = distillation or Distillation()
        # The Trainer then divides every loss by the accumulation steps, whatever the model does
        # with its number of items; `_mean` undoes that.
        self.model_accepts_loss_kwargs = False
        self._normaliser = ""
        self._totals: dict[str, Tensor] = {}
        self._sites: list[Site] = []

    def train(self, *args: Any, **options: Any) -> Any:
        """Train with the teacher at hand; see ``Trainer.train``."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.teacher))
            stack.enter_context(frozen(self.teacher))
            if "hf_device_map" not in vars(self.teacher):
                stack.callback(self.teacher.to, self.teacher.device)
                self.teacher.to(self.args.device)
            return super().train(*args, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **options: Any) -> Any:
        """Batches of one optimizer step; what the terms are means over is counted on the way."""
        samples, items = super().get_batch_samples(epoch_iterator, *args, **options)
        found = [self._count(self._read(columns)) for columns in samples]
        counts = [float(sum(each.get(unit, 0) for each in found)) for unit in UNITS]
        device = self.args.device
        own = torch.tensor([counts], dtype=widest(device), device=device)
        together = self.accelerator.gather(own).sum(0)
        self._totals = dict(zip(UNITS, together.clamp_min(1), strict=True))
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch: the labels' alone in evaluation, all terms in training."""
        inputs = to_device(inputs, self._student)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, weights = self._read(inputs), self.distillation
        if weights.hidden_weight:
            inputs["output_hidden_states"] = True
        if weights.attention_weight:
            inputs["output_attentions"] = True
            self._sites = self._sites or self._find_sites(inputs)
        with watched(self._student, self._sites) as own:
            loss, outputs = self._label_term(model, inputs, batch)
        if weights.needs_teacher or not batch.labels:
            with watched(self.teacher, self._sites) as others:
                wanted = self._ask_teacher(inputs)
            alpha = weights.alpha if batch.labels else 1.0
            if alpha:
                loss = loss + alpha * self._output_term(outputs, wanted, batch)
            if weights.hidden_weight:
                loss = loss + weights.hidden_weight * self._hidden_term(outputs, wanted, batch)
            if weights.attention_weight:
                loss = loss + weights.attention_weight * self._attention_term(own, others, batch)
        return (loss, outputs) if return_outputs else loss

    # -- terms -------------------------------------------------------------------------------

    def _label_term(
        self, model: nn.Module, inputs: dict[str, Any], batch: Batch
    ) -> tuple[Tensor, Any]:
        """Weighted loss of the labels, as the plain Trainer computes it, and the outputs."""
        nothing = torch.zeros((), device=self._student.device)
        weight = 1 - self.distillation.alpha
        if not batch.labels:
            return nothing, self._ask_unlabelled(model, inputs)
        if not weight:
            return nothing, model(**self._without_labels(inputs))
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        count = self._count(batch)["labels"]
        # Without a single label the mean is 0/0.
        return (weight * self._mean(loss.mean() * count, "labels") if count else nothing), outputs

    def _output_term(self, outputs: Any, wanted: Any, batch: Batch) -> Tensor:
        mask = batch.columns.get("attention_mask")
        # The span heads read it: no answer begins in the padding.
        mask = mask.bool() if isinstance(mask, Tensor) else None
        found = predict(outputs, self.model, mask)
        teacher = predict(wanted, self.model, mask).logits
        if found.logits.shape != teacher.shape:
            raise StructureError(
                f"{type(self.teacher).__name__} (the teacher) predicts {_shape(teacher)}, the "
                f"student {_shape(found.logits)} (examples, positions, values); give the model "
                "that the student was cut from, or one of the same labels or vocabulary."
            )
        weights, unit = self._places(found.logits, batch)
        total = weighted_divergence(
            found.logits,
            teacher,
            weights,
            divergence=DIVERGENCES[found.distribution],
            temperature=self.distillation.temperature,
        )
        return self._mean(total, unit)

    def _hidden_term(self, outputs: Any, wanted: Any, batch: Batch) -> Tensor:
        terms = []
        for name, mask in HIDDEN.items():
            if outputs.get(name) is None:
                continue
            pairs = list(zip(outputs[name], wanted[name], strict=False))
            if len(outputs[name]) != len(wanted[name]) or any(s.shape != t.shape for s, t in pairs):
                raise StructureError(
                    f"{name}: the student has {[_shape(s) for s in outputs[name]]}, the teacher "
                    f"{[_shape(t) for t in wanted[name]]}; their widths must match, so distil with "
                    "hidden_weight=0."
                )
            for student, teacher in pairs:
                weights, unit = self._masked_places(_rows(student), batch, mask)
                error = relative_error(_rows(student), _rows(teacher), weights)
                terms.append(self._mean(error, unit))
        if not terms:
            raise StructureError(
                f"{type(self._student).__name__} returns no hidden states; distil with "
                "hidden_weight=0."
            )
        return torch.stack(terms).mean()

    def _attention_term(self, own: Seen, others: Seen, batch: Batch) -> Tensor:
        terms = []
        for site, student, teacher in pair_attentions(self._student, own, self.teacher, others):
            queries, keys = ATTENTIONS[site.output]
            weights, unit = self._query_places(student, batch, queries)
            check_probabilities(site.path, student, weights)
            is_real = batch.columns.get(keys)
            rows = (student.shape[0], student.shape[-1])
            if not isinstance(is_real, Tensor) or is_real.shape != rows:
                is_real = torch.ones(rows, device=student.device)
            divergence = attention_divergence(
                student, teacher.to(student.device), weights, is_real != 0
            )
            terms.append(self._mean(divergence, unit))
        return torch.stack(terms).mean()

    def _ask_unlabelled(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Outputs of the student.

        Raises:
            DataError: It is an encoder-decoder and was given nothing to decode.
        """
        try:
            return model(**inputs)
        except ValueError as error:
            is_fed = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
            if is_fed or not self._student.config.is_encoder_decoder:
                raise
            raise DataError(
                f"{type(self._student).__name__} is an encoder-decoder, but the batch holds only "
                f"{sorted(inputs)}, needed labels or decoder_input_ids: the teacher's predictions "
                "are those for a given text; give the examples labels."
            ) from error

    def _find_sites(self, inputs: dict[str, Any]) -> list[Site]:
        inputs = to_device(self._without_labels(inputs), self.teacher)
        with torch.no_grad(), self.accelerator.autocast():
            return find_sites(self.teacher, inputs)

    def _ask_teacher(self, inputs: dict[str, Any]) -> Any:
        inputs = self._without_labels(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(**to_device(inputs, self.teacher))

    # -- what counts -------------------------------------------------------------------------

    def _mean(self, total: Tensor, unit: str) -> Tensor:
        """This batch's part of a mean over the accumulated batches of all processes."""
        shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return total * (shares / self._totals[unit]).to(total)

    def _places(self, logits: Tensor, batch: Batch) -> tuple[Tensor, str]:
        """Weight of each position ``(examples, positions)``, and what the sum is a mean over.

        Tokens with a label count where labels lie side by side with the outputs, shifted as the
        model's loss shifts them; else the tokens that the attention mask keeps; else every example
        counts 1, shared by its positions (frames of speech, start and end of a span).
        """
        for name in batch.labels:
            labels = batch.columns[name]
            if is_tokens(labels) and labels.shape == logits.shape[:2]:
                return self._labelled(labels), "label_tokens"
        is_decoder = self._student.config.is_encoder_decoder
        return self._masked_places(
            logits, batch, "decoder_attention_mask" if is_decoder else "attention_mask"
        )

    def _masked_places(self, values: Tensor, batch: Batch, mask: str) -> tuple[Tensor, str]:
        found = batch.columns.get(mask)
        if isinstance(found, Tensor) and found.shape == values.shape[:2]:
            return found != 0, "decoder_tokens" if mask.startswith("decoder") else "tokens"
        examples, positions = values.shape[:2]
        return torch.full((examples, positions), 1 / positions, device=values.device), "examples"

    def _query_places(self, attention: Tensor, batch: Batch, mask: str) -> tuple[Tensor, str]:
        """Weight of each query; where an example is cut into windows, these share its weight."""
        weights, unit = self._masked_places(attention[:, 0], batch, mask)
        share = batch.examples / attention.shape[0]
        return (weights * share if unit == "examples" else weights), unit

    def _labelled(self, labels: Tensor) -> Tensor:
        """Outputs that predict a label ``(examples, positions)``."""
        counted = labels != IGNORED
        if self._normaliser == "labels_after_shift":
            return nn.functional.pad(counted[:, 1:], (0, 1), value=False)
        return counted

    def _count(self, batch: Batch) -> dict[str, int]:
        """How many of each of `UNITS` a batch holds."""
        counts = {"examples": batch.examples}
        for unit in ("tokens", "decoder_tokens"):
            mask = batch.columns.get(unit.replace("tokens", "attention_mask"))
            if isinstance(mask, Tensor):
                counts[unit] = int((mask != 0).sum())
        if batch.labels:
            # Measured once, on the teacher: dropout would blur it on a student in training.
            self._normaliser = self._normaliser or find_normaliser(self.teacher, batch)
            counts["labels"] = count_labels(self._normaliser, batch)
        tokens = [batch.columns[name] for name in batch.labels if is_tokens(batch.columns[name])]
        if tokens:
            counts["label_tokens"] = TOKEN_COUNTS.get(self._normaliser, TOKEN_COUNTS["labels"])(
                tokens[0]
            )
        return counts

    def _read(self, columns: Mapping[str, Any]) -> Batch:
        known = find_labels(type(self._student))
        return check_batch(0, columns, known, brings=False)

    def _without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a forward needs: an encoder-decoder reads its labels, shifted."""
        batch = self._read(inputs)
        return dict(inputs) if self._student.config.is_encoder_decoder else batch.inputs()

    @property
    def _student(self) -> PreTrainedModel:
        """The model without a PEFT wrapper around it."""
        model = self.model
        return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _rows(states: Tensor) -> Tensor:
    """``(examples, positions, values)`` of hidden states; maps of a conv net are one position."""
    return states if states.dim() == 3 else states.flatten(1)[:, None]  # noqa: PLR2004


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
