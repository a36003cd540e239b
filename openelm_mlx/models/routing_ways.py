"""How rows meet the experts that they chose: the ways there are, and which one is taken. Without arrays.

All give the same sums. What they cost depends on how often an expert's weights are read and unpacked:

- unsorted: once for each route, a (row, expert) pair. The fewest steps: the best for one row.
- sorted: the routes in the order of their experts; from some routes an expert on MLX multiplies them by tiles. For many.
- grouped: every row through every expert, all in one batch, of which the chosen outputs are taken: nothing is to be placed.
- blocks_16, blocks_32: the routes of each expert side by side in blocks of so many, an expert having as many blocks as it
  needs.

Shapes decide alone. Nothing is asked of the host: an expert has at most one route from each row, and however the routes
fall, the blocks are no more than `num_groups` says.
"""

from __future__ import annotations

import itertools

# (First number of rows, way), rising from 1 row on.
ExpertWays = tuple[tuple[int, str], ...]

UNSORTED, SORTED, GROUPED = "unsorted", "sorted", "grouped"
WAYS = (UNSORTED, SORTED, GROUPED, "blocks_16", "blocks_32")
# Where experts are in MXFP4: a kernel of our own, which reads each expert once (models/expert_kernel.py). It is in no table.
KERNEL = "kernel"

# What holds where nobody has measured, and for MLX's CUDA backend (`precision.default_choices`).
BY_SORTING: ExpertWays = ((1, UNSORTED), (16, SORTED))
IN_BLOCKS: ExpertWays = ((1, UNSORTED), (16, GROUPED), (17, "blocks_16"))
# As far as the kernel is faster than those ways on MLX's CUDA backend, for one row too (docs/LOG.md).
KERNEL_ROWS_ON_CUDA = (1, 64)

# What a row of the table is: gpt-oss takes four experts a token. Fewer a token count as fewer rows.
ROUTES_A_ROW = 4
# As far as a table speaks, 128 rows. More routes are sorted whatever it says: that is a prompt, and places for padding
# would be memory for nothing.
MOST_ROUTES_OF_A_TABLE = 512
# So many (token, expert) routes are many: no constants are kept for their number, and tiles may be worth it. Only shapes
# decide, so that the same prompt always takes the same way.
SORT_FROM_ROUTES = 64
# From so many sorted rows an expert of the array it is given, MLX multiplies by tiles instead of row by row, and rounds in
# another order (metal/quantized.cpp, GatherQMM::eval_gpu, 0.32.4). Who has fewer experts in the array must not get there
# earlier: the promise that slots are sorted, without which no tiles are used, is given by `uses_tiles` alone.
TILE_FROM_ROWS = 4
# The most rows for which every expert gets as many places as there are rows.
MOST_ROWS_GROUPED = 32
# Groups have to be fewer than routes by this much: each is one reading of an expert, and making them costs some kernels.
FEWER_GROUPS = 0.75


def way_for(num_rows: int, experts_per_token: int, num_experts: int, ways: ExpertWays) -> str:
    """The way that `ways` has for so many rows of a layer: one of WAYS.

    ways: `KernelChoices.expert_ways`. The last entry counts that has begun by then and suits the layer: groups do not
    where they would be nearly as many as the routes, as for few rows of very many experts.
    """
    routes = num_rows * experts_per_token
    if routes > MOST_ROUTES_OF_A_TABLE:
        return SORTED
    for first, way in reversed(ways):
        if routes >= first * ROUTES_A_ROW and _suits(way, num_rows, routes, num_experts):
            return way
    return UNSORTED


def takes_kernel(num_rows: int, experts_per_token: int, kernel_rows: tuple[int, int]) -> bool:
    """Whether so many rows go by `KERNEL`, where it can be had. kernel_rows: `KernelChoices.expert_kernel_rows`."""
    first, last = kernel_rows
    routes = num_rows * experts_per_token
    return first * ROUTES_A_ROW <= routes <= min(last * ROUTES_A_ROW, MOST_ROUTES_OF_A_TABLE) and last > 0


def _suits(way: str, num_rows: int, routes: int, num_experts: int) -> bool:
    if way in (UNSORTED, SORTED):
        return True
    if way == GROUPED and num_rows > MOST_ROWS_GROUPED:
        return False
    return num_groups(way, num_rows, routes, num_experts) <= FEWER_GROUPS * routes


