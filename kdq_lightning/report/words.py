"""The words that a newcomer to the report doesn't know, each in a clause."""

from collections.abc import Sequence

from kdq_lightning.quantization.methods import CUSTOM_METHOD, DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.report.rows import Row, method_title

STRATEGIES = {
    "teacher": "the big network, trained on labels",
    "control": "the small network, trained on labels alone",
    "vanilla": "it learns from labels and the teacher's softened probabilities",
    "mixup": "it gives the teacher's answers to mixed images",
    "dkd": "decoupled distillation, which weighs the teacher's view of the right class and of the others apart",
    "hint": "it first imitates a middle layer of the teacher",
    "dml": "two small networks teach each other, without a teacher",
    "recover": "a quantized student whose scales, biases and BatchNorm learn from the teacher while its codes stay",
}
"""What each strategy does; one of a user's own has no entry."""

METHODS = {
    DEFAULT_METHOD: "this project's refinement of GPFQ, at most 2^b levels a weight at b bits",
    "gpfq": "the published algorithm, 2^b + 1 levels",
    MIXED_METHOD: "the default method with a bit width of its own for each layer, within a budget of bytes",
    CUSTOM_METHOD: "the default method with the user's solver or codebook",
}
"""What each method of quantizing is."""


def words(rows: Sequence[Row]) -> list[str]:
    """Return a sentence that explains the strategies of some rows, and one that explains their methods."""
    titles = {row.strategy: row.appearance.title for row in rows if row.strategy in STRATEGIES}
    strategies = [f"*{title}*: {STRATEGIES[name]}" for name, title in titles.items()]
    known = [method for method in METHODS if any(row.method == method for row in rows)]
    methods = [f"*{method_title(method)}*: {METHODS[method]}" for method in known]
    sentences = [f"**Strategies.** {'; '.join(strategies)}."] if strategies else []
    return sentences + ([f"**Methods of quantizing.** {'; '.join(methods)}."] if methods else [])
