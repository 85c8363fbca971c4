"""PyTorch's side of the benchmarks: torchvision's networks and the optimizer that ours has."""

import workload

SHIM = workload.ROOT.parent / "shared" / "tools" / "torchvision_cpu.py"


def torchvision():
    """torchvision; beside a CPU build of PyTorch its import may need a declaration first."""
    import importlib.util
    import sys

    if SHIM.exists() and "torchvision_cpu" not in sys.modules:
        spec = importlib.util.spec_from_file_location("torchvision_cpu", SHIM)
        # The module has to stay: what it declares ends with it.
        module = sys.modules["torchvision_cpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    import torchvision

    return torchvision


def network(name: str, layout):
    """The network of a name in `workload.NETWORKS`, with its weights in a memory layout."""
    make = getattr(torchvision().models, workload.NETWORKS[name][1])
    return make(num_classes=workload.CLASSES).to(memory_format=layout)


def parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


def trainer(net):
    """Returns the function of a batch and its labels that does a step of SGD with momentum."""
    import torch

    optim = workload.OPTIM
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=optim["lr"],
        momentum=optim["momentum"],
        weight_decay=optim["decay"],
        fused=True,
    )

    def step(images, labels):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step
