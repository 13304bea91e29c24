"""Repair by least squares: what waits at the gates is what the new weights do in the model."""

import dataclasses
import shutil
import warnings
import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import zoo
from families import spread
from torch import nn

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.errors import GradNASWarning, RepairError
from hf_gradnas.masks import masked
from hf_gradnas.repair import first, least_squares, paused, ridge
from hf_gradnas.repair.changes import Outputs, new_values
from hf_gradnas.repair.closeness import divergence_sum, divergences
from hf_gradnas.repair.first import TRACED
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.repair.memory import Memory
from hf_gradnas.repair.pieces import Piece
from hf_gradnas.repair.readers import Reader
from hf_gradnas.repair.repairs import repaired
from hf_gradnas.verification import find_structure


@pytest.fixture(autouse=True)
def _few_rows():
    """Tiny models have fewer positions than inputs, which is said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "repair: .* was fitted on")
        yield


def planned(family, *, flops="70%", layout="per_layer"):
    """A tiny float64 model with its batch, pruner and plan."""
    model, batch = zoo.build(family)
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(batch)
    pruner.score([batch])
    return model, batch, pruner, pruner.plan({"flops": flops})


@contextmanager
def trial(model, axes, plan, repair=None):
    """The model as the plan and its repair leave it."""
    with ExitStack() as stack:
        stack.enter_context(masked(model, axes, plan.kept))
        if repair is not None:
            stack.enter_context(repaired(model, repair))
        yield


@pytest.fixture
def waited(monkeypatch):
    """Divergence of what the pruned forwards give that waited while weights were fitted."""
    found, judge = [], least_squares._Fit.judge

    def go_on(fit, alone):
        pieces = [piece for piece in fit._pieces if piece.is_held_out]
        for piece in pieces:
            for forward in (piece.original, piece.pruned):
                fit._advance(forward, len(fit._conductor.gates))
        pairs = [(piece.pruned.result, piece.original.result) for piece in pieces]
        labels = sum(int(wanted.valid.sum()) for _, wanted in pairs)
        found.append(sum(divergence_sum(*pair) for pair in pairs) / labels)
        return judge(fit, alone)

    monkeypatch.setattr(least_squares._Fit, "judge", go_on)
    return found


@pytest.mark.parametrize("family", spread(zoo.FAMILIES))
def test_divergences_are_those_of_the_model_with_the_new_weights(family, waited):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned(family)
        axes = pruner.structure.axes
        before = {name: p.clone() for name, p in model.named_parameters()}
        repair = find_repair(model, axes, plan, [batch] * 5)
        found = divergences(
            model,
            [batch],
            [lambda: trial(model, axes, plan), lambda: trial(model, axes, plan, repair)],
        )
    assert found[0] == pytest.approx(repair.kl_before, rel=1e-7)
    assert waited == [pytest.approx(repair.kl_after, rel=1e-7, abs=1e-12)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert repair.is_accepted
    if family == "albert":  # its layers share their weights; the head does not
        shared = [site.reason for site in repair.sites if "albert_layers" in site.module]
        assert set(shared) == {"it runs 3 times in a forward"}
        return
    assert any(site.ridge for site in repair.sites)
    assert found[1] == pytest.approx(repair.kl_after, rel=1e-7, abs=1e-12)
    assert repair.kl_after < 0.5 * repair.kl_before
    assert all(site.error_after < site.error_before for site in repair.sites if not site.reason)


def test_ridges_are_sought_with_some_outputs_and_all_are_changed(monkeypatch):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        monkeypatch.setattr(least_squares, "TRIED", 16)
        solved, solve = [], least_squares.NormalEquations.solve

        def note(sums, ridge, **options):
            found = solve(sums, ridge, **options)
            solved.append((sums.cross.shape[1], found[0].shape[1]))
            return found

        monkeypatch.setattr(least_squares.NormalEquations, "solve", note)
        repair = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
    assert {(64, 16), (64, 64)} <= set(solved)
    assert repair.kl_after < 0.5 * repair.kl_before
    reading = [site.module for site in repair.sites if site.ridge]
    assert reading
    for path in reading:
        weight = dict(model.named_parameters())[f"{path}.weight"]
        assert (repair.tensors[f"{path}.weight"] != weight).any(1).all(), path


@pytest.mark.parametrize("family", ["bert", "llama", "resnet"])
def test_new_weights_are_kept_in_files_and_changes_until_all_have_passed(family, monkeypatch):
    """In float32, to the last bit what all changes at once would give in the end."""
    model, batch, pruner, plan = planned(family)
    model.float()
    batch = {n: v.float() if v.is_floating_point() else v for n, v in batch.items()}
    changes, alive, kept = {}, [], []
    put, keep = Outputs.put, least_squares.mapped

    def note(outputs, reader, change):
        if isinstance(reader, Reader):
            alive.append(weakref.ref(change.weight))
            gates = [gate for gate in outputs._gates if outputs._changes.keys() & {*gate.readers}]
            assert len(gates) <= 2
        copy = dataclasses.replace(change, weight=change.weight.clone())
        changes[reader] = copy
        put(outputs, reader, change)

    monkeypatch.setattr(Outputs, "put", note)
    monkeypatch.setattr("hf_gradnas.repair.mapped._LEAST_BYTES", 1)
    monkeypatch.setattr(least_squares, "mapped", lambda *args: kept.append(keep(*args)) or kept[-1])
    repair = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
    assert repair.is_accepted
    assert sum(isinstance(reader, Reader) for reader in changes) == len(alive) > 1
    wanted = new_values(changes)
    assert repair.tensors.keys() == wanted.keys()
    assert all(torch.equal(repair.tensors[name], tensor) for name, tensor in wanted.items())
    assert {id(tensor) for tensor in repair.tensors.values()} == {id(tensor) for tensor in kept}
    assert not [ref for ref in alive if ref() is not None]


def same_repairs(found, wanted):
    assert found.kl_after == pytest.approx(wanted.kl_after, rel=1e-7)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", spread(["bert", "llama"]))
def test_outputs_that_are_left_out_until_the_weights_are_known_change_nothing(family, monkeypatch):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned(family)
        runs, late = [], paused.late_readers
        for may_wait in (True, False):
            found = late if may_wait else lambda gates: {}
            monkeypatch.setattr(paused, "late_readers", lambda gates, found=found: found(gates))
            runs.append(find_repair(model, pruner.structure.axes, plan, [batch] * 5))
    same_repairs(*runs)
    assert [site.reason for site in runs[0].sites] == [site.reason for site in runs[1].sites]
    before = [[site.error_before for site in repair.sites] for repair in runs]
    assert before[0] == pytest.approx(before[1], rel=1e-7, abs=1e-20, nan_ok=True)


def test_an_output_that_was_left_out_for_good_is_said_and_the_repair_found_without(monkeypatch):
    """As where the layers of a batch run in another order than those of the sample."""
    late, given, missed = paused.late_readers, [], []
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        axes = pruner.structure.axes
        monkeypatch.setattr(paused, "late_readers", lambda gates: {})
        wanted = find_repair(model, axes, plan, [batch] * 5)

        def too_early(gates):
            given.append({path: number - 1 for path, number in late(gates).items()})
            return given[-1]

        attached = paused.Conductor.attached

        @contextmanager
        def noted(conductor):
            with attached(conductor):
                yield
            missed.append(conductor.has_missed)

        monkeypatch.setattr(paused, "late_readers", too_early)
        monkeypatch.setattr(paused.Conductor, "attached", noted)
        found = find_repair(model, axes, plan, [batch] * 5)
    assert given[0]
    assert missed == [True, False]
    same_repairs(found, wanted)


@pytest.mark.parametrize("family", ["cohere", "gpt_neox", "phi"])
def test_both_halves_of_a_parallel_block_are_fitted(family):
    """What the attention puts out is seen after the FFN has read its own input."""
    classes = {"cohere": tf.CohereConfig, "gpt_neox": tf.GPTNeoXConfig, "phi": tf.PhiConfig}
    config = classes[family](**{**zoo.DECODER, "num_hidden_layers": 2})
    config._attn_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    batches = [{"input_ids": torch.randint(3, zoo.VOCAB, (8, 20))} for _ in range(5)]
    with zoo.float64_throughout():
        axes = find_structure(model, batches[0]).axes
        kept = {axis.name: tuple(range(-(-axis.size // 2))) for axis in axes}
        plan = Plan(kept, {axis.name: axis.size for axis in axes}, layout="per_layer")
        repair = find_repair(model, axes, plan, batches)
        (found,) = divergences(model, batches[4:], [partial(trial, model, axes, plan, repair)])
    sites = {site.module: site for site in repair.sites}
    reading = {axis.taps[0].module for axis in axes}
    assert len(reading) == 4
    for path in reading:
        assert sites[path].rows == 5 * 8 * 20, path
        assert sites[path].error_after < sites[path].error_before
    assert found == pytest.approx(repair.kl_after, rel=1e-7)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_what_a_decoder_reads_of_the_encoder_is_padded_as_the_encoder_is(family):
    """Also where both are padded to one length."""
    model, batch = zoo.build(family)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask.flip(0) == 0, -100)
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": labels}] * 5
    assert int(mask[:2].sum()) != int(mask.flip(0)[:2].sum())
    short = [{name: value[:2] for name, value in each.items()} for each in batches]
    with zoo.float64_throughout():
        axes = find_structure(model, batch).axes
        kept = {axis.name: tuple(range(-(-axis.size // 2))) for axis in axes}
        plan = Plan(kept, {axis.name: axis.size for axis in axes}, layout="per_layer")
        repair = find_repair(model, axes, plan, short)
    rows = {site.module: site.rows for site in repair.sites if site.rows}
    crossing = {"bart": "decoder.layers.0.encoder_attn.", "t5": "decoder.block.0.layer.1."}[family]
    found = {path: count for path, count in rows.items() if crossing in path}
    of_encoder = {path for path in found if path.endswith((".k", ".k_proj", ".v", ".v_proj"))}
    assert of_encoder
    for path, count in found.items():
        real = mask[:2] if path in of_encoder else mask.flip(0)[:2]
        assert count == 5 * int(real.sum()), path


def test_a_layer_that_held_out_batches_do_not_come_to_is_said(monkeypatch):
    is_at, path = Piece.is_at, "bert.encoder.layer.1.output.dense"

    def elsewhere(piece, number, reader):
        return reader.path != path and is_at(piece, number, reader)

    monkeypatch.setattr(Piece, "is_at", elsewhere)
    model, batch, pruner, plan = planned("bert")
    repair = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
    (site,) = (site for site in repair.sites if site.module == path)
    assert site.reason == "the held-out batches do not come to it in both models"
    assert repair.record()["sites"][repair.sites.index(site)]["error_before"] is None
    assert f"{path}.weight" not in repair.tensors


def test_held_out_rows_that_do_not_fit_into_memory_are_read_again(monkeypatch):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        wanted = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
        monkeypatch.setattr(ridge, "HELD_BYTES", 0)
        found = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
    assert found.summary() == wanted.summary()
    assert all(torch.equal(found.tensors[name], t) for name, t in wanted.tensors.items())


def test_what_does_not_fit_into_memory_waits_on_disk(tmp_path):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        axes = pruner.structure.axes
        wide = {name: value.repeat(8, 1) for name, value in batch.items()}
        wanted = find_repair(model, axes, plan, [wide] * 5)
        seen = []
        found = find_repair(
            model,
            axes,
            plan,
            [wide] * 5,
            memory_bytes=0,
            spill=tmp_path,
            progress=lambda done, total: seen.append(len(list(tmp_path.rglob("*")))),
        )
    assert max(seen) > 5  # a folder, and a file for each that waits
    assert not list(tmp_path.iterdir())
    assert found.summary() == wanted.summary()
    for name, tensor in wanted.tensors.items():
        assert torch.equal(tensor, found.tensors[name])


@pytest.mark.parametrize("bound", [0, 300_000])
def test_held_out_rows_stay_when_their_forward_goes_to_disk(bound, tmp_path):
    """Without padding they are no copies of what the forward holds."""
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        ids = {"input_ids": batch["input_ids"].repeat(8, 1)}
        wanted = find_repair(model, pruner.structure.axes, plan, [ids] * 5)
        found = find_repair(
            model, pruner.structure.axes, plan, [ids] * 5, memory_bytes=bound, spill=tmp_path
        )
    assert found.summary() == wanted.summary()


def test_short_batches_do_not_tell_how_much_long_ones_will_hold(tmp_path, monkeypatch):
    sizes, write = [], Memory._write

    def note(memory, held, storages):
        sizes.append(sum(storage.nbytes() for _, storage in storages))
        write(memory, held, storages)

    monkeypatch.setattr(Memory, "_write", note)
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        short = {"input_ids": batch["input_ids"][:1, :2]}
        long = {"input_ids": batch["input_ids"].repeat(16, 1)}
        data = [*[short] * 5, *[long] * 5]
        find_repair(model, pruner.structure.axes, plan, data, memory_bytes=600_000, spill=tmp_path)
    assert sizes


def boxed(tensor):
    """In an object of the model's own."""
    return SimpleNamespace(tensor=tensor)


