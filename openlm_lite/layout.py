"""Which rank does what: how many copies, shards, parts of a row and parts of a matrix there are.

    rank = ((replica * dp_shard + shard) * cp + part of the row) * tp + part of the matrices

    dp_replicate   copies of the model; gradients are added up over them       farthest apart
    dp_shard       each copy's weights lie in pieces, gathered when used
    cp             each row is cut; keys and values are gathered
    tp             each matrix is cut; activations are gathered, block by block     nearest

What talks most lies nearest: the ranks of a `tp` group are neighbours on one node. Along both dp
dimensions ranks read rows of their own; the cp x tp ranks of one row read the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openlm_lite.dist import World
from openlm_lite.errors import InputError

AUTO = -1


class Sizes(NamedTuple):
    """Ranks along each dimension; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that read rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_row(self) -> int:
        """Ranks that share the work on one row."""
        return self.cp * self.tp

    @property
    def shards(self) -> int:
        """Pieces that FSDP makes of a parameter: cp ranks have different tokens too."""
        return self.dp_shard * self.cp

    @property
    def addends(self) -> int:
        """Ranks whose gradients of one piece of a block's matrix are added up."""
        return self.dp_replicate * self.shards

    def describe(self) -> str:
        """The dimensions that are more than one rank, such as `dp_shard 2 x tp 2`."""
        named = zip(self._fields, self, strict=True)
        return " x ".join(f"{name} {size}" for name, size in named if size > 1)


@dataclass(frozen=True)
class LayoutConfig:
    """How the ranks are divided. One of the two dp sizes may be -1: all ranks that are left."""

    dp_replicate: int = 1
    """copies of the model (HSDP); -1: as many as the ranks make"""
    dp_shard: int = AUTO
    """ranks that share one copy's weights, gradients and optimizer state; -1: all that are left"""
    cp: int = 1
    """ranks that share each row: 2 cp tp has to divide data.seq_len"""
    tp: int = 1
    """ranks that share each matrix of the blocks: divides n_heads, n_kv_heads and d_ff"""

    def __post_init__(self) -> None:
        found = [
            f"{name} = {getattr(self, name)}, must be at least 1 (or -1: all ranks that are left)"
            for name in ("dp_replicate", "dp_shard")
            if getattr(self, name) < 1 and getattr(self, name) != AUTO
        ]
        found += [
            f"{name} = {getattr(self, name)}, must be at least 1"
            for name in ("cp", "tp")
            if getattr(self, name) < 1
        ]
        if self.dp_replicate == AUTO == self.dp_shard:
            found.append("dp_replicate and dp_shard are both -1: give one of them")
        if found:
            raise InputError("parallel: " + "; ".join(found))

    @property
    def least_ranks(self) -> int:
        """The fewest ranks that the layout allows."""
        given = (self.dp_replicate, self.dp_shard, self.cp, self.tp)
        return math.prod(size for size in given if size != AUTO)

    def sizes(self, world_size: int) -> Sizes:
        """The layout on `world_size` ranks. Raises InputError where it does not fit them."""
        given = Sizes(self.dp_replicate, self.dp_shard, self.cp, self.tp)
        known = self.least_ranks
        named = zip(given._fields, given, strict=True)
        product = " x ".join(f"{name} {size}" for name, size in named if size != AUTO)
        if AUTO in given:
            if world_size % known:
                raise InputError(
                    f"parallel: {product} = {known} does not divide the {world_size} ranks; "
                    f"change one of these sizes, or start a multiple of {known} ranks"
                )
            return Sizes(*(world_size // known if size == AUTO else size for size in given))
        if known != world_size:
            raise InputError(
                f"parallel: {product} = {known}, but there are {world_size} ranks; start {known} "
                "ranks, or set parallel.dp_shard=-1 (all that are left)"
            )
        return given


@dataclass(frozen=True)
class Layout:
    """This rank's place in the layout, and the meshes over which tensors are laid out."""

    sizes: Sizes
    rank: int
    blocks: DeviceMesh
    """of the blocks' parameters, for FSDP: one dimension, or replicas x shards"""
    tables: DeviceMesh
    """of all other parameters: with tp, the ranks of a tp group are shards like the others"""
    tp: DeviceMesh | None
    """of this rank's tp group; None without"""
    cp: DeviceMesh | None

    @property
    def data_rank(self) -> int:
        """Whose rows this rank reads, of `sizes.data_ranks`."""
        return self.rank // self.sizes.ranks_per_row


def build_layout(cfg: LayoutConfig, world: World) -> Layout:
    """The meshes of `cfg` on the ranks of the process group; collective."""
    sizes, device = cfg.sizes(world.world_size), world.device.type
    copies, names = (sizes.dp_replicate,), ("dp_replicate",)
    if sizes.dp_replicate == 1:
        copies, names = (), ()
    if sizes.tp == 1:
        blocks = init_device_mesh(
            device, (*copies, sizes.shards), mesh_dim_names=(*names, "dp_shard")
        )
        tables, tp = blocks, None
    else:
        whole = init_device_mesh(
            device, (*copies, sizes.shards, sizes.tp), mesh_dim_names=(*names, "dp_shard", "tp")
        )
        blocks, tp = whole[(*names, "dp_shard")], whole["tp"]
        tables = init_device_mesh(
            device, (*copies, sizes.shards * sizes.tp), mesh_dim_names=(*names, "dp_shard_tp")
        )
    cp = None
    if sizes.cp > 1:
        shape = (sizes.data_ranks, sizes.cp, sizes.tp)
        cp = init_device_mesh(device, shape, mesh_dim_names=("dp", "cp", "tp"))["cp"]
    return Layout(sizes, world.rank, blocks, tables, tp, cp)
