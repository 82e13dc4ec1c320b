"""How good generated images are: features, distances between sets of them, a report.

features.py     what images are compared by, with a name for the reports
random_conv.py, classifier.py    two kinds of features
batches.py      networks on any number of images
frechet.py      the Frechet distance, and statistics of real data in a file
distances.py    KID, MMD, energy distance, sliced Wasserstein
neighbours.py   precision, recall, density, coverage
class_score.py  how sure and how diverse a classifier finds images
pairs.py        checks, and pairs of features in blocks
report.py       all of them, as JSON and as a table

Numbers of features other than Inception's are never called FID.
"""

from .class_score import class_score
from .classifier import Classifier, load as load_classifier
from .distances import (
    Estimate,
    energy_distance,
    kid,
    kid_of_subsets,
    mmd2_rbf,
    sliced_wasserstein,
)
from .features import (
    FeatureExtractor,
    Features,
    classifier_features,
    from_file,
    make_extractor,
    pca,
    pixels,
    random_conv_features,
)
from .frechet import (
    Statistics,
    frechet_distance,
    frechet_of_statistics,
    load_statistics,
    save_statistics,
    statistics,
)
from .neighbours import Neighbours, neighbour_metrics
from .report import evaluate, table

__all__ = [
    "Classifier",
    "Estimate",
    "FeatureExtractor",
    "Features",
    "Neighbours",
    "Statistics",
    "class_score",
    "classifier_features",
    "energy_distance",
    "evaluate",
    "frechet_distance",
    "frechet_of_statistics",
    "from_file",
    "kid",
    "kid_of_subsets",
    "load_classifier",
    "load_statistics",
    "make_extractor",
    "mmd2_rbf",
    "neighbour_metrics",
    "pca",
    "pixels",
    "random_conv_features",
    "save_statistics",
    "sliced_wasserstein",
    "statistics",
    "table",
]