@pytest.mark.parametrize("holder", [lambda t: t, lambda t: {"a": ([t],)}, boxed])
def test_what_a_module_caches_in_one_forward_is_there_in_the_next(holder, tmp_path):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        wide = {name: torch.cat([value] * 8) for name, value in batch.items()}
        wanted = find_repair(model, pruner.structure.axes, plan, [wide] * 5)
        module = model.bert.encoder.layer[1].intermediate
        plain, ones = module.forward, []

        def forward(hidden):
            if not ones or ones[0]().shape != hidden.shape:
                made = torch.ones_like(hidden)
                ones[:] = [weakref.ref(made)]
                module.cached = holder(made)
            return plain(hidden * ones[0]())

        module.forward = forward
        try:
            found = find_repair(
                model, pruner.structure.axes, plan, [wide] * 5, memory_bytes=0, spill=tmp_path
            )
            assert ones[0]().min() == 1  # also after it
        finally:
            del module.forward, module.cached
    assert found.summary() == wanted.summary()


def test_nothing_depends_on_the_order_of_calls_or_the_size_of_batches():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        axes = pruner.structure.axes
        first = find_repair(model, axes, plan, [batch] * 5)
        again = find_repair(model, axes, plan, [batch] * 5)
    assert first.summary() == again.summary()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
    assert dataclasses.is_dataclass(first)


