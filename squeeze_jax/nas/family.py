"""The networks of a space, and the network that holds the weights of all of them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import Plain
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas import subnetwork
from squeeze_jax.nas.space import Arch
from squeeze_jax.nn.chain import Chain, Piece
from squeeze_jax.nn.placement import placements


class Family:
    """The networks of a space by architecture; each is an ordinary network of the zoo.

    Attributes:
      space: the space.
      holder_options: options of `models.make` of the network that holds the weights of all others.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        plain: Plain,
        choices: Mapping[str, Any] | None = None,
    ):
        """Builds the family.

        Args:
          options: options of `models.make` of the network that holds the weights.
          plain: makes networks.
          choices: {option: values}, which restrict the space; None for the whole space.

        Raises:
          UserError: the network has no elastic options or is no `Chain`, the choices do not fit them, or the network that
            should hold the weights is smaller than the largest network of the space.
        """
        elastic = plain.elastic(options)
        own = {k: v for k, v in options.items() if k in elastic and v is not None}
        whole = spaces.from_choices(elastic)
        held = whole.options(whole.arch(own))
        self.space = spaces.from_choices(elastic, choices)
        for name, wanted in self.space.options(self.space.largest()).items():
            for place, (have, want) in enumerate(zip(held[name], wanted, strict=True)):
                ascending = elastic[name][place]
                if ascending.index(have) < ascending.index(want):
                    raise UserError(
                        f"{name}[{place}] = {have} in the network that holds the weights, but {want} is in the space: leave"
                        f" config.model.{name} out, or restrict the choices"
                    )
        self.holder_options = {**options, **held}
        self._plain, self._known = plain, {}
        if not isinstance(self.holder(), Chain):
            raise UserError(
                f"{options['name']!r} makes no Chain: choose a network of pieces, such as 'ofa_mobilenet_v3'"
            )

    def options(self, arch: Arch) -> dict[str, Any]:
        """Returns the options of `models.make` of an architecture's network."""
        return {**self.holder_options, **self.space.options(arch)}

    def network(self, arch: Arch) -> Chain:
        """Returns the network of an architecture."""
        return self._plain.make(self.options(arch))

    def holder(self) -> Chain:
        """Returns the network that holds the weights."""
        return self._plain.make(self.holder_options)

    def shapes(self, network: Chain) -> Any:
        """Returns the shapes of a network's variables, {"params", "batch_stats"}; equal pieces are traced once."""
        x, shapes = self._plain.example, {"params": {}}
        for piece in network.pieces:
            inputs, structure = jax.tree.flatten(x)
            key = piece.module, structure, tuple((a.shape, a.dtype) for a in inputs)
            if key not in self._known:
                net = Chain((Piece("piece", piece.module),))
                (output, _), own = jax.eval_shape(
                    net.init_with_output, jax.random.key(0), x
                )
                self._known[key] = output, own
            x, own = self._known[key]
            for collection, arrays in own.items():
                known = shapes.get(collection, {})
                shapes[collection] = tree.with_value_at(
                    known, piece.scope, arrays["piece"]
                )
        return shapes

    def spare_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns the parameters that smaller networks have and the network that holds the weights lacks.

        An example is the convolution in a shortcut between layers that have equal widths in the largest network only. The shape
        of each array, {layer: {"kernel": shape}}, has room for all networks that differ from the largest in one position.
        """
        held = tree.flatten(self.shapes(self.holder())["params"])
        spare = {}
        for name, positions in self.space.choices.items():
            for place in range(len(positions)):
                arch = spaces.changed(self.space.largest(), name, place, 0)
                shapes = self.shapes(self.network(arch))["params"]
                for array, leaf in tree.flatten(shapes).items():
                    if array in held:
                        continue
                    layer, _, end = array.rpartition("/")
                    known = spare.setdefault(layer, {}).get(end, leaf)
                    shape = tuple(np.maximum(leaf.shape, known.shape).tolist())
                    spare[layer][end] = jax.ShapeDtypeStruct(shape, leaf.dtype)
        return spare

    def kernel_sizes(self) -> dict[str, tuple[int, ...]]:
        """Returns the sides of the kernels that have several, {layer: sides in descending order}."""
        networks = [self.holder()]
        kernels = tree.flatten(self.shapes(networks[0])["params"]).items()
        sides = [a.shape[:-2] for n, a in kernels if n.endswith("/kernel")]
        if all(side == 1 for extent in sides for side in extent):
            return {}  # smaller networks have no smaller kernels
        for name, positions in self.space.choices.items():
            for value in {v for choices in positions for v in choices}:
                values = tuple(value if value in c else c[-1] for c in positions)
                networks.append(self.network(self.space.arch({name: values})))
        return subnetwork.kernel_sizes([self.shapes(n)["params"] for n in networks])

    def extract(
        self,
        arch: Arch,
        variables: Mapping[str, Any],
        transforms: subnetwork.Transforms | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (options of `models.make`, variables) of an architecture's network, with its part of the weights.

        Args:
          arch: the architecture.
          variables: {"params", "batch_stats"} of the network that holds the weights.
          transforms: matrices of the kernels, see `subnetwork.take`.
        """
        network = self.network(arch)
        shapes = self.shapes(network)
        large = {k: variables[k] for k in shapes}
        both = placements(self.holder().pieces), placements(network.pieces)
        return self.options(arch), subnetwork.take(large, shapes, transforms, both)
