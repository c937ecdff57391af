"""What the first of two hosts does in test_two_hosts: train and certify on workers of the second, and here."""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from configs.schema import ClusterConfig
from deepzero_core.smoothing import Certification
from deepzero_core.training import Batch, CGESource
from infra.certification import Examples, Task, certify_examples
from infra.classifiers import Recipe
from infra.cluster import open_cluster
from infra.forward import DistributedCGE
from infra.problem import Problem


def main(address: str, store: str, scratch: str) -> None:
    model = {"name": "ownnet.nets:small", "in_channels": 1, "num_classes": 10, "image_size": [8, 8], "depth": 1}
    model |= {"width": 3, "arguments": {"features": 6}, "seed": 0}
    batches = {"batch_size": 16, "seed": 0, "augmentation": {"crop_padding": 1, "flip": False}, "limit": 64}
    problem = Problem(Path(store), batches, model, 5e-3, "forward", 1 << 20)
    module, source = problem.build_module().train(), problem.build_batches()
    here = CGESource(F.cross_entropy, problem.mu, problem.difference, problem.memory)
    weights = Path(scratch) / "weights.pt"
    torch.save(module.state_dict(), weights)
    arguments = {"model": model, "weights": str(weights), "mean": [0.3], "std": [0.4]}
    task = Task(
        Examples(Path(store), "test", tuple(range(0, 40, 4))),
        Recipe("infra.classifiers:trained", arguments),
        Certification(0.25, 20, 200, 0.01, 100),
        seed=3,
    )
    torch.set_num_threads(1)
    settings = ClusterConfig(workers=1, spec="scheduler-tls", address=address, timeout_s=60)
    with open_cluster(settings, mentions=[model, arguments]) as client:
        same = []
        with DistributedCGE(client, problem) as workers:
            for number in range(2):
                batch = Batch.of(number, 0, number, *source.batch(0, number))
                found, expected = workers.estimate(module, batch, None), here.estimate(module, batch, None)
                lanes = workers._lanes.status
                same += [torch.equal(value, found.gradients[name]) for name, value in expected.gradients.items()]
        there, _ = certify_examples(task, Path(scratch) / "there", client=client)
        table, _ = certify_examples(task, Path(scratch) / "here")

        def sees(paths: list[str]) -> dict[str, object]:
            import os
            import sys
            from pathlib import Path

            import infra

            return {
                "home": os.environ["DEEPZERO_HOME"],
                "folder": str(Path.cwd()),
                "sees": [path for path in paths if Path(path).exists()],
                "package": str(Path(infra.__file__).parent.parent),
                "path": sys.path,
            }

        (facts,) = client.run(sees, [store, scratch, str(weights), "/ownnet"]).values()
        addresses = list(client.nthreads())
    tables = [path.read_bytes() for path in (there, table)]
    print(json.dumps({"same": same, "tables": tables[0] == tables[1], "workers": addresses, "lanes": lanes} | facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
