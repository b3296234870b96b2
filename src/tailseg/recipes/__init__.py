"""The built-in recipes: a function each, one file a table."""

from collections.abc import Callable

from tailseg.recipe import Recipe
from tailseg.recipes import small, table1

BUILT_IN: dict[str, Callable[[], Recipe]] = {
    "table1/cross-entropy": table1.cross_entropy,
    "table1/eql": table1.eql,
    "table1/seesaw": table1.seesaw,
    "small/cross-entropy": small.cross_entropy,
    "small/seesaw": small.seesaw,
    "demo/cross-entropy": small.demo_cross_entropy,
    "demo/seesaw": small.demo_seesaw,
}
