"""How a real hub is shaped: lifetime downloads, versions, files, sizes.

Parameters are fitted to published figures of a large public hub.
"""

from math import exp, log
from random import Random
from typing import Final

# 85.6 % of models have fewer than 200 lifetime downloads; the top 1.5 % have 99.2 % of all. Without a
# limit one of 500 models could have more than all others together, which none of a hub has.
DOWNLOADS_MU: Final = 0.433
DOWNLOADS_SIGMA: Final = 4.58
MAX_DOWNLOADS: Final = 50_000_000
# Weights files, in bytes, nearly: p5 7 MB, p25 254 MB, p50 1.18 GB, p75 4.27 GB, p90 9.6 GB, p99 29 GB;
# the spread differs below and above the median.
WEIGHTS_MEDIAN: Final = 1.18e9
WEIGHTS_SIGMA_BELOW: Final = 2.6
WEIGHTS_SIGMA_ABOVE: Final = 1.6
MAX_WEIGHTS: Final = 500e9
# 83.5 % of models are hardly maintained, the others much more, up to thousands of versions.
CARELESS_SHARE: Final = 0.835
CARELESS_TAIL: Final = 1.6
CARING_SCALE: Final = 6
CARING_TAIL: Final = 1.2
MAX_VERSIONS: Final = 20_000  # there are longer ones: `--monsters` makes them when they are wanted
FILES_MEDIAN: Final = 9
FILES_SIGMA: Final = 0.6
MAX_FILES: Final = 100_000


def draw_downloads(random: Random) -> int:
    """Never quite MAX_DOWNLOADS, so that no two have the same because of it."""
    many = exp(random.gauss(DOWNLOADS_MU, DOWNLOADS_SIGMA))
    return int(many / (1 + many / MAX_DOWNLOADS))


def draw_weights_bytes(random: Random) -> int:
    deviation = random.gauss(0, 1)
    sigma = WEIGHTS_SIGMA_ABOVE if deviation > 0 else WEIGHTS_SIGMA_BELOW
    return int(min(MAX_WEIGHTS, WEIGHTS_MEDIAN * exp(deviation * sigma)))


def draw_versions(random: Random) -> int:
    """Versions of one model, at least 1; 7.2 on average."""
    if random.random() < CARELESS_SHARE:
        many = random.paretovariate(CARELESS_TAIL)
    else:
        many = CARING_SCALE * random.paretovariate(CARING_TAIL)
    return 1 + int(min(MAX_VERSIONS - 1, many - 1))


def draw_files(random: Random) -> int:
    """Files of one version, at least 1; 11 on average."""
    return 1 + min(MAX_FILES - 1, int(random.lognormvariate(log(FILES_MEDIAN), FILES_SIGMA)))


def draw_rank(random: Random, count: int) -> int:
    """A place among `count`, from 0, by Zipf's law: the second half as often as the first."""
    return min(count - 1, int((count + 1) ** random.random()) - 1)