@pytest.mark.parametrize("packed", [False, True])
def test_readers_are_looked_for_with_a_few_examples(packed, monkeypatch):
    model, batch, pruner, plan = planned("bert", flops="70%")
    wide = {name: torch.cat([value] * 4) for name, value in batch.items()}
    if packed:  # a column that counts no examples cannot be cut
        wide["position_ids"] = torch.arange(wide["input_ids"].shape[1])[None]
    traced, real = [], first.find_readers

    def find(model, axes, kept, call, *, examples):
        traced.append((examples, {name: len(value) for name, value in call.items()}))
        return real(model, axes, kept, call, examples=examples)

    monkeypatch.setattr(first, "find_readers", find)
    found = find_repair(model, pruner.structure.axes, plan, [wide] * 5)
    ((examples, sizes),) = traced
    assert examples == sizes["input_ids"] == (len(wide["input_ids"]) if packed else TRACED)
    assert len(wide["input_ids"]) > TRACED
    assert found.examples == 5 * len(wide["input_ids"])


def test_one_example_is_too_few():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        one = {name: value[:1] for name, value in batch.items()}
        with pytest.raises(RepairError, match=r"found one example, needed at least two"):
            find_repair(model, pruner.structure.axes, plan, [one])


def test_fewer_batches_than_five_are_split():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        found = find_repair(model, pruner.structure.axes, plan, [batch])
    assert found.examples == zoo.BATCH
    assert all(site.rows for site in found.sites if site.ridge)


