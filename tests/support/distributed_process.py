"""Prune a tiny BERT on this process's share of the batches, and write down what was chosen."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import zoo
from accelerate import PartialState

from hf_gradnas import nas


def chosen(index: int, count: int) -> dict[str, Any]:
    """The configuration that is best, and the scores, with this process's share."""
    model, batch = zoo.build("bert", dtype=torch.float64)
    batches = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(4)]
    dummy = ({name: values[:1] for name, values in batch.items() if name != "labels"},)
    nas.convert(model, [("gradnas", {"nn.Linear": {"feature_divisor": 8}})])
    _, history = nas.search(
        model,
        {"flops": "60%"},
        dummy,
        {
            "data_loader": batches[index::count],
            "collect_func": lambda batch: (batch,),
            "loss_func": lambda output, batch: output.loss,
            "verbose": False,
        },
    )
    scores = {name: h.score_tensor.tolist() for name, h in nas.named_hparams(model)}
    return {"config": history["best"]["config"], "scores": scores}


def main() -> None:
    """Arguments: the folder that every process writes ``<processes>-<rank>.json`` to."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    found = chosen(state.process_index, state.num_processes)
    file = Path(sys.argv[1]) / f"{state.num_processes}-{state.process_index}.json"
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
