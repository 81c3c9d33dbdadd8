"""The table of models. Each module stands on torch alone; a builder takes what the data decides.

CLASSIFIERS[name](channels=, image_size=, classes=, **options) -> nn.Module: (n, channels, s, s) float -> (n, classes)
GANS[name](channels=, image_size=, classes=, **options) -> (generator, discriminator)
"""

from pipeline.models.cnn import CNN
from pipeline.models.gan import conditional_gan

CLASSIFIERS = {"cnn": CNN}
GANS = {"dcgan": conditional_gan}