def test_too_few_positions_for_the_widest_layer_are_said():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        two = {
            name: value[:2, :8] if value.dim() > 1 else value[:2] for name, value in batch.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with pytest.warns(GradNASWarning, match=r"on \d+ positions for \d+ inputs"):
                find_repair(model, pruner.structure.axes, plan, [two])


def test_activations_that_are_not_finite_name_the_layer():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        with torch.no_grad():
            model.bert.encoder.layer[1].attention.output.dense.bias[3] = float("nan")
        with pytest.raises(RepairError, match=r"layer\.1\.\S+: .*not finite on batch \d"):
            find_repair(model, pruner.structure.axes, plan, [batch] * 5)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_disk_that_is_too_small_says_how_much_is_needed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        wide = {name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in batch.items()}
        with pytest.raises(RepairError, match=r"MiB left, but the next states take"):
            find_repair(
                model, pruner.structure.axes, plan, [wide] * 5, memory_bytes=0, spill=tmp_path
            )
    assert not list(tmp_path.iterdir())


def test_a_folder_to_spill_to_that_is_not_there_is_named(tmp_path):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        wide = {name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in batch.items()}
        with pytest.raises(RepairError, match=r"states cannot be kept in \S+nowhere"):
            find_repair(
                model,
                pruner.structure.axes,
                plan,
                [wide] * 5,
                memory_bytes=0,
                spill=tmp_path / "nowhere",
            )


def test_units_that_repeat_others_are_replaced_exactly():
    """Half of the neurons are copies: their part of the output moves into what stays."""
    with zoo.float64_throughout():
        model, batch = zoo.build("llama")
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                weight = getattr(mlp, name).weight
                weight[48:] = weight[:48]
        pruner = GradNASPruner(model, layout="per_layer")
        pruner.discover(batch)
        pruner.score([batch])
        plan = pruner.plan({"flops": "99%"})
        kept = {axis.name: tuple(range(axis.size)) for axis in pruner.structure.axes}
        name = next(name for name in kept if name.startswith("model.layers.1.mlp"))
        plan = dataclasses.replace(plan, kept={**kept, name: tuple(range(48))})
        many = [{k: v.roll(n, 1) for k, v in batch.items()} for n in range(10)]
        repair = find_repair(model, pruner.structure.axes, plan, many)
    site = next(site for site in repair.sites if site.module.endswith("layers.1.mlp.down_proj"))
    assert site.error_after < 1e-3 * site.error_before
    assert repair.kl_after < 1e-3 * repair.kl_before


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("share", [0.1, 0.8])
def test_an_interrupt_leaves_the_model_as_it_was(share, memory_bytes, tmp_path):
    model, batch, pruner, plan = planned("bert")
    wide = {name: torch.cat([value] * 2) for name, value in batch.items()}
    options = {"memory_bytes": memory_bytes, "spill": tmp_path}
    calls, stop = 0, 0

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        flags = [module.training for module in model.modules()]
        return hooks, flags, model.config.use_cache, torch.get_rng_state().tolist()

    with torch.no_grad():
        wanted = model(**batch).logits
    model.bert.pooler.train()
    before = state()
    with nn.modules.module.register_module_forward_pre_hook(count):
        find_repair(model, pruner.structure.axes, plan, [wide] * 5, **options)
        assert state() == before
        calls, stop = 0, int(share * calls)
        with pytest.raises(KeyboardInterrupt):
            find_repair(model, pruner.structure.axes, plan, [wide] * 5, **options)
    assert state() == before
    assert not list(tmp_path.iterdir())
    assert torch.is_grad_enabled()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)