def uses_tiles(num_routes: int, num_experts: int) -> bool:
    """Whether so many (token, expert) routes of a layer with so many experts are multiplied by tiles.

    num_experts: the model's, however many of them are in memory.
    """
    return num_routes >= fewest_rows(num_experts)


def fewest_rows(num_slots: int) -> int:
    """With how many rows at least MLX multiplies by tiles where so many experts are in memory: a block of fewer is filled."""
    return max(SORT_FROM_ROUTES, TILE_FROM_ROWS * num_slots)


def rows_at_once(num_routes: int, num_experts: int, num_slots: int) -> int:
    """How many rows of so many routes are computed at once, at most, where experts are read from disk in blocks.

    What half of the slots have if all experts are chosen as often: tokens that all want the same few experts would take as
    much memory as if all experts were there.
    """
    share = -(-num_routes * max(1, num_slots // 2) // num_experts)
    return max(share, fewest_rows(num_slots))


def most_blocks(num_routes: int, num_experts: int, num_slots: int) -> int:
    """How many blocks of experts so many routes are computed in, at most, where experts are read from disk.

    Two blocks fit into the slots; experts that are there and those that are not are apart (experts/slots.py, `blocks_of`).
    """
    size = max(1, num_slots // 2)
    return -(-min(num_experts, num_routes) // size) + (size > 1)


def most_places_by_blocks(
    num_rows: int, experts_per_token: int, num_experts: int, num_slots: int, ways: ExpertWays
) -> int:
    """As `most_places` where experts are read from disk: each block of them is filled up by itself.

    With tiles to the rows that MLX has tiles from, in groups of every slot to the places of all rows (experts/modules.py).
    """
    found = most_places(num_rows, experts_per_token, num_experts, ways)
    for n in {num_rows, *range(1, min(num_rows, MOST_ROWS_GROUPED) + 1)}:
        routes, way = n * experts_per_token, way_for(n, experts_per_token, num_experts, ways)
        blocks = most_blocks(routes, num_experts, num_slots)
        if way == GROUPED:
            found = max(found, blocks * num_slots * rows_in_a_group(way, n))
        elif way == SORTED and uses_tiles(routes, num_experts):
            found = max(found, routes + blocks * (fewest_rows(num_slots) - 1))
    return found


def most_places(num_rows: int, experts_per_token: int, num_experts: int, ways: ExpertWays) -> int:
    """The most rows that so many rows, or fewer, become on their way through the experts, padding included."""
    found = num_rows * experts_per_token
    for n in range(1, min(num_rows, MOST_ROUTES_OF_A_TABLE // experts_per_token) + 1):
        way = way_for(n, experts_per_token, num_experts, ways)
        if way not in (UNSORTED, SORTED):
            groups = num_groups(way, n, n * experts_per_token, num_experts)
            found = max(found, groups * rows_in_a_group(way, n))
    return found


def is_checked(ways: object) -> bool:
    """Whether `ways` is a table: pairs (first number of rows, way), the first from 1 row on, the numbers rising."""
    if not isinstance(ways, list | tuple) or not ways:
        return False
    pairs = [each for each in ways if isinstance(each, list | tuple) and len(each) == 2]
    if len(pairs) < len(ways) or not all(type(first) is int and way in WAYS for first, way in pairs):
        return False
    firsts = [first for first, _ in pairs]
    return firsts[0] == 1 and all(a < b for a, b in itertools.pairwise(firsts))


def is_range(kernel_rows: object) -> bool:
    """Whether this is from and to how many rows a kernel is taken, or (0, 0)."""
    if not isinstance(kernel_rows, list | tuple) or [type(each) for each in kernel_rows] != [int, int]:
        return False
    first, last = kernel_rows
    return first == last == 0 or 1 <= first <= last


def rows_in_a_group(way: str, num_rows: int) -> int:
    """How many places a group has."""
    if way == GROUPED:
        return 1 << (num_rows - 1).bit_length()  # a power of two: few shapes
    return int(way.removeprefix("blocks_"))


def num_groups(way: str, num_rows: int, routes: int, num_experts: int) -> int:
    """How many groups there are, whatever was chosen: each expert's last block is the only one that may be partly empty."""
    if way == GROUPED:
        return num_experts
    used, places = min(num_experts, routes), rows_in_a_group(way, num_rows)
    return min(used * -(-num_rows // places), used + (routes - used) // places)
