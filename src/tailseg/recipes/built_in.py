"""The built-in recipes: a function each, one file a table."""

from collections.abc import Callable

from tailseg.recipes import small, table1, table2
from tailseg.recipes.schema import Recipe

BUILT_IN: dict[str, Callable[[], Recipe]] = {
    "table1/cross-entropy": table1.cross_entropy,
    "table1/eql": table1.eql,
    "table1/seesaw": table1.seesaw,
    **table2.rows("table2", table2.mask_rcnn),
    "table2/cascade-mask-rcnn": table2.cascade_mask_rcnn,
    "small/cross-entropy": small.cross_entropy,
    "small/seesaw": small.seesaw,
    "demo/cross-entropy": small.demo_cross_entropy,
    "demo/seesaw": small.demo_seesaw,
    **table2.rows("demo-table2", small.demo_mask_rcnn, small.DEMO_STEPS),
}