def test_a_caller_in_autocast_gets_the_same_repair():
    model, batch, pruner, plan = planned("bert")
    model.float()
    wanted = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
        assert torch.is_autocast_enabled("cpu")
    assert wanted.is_accepted
    assert found.summary() == wanted.summary()


@pytest.mark.parametrize("layer", [0, 1])
def test_no_forward_waits_in_an_inference_mode_of_its_own(layer):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        module = model.bert.encoder.layer[layer]
        module.forward = torch.inference_mode()(module.forward)
        try:
            repair = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
        finally:
            del module.forward
    assert not torch.is_inference_mode_enabled()
    assert repair.is_accepted
    inside = f"bert.encoder.layer.{layer}."
    assert not any(name.startswith(inside) for name in repair.tensors)
    reasons = {site.module: site.reason for site in repair.sites if site.module.startswith(inside)}
    assert reasons[f"{inside}output.dense"] == "it did not run on the sample, or in inference mode"
    assert any(name.startswith("bert.encoder.layer.2.") for name in repair.tensors)


def _compile_model(model):
    model.compile(backend="eager")


def _compile_layers(model):
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager")


def _compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("compile_", [_compile_model, _compile_layers, _compile_forward])
def test_compiled_calls_do_not_wait(compile_):
    """Their frames keep what torch dispatches by, and would put it back in another forward."""
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        wanted = find_repair(model, pruner.structure.axes, plan, [batch] * 5)
        compile_(model)
        before = {path: dict(vars(module)) for path, module in model.named_modules()}
        found = pruner.repair(plan, [batch] * 5)
        after = {path: dict(vars(module)) for path, module in model.named_modules()}
    assert found.summary() == wanted.summary()
    for path, values in before.items():
        assert after[path].keys() == values.keys()
        for name in ("forward", "_compiled_call_impl"):
            assert after[path].get(name) is values.get(name)
    assert torch.ones(2).sum() == 2  # torch works as before


def test_a_forward_that_waits_within_autocast_leaves_it_to_itself():
    model, batch, pruner, plan = planned("bert")
    axes = pruner.structure.axes
    plain = model.forward

    def patched(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = patched  # as a wrapper may do that no mark tells of
    try:
        find_repair(model, axes, plan, [batch] * 5)
    finally:
        del model.forward
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
